"""The weights of a mixture: against the linear program, and where no pure classifier will do."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixadv.mixtures import Mixture, weigh, weigh_under
from mixadv.mixtures.weighing import _projected
from tests.test_mixtures import X, three
from theory.oracles.finite import equilibrium


@st.composite
def matrices(draw: Any) -> Tensor:
    """Errors of up to 5 members under up to 8 attacks, with ties."""
    m, n, seed = draw(st.integers(1, 5)), draw(st.integers(1, 8)), draw(st.integers(0, 10**6))
    drawn = torch.rand(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.round(decimals=1) if draw(st.booleans()) else drawn


@given(matrices())
@settings(max_examples=20)
def test_weights_are_those_of_the_linear_program(payoff: Tensor):
    found, exact = weigh(payoff), equilibrium(payoff).value
    assert found.guaranteed - 1e-9 <= exact <= found.error + 1e-9
    assert found.gap <= 1e-6
    assert found.error <= payoff.amax(1).min() + 1e-12  # no worse than the best member alone
    for weights, count in ((found.probabilities, 0), (found.adversary, 1)):
        assert weights.shape == (payoff.shape[count],)
        assert weights.min() >= 0
        assert weights.sum().item() == pytest.approx(1)


@given(matrices(), st.floats(0.01, 0.6))
@settings(max_examples=15)
def test_the_gap_says_what_members_dropped_cost(payoff: Tensor, least: float):
    whole, found = weigh(payoff), weigh(payoff, least=least)
    kept = (whole.probabilities >= least) | (whole.probabilities == whole.probabilities.max())
    assert not found.probabilities[~kept].any()
    assert found.error == pytest.approx(equilibrium(payoff[kept]).value, abs=1e-6)
    assert found.gap == pytest.approx(
        equilibrium(payoff[kept]).value - equilibrium(payoff).value, abs=1e-6
    )


class Threshold(nn.Module):
    """Says class 1 above a threshold, or below it."""

    def __init__(self, at: float, sign: float) -> None:
        super().__init__()
        self.at, self.sign = nn.Parameter(torch.tensor(at)), sign

    def forward(self, x: Tensor) -> Tensor:
        score = 100 * self.sign * (x - self.at)
        return torch.cat([torch.zeros_like(score), score], 1)


def test_no_member_that_stays_is_below_the_least_share():
    """One that was above it may fall below once others are dropped."""
    source = torch.Generator().manual_seed(166)
    games = [torch.rand(6, 8, generator=source).double() for _ in range(13)]
    for payoff in (games[5], games[12]):
        found = weigh(payoff, least=0.15).probabilities
        assert found[found > 0].min() >= 0.15 - 1e-9


def test_every_threshold_loses_what_a_mixture_of_two_keeps():
    """One row at 0 with label 1, δ in [−1, 1]: any threshold inside is crossed by some δ.

    Thresholds at −½ (right above) and ½ (right below) are never crossed both.
    """
    deltas = torch.linspace(-1, 1, 41)[:, None]

    def errors(model: nn.Module) -> Tensor:
        return (model(deltas).argmax(1) != 1).double()

    for at in np.linspace(-0.99, 0.99, 34):  # of pure classifiers whose threshold is in reach
        assert all(errors(Threshold(float(at), sign)).max() == 1 for sign in (1, -1))
    mixture = Mixture([Threshold(-0.5, 1.0), Threshold(0.5, -1.0), Threshold(0.9, 1.0)])
    found = weigh(torch.stack([errors(m.module) for m in mixture.members]))  # pyright: ignore
    assert found.error == pytest.approx(0.5, abs=1e-6)
    assert found.probabilities[:2].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    sparse = mixture.weighed(weigh(found.errors, least=0.1).probabilities)
    assert len(sparse) == 2
    right = sparse.predict(lambda: sparse(deltas))[:, 1]
    assert right.min().item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("kind", ["models", "weights", "masks"])
def test_a_mixture_weighed_anew_has_the_same_members_without_those_of_weight_0(kind: str):
    mixture = three(kind)
    found = mixture.weighed([1, 0, 3])
    assert len(found) == 2
    assert found.probabilities.tolist() == [0.25, 0.75]
    each, whole = found.each(lambda: found(X)), mixture.each(lambda: mixture(X))
    assert torch.equal(each, whole[[0, 2]])
    assert len(mixture) == 3
    assert len(mixture.weighed([0, 0, 1])) == 1


def against(payoff: Tensor) -> Any:
    """Return the best attack on a mixture, of a finite set."""
    return lambda mixture: payoff[:, (mixture.probabilities @ payoff).argmax()]


def blank(members: int) -> Mixture:
    return Mixture([{} for _ in range(members)], model=nn.Linear(1, 1))


@given(matrices(), st.integers(1, 40))
@settings(max_examples=20)
def test_the_subgradient_comes_as_near_as_its_bound(payoff: Tensor, rounds: int):
    """(‖π₁ − π*‖² + Σ (η_t·‖g_t‖)²)/(2·Σ η_t) with ‖π₁ − π*‖² ≤ 2, at the best of all rounds."""
    found = weigh_under(blank(len(payoff)), against(payoff), rounds)
    exact = equilibrium(payoff).value
    steps = [1 / (t + 1) for t in range(rounds)]
    steepest = payoff.square().sum(0).max().item()
    bound = (2 + steepest * sum(s * s for s in steps)) / (2 * sum(steps))
    assert exact - 1e-9 <= found.error <= exact + bound + 1e-9
    assert found.guaranteed <= exact + 1e-9
    assert found.error - exact <= found.gap + 1e-9
    assert (found.probabilities @ payoff).amax().item() == pytest.approx(found.error)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_projection_is_onto_the_nearest_point_of_the_simplex(values: list[float]):
    """A point p is it exactly where ⟨v − p, e_i − p⟩ ≤ 0 for all corners."""
    v = torch.tensor(values, dtype=torch.float64)
    p = _projected(v)
    assert p.min() >= 0
    assert p.sum().item() == pytest.approx(1)
    assert ((torch.eye(len(v), dtype=v.dtype) - p) @ (v - p)).max() <= 1e-9


def test_an_attack_that_fails_on_its_own_mixture_does_not_make_it_look_best():
    """The third attack finds nothing, and the mixture it was made for falls to the first."""
    made = iter([[0.9, 0.2], [0.3, 0.8], [0.0, 0.0]])
    found = weigh_under(blank(2), lambda m: torch.tensor(next(made)), 3)
    assert found.error >= found.guaranteed > 0.4


def test_a_mixture_that_is_weighed_is_left_as_it_is():
    mixture = three("models")
    before = mixture.probabilities.clone()
    found = weigh_under(mixture, lambda m: torch.tensor([0.1, 0.2, 0.9]), 5)
    assert torch.equal(before, mixture.probabilities)
    assert found.probabilities[0] > found.probabilities[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weigh(torch.rand(2, 3, 4)), r"\[members, attacks\]"),
        (lambda: weigh([[math.nan]]), "finite"),
        (lambda: weigh([[1.0]], least=2), "least"),
        (lambda: weigh_under(blank(2), lambda m: torch.rand(3)), "2 finite errors"),
        (lambda: weigh_under(blank(1), lambda m: torch.tensor([math.nan])), "1 finite errors"),
        (lambda: weigh_under(blank(1), lambda m: torch.rand(1), 0), "rounds"),
        (lambda: three("models").weighed([1, 2]), "3 numbers"),
    ],
)
def test_what_is_no_weighing_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
