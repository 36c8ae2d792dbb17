"""Double oracle: ends at the value, with few of the strategies, and says what its gap is worth."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixadv.games import Grown, double_oracle
from theory.oracles.finite import equilibrium


def grown(payoff: Tensor, **options: Any) -> Grown[int, int]:
    """Play a finite game by best responses, from its first row and column."""
    given = {"rows": [0], "columns": [0], **options}
    return double_oracle(
        lambda i, j: payoff[i, j],
        lambda columns, y: int((payoff[:, columns] @ y).argmin()),
        lambda rows, x: int((x @ payoff[rows]).argmax()),
        **given,
    )


@st.composite
def matrices(draw: Any) -> Tensor:
    """Games of up to 8×8, of few different payoffs among them: many best responses are as good."""
    m, n, seed = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(0, 10**6))
    source = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        return torch.randint(-1, 2, (m, n), generator=source).double()
    return torch.randn(m, n, generator=source, dtype=torch.float64)


@given(matrices(), st.floats(0.1, 100))
@settings(max_examples=25)
def test_it_ends_at_the_value_of_the_linear_program(payoff: Tensor, scale: float):
    payoff = payoff * scale
    found, exact = grown(payoff, tolerance=1e-4 * scale), equilibrium(payoff).value
    assert found.lower - 1e-9 <= exact <= found.upper + 1e-9
    assert found.gap <= 1e-4 * scale
    assert len(found.gaps) <= max(1, 2 * sum(payoff.shape) - 2)
    for known, weights in ((found.rows, found.learner), (found.columns, found.adversary)):
        assert len(set(known)) == len(known) == len(weights)
        assert weights.min() >= 0
        assert weights.sum().item() == pytest.approx(1)
    rows, columns = found.rows, found.columns
    assert torch.equal(found.payoff, payoff[rows][:, columns])
    upper, lower = (
        (found.learner @ payoff[rows]).max(),
        (payoff[:, columns] @ found.adversary).min(),
    )
    assert found.upper == pytest.approx(upper.item())  # the bounds hold in the whole game
    assert found.lower == pytest.approx(lower.item())
    assert found.gap == pytest.approx((upper - lower).item(), abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(4))
def test_few_strategies_are_enough_where_the_rank_is_low(seed: int):
    """A game of rank k has an equilibrium of k + 1 rows and columns at most, here k = 3."""
    source = torch.Generator().manual_seed(seed)
    draw = {"generator": source, "dtype": torch.float64}
    payoff = torch.randn(50, 3, **draw) @ torch.randn(3, 50, **draw)
    found = grown(payoff)
    assert len(found.rows) < 25
    assert len(found.columns) < 25
    assert found.upper == pytest.approx(equilibrium(payoff).value, abs=2e-6)
    assert found.lower == pytest.approx(equilibrium(payoff).value, abs=2e-6)


def test_a_game_that_its_steps_do_not_solve_is_not_passed_off_as_solved():
    payoff = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"gap of .* above tolerance=1e-06: no response .*=300"):
        found = grown(payoff, steps=30)
    assert found.gap > 1e-6
    assert grown(payoff, steps=100_000).gap <= 1e-6


def test_strategies_may_be_tensors_of_a_continuous_set():
    """|x − y|² on a square: the adversary mixes corners, the learner stays in the middle.

    Tensors have no one truth value when they are compared, and no two points of a set are equal.
    """

    def mean(ys: Any, weights: Tensor) -> Tensor:
        return weights @ torch.stack(list(ys))

    def corner(xs: Any, weights: Tensor) -> Tensor:
        return torch.where(weights @ torch.stack(list(xs)) > 0, -1.0, 1.0).double()

    start = [torch.tensor([0.3, -0.9]).double()]
    found = double_oracle(
        lambda x, y: (x - y).square().sum(), mean, corner, start, start, tolerance=0.05
    )
    assert found.gap <= 0.05
    assert found.lower - 1e-9 <= 2 <= found.upper + 1e-9
    assert mean(found.rows, found.learner).tolist() == pytest.approx([0, 0], abs=0.05)
    stacked: Any = torch.stack(start)
    again = double_oracle(
        lambda x, y: (x - y).square().sum(), mean, corner, stacked, stacked, tolerance=0.05
    )
    assert again.gap == found.gap


def test_responses_that_find_nothing_end_the_game_of_what_is_known():
    payoff = torch.eye(3, dtype=torch.float64)
    found = double_oracle(
        lambda i, j: payoff[i, j], lambda *_: 0, lambda *_: 0, rows=[0, 1], columns=[0, 1]
    )
    assert found.rows == found.columns == [0, 1]
    assert len(found.gaps) == 1
    assert found.upper == pytest.approx(0.5, abs=1e-6)  # of the whole game it is a third


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_game_that_is_cut_short_keeps_bounds_that_hold(rounds: int):
    payoff = torch.randn(20, 20, generator=torch.Generator().manual_seed(3)).double()
    found = grown(payoff, rounds=rounds)
    assert len(found.gaps) == rounds
    assert len(found.learner) == len(found.rows)
    assert found.lower <= equilibrium(payoff).value <= found.upper
    assert found.gap > 1e-3
    assert (found.learner @ payoff[found.rows]).max().item() == pytest.approx(found.upper)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "at least one row"),
        ({"columns": []}, "at least one row"),
        ({"tolerance": 0.0}, "tolerance above 0"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_what_is_no_start_is_refused(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        grown(torch.eye(2).double(), **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1.0, 2.0]])
def test_what_is_no_payoff_is_refused(bad: Any):
    with pytest.raises(ValueError, match="finite number for a row and a column"):
        double_oracle(lambda i, j: bad, lambda *_: 0, lambda *_: 0, [0], [0])
