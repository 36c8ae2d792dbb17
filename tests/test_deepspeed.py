"""DeepSpeed ZeRO 1 and 2 train as replicas do, with two processes; where it is installed.

pip install deepspeed  # DS_BUILD_OPS=0: nothing is compiled
"""

import importlib.util
import os
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mixadv
from tests.processes import Net, Verdict, batches, by_name, verdicts_of
from tests.zoo import AROUND, ROWS

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
MOVES = [
    name
    for name in mixadv.SOLVERS
    if mixadv.make_solver(name).learner() is not None or mixadv.make_solver(name).replays_batch
]
"""Solvers that move the weights themselves, of which an optimizer of DeepSpeed holds copies."""
TWICE = (
    "Gradient computed twice for this partition. Multiple gradient reduction is currently not "
    "supported"
)
"""What DeepSpeed says where ZeRO 2 is differentiated twice before a step."""
GROUPED: Any = {"groups": 2}, {"groups": torch.tensor([0, 1, 0, 1])}


def on_cpus() -> None:
    """Have DeepSpeed run on CPUs, with none of what it compiles."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__.update(dict.fromkeys(__compatible_ops__, False))  # compiled when asked for


def engine_of(model: nn.Module, optimizer: Any, stage: int) -> Any:
    on_cpus()
    import deepspeed

    names = {"RANK": torch.distributed.get_rank(), "WORLD_SIZE": 2}
    names["LOCAL_RANK"] = names["RANK"]
    os.environ |= {name: str(value) for name, value in names.items()}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def trains_as_replicas_do(rank: int, name: str, stage: int) -> None:
    warnings.simplefilter("ignore")  # of DeepSpeed
    seen = []
    for zero in (False, True):
        net = Net().float()
        base = torch.optim.AdamW(net.parameters(), lr=0.01)
        engine = engine_of(net, base, stage) if zero else DistributedDataParallel(net)
        model = engine.module if zero else engine
        words, asked = GROUPED if name == "group_dro" else ({}, {})
        game, objectives = mixadv.Game(model, mixadv.make_solver(name, **words)), []
        torch.manual_seed(100 + rank)
        for number, (ids, labels) in enumerate(batches(rank, 4)):

            def run(ids: Any = ids, labels: Any = labels, model: Any = model) -> Any:
                logits = model(ids)
                each = "none" if name in ROWS else "mean"
                return F.cross_entropy(logits, labels, reduction=each), logits, labels

            loss = game.loss(run, **asked)
            objectives.append(loss.detach())
            if zero:
                engine.backward(loss)
                engine.step()
                continue
            (loss / 2).backward()
            if number % 2:
                base.step()
                base.zero_grad()
        seen.append([*objectives, *(p.detach().clone() for p in net.parameters())])
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    assert (seen[0][-1] - Net().float().head.bias).abs().max() > 5e-3


def trains_or_is_refused(rank: int, name: str, stage: int) -> str | None:
    warnings.simplefilter("ignore")  # of DeepSpeed
    if name in MOVES:
        net = Net().float()
        optimizer = mixadv.wrap(torch.optim.AdamW(net.parameters()), net, name)
        engine_of(net, optimizer, stage)
        ids, labels = next(batches(rank, 1))
        with pytest.raises(ValueError, match="DeepSpeed gives an optimizer flat copies") as refused:
            optimizer.step(lambda: (F.cross_entropy(net(ids), labels), net(ids)))
        return str(refused.value)
    if name in AROUND and stage == 2:
        with pytest.raises(AssertionError) as refused:
            trains_as_replicas_do(rank, name, stage)
        assert TWICE in " ".join(str(refused.value).split())
        return f"DeepSpeed: {TWICE}. Use stage 1."
    trains_as_replicas_do(rank, name, stage)
    return None


def others_are_refused(rank: int) -> None:
    warnings.simplefilter("ignore")
    net = Net().float()
    optimizer = mixadv.wrap(torch.optim.AdamW(net.parameters()), net, mixadv.SMART())
    engine = engine_of(net, optimizer, 1)
    with pytest.raises(TypeError, match=r"engine\.backward\(game\.loss\(closure\)\)"):
        mixadv.Game(engine, mixadv.PGD())
    ids, labels = next(batches(rank, 1))
    with pytest.raises(ValueError, match="DeepSpeed gives an optimizer flat copies"):
        optimizer.game.loss(lambda: (F.cross_entropy(net(ids), labels), net(ids)))
    net = Net().float()
    engine_of(net, torch.optim.AdamW(net.parameters()), 3)
    with pytest.raises(ValueError, match=r"ZeRO-3.*Use stage 1 or 2"):
        mixadv.Game(net, mixadv.PGD())


CASES: dict[str, Any] = {
    **by_name(partial(trains_or_is_refused, stage=1), "stage 1", mixadv.SOLVERS),
    **by_name(partial(trains_or_is_refused, stage=2), "stage 2", mixadv.SOLVERS),
    "others": others_are_refused,
}
verdicts = verdicts_of(CASES, "deepspeed")


@installed
@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, verdicts: dict[str, Verdict]):
    verdicts[case].hold()


def test_a_backward_that_steps_is_refused():
    """Without it installed: Accelerate's by what it keeps, the engine's by its name."""

    class Accelerator:
        deepspeed_engine_wrapped: Any = None

        def backward(self, loss: Any) -> None:
            loss.backward()

    accelerator, engine = Accelerator(), type("DeepSpeedEngine", (Accelerator,), {})()
    model = nn.Linear(2, 2)
    game = mixadv.Game(model, mixadv.PGD(), site="input")

    def closure() -> Any:
        return model(torch.eye(2)).square().sum()

    game.backward(closure, accelerator.backward)
    accelerator.deepspeed_engine_wrapped = engine
    for backward in (accelerator.backward, engine.backward):
        with pytest.raises(TypeError, match=r"write backward\(game\.loss\(closure\)\)"):
            game.backward(closure, backward)
    assert game.round == 1


def test_what_is_deepspeeds_is_told_by_its_marks():
    """Without it installed: an engine by its name, weights of ZeRO-3 by what they carry."""
    engine = type("DeepSpeedEngine", (nn.Linear,), {})(2, 2)
    with pytest.raises(TypeError, match=r"give the game engine\.module"):
        mixadv.Game(engine, mixadv.PGD())
    model = nn.Linear(2, 2)
    vars(model.weight)["ds_id"] = 0
    with pytest.raises(ValueError, match=r"ZeRO-3.*fully_shard"):
        mixadv.Game(model, mixadv.PGD())


def test_an_optimizer_that_lost_the_weights_is_told_of_in_the_first_round():
    model = nn.Linear(2, 2)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters()), model, mixadv.MAT())
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(6))]  # as DeepSpeed does
    with pytest.raises(ValueError, match="holds 1 parameters and none of the 2"):
        optimizer.step(lambda: (model(torch.eye(2)).sum(), model(torch.eye(2))))
