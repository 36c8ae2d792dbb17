"""What the Trainers of sentence-transformers have in common: losses that return one number.

What solvers compare are the scores that the loss is about, computed from what the loss itself asked
the model for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

try:
    from sentence_transformers.base.losses import column_merging_disabled, uses_gradient_cache
    from sentence_transformers.sentence_transformer import losses
except ImportError as error:
    raise ImportError(
        "mixadv.integrations.sentence_transformers and cross_encoder need sentence-transformers: "
        "pip install 'mixadv[sentence-transformers]'."
    ) from error

from mixadv.integrations.transformers import Adversarial


class Scored(Adversarial):
    """What Trainers of sentence-transformers have in common: a loss, and scores beside it."""

    returns = "sentence_embedding"
    """The name by which the model returns what scores are computed from."""
    loss: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if self.solver.weighs:
            raise ValueError(
                f"{type(self.solver).__name__} weighs the rows of a batch by their losses, and "
                "losses of sentence-transformers return one for all: write a loop around "
                "optimizer.step(closure) with one loss per row, or choose another solver."
            )
        for name, column in {"where": self.where, "groups": self.groups}.items():
            if isinstance(column, str):
                raise ValueError(
                    f"{name}={column!r} names a column, and sentence-transformers takes columns "
                    "for texts: give where= a function of the call."
                )
        for loss in self.loss.values() if isinstance(self.loss, dict) else [self.loss]:
            self.check_loss(loss)

    def check_loss(self, loss: nn.Module) -> None:
        """Raise ValueError for a loss that cannot be played, or not by the solver."""
        for part in nested(loss):
            _check_whole(part)
        who, kind, learner = type(self.solver).__name__, type(loss).__name__, self.solver.learner()
        own = {id(p) for p in self.model.parameters()}  # pyright: ignore
        beside = [p for p in loss.parameters() if id(p) not in own and p.requires_grad]
        if not beside or learner is None:
            return
        guided = any(isinstance(part, losses.GISTEmbedLoss) for part in nested(loss))
        if guided or learner.ema_decay is not None or learner.keeps_samples:
            raise ValueError(
                f"{who} moves or averages the weights by itself, and {kind} holds {len(beside)} "
                "that are not the model's: freeze them where they are not to be trained, as by "
                "guide.requires_grad_(False), or choose a solver that leaves the weights to the "
                "optimizer, such as mixadv.ALUM()."
            )

    def forward_pass(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, outputs: bool
    ) -> tuple[Tensor, Any]:
        """Run one pass; the arguments are those of `Adversarial.forward_pass`."""
        # A call per column, so that row b of each is sample b to what is weighed or compared.
        apart = outputs or self.solver.reads is not None
        with column_merging_disabled() if apart else nullcontext():
            if not outputs:
                return super().forward_pass(model, inputs, items, False)
            found: list[Tensor] = []
            hook = model.register_forward_hook(
                lambda *called: found.append(called[-1][self.returns])
            )
            try:
                loss, _ = super().forward_pass(model, dict(inputs), items, False)
            finally:
                hook.remove()
        kind = self.loss[inputs["dataset_name"]] if isinstance(self.loss, dict) else self.loss
        return loss, self.predictions(kind, inputs, found)

    def predictions(
        self, loss: nn.Module, inputs: dict[str, Any], found: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return what solvers compare, by the names that a model's output has.

        Args:
            loss: of the data set that the batch is of.
            inputs: the batch.
            found: what each call of the model returned in the pass, in their order.
        """
        raise NotImplementedError


def nested(loss: nn.Module) -> list[nn.Module]:
    """Return a loss and those within, from outside in, as of `MatryoshkaLoss`."""
    inner = getattr(loss, "loss", None)
    return [loss, *nested(inner)] if isinstance(inner, nn.Module) else [loss]


def _check_whole(loss: nn.Module) -> None:
    """Raise ValueError for a loss that embeds its batch in parts, or that of other processes."""
    kind = type(loss).__name__
    if uses_gradient_cache(loss) and not isinstance(loss, losses.MatryoshkaLoss):  # says its inner
        other = kind.removeprefix("Cached")
        if isinstance(loss, losses.MegaBatchMarginLoss):
            other = "MegaBatchMarginLoss(model, use_mini_batched_version=False)"
        raise ValueError(
            f"{kind} embeds under no_grad and again in its backward, where the adversary gets "
            f"no gradient: use {other}, with gradient_checkpointing=True where memory is short."
        )
    if getattr(loss, "gather_across_devices", False):
        raise ValueError(
            "gather_across_devices=True is not tested under a round, whose passes would gather "
            "embeddings each: leave it out, and negatives are those of one process."
        )
