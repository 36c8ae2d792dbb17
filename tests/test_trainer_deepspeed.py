"""Trainer's `deepspeed=` on two processes trains as replicas do; where DeepSpeed is installed.

It runs on CPUs, with the Trainer, the engine and the optimizer that it has on GPUs.
"""

import importlib.util
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

from mixadv.integrations.transformers import Adversarial
from tests.processes import Verdict, by_name, verdicts_of
from tests.test_trainer import at_zero, logged, trainer_of, weights
from tests.test_trainer_sharded import CLOSE, OPTIONS, alone
from tests.zoo import AROUND, ROWS, assert_same

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
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
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__.update(dict.fromkeys(__compatible_ops__, False))  # compiled when asked
        options |= {"deepspeed": zero}
    trainer = trainer_of(Path(mkdtemp()), solver, **options)
    assert trainer.is_deepspeed_enabled == bool(zero)
    return trainer


def trains(trainer: Any, evaluate: bool = True) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        names = ["loss", "radius"]
        if evaluate:
            trainer.evaluate()
            names.append("eval_loss")
    unit = [torch.tensor(trainer.game.unit)] if isinstance(trainer, Adversarial) else []
    return [*weights(trainer), *unit, *(torch.tensor(logged(trainer, name)) for name in names)]


# Cases ---------------------------------------------------------------------------------------


def trainers_agree(rank: int, name: str, zero: dict[str, Any], **changes: Any) -> str | None:
    warnings.simplefilter("ignore")  # of DeepSpeed
    solver = mixadv.make_solver(name)
    moves = solver.learner() is not None or solver.replays_batch
    if moves or (name in AROUND and zero["zero_optimization"]["stage"] == 2):
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
    plain, still = (
        trains(trainer_for(solver, zero, bf16=True), evaluate=False)
        for solver in (None, at_zero("pgd"))
    )
    number = len(plain) - 2
    assert plain[0].dtype == torch.bfloat16
    assert_same(still[:number], plain[:number])


def resumed(rank: int, name: str) -> None:
    """A checkpoint has the adversary of each process."""
    warnings.simplefilter("ignore")
    folder = [mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0)
    saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": folder[0], "max_steps": 3}
    solver = mixadv.make_solver(name)
    uninterrupted = trainer_for(solver, configured(1), **saving)
    expected = trains(uninterrupted, evaluate=False)
    first = uninterrupted.game
    again = trainer_for(solver, configured(1), **saving)
    again.train(resume_from_checkpoint=f"{folder[0]}/checkpoint-1")
    assert again.game.round == first.round
    assert_same(weights(again), expected[: len(weights(again))])
    assert_same(*(list(g.state_dict()["memory"].values()) for g in (again.game, first)))
    Path(folder[0], f"checkpoint-1/players_{rank}.pt").unlink()
    with pytest.raises(mixadv.GameError, match="as many processes as saved it"):
        trainer_for(solver, configured(1), **saving).train(
            resume_from_checkpoint=f"{folder[0]}/checkpoint-1"
        )


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
