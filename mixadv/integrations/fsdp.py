"""Trainer's `fsdp=`: weights sharded by `fully_shard` through Accelerate.

Gradients of sharded weights come of whole backwards, so a round delivers each of its passes at
once, by Accelerate's backward, and Trainer gets a loss that has nothing left to deliver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer

from mixadv.game import Game
from mixadv.integrations.trainer import is_scaled
from mixadv.solvers.base import Solver
from mixadv.solvers.weights import WeightsSolver


def check_fsdp(trainer: Trainer, solver: Solver, averages: bool) -> None:
    """Raise ValueError for what rounds were not seen to train with under FSDP, where it is used."""
    if not trainer.is_fsdp_enabled:
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP1 flattens the weights that a round handles one by one: set "
            "fsdp_config={'version': 2}."
        )
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "Rounds were not tested with weights offloaded, which takes a GPU: leave cpu_offload "
            "out of fsdp_config."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "Accelerate's activation checkpointing draws other dropout masks in the recomputation, "
            "so that gradients are not those of the round: set gradient_checkpointing=True in "
            "place of activation_checkpointing in fsdp_config."
        )
    moves_weights = isinstance(solver, WeightsSolver)
    if moves_weights and trainer.args.gradient_accumulation_steps > 1:
        raise ValueError(
            "An adversary of the weights needs the gradient of each batch, and sharded weights "
            "get theirs with the last that is accumulated: set gradient_accumulation_steps=1."
        )
    if averages and trainer.args.load_best_model_at_end:
        raise ValueError(
            "The average of sharded weights is saved by process, where load_best_model_at_end does "
            "not find it: set evaluate_average=False, or leave load_best_model_at_end out."
        )


def play(
    trainer: Trainer, closure: Callable[[], Any], share: Tensor | float, items: Any, **whom: Any
) -> Tensor:
    """Play a round and return the loss that Trainer calls backward on.

    Args:
        trainer: the mixin's, whose `accelerator` delivers the gradients of sharded weights.
        closure: of one micro-batch.
        share: of it among those that are accumulated; see `Share`.
        items: what `compute_loss` was told of their number.
        whom: `where=` and `groups=` of the round.
    """
    game: Game = trainer.game  # pyright: ignore
    if not trainer.is_fsdp_enabled:
        return game.loss(closure, **whom) * share
    steps = 1 if is_scaled(trainer, items) else trainer.current_gradient_accumulation_steps

    def backward(objective: Tensor) -> None:
        trainer.accelerator.backward(objective * share / steps)

    outcome = game.backward(closure, backward, **whom)
    return outcome.objective.clone().requires_grad_() * share
