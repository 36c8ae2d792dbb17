"""Trainer's `deepspeed=`: ZeRO 1 and 2, which step within the backward.

DeepSpeed's optimizer holds flat copies of the weights, so a game without an optimizer plays the
rounds, on the model within the engine: a pass through the engine would reduce the gradients of the
adversary's passes, too. The engine's own backward delivers the loss that a round leaves.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from mixadv.game import Game
from mixadv.integrations.trainer import Base, Rounds
from mixadv.solvers.base import Solver
from mixadv.solvers.weights import WeightsSolver

_PASSED_BY = (
    "amp",
    "torch_autocast",
    "fp16",
    "progressive_layer_drop",
    "curriculum_learning",
    "data_efficiency",
    "tensor_parallel",  # whose processes share a batch, and would each draw another δ for it
)
"""Entries of DeepSpeed's configuration that change the engine's forward, or scale its backward."""


def check_deepspeed(trainer: Trainer, solver: Solver, schedule: Any) -> None:
    """Raise ValueError for what rounds were not seen to train with under DeepSpeed, if it is on."""
    if not trainer.is_deepspeed_enabled:
        return
    who, args = type(solver).__name__, trainer.args
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    found: dict[str, Any] = plugin.deepspeed_config
    zero = found.get("zero_optimization", {})
    if trainer.optimizer is not None:
        raise ValueError(
            "Trainer leaves out the optimizer that it is given where DeepSpeed trains: leave "
            "optimizers= out and give solver=."
        )
    if solver.learner() is not None or solver.modules():
        what = "moves the weights" if solver.learner() is not None else "trains a module"
        raise ValueError(
            f"{who} {what} with the optimizer, which DeepSpeed gives flat copies of the weights "
            "and steps within the backward. Shard with fsdp=True (FSDP2) in place of deepspeed=, "
            "or choose a solver that leaves the weights to the optimizer, such as FreeLB."
        )
    if plugin.zero_stage == 3:
        raise ValueError(
            "ZeRO-3 counts each backward through its engine as one of training: a round would "
            "train on wrong gradients. Use stage 1 or 2, or fsdp=True (FSDP2)."
        )
    if isinstance(solver, WeightsSolver) and plugin.zero_stage == 2:
        raise ValueError(
            f"{who} differentiates the weights twice before a step, and ZeRO-2 reduces gradients "
            "within each backward: use stage 1."
        )
    offloaded = [name for name in ("offload_optimizer", "offload_param") if _is_on(zero.get(name))]
    passed_by = [name for name in _PASSED_BY if _is_on(found.get(name))]
    if unseen := offloaded + passed_by:
        raise ValueError(
            f"Rounds were not tested with {' and '.join(unseen)} in DeepSpeed's configuration: "
            "leave it out. (A round calls the model within the engine; bf16 works.)"
        )
    if args.torch_compile:
        raise ValueError("Rounds were not tested with torch_compile=True under DeepSpeed.")
    if schedule is not None and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "A schedule counts optimizer steps, which a game does not see where DeepSpeed takes "
            "them: set gradient_accumulation_steps=1, or leave schedule= out."
        )


class GameAlone(Base):
    """Keeps the game that no optimizer holds, on the callback that counts its rounds."""

    _rounds: Rounds
    _optimizer: Any = None  # of the training that the game is of

    def _play_alone(self, optimizer: Any, *arguments: Any, **keywords: Any) -> None:
        """Make the game, on its arguments, of a training that begins with a new optimizer."""
        if optimizer is not self._optimizer:
            self._optimizer, self._rounds.alone = optimizer, Game(*arguments, **keywords)


def _is_on(entry: Any) -> bool:
    """Return whether an entry of DeepSpeed's configuration turns something on."""
    entry = entry or {}
    several = entry.get("autotp_size", 1) > 1
    return several or entry.get("device", "none") != "none" or bool(entry.get("enabled"))
