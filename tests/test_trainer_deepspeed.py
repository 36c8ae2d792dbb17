"""Trainer's `deepspeed=` on two processes trains as replicas do; where DeepSpeed is installed.

It runs on CPUs, with the Trainer, the engine and the optimizer that it has on GPUs.
"""

import os
import warnings
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mixadv

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from tests.processes import Verdict, by_name, verdicts_of
from tests.test_deepspeed import MOVES, installed, on_cpus
from tests.test_trainer import at_zero, logged, trainer_of, weights
from tests.test_trainer_sharded import CLOSE, OPTIONS, alone, goes_on
from tests.zoo import AROUND, ROWS, assert_same

AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
WHY = r"Shard with fsdp|one step per batch|use stage 1"
ADAMW: dict[str, Any] = {"lr": "auto", "weight_decay": "auto", "torch_adam": True}


def configured(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage}
    auto = dict.fromkeys(AUTO, "auto")
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **auto, **more}


def trainer_for(solver: mixadv.Solver | None, zero: Any = None, **changes: Any) -> Any:
    """Return a Trainer on one of two processes, by DeepSpeed where there is a configuration."""
    alone(dist.get_rank())
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # by which a Trainer before turned DeepSpeed on
    options: dict[str, Any] = OPTIONS | changes
    if solver is not None and (solver.name in ROWS or solver.name == "mart"):
        options |= {"family": "bert"}  # whose harness has one loss for each row, or shows labels
    if zero:
        on_cpus()
        options |= {"deepspeed": zero}
    trainer = trainer_of(Path(mkdtemp()), solver, **options)
    assert trainer.is_deepspeed_enabled == bool(zero)
    return trainer


def trains(trainer: Any) -> list[Any]:
    trainer.train()
    trainer.evaluate()
    seen = [trainer.game.unit, *(logged(trainer, name) for name in ("loss", "radius", "eval_loss"))]
    return [*weights(trainer), *map(torch.tensor, seen)]


# Cases ---------------------------------------------------------------------------------------


def trainers_agree(rank: int, name: str, zero: dict[str, Any], **changes: Any) -> str | None:
    warnings.simplefilter("ignore")  # of DeepSpeed
    solver = mixadv.make_solver(name)
    if name in MOVES or (name in AROUND and zero["zero_optimization"]["stage"] == 2):
        with pytest.raises(ValueError, match=WHY) as e:
            trainer_for(solver, zero)
        return str(e.value)
    expected = trains(trainer_for(solver, **changes))
    torch.testing.assert_close(trains(trainer_for(solver, zero, **changes)), expected, **CLOSE)
    return None


def plain_at_radius_zero(rank: int) -> None:
    """In bf16, whose weights and optimizer are DeepSpeed's own."""
    warnings.simplefilter("ignore")
    zero = configured(1, bf16={"enabled": True})
    found = []
    for solver in (None, at_zero("pgd")):
        trainer = trainer_for(solver, zero, bf16=True)
        trainer.train()
        found.append(weights(trainer))
    assert found[0][0].dtype == torch.bfloat16
    assert_same(*found)


def resumed(rank: int, name: str) -> None:
    """A checkpoint has the adversary of each process."""
    warnings.simplefilter("ignore")
    pair = goes_on(rank, partial(trainer_for, mixadv.make_solver(name), configured(1)))
    assert_same(*map(weights, pair))
    assert_same(*(list(t.game.state_dict()["memory"].values()) for t in pair))


CASES: dict[str, Any] = {
    **by_name(partial(trainers_agree, zero=configured(1)), "stage 1", mixadv.SOLVERS),
    **by_name(partial(trainers_agree, zero=configured(2)), "stage 2", mixadv.SOLVERS),
    **by_name(partial(trainers_agree, zero=configured(0)), "stage 0", ["freelb"]),
    **by_name(
        partial(
            trainers_agree,
            zero=configured(2, optimizer={"type": "AdamW", "params": ADAMW}),
            optim="adamw_torch",
            learning_rate=1e-2,
        ),
        "an optimizer of DeepSpeed",
        ["freelb"],
    ),
    **by_name(resumed, "resumed", ["textat"]),
    "bf16": plain_at_radius_zero,
}
verdicts = verdicts_of(CASES, "trainer_deepspeed")


@installed
@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, verdicts: dict[str, Verdict]):
    verdicts[case].hold()
