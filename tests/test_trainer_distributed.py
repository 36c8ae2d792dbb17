"""Trainer on two processes: itself at radius 0, replicas that stay equal, the example script."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mixadv

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from transformers import Trainer

from mixadv.integrations.transformers import Adversarial
from tests.test_trainer import (
    STILL,
    Sequential,
    alone,  # noqa: F401
    at_zero,
    logged,
    trained,
    weights,
)
from tests.zoo import assert_same, player, without_dropout

EXAMPLE = Path(__file__).parent.parent / "examples" / "trainer.py"
SOLVERS = {name: mixadv.make_solver(name) for name in ("pgd", "freelb", "cat", "smart", "mat")}
OPTIONS: dict[str, Any] = {
    "family": "llama-causal",  # rows have unlike numbers of tokens
    "rows": 12,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
}


class Gathering(Trainer):
    """Asks the other processes in each pass, for its metrics, as TRL's SFTTrainer does."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        found = super().compute_loss(model, inputs, *rest, **more)
        self.accelerator.gather(inputs["labels"].sum())
        return found


class FirstUnlabelled(Adversarial, Gathering):
    """One process begins with rows of which nothing is labelled."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if dist.get_rank() == 1 and self.game.round == 0:
            inputs = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
        return super().compute_loss(model, inputs, *rest, **more)


def as_one_process(folder: Path, family: str, solver: mixadv.Solver) -> None:
    """Loss and divergence keep their proportion, whoever divides by the items or does not.

    BERT does not, and Trainer multiplies its loss by the number of processes.
    """
    options: dict[str, Any] = {"family": family, "base": Sequential, "dropout": False}
    options |= {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 2, "rows": 8, "max_steps": 2}
    found = weights(trained(folder, solver, **options))
    p = player(family, rows=8)
    without_dropout(p.model)
    base = torch.optim.SGD(p.model.parameters(), lr=2e-2 if family == "bert" else 1e-2)
    optimizer = mixadv.wrap(base, p.model, solver)
    for i in (0, 4):
        optimizer.step(p.closure(**{k: v[i : i + 4] for k, v in p.batch.items()}))
    expected = [q.detach() for q in p.model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": os.environ["TEST_PORT"]}
    plain = trained(Path(folder), None, **OPTIONS)
    assert dist.get_world_size() == 2
    for name in ("pgd", "r3f"):
        trainer = trained(Path(folder), at_zero(name), **OPTIONS)
        assert_same(weights(trainer), weights(plain))
        if rank == 0:
            assert logged(trainer) == pytest.approx(logged(plain), rel=1e-5)
    for solver in SOLVERS.values():
        trainer = trained(Path(folder), solver, **OPTIONS)
        learner = trainer.game.learner
        kept = [] if learner is None else [*learner.average.values()]
        for mine in [*weights(trainer), *kept, torch.tensor(trainer.game.unit)]:
            others = mine.clone()
            dist.broadcast(others, 0)
            assert_same(mine, others)
    for family in ("bert", "llama-causal"):
        for solver in STILL:
            if family == "bert" or solver.compares is None:
                as_one_process(Path(folder), family, solver)
    trainer = trained(Path(folder), mixadv.PGD(), base=FirstUnlabelled, **OPTIONS)
    assert trainer._share.divides is True
    with pytest.raises(ValueError, match="gradients of head= would not be averaged"):
        trained(Path(folder), mixadv.CAT(head=nn.Linear(16, 4)), **OPTIONS)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_PORT", str(20000 + os.getpid() % 20000))
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path: Path):
    script = [str(EXAMPLE), "--steps", "2", "--solver", "freelb", "--output", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("adversarial") == 1  # one process prints
    assert "freelb" in run.stdout


@pytest.mark.filterwarnings("ignore")
def test_the_example_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import dataclasses

    import intent
    import trainer

    load = intent.load

    def few(options: Any) -> Any:
        task = load(options)
        splits = {name: rows.select(range(16)) for name, rows in task.splits.items()}
        return dataclasses.replace(task, train=task.train.select(range(32)), splits=splits)

    monkeypatch.setattr(intent, "load", few)
    trainer.main(["--steps", "1", "--output", str(tmp_path)])
    head, plain, freelb = capsys.readouterr().out.splitlines()[-3:]
    assert head.split() == ["solver", "dev", "test", "adversarial"]
    assert plain.split()[0] == "plain"
    assert freelb.split()[0] == "freelb"
    assert all(0 <= float(x) <= 100 for line in (plain, freelb) for x in line.split()[1:])
