"""What the mixin of `mixadv.integrations.transformers` needs of Trainer besides."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from mixadv.errors import GameError
from mixadv.optimizer import GameOptimizer

if TYPE_CHECKING:
    from mixadv.integrations.transformers import Adversarial


class Zeroing(TrainerCallback):
    """Zeroes the gradients of what the solver trains: Trainer does so for its model alone.

    Before a step, since loss scaling may skip the last one and its gradients that are not finite.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Zero them."""
        for module in self.modules:
            module.zero_grad()


class Playing(TrainerCallback):
    """Raises before an optimizer step for which no round was played."""

    def __init__(self, trainer: Adversarial) -> None:
        self.trainer = weakref.ref(trainer)
        self.round = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Note the rounds so far, of a game that may be new."""
        trainer = self.trainer()
        self.round = 0 if trainer is None else trainer.game.round

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Compare the number of rounds with that before the last step."""
        trainer = self.trainer()
        if trainer is None:
            return
        if trainer.game.round == self.round:
            raise GameError(
                f"No round was played since the last optimizer step: {type(trainer).__name__} "
                "computes its loss past compute_loss of the mixin. Override forward_pass, or put "
                "the loss in a Trainer that the mixin is named before."
            )
        self.round = trainer.game.round


def wrapped(optimizer: Any) -> GameOptimizer | None:
    """Return the game's optimizer inside Accelerate's."""
    while optimizer is not None and not isinstance(optimizer, GameOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def refuse(trainer: Adversarial) -> None:
    """Raise for what a Trainer can do and a game cannot."""
    who, args = type(trainer.solver).__name__, trainer.args
    if trainer.solver.replays_batch:
        raise ValueError(
            f"{who} takes an optimizer step after each of its passes over one batch, and Trainer "
            "takes one step per batch: write a loop around optimizer.step(closure) of the wrapped "
            "optimizer, or choose another solver."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Trainer sees {args.n_gpu} GPUs in one process and would use torch.nn.DataParallel, "
            "whose replicas would not receive δ: start it with torchrun."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "DeepSpeed and FSDP own the gradients that a round computes before the loss is "
            "returned: train with DistributedDataParallel (torchrun), or call game.backward in a "
            "loop of your own."
        )
    if args.ddp_static_graph:
        raise ValueError(
            "ddp_static_graph=True expects one forward and backward per step; under a round the "
            "replicas drift apart. Leave it out."
        )
    if trainer.averages and args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            f"{who} is evaluated at the average of its weights, which is saved with the optimizer: "
            "with load_best_model_at_end set save_only_model=False, or evaluate_average=False."
        )
