"""Adversarial training inside `transformers.Trainer`: the game takes the place of the loss.

    class MyTrainer(Adversarial, SomeTrainer): ...

`compute_loss` returns `game.loss`, whose backward delivers the round's whole gradient, so Trainer's
own accumulation, loss scaling, clipping, logging and distribution act on it as on any loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from mixadv.game import Game
from mixadv.optimizer import GameOptimizer, wrap
from mixadv.solvers.base import Solver

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class Adversarial(Base):
    """Mixin that makes any subclass of `Trainer` play a game; name it before the Trainer.

    Per batch one round is played and one optimizer step follows: a MAT round closes every
    `learner_steps` optimizer steps, over successive batches. Evaluation and prediction run at the
    average of the learner where the solver keeps one. Checkpoints hold the live weights, which a
    resumed run goes on from, and the game's state with the optimizer's; to export the average:

        with trainer.game.averaged():
            trainer.save_model("exported")

    Args:
        solver: how a round is played; not FreeAT, whose steps within a batch Trainer cannot take.
        site: where δ acts; None finds the input embedding that the encoder calls.
        evaluate_average: evaluate the learner's average, where there is one.
        arguments: of the Trainer.

    Raises:
        ValueError: if `load_best_model_at_end` would choose by the average and load the live
            weights.
    """

    loss_is_scaled_for_ga = False  # see compute_loss

    def __init__(
        self,
        *arguments: Any,
        solver: Solver,
        site: Any = None,
        evaluate_average: bool = True,
        **keywords: Any,
    ) -> None:
        self.solver, self.site, self.evaluate_average = solver, site, evaluate_average
        super().__init__(*arguments, **keywords)
        learner = solver.learner()
        keeps = learner is not None and learner.average_decay is not None
        if keeps and evaluate_average and self.args.load_best_model_at_end:
            raise ValueError(
                f"{type(solver).__name__} is evaluated at the average of its weights, and "
                "load_best_model_at_end loads the live ones: set evaluate_average=False, or leave "
                "load_best_model_at_end out and export the average with trainer.game.averaged()."
            )

    @property
    def game(self) -> Game:
        """The game, once training has begun."""
        optimizer = self.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        if not isinstance(optimizer, GameOptimizer):
            raise AttributeError("The game is made with the optimizer, when training begins.")
        return optimizer.game

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer and wrap it."""
        made = super().create_optimizer() if model is None else super().create_optimizer(model)
        if not isinstance(made, GameOptimizer):
            played = self.model if model is None else model
            made = wrap(made, played, self.solver, site=self.site, seed=self.args.seed)  # pyright: ignore
        self.optimizer = made
        return made

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Play a round in training; the Trainer's own loss elsewhere.

        A loss summed over the accumulated batch is turned into one of this micro-batch, of the
        scale of a mean: the divergences that a solver adds are means too, and Trainer divides
        the whole by the number of micro-batches.
        """
        plain = super().compute_loss
        if not (model.training and torch.is_grad_enabled()):
            return plain(model, inputs, return_outputs, num_items_in_batch)
        scale = self.current_gradient_accumulation_steps if self._summed(num_items_in_batch) else 1
        outputs = None

        def closure() -> tuple[Tensor, Any]:
            nonlocal outputs
            found, outputs = plain(model, dict(inputs), True, num_items_in_batch)
            logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[1]
            return found * scale if scale != 1 else found, logits

        loss = self.game.loss(closure)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log the round's numbers beside the training loss, which is the objective."""
        if "loss" in logs and isinstance(getattr(self, "optimizer", None), torch.optim.Optimizer):
            outcome = self.game.outcome
            found = {} if outcome is None else outcome.as_dict()
            for name in ("loss", "payoff", "radius", "entropy", "nonfinite"):
                if found.get(name) is not None:
                    logs["clean_loss" if name == "loss" else name] = float(found[name])
        super().log(logs, *arguments, **keywords)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """Evaluate, at the learner's average where there is one."""
        try:
            learner = self.game.learner
        except AttributeError:  # no training yet
            learner = None
        if learner is None or not self.evaluate_average or not learner.average:
            return super().evaluation_loop(*arguments, **keywords)
        with self.game.averaged():
            return super().evaluation_loop(*arguments, **keywords)

    def _summed(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Return whether the Trainer's loss is one share of the accumulated batch's."""
        own = super().loss_is_scaled_for_ga
        if own is not None:
            return own
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None


class AdversarialTrainer(Adversarial, Trainer):
    """`transformers.Trainer` that plays a game; see `Adversarial`."""
