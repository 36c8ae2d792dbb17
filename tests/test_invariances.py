"""Runs of solvers that keep, read or share something do not depend on padding or on order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixadv
from tests.zoo import PAD, player, without_dropout, wrapped

ROWS, LENGTH = 6, 9
SOLVERS = {
    "freeat": mixadv.FreeAT(steps=2),
    "textat": mixadv.TextAT(exclude=(2,)),
    "textat-accumulate": mixadv.TextAT(write="accumulate"),
    "creat": mixadv.CreAT(steps=2),
    "cat": mixadv.CAT(),
    "cat-cross": mixadv.CAT(shared=False, negatives="cross"),
    "vat": mixadv.VAT(steps=2),
    "r3f": mixadv.R3F(),
    "alum": mixadv.ALUM(steps=2),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


class RowNoise:
    """Draws that depend on sample, place, coordinate and round alone."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        self.draw = torch.Generator().manual_seed(round)

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        size = (ROWS, 20, like.shape[-1])
        drawn = torch.randn(size, generator=self.draw, dtype=like.dtype).clamp(-1, 1)
        return drawn[self.order, : like.shape[1]]


def run(solver: mixadv.Solver, order: list[int], extra: int = 0) -> tuple[list, dict]:
    """Three rounds on a batch in this order, with extra padding; objectives and weights, memory."""
    one = player("bert", rows=ROWS)
    without_dropout(one.model).double()
    fill = {"input_ids": PAD, "attention_mask": 0}
    batch = {
        name: F.pad(value[order], (0, extra), value=fill[name]) if name in fill else value[order]
        for name, value in one.batch.items()
    }
    optimizer = wrapped(one.model, solver)
    optimizer.game.rounds.arena.noise = RowNoise(order)
    found = [optimizer.step(one.closure(**batch)) for _ in range(3)]
    return [*found, *one.model.parameters()], optimizer.game.rounds.memory


def assert_close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@each_solver
@pytest.mark.parametrize("extra", [1, 5])
def test_padding_changes_no_run(solver, extra):
    order = list(range(ROWS))
    (short, kept), (long, also) = run(solver, order), run(solver, order, extra)
    assert_close(long, short)
    if "delta" in kept:
        assert not also["delta"][0][:, LENGTH:].any()
        also = {"delta": [also["delta"][0][:, :LENGTH]]}
    assert_close(also, kept)


@each_solver
def test_order_changes_no_run(solver):
    order = [3, 1, 5, 0, 4, 2]
    (sorted_, kept), (shuffled, also) = run(solver, list(range(ROWS))), run(solver, order)
    assert_close(shuffled, sorted_)
    if "delta" in kept:
        kept = {"delta": [kept["delta"][0][order]]}
    assert_close(also, kept)
