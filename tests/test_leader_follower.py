"""A quadratic game of general sum, through `wrap`, against its closed answer (L1)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from theory.oracles import LeaderFollower

seeds = st.integers(0, 2**32 - 1)
SIZES = 3, 2  # of θ, of δ


def game(seed: int, steps: int = 3, weight: float = 0.4) -> LeaderFollower:
    """Return a game with a coupling that leaves M + Mᵀ positive definite."""
    draw = np.random.default_rng(seed)
    n, m = SIZES
    answer, coupling = draw.normal(size=(2, m, n))
    coupling *= 0.8 / np.linalg.norm(coupling, 2) / np.linalg.norm(answer, 2)
    return LeaderFollower(
        answer, coupling, *draw.normal(size=(2, n)), weight, draw.uniform(0.2, 0.9), steps
    )


class Played(nn.Module):
    """θ, and δ as it comes in; what the players minimise and maximise is in the closures."""

    def __init__(self, of: LeaderFollower) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(SIZES[0], dtype=torch.float64))
        self.of = {n: torch.tensor(getattr(of, n)) for n in ("answer", "coupling")}
        self.of |= {n: torch.tensor(getattr(of, n)) for n in ("centre", "anchor")}
        self.weight = of.weight
        self.nothing = torch.zeros(1, SIZES[1], dtype=torch.float64)

    def forward(self, delta: Tensor) -> Tensor:
        return delta

    def learner(self) -> Tensor:
        delta = self(self.nothing)[0]
        own = 0.5 * (self.theta - self.of["centre"]).square().sum()
        return own + delta @ self.of["coupling"] @ self.theta

    def adversary(self) -> Tensor:
        away = self(self.nothing) - self.of["answer"] @ self.theta
        return -0.5 * away.square().sum(1)

    def retain(self) -> Tensor:
        return 0.5 * self.weight * (self.theta - self.of["anchor"]).square().sum()

    @property
    def goals(self) -> dict[str, Callable[[], Tensor]]:
        return {"adversary": self.adversary, "retain": self.retain}


def built(of: LeaderFollower, rate: float, **words: Any) -> tuple[Played, mixadv.GameOptimizer]:
    model = Played(of)
    solver = mixadv.PGD(
        steps=of.ascent_steps,
        step_size=of.ascent_step,
        **{"radius": None, "unit": "absolute", "start": "zero", "normalize": "none"} | words,
    )
    base = torch.optim.SGD(model.parameters(), lr=rate)
    return model, mixadv.wrap(base, model, solver, site="input")


def rate_of(of: LeaderFollower) -> float:
    """Return the learner's step that brings it nearest in a round."""
    least = np.linalg.eigvalsh(of.matrix + of.matrix.T)[0]
    return float(least / (2 * np.linalg.norm(of.matrix, 2) ** 2))


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("seed", range(2))
def test_rounds_come_to_rest_at_the_closed_answer(seed: int, steps: int):
    of = game(seed, steps)
    model, optimizer = built(of, rate_of(of))
    for _ in range(70):
        optimizer.step(model.learner, **model.goals)
    np.testing.assert_allclose(model.theta.detach().numpy(), of.rest(), atol=1e-10)
    delta = optimizer.game.strategy.points[0][0, 0].numpy()
    np.testing.assert_allclose(delta, of.share * of.answer @ of.rest(), atol=1e-10)


@given(seeds)
def test_each_round_comes_nearer_by_the_rate(seed: int):
    of = game(seed)
    rate = rate_of(of)
    model, optimizer = built(of, rate)
    before = np.linalg.norm(1 - of.rest())
    assert of.rate(rate) < 1
    for _ in range(4):
        optimizer.step(model.learner, **model.goals)
        now = np.linalg.norm(model.theta.detach().numpy() - of.rest())
        assert now <= of.rate(rate) * before + 1e-12
        before = now


@pytest.mark.parametrize("seed", range(3))
def test_regret_is_the_closed_one(seed: int):
    of = game(seed, steps=1)
    model, optimizer = built(of, 0.1)
    optimizer.step(model.learner, **model.goals)
    theta = model.theta.detach().numpy()
    radius = 1.5 * float(np.linalg.norm(of.answer @ theta))
    wide, held = built(of, 0.1, radius=radius)
    wide.theta.data.copy_(model.theta)
    found = mixadv.equilibrium.exploitability(
        held.game, wide.learner, adversary=wide.adversary, steps=40
    )
    exact = of.regret(theta)
    assert float(found.gain) <= exact + 1e-12
    # It ends within a step of a quarter of the radius from the best response.
    assert float(found.gain) >= exact - 0.5 * (radius / 4) ** 2


@given(seeds)
def test_at_rest_no_player_gains_alone_and_a_leader_would_play_otherwise(seed: int):
    of = game(seed, steps=400)
    theta = torch.tensor(of.rest(), requires_grad=True)
    delta = torch.tensor(of.answer @ of.rest())
    a, b, c, anchor = (torch.tensor(x) for x in (of.answer, of.centre, of.coupling, of.anchor))

    def learner(theta: Tensor, delta: Tensor) -> Tensor:
        kept = 0.5 * of.weight * (theta - anchor).square().sum()
        return 0.5 * (theta - b).square().sum() + delta @ c @ theta + kept

    (slope,) = torch.autograd.grad(learner(theta, delta), theta)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    leader = torch.tensor(of.leader())
    foreseen = [float(learner(t, a @ t).detach()) for t in (leader, theta)]
    assert foreseen[0] < foreseen[1]
