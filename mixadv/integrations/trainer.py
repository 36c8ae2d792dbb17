"""What the mixin of `mixadv.integrations.transformers` needs of Trainer besides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.model import parallel
from mixadv.model.contexts import no_grad
from mixadv.model.modules import base_of
from mixadv.model.replay import Replay
from mixadv.model.walk import modules
from mixadv.optimizer import GameOptimizer
from mixadv.round.outcome import Outcome
from mixadv.solvers.base import Solver

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

_ROWS = ("worst_group", "worst_group_weight", "effective_rows")
_PLAYED = ("clean_loss", "payoff", "radius", "effective_particles", "nonfinite", *_ROWS)
LOGGED = {name: name for name in _PLAYED}
LOGGED["entropy"] = "strategy_entropy"
"""Trainer's names for what a round comes to, by those of `Outcome`."""


class Rounds(TrainerCallback):
    """Asks for a round before each optimizer step, and zeroes gradients beside the model's.

    Trainer zeroes those of its model alone. What the solver trains is zeroed before a step: loss
    scaling may skip the last one, and its gradients are not finite.

    Attributes:
        alone: the game, where no optimizer holds it.
    """

    def __init__(self, who: str, modules: Iterable[nn.Module]) -> None:
        self.who, self.modules = who, modules
        self.played = 0
        self.alone: Game | None = None

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Note the rounds so far, of a game that may be new."""
        self.played = self.game_of(optimizer).round

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Zero the gradients of what the solver trains."""
        for module in self.modules:
            module.zero_grad()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Compare the number of rounds with that before the last step."""
        played = self.game_of(optimizer).round
        if played == self.played:
            raise GameError(
                f"No round was played since the last optimizer step: {self.who} computes its loss "
                "past compute_loss of the mixin. Override forward_pass, or put the loss in a "
                "Trainer that the mixin is named before."
            )
        self.played = played

    def game_of(self, optimizer: Any) -> Game:
        """Return the game that is played: alone, or with an optimizer."""
        made = self.alone or wrapped(optimizer)
        if made is None:
            raise GameError("The game is made with the optimizer, when training begins.")
        return made if isinstance(made, Game) else made.game


def wrapped(optimizer: Any) -> GameOptimizer | None:
    """Return the game's optimizer inside Accelerate's."""
    while optimizer is not None and not isinstance(optimizer, GameOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def logged(outcome: Outcome) -> dict[str, float]:
    """Return what a round came to, by Trainer's names."""
    found = outcome.as_dict()
    return {LOGGED[k]: float(v) for k, v in found.items() if k in LOGGED and v is not None}


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
    if getattr(args, "ddp_static_graph", False):  # which transformers 4 has not
        raise ValueError(
            "ddp_static_graph=True expects one forward and backward per step; under a round the "
            "replicas drift apart. Leave it out."
        )
    layout = getattr(trainer.accelerator, "parallelism_config", None)
    if any(getattr(layout, size, 1) > 1 for size in ("cp_size", "sp_size")):
        raise ValueError(
            "Context and sequence parallelism give a process a part of each text: it would draw δ "
            "for that part alone, in a ball of its own. Leave cp_size and sp_size at 1 in the "
            "ParallelismConfig, and shard by processes, with fsdp=True or dp_shard_size."
        )
    if solver.modules() and args.max_grad_norm and not hasattr(Trainer, "_clip_grad_norm"):
        raise ValueError(
            f"{who} trains a module beside the model, and this version of transformers would clip "
            "the gradients of the model alone: set max_grad_norm=0, or install a newer one."
        )
    if averages and args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            f"{who} is evaluated at the average of its weights, which is saved with the optimizer: "
            "with load_best_model_at_end set save_only_model=False, or evaluate_average=False."
        )


def check_columns(where: Any, groups: Any, model: nn.Module) -> None:
    """Raise TypeError or ValueError for what names no column that is the game's own."""
    if not (where is None or isinstance(where, str) or callable(where)):
        raise TypeError(
            "where must be the name of a column of the batch or a function of the call, got "
            f"{type(where).__name__}: a mask belongs to one batch, so put it into the data set."
        )
    if not (groups is None or isinstance(groups, str)):
        raise TypeError(
            "groups must be the name of a column of the batch that numbers the group of each row, "
            f"got {type(groups).__name__}: put it into the data set."
        )
    both = (model, base_of(model))  # PEFT hides arguments
    taken = {name for m in both for name in inspect.signature(m.forward).parameters}
    for name, column in {"where": where, "groups": groups}.items():
        if isinstance(column, str) and column in taken:
            raise ValueError(
                f"{name}={column!r} is an argument of the model, which would not get it: put a "
                f"copy into the data set under a name of its own, such as {name!r}."
            )


class OwnColumns(Base):
    """Keeps columns of the data that are the game's own, and from the model."""

    where: Any
    groups: str | None

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Predict without the columns that are the game's own."""
        return super().prediction_step(model, self._for_model(inputs), *arguments, **keywords)

    def _for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        own = (self.where, self.groups)
        return {name: value for name, value in inputs.items() if name not in own}

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that are the game's own, which no argument of the model is."""
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # pyright: ignore
        own = [name for name in (self.where, self.groups) if isinstance(name, str)]
        columns += [name for name in own if name not in columns]


def column_missing(name: str, column: Any, inputs: Iterable[str]) -> str:
    """Say that a batch lacks a column of the game's own."""
    return (
        f"{name}={column!r} names a column that the batch lacks; it has {', '.join(inputs)}. Put "
        "it into the training set, and have the collator keep it."
    )


def is_scaled(trainer: Trainer, items: Any) -> bool:
    """Return whether the losses of accumulated micro-batches add up, and are not divided."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # Trainer's rule
    if scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and items is not None
        scaled = by_model or trainer.compute_loss_func is not None
    return scaled


class Share:
    """How large the loss of a micro-batch is beside its own mean over all processes.

    Trainer has the losses of micro-batches divided by the items of them all, or divides by their
    number itself; it multiplies by the number of processes, whose mean is taken afterwards.
    """

    def __init__(self) -> None:
        self.divides: bool | None = None  # the loss by the number of items, where that is known
        self.by_row = False  # the loss is one for each row, whose mean is the game's
        self.of_rows: Tensor | float = 1.0  # what is left of that mean beside the other rows'

    def of_mean(
        self, trainer: Trainer, inputs: dict[str, Any], items: Any, loss: Callable[[Any], Tensor]
    ) -> Tensor | float:
        """Return the share of a micro-batch, of those that have so many items together.

        `loss(items)` runs the model on the micro-batch, told of so many. Of one loss for each row
        the game takes the mean. Trainer does not divide it; `of_rows` does.
        """
        self.of_rows = 1.0
        steps, scaled = trainer.current_gradient_accumulation_steps, is_scaled(trainer, items)
        processes = trainer.accelerator.num_processes
        if not (trainer.args.average_tokens_across_devices and scaled and items is not None):
            processes = 1
        if steps * processes == 1 or not scaled:
            return 1.0
        if items is None and getattr(trainer, "loss_is_scaled_for_ga", None):
            return 1 / steps
        if items is None:  # a function of the loss that is told of none returns a mean, or rows
            rows = next(len(x) for x in inputs.values() if isinstance(x, Tensor))
            self._find_out(trainer, 1, lambda _: loss(None), rows)
            self.of_rows = 1 / steps if self.by_row else 1.0
            return 1.0
        if self.divides is False and not self.by_row:  # on all processes: none waits below
            return float(processes)
        own = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        if own is None:
            return 1 / steps
        part = torch.as_tensor(own).clamp(min=1) / items
        labels: Tensor = inputs["labels"]
        if self._find_out(trainer, items, loss, len(labels)):
            return part
        if self.by_row:  # where labels are of tokens, rows are not what is counted
            self.of_rows = (part if labels.dim() == 1 else 1 / steps) / processes
        return float(processes)

    def _find_out(
        self, trainer: Trainer, items: Any, loss: Callable[[Any], Tensor], rows: int
    ) -> bool:
        """Return whether the loss is divided by the number of items it is told.

        Many models return the mean whatever they are told, and Trainer adds up the means. Asked of
        the model once, whose random state and buffers are put back.
        """
        if self.divides is not None:
            return self.divides
        model: Any = trainer.model
        losses, replay = [], Replay(modules(model))
        for count in (items, 2 * items):
            with replay.run(), no_grad():
                losses.append(loss(count).detach())
        replay.undo()
        self.by_row = losses[0].shape == (rows,)
        losses = [each.mean() for each in losses]
        divides = float(losses[1].abs()) < 0.75 * float(losses[0].abs())
        # A loss of 0, where nothing is labelled, says nothing; all processes have to know, for
        # those that ask again run the model again.
        if parallel.agreed(float(losses[0]) != 0, losses[0]):
            self.divides = divides
        return divides
