"""Adversaries of weights on two processes: one displacement for all, or one for each."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from tests.processes import (
    Net,
    Verdict,
    assert_equal_on_all,
    batches,
    by_name,
    closure,
    found,
    replicated,
    sharded,
    verdicts_of,
    whole,
)
from tests.zoo import without_dropout, wrapped

ROWS = 4
PGD = mixadv.PGD(start="zero", unit="absolute")
RULES: dict[str, Any] = {
    "SAM": partial(mixadv.SAM, radius=0.3),
    "ASAM": mixadv.ASAM,
    "AWP": partial(mixadv.AWP, radius=0.1, solver=PGD),
    "around freelb": partial(
        mixadv.SAM, radius=0.3, solver=mixadv.FreeLB(start="zero", unit="absolute")
    ),
}
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def mine(rank: int) -> slice:
    return slice(rank * ROWS, (rank + 1) * ROWS)


def trained(model: nn.Module, solver: mixadv.Solver, way: str, rows: slice) -> list[Tensor]:
    """Train three rounds on rows of one batch for all processes, of two micro-batches each."""
    optimizer = wrapped(without_dropout(model), solver, lr=0.5)
    for ids, labels in batches(7, 3, 2 * ROWS):
        mine_ids, mine_labels = ids[rows], labels[rows]
        if way == "loss":
            optimizer.game.loss(closure(model, mine_ids, mine_labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
            continue
        half = len(mine_ids) // 2
        parts = [slice(0, half), slice(half, None)] if way == "micro" else [slice(None)]
        closures = [closure(model, mine_ids[part], mine_labels[part]) for part in parts]
        optimizer.step(closures if way == "micro" else closures[0])
    return found(optimizer)[:-1]  # without the unit, which the first rows tell


def shared_it_is_that_of_one_process(rank: int, name: str) -> None:
    for way in ("step", "micro", "loss"):
        one = trained(Net(), RULES[name](), way, slice(0, 2 * ROWS))
        two = trained(replicated(), RULES[name](), way, mine(rank))
        assert_equal_on_all(two)
        torch.testing.assert_close(two, one, **CLOSE, msg=lambda m, way=way: f"{way}: {m}")
        if way != "loss":
            spread = trained(sharded(), RULES[name](), way, mine(rank))
            torch.testing.assert_close([whole(x) for x in spread], one, **CLOSE)


def by_hand(model: nn.Module, radius: float) -> list[Tensor]:
    """Train on all rows with SAM, of which each process displaces by its own."""
    without_dropout(model)
    for ids, labels in batches(7, 3, 2 * ROWS):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(2):
            own = partial(_slope, model, ids[mine(rank)], labels[mine(rank)])
            slope = own()
            length = torch.cat([g.flatten() for g in slope]).norm()
            before = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p, g in zip(model.parameters(), slope, strict=True):
                    p.add_(radius * g / length)
            total = [t + g / 2 for t, g in zip(total, own(), strict=True)]
            with torch.no_grad():
                for p, b in zip(model.parameters(), before, strict=True):
                    p.copy_(b)
        with torch.no_grad():
            for p, g in zip(model.parameters(), total, strict=True):
                p.sub_(0.5 * g)
    return [p.detach() for p in model.parameters()]


def _slope(model: nn.Module, ids: Tensor, labels: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(model(ids), labels)
    return [*torch.autograd.grad(loss, [*model.parameters()])]


def each_its_own_is_the_mean_of_both(rank: int) -> None:
    expected, model = by_hand(Net(), 0.3), replicated()
    for way in ("step", "loss"):
        model = replicated()
        trained(model, mixadv.SAM(radius=0.3, shared=False), way, mine(rank))
        torch.testing.assert_close(list(model.parameters()), expected, **CLOSE)
    together = replicated()
    trained(together, mixadv.SAM(radius=0.3), "step", mine(rank))
    assert (next(together.parameters()) - expected[0]).abs().max() > 1e-6


def what_shards_cannot_is_refused(rank: int) -> None:
    model, (ids, labels) = sharded(), next(batches(rank, 1))
    with pytest.raises(ValueError, match=r"shared=False.*fully_shard.*shared=True"):
        wrapped(model, mixadv.SAM(shared=False))
    optimizer = wrapped(model, mixadv.SAM())
    with pytest.raises(mixadv.GameError, match=r"fully_shard.*use game\.backward"):
        optimizer.game.loss(closure(model, ids, labels))
    optimizer.game.backward(closure(model, ids, labels))


CASES: dict[str, Any] = {
    **by_name(shared_it_is_that_of_one_process, "shared", RULES),
    "each its own": each_its_own_is_the_mean_of_both,
    "what shards cannot": what_shards_cannot_is_refused,
}
verdicts = verdicts_of(CASES, "weights_distributed")


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, verdicts: dict[str, Verdict]):
    verdicts[case].hold()
