"""Adversarial fine-tuning of causal language models by TRL: `SFTTrainer` that plays a game.

SFTTrainer computes its loss without the logits. Solvers that compare predictions need them, and get
the loss and the logits of the model itself: the same loss, without SFTTrainer's metrics.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

try:
    from trl import SFTTrainer  # pyright: ignore
except ImportError as error:
    raise ImportError("mixadv.integrations.trl needs trl: pip install 'mixadv[trl]'.") from error

from mixadv.integrations.transformers import Adversarial, Trainer
from mixadv.model.modules import base_of


class AdversarialSFTTrainer(Adversarial, SFTTrainer):
    """`trl.SFTTrainer` that plays a game; see `mixadv.integrations.transformers.Adversarial`.

    δ acts on the tokens of prompts too, which the model reads; the loss is that of the completion.
    `where=` names a column of the batch that is 1 where δ may act, such as on prompts alone, or is
    a function of the call. A divergence is the mean over all real tokens. SFTTrainer's metrics are
    means over the passes.

    Raises:
        ValueError: for a solver that compares predictions where the loss is not the likelihood.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        kind = getattr(self.args, "loss_type", "nll")
        if self.solver.compares is not None and kind != "nll":
            raise ValueError(
                f"{type(self.solver).__name__} compares logits, which SFTTrainer does not compute "
                f"for loss_type={kind!r}: choose 'nll', or a solver that needs the "
                "loss alone, such as mixadv.FreeLB()."
            )

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        """Play a round in training, in which a batch's tokens are counted once."""
        self._counted = self._total_train_tokens
        return super().compute_loss(*arguments, **keywords)

    def forward_pass(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, outputs: bool
    ) -> tuple[Tensor, Any]:
        """Run one pass; the arguments are those of `Adversarial.forward_pass`."""
        # Where SFTTrainer computes the loss from logits, it runs the model again for its metrics.
        if outputs or self.compute_loss_func is not None or self.label_smoother is not None:
            own = self.compute_loss_func is None and self.label_smoother is None
            if own and self.aux_loss_enabled:
                inputs = {**inputs, "output_router_logits": True}
            found: Any = Trainer.compute_loss(self, model, inputs, True, items)
            loss, result = found
            if own and self.aux_loss_enabled:
                loss = loss - self._more_of_auxiliary(items) * result["aux_loss"]
            return loss, result
        self._total_train_tokens = self._counted
        return super().forward_pass(model, inputs, items, False)

    def _more_of_auxiliary(self, items: Tensor | int | None) -> float:
        """Return how much more of the load-balancing loss of experts Trainer adds than SFTTrainer.

        SFTTrainer averages it over micro-batches, where the rest is divided by the items of them
        all, by the coefficient of its arguments; Trainer adds it whole, by the one that the model
        was made with, and multiplies both by the number of processes.
        """
        across = items is not None and self.args.average_tokens_across_devices
        base = base_of(self.accelerator.unwrap_model(self.model))
        added = getattr(base, "router_aux_loss_coef", self.router_aux_loss_coef)
        added *= self.accelerator.num_processes if across else 1
        steps = 1 if items is None else self.current_gradient_accumulation_steps
        return added - self.router_aux_loss_coef / steps
