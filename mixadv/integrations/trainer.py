"""What the mixin of `mixadv.integrations.transformers` needs of Trainer besides."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.model import parallel
from mixadv.model.contexts import no_grad
from mixadv.model.replay import Replay
from mixadv.optimizer import GameOptimizer
from mixadv.solvers.base import Solver


class Plays(Protocol):
    """A Trainer that plays a game."""

    @property
    def game(self) -> Game:
        """The game, once training has begun."""
        ...


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

    def __init__(self, trainer: Plays) -> None:
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


def check_playable(trainer: Trainer, solver: Solver, averages: bool) -> None:
    """Raise ValueError for what a Trainer can do and a game cannot."""
    who, args = type(solver).__name__, trainer.args
    if solver.replays_batch:
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
    if averages and args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            f"{who} is evaluated at the average of its weights, which is saved with the optimizer: "
            "with load_best_model_at_end set save_only_model=False, or evaluate_average=False."
        )


class Share:
    """How large the loss of a micro-batch is beside its own mean over all processes.

    Trainer has the losses of micro-batches divided by the items of them all, or divides by their
    number itself; it multiplies by the number of processes, whose mean is taken afterwards.
    """

    def __init__(self) -> None:
        self.divides: bool | None = None  # the loss by the number of items, where that is known

    def of_mean(
        self, trainer: Trainer, inputs: dict[str, Any], items: Any, loss: Callable[[Any], Tensor]
    ) -> Tensor | float:
        """Return the share of a micro-batch.

        Args:
            trainer: which asks for it.
            inputs: the micro-batch.
            items: the number that Trainer tells of all that are accumulated, if it does.
            loss: `loss(items)` runs the model on the micro-batch, told of so many.
        """
        steps = trainer.current_gradient_accumulation_steps
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # Trainer's rule
        if scaled is None:
            by_model = trainer.model_accepts_loss_kwargs and items is not None
            scaled = by_model or trainer.compute_loss_func is not None
        processes = trainer.accelerator.num_processes
        if not (trainer.args.average_tokens_across_devices and scaled and items is not None):
            processes = 1
        if steps * processes == 1 or not scaled:
            return 1.0
        if items is None:
            return 1 / steps
        if self.divides is False:  # on all processes, so that none waits below for the others
            return float(processes)
        own = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        if own is None:
            return 1 / steps
        if not self._find_out(trainer, items, loss):
            return float(processes)
        return torch.as_tensor(own).clamp(min=1) / items

    def _find_out(self, trainer: Trainer, items: Any, loss: Callable[[Any], Tensor]) -> bool:
        """Return whether the loss is divided by the number of items it is told.

        Many models return the mean whatever they are told, and Trainer adds up the means. Asked of
        the model once, whose random state and buffers are put back.
        """
        if self.divides is not None:
            return self.divides
        model: Any = trainer.model
        losses, replay = [], Replay(model)
        for count in (items, 2 * items):
            with replay.run(), no_grad():
                losses.append(loss(count).detach())
        replay.undo()
        divides = float(losses[1].abs()) < 0.75 * float(losses[0].abs())
        # A loss of 0, where nothing is labelled, says nothing; all processes have to know, for
        # those that ask again run the model again.
        if parallel.agreed(float(losses[0]) != 0, losses[0]):
            self.divides = divides
        return divides
