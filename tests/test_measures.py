"""Continuous games with known equilibria, their grids, and mirror descent on both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixadv.maths import mirror
from tests.test_oracles import interior
from theory import bounds, oracles

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 8)


def nodes(example, count):
    low, high = example.bounds
    if example.periodic:
        return low + (high - low) * np.arange(count) / count
    return np.linspace(low, high, count)


@pytest.mark.parametrize("name", oracles.EXAMPLES)
def test_no_point_gains_against_the_equilibrium_of_a_continuous_example(name):
    example = oracles.EXAMPLES[name]
    z = nodes(example, 2001)
    losses = example.adversary.mean(example.payoff(z[:, None], example.adversary.points))
    gains = example.learner.mean(example.payoff(example.learner.points, z[:, None]))
    # the duel's density is a quadrature rule, and its payoff jumps where the two points meet
    tolerance = 5e-3 if name == "silent duel" else 1e-6
    assert losses.min() == pytest.approx(example.value, abs=tolerance)
    assert gains.max() == pytest.approx(example.value, abs=tolerance)
    for player in (example.learner, example.adversary):
        assert player.masses.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", oracles.EXAMPLES)
def test_linear_program_on_a_grid_finds_the_value_of_a_continuous_example(name):
    example = oracles.EXAMPLES[name]
    z = nodes(example, 81)
    value = oracles.equilibrium(example.payoff(z[:, None], z)).value
    assert value == pytest.approx(example.value, abs=2e-2 if name == "silent duel" else 2e-3)


def test_tensors_and_arrays_are_paid_alike():
    z = np.linspace(-0.9, 0.9, 7)
    for example in oracles.EXAMPLES.values():
        expected = example.payoff(z[:, None], z)
        found = example.payoff(torch.tensor(z)[:, None], torch.tensor(z))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@given(seeds, st.integers(1, 6))
def test_gap_of_the_cosine_game_is_the_sum_of_the_first_harmonics(seed, count):
    draw = np.random.default_rng(seed)
    x, y = (oracles.Measure(draw.random(count), interior(draw, count)) for _ in range(2))
    payoff, z = oracles.EXAMPLES["cosine"].payoff, np.arange(2000) / 2000
    gains, losses = x.mean(payoff(x.points, z[:, None])), y.mean(payoff(z[:, None], y.points))
    expected = oracles.first_harmonic(x) + oracles.first_harmonic(y)
    assert gains.max() - losses.min() == pytest.approx(expected, abs=1e-5)


def trigonometric(seed, degree=2):
    game = oracles.trigonometric(degree, seed)
    return game, (game.lipschitz, (1, 1))


@given(seeds)
def test_a_gap_on_a_grid_lacks_at_most_the_error_of_the_grid(seed):
    game, smoothness = trigonometric(seed)
    coarse, fine = oracles.circle(24), oracles.circle(960)
    found = oracles.equilibrium(game.payoff(coarse.points, coarse.points))
    gains = found.x @ game.payoff(coarse.points, fine.points)
    losses = game.payoff(fine.points, coarse.points) @ found.y
    gap = gains.max() - losses.min()
    assert 0 <= gap <= bounds.grid_error((1 / 24, 1 / 24), *smoothness)
    slopes = np.gradient(game.payoff(fine.points, fine.points), 1 / 960)
    assert abs(slopes[0]).max() <= game.lipschitz[0] * (1 + 1e-9)
    assert abs(slopes[1]).max() <= game.lipschitz[1] * (1 + 1e-9)


@given(seeds, st.floats(-3, 0.5))
def test_entropy_costs_at_most_its_bound_on_the_torus(seed, log_temperature):
    game, smoothness = trigonometric(seed)
    circle, tau = oracles.circle(80), 10**log_temperature
    payoff = game.payoff(circle.points, circle.points)
    x, y = oracles.quantal_response(payoff, tau, circle.masses, circle.masses)
    assert oracles.gap(payoff, x, y) <= bounds.regularised_torus(tau, *smoothness)


def hedge(payoff, step_size, steps, log_x, log_y):
    """Mean strategies of the library's mirror step, from the given log-weights."""
    payoff, x, y = torch.tensor(payoff), torch.tensor(log_x), torch.tensor(log_y)
    mean_x, mean_y = torch.zeros_like(x), torch.zeros_like(y)
    for _ in range(steps):
        mean_x += x.exp() / steps
        mean_y += y.exp() / steps
        losses, gains = payoff @ y.exp(), payoff.T @ x.exp()
        x, y = mirror.step(x, -losses, step_size), mirror.step(y, gains, step_size)
    return mean_x.numpy(), mean_y.numpy()


@given(seeds, st.integers(1, 150), st.floats(0.05, 4))
def test_hedge_on_the_circle_keeps_its_bound_without_a_dimension(seed, steps, multiple):
    game, smoothness = trigonometric(seed)
    circle = oracles.circle(256)
    payoff = game.payoff(circle.points, circle.points)
    range_, start = np.ptp(payoff), np.log(circle.masses)
    step_size = multiple / range_
    x, y = hedge(payoff, step_size, steps, start, start)
    gap = oracles.gap(payoff, x, y)
    assert gap <= bounds.continuous_hedge(range_, *smoothness, steps, step_size)


@given(seeds, sizes, sizes, st.integers(1, 100), st.floats(0.01, 3))
def test_hedge_keeps_its_bound_against_any_comparator_from_any_start(seed, m, n, steps, step_size):
    draw = np.random.default_rng(seed)
    payoff, starts = draw.standard_normal((m, n)), (interior(draw, m), interior(draw, n))
    x, y = hedge(payoff, step_size, steps, *(np.log(z) for z in starts))
    rivals = interior(draw, m), interior(draw, n)
    apart = sum(r @ np.log(r / s) for r, s in zip(rivals, starts, strict=True))
    gain = x @ payoff @ rivals[1] - rivals[0] @ payoff @ y
    assert gain <= bounds.measure_hedge(apart, np.ptp(payoff), steps, step_size) + 1e-9
