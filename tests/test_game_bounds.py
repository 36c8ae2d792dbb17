"""The proved bounds, confronted with thousands of games."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixadv.games import MatrixGame, solve
from mixadv.maths import mirror
from tests.test_finite_games import trajectory
from theory import bounds, oracles, worst

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_gap_exceeds_its_bound_and_some_come_near(count):
    for trial, ratio in zip(worst.TRIALS, worst.survey(count, seed=count), strict=True):
        assert ratio <= 1, trial
        assert ratio >= 0.5, trial


def divergence(p, log_q):
    """KL(p‖q) over the last dimension."""
    p = torch.as_tensor(p)
    return (torch.xlogy(p, p) - p * log_q).sum(-1)


@given(seeds, st.integers(1, 12), st.integers(1, 12), st.floats(-1.5, 1), st.floats(0.1, 1))
def test_magnetic_descent_contracts_to_the_quantal_response(seed, m, n, log_tau, fraction):
    payoff = worst.Games(oracles.games(8, m, n, seed), np.random.default_rng()).unit().payoff
    tau = 10**log_tau
    step = fraction * float(bounds.magnetic_step(1.0, tau))
    exact = [oracles.quantal_response(game, tau) for game in payoff]
    x, y = trajectory(payoff, "magnetic", 60, temperature=tau, step_size=step)
    sides = [np.stack(side) for side in zip(*exact, strict=True)]
    apart = divergence(sides[0], x) + divergence(sides[1], y)
    assert (apart[0] <= np.log(m * n) + 1e-12).all()
    factor = bounds.magnetic_contraction(tau, step)
    assert (apart[1:] <= factor * apart[:-1] + 1e-12).all()
    gaps = torch.tensor(oracles.gap(payoff, *sides))
    assert (gaps <= bounds.quantal_response(m, n, tau) + 1e-9).all()


@given(seeds, st.integers(2, 6), st.integers(2, 6), st.floats(0.01, 5), st.floats(0.01, 5))
def test_last_strategies_of_hedge_never_approach_an_interior_equilibrium(seed, m, n, eta_x, eta_y):
    draw = np.random.default_rng(seed)
    x, y = draw.dirichlet(np.full(m, 3.0)), draw.dirichlet(np.full(n, 3.0))
    start = [torch.tensor(draw.dirichlet(np.full(k, 3.0))) for k in (m, n)]
    payoff = oracles.planted(x, y, 0.5, draw.uniform(-1, 1, (m, n)))
    played = trajectory(payoff, "hedge", 60, start, step_size=(eta_x, eta_y))
    apart = divergence(x, played[0]) / eta_x + divergence(y, played[1]) / eta_y
    assert (apart.diff() >= -1e-11 * apart[1:]).all()


@given(seeds, st.integers(2, 6), st.integers(2, 6), st.integers(1, 60), st.floats(0.2, 5))
def test_hedge_on_sampled_actions_keeps_its_bound_in_expectation(seed, m, n, steps, multiple):
    """Each player sees the payoffs against one action, drawn from the other's strategy."""
    replicas, payoff = 200, torch.tensor(oracles.games(1, m, n, seed)[0])
    range_ = float(payoff.max() - payoff.min())
    pair = tuple(multiple * eta for eta in bounds.hedge_steps(range_ or 1.0, m, n, steps))
    noise = torch.Generator().manual_seed(seed)
    x, y = (mirror.uniform(k).double().expand(replicas, k) for k in (m, n))
    mean_x, mean_y = torch.zeros_like(x), torch.zeros_like(y)
    for _ in range(steps):
        mean_x, mean_y = mean_x + x.exp() / steps, mean_y + y.exp() / steps
        row, column = (torch.multinomial(z.exp(), 1, generator=noise)[:, 0] for z in (x, y))
        x = mirror.step(x, -payoff[:, column].T, pair[0], -1)
        y = mirror.step(y, payoff[row], pair[1], -1)
    gaps = oracles.gap(payoff, mean_x, mean_y)
    error = 4.5 * gaps.std() / np.sqrt(replicas) + 1e-12 * float(payoff.abs().max())
    assert gaps.mean() <= bounds.noisy_hedge(range_, m, n, steps, pair) + error


def test_mixed_play_halves_the_risk_that_best_responses_cycle_around():
    payoff, expected = oracles.thresholds(2)
    pure = solve(MatrixGame(payoff), "best_response_dynamics", 50, start=([1, 0], [0, 1]))
    assert pure.gaps.tolist() == [1.0] * 50
    start = [0.9, 0.1], [0.2, 0.8]
    for name in ("hedge", "optimistic_hedge", "mirror_prox", "magnetic"):
        mixed = solve(MatrixGame(payoff), name, 2000, start=start)
        risk = MatrixGame(payoff).gains(mixed.learner).max().item()
        assert risk == pytest.approx(expected.value, abs=0.1)
        assert float(mixed.gap) < 0.1
