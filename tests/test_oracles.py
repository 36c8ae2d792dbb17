"""The oracles agree with one another: programs, quadrature and formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from theory import bounds, oracles

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 8)
scales = st.sampled_from([1.0, 1e-12, 1e12])


def interior(draw, size):
    return draw.dirichlet(np.full(size, 2.0))


def closed_forms(seed, m, n, scale):
    """One game of each family whose equilibrium is a formula, with that equilibrium."""
    draw = np.random.default_rng(seed)
    x, y, noise = interior(draw, m), interior(draw, n), draw.standard_normal((m, n))
    yield oracles.planted(x, y, 3.0, noise), oracles.Equilibrium(3.0, x, y)
    yield oracles.diagonal(draw.uniform(0.1, 2, m))
    yield oracles.two_by_two(2.0 + draw.random(), draw.random(), draw.random(), 2.0 + draw.random())
    yield oracles.circulant(draw.standard_normal(m))
    yield oracles.thresholds(m)


@given(seeds, sizes, sizes, scales)
def test_linear_program_finds_the_value_of_every_closed_form(seed, m, n, scale):
    for payoff, expected in closed_forms(seed, m, n, scale):
        spread = max(np.ptp(payoff), 1e-3)
        assert oracles.gap(payoff, expected.x, expected.y) == pytest.approx(0, abs=1e-12 * spread)
        found = oracles.equilibrium(scale * payoff)
        assert found.value == pytest.approx(scale * expected.value, rel=1e-9)
        assert found.value == pytest.approx(scale * (found.x @ payoff @ found.y), rel=1e-9)


def test_linear_program_solves_awkward_games_of_every_scale():
    for batch in oracles.batches(400, seed=0):
        for payoff in batch:
            found = oracles.equilibrium(payoff)  # checks its own gap
            assert found.x.shape + found.y.shape == payoff.shape
            slack = 1e-9 * np.ptp(payoff)
            assert payoff.min() - slack <= found.value <= payoff.max() + slack


def test_games_with_a_saddle_point_are_not_mixed():
    with pytest.raises(ValueError, match="saddle point"):
        oracles.two_by_two(1.0, 2.0, 3.0, 4.0)


def test_awkward_games_come_in_every_shape_and_number():
    found = oracles.batches(101, seed=3)
    assert sum(len(batch) for batch in found) == 101
    assert {batch.shape[1:] for batch in found} >= {(1, 1), (1, 6), (6, 1), (12, 12)}
    assert np.array_equal(found[4], oracles.batches(101, seed=3)[4])
    stack = oracles.games(600, 3, 3, seed=0)
    assert (np.ptp(stack, axis=(1, 2)) == 0).any()
    assert abs(stack).max() > 1e11


# Entropy and quadrature --------------------------------------------------------------------------


@given(seeds, sizes, sizes, st.floats(-3, 1), scales)
def test_quantal_response_is_a_saddle_within_its_bound(seed, m, n, log_temperature, scale):
    draw = np.random.default_rng(seed)
    payoff, tau = scale * draw.standard_normal((m, n)), scale * 10**log_temperature
    x, y = oracles.quantal_response(payoff, tau)
    entropy = -(x @ np.log(x, where=x > 0, out=np.zeros(m)))
    entropy -= y @ np.log(y, where=y > 0, out=np.zeros(n))
    slack = 1e-9 * (tau + np.ptp(payoff))
    assert oracles.gap(payoff, x, y) <= tau * entropy + slack
    assert tau * entropy <= bounds.quantal_response(m, n, tau) + slack

    def pays(x, y):
        return x @ payoff @ y + tau * (x @ np.log(x + 1e-300) - y @ np.log(y + 1e-300))

    for _ in range(5):
        assert pays(interior(draw, m), y) >= pays(x, y) - slack
        assert pays(x, interior(draw, n)) <= pays(x, y) + slack


def scalar_game(seed):
    draw = np.random.default_rng(seed)
    a, b = draw.uniform(0.7, 2, 2)
    return (a, b, *draw.normal(0, 0.7, 3))


@given(seeds, st.floats(0.2, 1))
def test_quadrature_finds_the_gaussian_equilibrium_of_a_quadratic_game(seed, temperature):
    a, b, c, p, q = scalar_game(seed)
    line = oracles.interval(-9.0, 9.0, 80)
    x, y = line.points[:, None], line.points
    payoff = a * x**2 / 2 + c * x * y - b * y**2 / 2 + p * x + q * y
    laws = oracles.quantal_response(payoff, temperature, line.masses, line.masses)
    means = oracles.scalar_means(a, b, c, p, q)
    for law, mean, curvature in zip(laws, means, (a, b), strict=True):
        assert law @ line.points == pytest.approx(mean, abs=1e-6)
        assert law @ (line.points - mean) ** 2 == pytest.approx(temperature / curvature, abs=1e-6)


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_derivatives_read_a_quadratic_game_back_and_its_means_are_its_saddle(seed, d, e):
    draw = np.random.default_rng(seed)
    square = [
        z @ z.T + np.eye(len(z)) for z in (draw.normal(size=(d, d)), draw.normal(size=(e, e)))
    ]
    parts = *square, draw.normal(size=(d, e)), draw.normal(size=d), draw.normal(size=e)
    a, b, c, p, q = (torch.tensor(z) for z in parts)

    def payoff(x, y):
        return x @ a @ x / 2 + x @ c @ y - y @ b @ y / 2 + p @ x + q @ y

    game = oracles.quadratic(payoff, d, e)
    for found, expected in zip(game, parts, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    saddle = [torch.tensor(z) for z in game.means()]
    for slope in torch.func.grad(payoff, (0, 1))(*saddle):
        assert slope.abs().max() < 1e-10
    anchored = game.anchored(0.5, 2.0)
    np.testing.assert_allclose(anchored.a - game.a, np.eye(d) / 8, atol=1e-12)
    if (d, e) == (1, 1):
        expected = oracles.scalar_means(*(z.item() for z in parts))
        np.testing.assert_allclose(np.ravel(game.means()), expected, atol=1e-12)


@given(seeds, st.floats(0.1, 3), st.floats(0.5, 2))
def test_a_gaussian_reference_is_the_equilibrium_of_every_bilinear_game(seed, temperature, width):
    """E2: both players' measures are their reference, whatever couples them."""
    coupling = np.random.default_rng(seed).normal(size=(3, 2))
    nothing = [np.zeros((3, 3)), np.zeros((2, 2)), coupling, np.zeros(3), np.zeros(2)]
    game = oracles.Quadratic(*nothing).anchored(temperature, width)
    for law in game.equilibrium(temperature):
        np.testing.assert_allclose(law.mean, 0, atol=1e-12)
        np.testing.assert_allclose(law.covariance, width**2 * np.eye(len(law.mean)), atol=1e-12)


def test_hessian_of_the_divergence_is_the_fisher_matrix():
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    x = torch.randn(4, dtype=torch.float64)
    clean = net(x).log_softmax(-1).detach()
    directions = {
        "KL": lambda z: (clean.exp() * (clean - net(z).log_softmax(-1))).sum(),
        "reverse": lambda z: (net(z).softmax(-1) * (net(z).log_softmax(-1) - clean)).sum(),
    }
    for divergence in directions.values():
        expected = torch.func.jacrev(torch.func.jacrev(divergence))(x)
        torch.testing.assert_close(oracles.divergence_hessian(net, x), expected)
