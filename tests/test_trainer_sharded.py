"""Trainer's `fsdp=` and Accelerate's FSDP2 on two processes train as replicas do.

Accelerate turns FSDP on for GPUs alone: on CPUs its state is told that it is on, and all that
follows is its own code and Trainer's.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mixadv

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from mixadv.integrations.transformers import AdversarialTrainer
from tests.processes import (
    Net,
    Verdict,
    batches,
    by_name,
    closure,
    found,
    refusal,
    start,
    verdicts_of,
    whole,
)
from tests.test_trainer import at_zero, logged, trainer_of
from tests.zoo import AROUND, ROWS, assert_same

# Micro-batches have unlike numbers of tokens, and two make one optimizer step.
OPTIONS: dict[str, Any] = {
    "family": "llama-causal",
    "rows": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "optim": "sgd",  # an adaptive one would blow up rounding where a gradient is next to nothing
    "learning_rate": 0.1,
}
SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def shard(accelerator: Accelerator, **words: Any) -> None:
    """Tell the state that accelerators of this process share that FSDP2 is on."""
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **words)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin


class Sharding:
    """Shards on CPUs too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        words = {k: v for k, v in self.args.fsdp_plugin_args.items() if k != "fsdp_version"}
        shard(self.accelerator, **words)
        self.is_fsdp_enabled = True


class Sharded(Sharding, AdversarialTrainer):
    pass


class PlainSharded(Sharding, Trainer):
    pass


def alone(rank: int) -> None:
    """Be as Accelerate finds a process, and leave no accelerator's state to what follows."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"OMP_NUM_THREADS": 1}  # of which Accelerate warns where it is not set
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # of a group there is
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer_for(name: str, sharded: bool, **changes: Any) -> Any:
    alone(dist.get_rank())
    base = Sharded if sharded else AdversarialTrainer
    options = OPTIONS | (SHARDED if sharded else {}) | changes
    if name in (*ROWS, "mart"):  # whose loss the harness has be one for each row, or shows labels
        options |= {"family": "bert"}
        if sharded:
            options |= {"fsdp_config": {"transformer_layer_cls_to_wrap": "BertLayer"}}
    return trainer_of(Path(mkdtemp()), mixadv.make_solver(name), base=base, **options)


def seen(trainer: Any) -> list[Any]:
    """Return what training came to, whole on all processes."""
    learner = trainer.game.learner
    kept = [] if learner is None else [*learner.average.values(), *learner.teacher.values()]
    weights = [*trainer.model.parameters(), *kept, torch.tensor(trainer.game.unit)]
    return [whole(w).double() for w in weights]


def goes_on(rank: int, make: Callable[..., Any]) -> tuple[Any, Any]:
    """Return a Trainer that goes on from a checkpoint, and one that is not interrupted.

    None goes on without the players of each process.
    """
    folder = [mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0)
    saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": folder[0], "max_steps": 3}
    checkpoint = f"{folder[0]}/checkpoint-1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uninterrupted = make(**saving)
        uninterrupted.train()
        again = make(**saving)
        again.train(resume_from_checkpoint=checkpoint)
        assert again.game.round == uninterrupted.game.round
        Path(checkpoint, f"players_{rank}.pt").unlink()
        with pytest.raises(mixadv.GameError, match="as many processes as saved it"):
            make(**saving).train(resume_from_checkpoint=checkpoint)
    return again, uninterrupted


def trains(name: str, sharded: bool, **changes: Any) -> Any:
    trainer = trainer_for(name, sharded, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        trainer.evaluate()  # at the average, where there is one
    assert sharded == isinstance(next(trainer.model.parameters()), DTensor)
    names = ("loss", "eval_loss", "radius", "grad_norm")
    return [*seen(trainer), *(torch.tensor(logged(trainer, n)) for n in names)]


# Cases ---------------------------------------------------------------------------------------


def trainers_agree(rank: int, name: str, **changes: Any) -> str | None:
    if mixadv.make_solver(name).replays_batch or name in AROUND:
        why = "Trainer takes one step per batch|set gradient_accumulation_steps=1"
        with pytest.raises(ValueError, match=why) as caught:
            trainer_for(name, sharded=True)
        if name not in AROUND:
            return str(caught.value)
        changes["gradient_accumulation_steps"] = 1
    expected = trains(name, sharded=False, **changes)
    torch.testing.assert_close(trains(name, sharded=True, **changes), expected, **CLOSE)
    return str(caught.value) if name in AROUND else None


def resumed(rank: int, name: str, kind: str = "FULL_STATE_DICT") -> None:
    """A checkpoint has both players of each process."""
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2}
    options["fsdp_config"] = SHARDED["fsdp_config"] | {"state_dict_type": kind}
    pair = goes_on(rank, partial(trainer_for, name, True, **options))
    torch.testing.assert_close(*map(seen, pair), **CLOSE)


def plain_at_radius_zero(rank: int) -> None:
    """In bf16, in which shards are gathered; one batch a step, as shares of several round."""
    options = OPTIONS | SHARDED | {"bf16": True, "gradient_accumulation_steps": 1}
    found = []
    for solver, base in ((None, PlainSharded), (at_zero("pgd"), Sharded)):
        alone(rank)
        trainer = trainer_of(Path(mkdtemp()), solver, base=base, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        assert policy.param_dtype == torch.bfloat16
        found.append([whole(w) for w in trainer.model.parameters()])
    assert_same(*found)


def accelerated(rank: int, name: str, way: str) -> str | None:
    """The plugin alone, in a loop by hand, against replicas."""
    solver = mixadv.make_solver(name)
    results = []

    def train(plugin: bool) -> None:
        alone(rank)
        model = Net()
        if plugin:
            accelerator = Accelerator(cpu=True)
            shard(accelerator, transformer_cls_names_to_wrap="Block")
            model, prepared = accelerator.prepare(model, start(model, solver))
            optimizer = prepared.optimizer
            backward = accelerator.backward
        else:
            model = DistributedDataParallel(model)
            optimizer = prepared = start(model, solver)
            backward = torch.autograd.backward
        torch.manual_seed(100 + rank)
        for ids, labels in batches(rank, 3):
            run = closure(model, ids, labels)
            if way == "step":
                prepared.step(run)
            else:
                optimizer.game.backward(run, backward=backward)
                prepared.step()
                prepared.zero_grad()
        results.append(found(optimizer))

    if reason := refusal(solver, way, lambda: train(plugin=True)):
        return reason
    for plugin in (False, True):
        train(plugin)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    return None


# Tests ---------------------------------------------------------------------------------------

CASES: dict[str, Any] = {  # one of each; all solvers are slow
    **by_name(trainers_agree, "trainer", ["mat"]),
    **by_name(accelerated, "accelerate", ["freelb"], way="backward"),
}
SLOW: dict[str, Any] = {
    **by_name(trainers_agree, "trainer", mixadv.SOLVERS),
    **by_name(accelerated, "backward", mixadv.SOLVERS, way="backward"),
    **by_name(accelerated, "step", mixadv.SOLVERS, way="step"),
    **by_name(resumed, "resumed", ["mat", "smart"]),
    **by_name(partial(resumed, kind="SHARDED_STATE_DICT"), "resumed from shards", ["mat"]),
    "bf16": plain_at_radius_zero,
}

verdicts = verdicts_of(CASES, "trainer_sharded")
slow_verdicts = verdicts_of(SLOW, "trainer_sharded_slow")


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, verdicts: dict[str, Verdict]):
    verdicts[case].hold()


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_every_solver_on_two_processes(case: str, slow_verdicts: dict[str, Verdict]):
    slow_verdicts[case].hold(changed=case.rpartition(" ")[2] in AROUND)
