"""Langevin chains whose law is known exactly, at every step size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixadv.maths import langevin
from theory import bounds, oracles

seeds = st.integers(0, 2**32 - 1)


@given(st.floats(0.1, 3), st.floats(0.05, 1.9), st.floats(0.01, 2), st.integers(0, 30))
def test_variance_of_a_linear_chain_follows_its_recursion(curvature, contact, temperature, steps):
    step_size, variance = contact / curvature, 0.7
    for _ in range(steps):
        variance = (1 - contact) ** 2 * variance + 2 * step_size * temperature
    found = bounds.langevin_variance(curvature, step_size, temperature, steps, 0.7)
    assert found == pytest.approx(variance)
    limit = bounds.langevin_variance(curvature, step_size, temperature)
    matrix = oracles.langevin_covariance([[curvature]], step_size, temperature)
    assert matrix == pytest.approx(np.array([[limit]]))


def descent_ascent(particles=7):
    draw = np.random.default_rng(5)
    square = [
        z @ z.T / 4 + np.eye(len(z)) for z in (draw.normal(size=(2, 2)), draw.normal(size=(3, 3)))
    ]
    parts = *square, draw.normal(size=(2, 3)), draw.normal(size=2), draw.normal(size=3)
    return oracles.DescentAscent(oracles.Quadratic(*parts), 0.1, 0.3, particles)


def test_stationary_law_of_the_means_is_where_their_recursion_stays():
    chain = descent_ascent()
    limit = chain.stationary()
    later = chain.means(limit.mean + 1.0, 400)
    np.testing.assert_allclose(later.mean, limit.mean, atol=1e-9)
    np.testing.assert_allclose(later.covariance, limit.covariance, atol=1e-9)
    with pytest.raises(ValueError, match="spectral radius"):
        chain._replace(step_size=3.0).stationary()


def test_particles_have_means_and_clouds_of_the_linear_recursion():
    """Many replicas of seven particles against seven, moved by the library's Langevin step."""
    chain, replicas, steps = descent_ascent(), 4000, 25
    game, tau = chain.game, chain.temperature
    a, b, c, p, q = (torch.tensor(z) for z in game)
    noise = torch.Generator().manual_seed(0)

    def step(z, drift):
        draw = torch.randn(z.shape, dtype=z.dtype, generator=noise)
        return langevin.step(z, drift, chain.step_size, tau, lambda like: draw)

    x, y = torch.ones(replicas, 7, 2).double(), torch.ones(replicas, 7, 3).double()
    for _ in range(steps):
        mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = (
            step(x, -(x @ a + mean_y @ c.T + p)),
            step(y, -(y @ b) + mean_x @ c + q),
        )
    law = chain.means(np.ones(5), steps)
    means = torch.cat([x.mean(1), y.mean(1)], -1).numpy()
    errors = np.sqrt(np.diag(law.covariance) / replicas)
    assert (abs(means.mean(0) - law.mean) < 4.5 * errors).all()
    spread, variances = np.cov(means.T), np.diag(law.covariance)
    allowed = np.sqrt((np.outer(variances, variances) + law.covariance**2) / replicas)
    assert (abs(spread - law.covariance) < 4.5 * allowed).all()
    for cloud, limit, curvature in zip((x, y), chain.clouds(), (game.a, game.b), strict=True):
        inside = cloud - cloud.mean(1, keepdim=True)
        found = (inside.mT @ inside).mean(0).numpy() / 6
        matrix = np.linalg.matrix_power(np.eye(len(limit)) - chain.step_size * curvature, steps)
        expected = limit - matrix @ limit @ matrix.T
        variances = np.diag(expected)
        allowed = np.sqrt((np.outer(variances, variances) + expected**2) / (6 * replicas))
        assert (abs(found - expected) < 4.5 * allowed).all()


def double_well(x):
    return (x**2 - 1) ** 2


def drift(x):
    return -4 * x * (x**2 - 1)


def test_projected_chain_in_a_double_well_has_the_law_of_its_kernel():
    """Its atoms and its first harmonics, after one step and after forty."""
    low, high, gamma, tau, chains = -1.1, 1.3, 0.05, 0.3, 40_000
    exact = oracles.ProjectedLangevin(low, high, gamma, tau)
    kernel = exact.kernel(drift(exact.points))

    def features(x):
        waves = [np.cos(k * np.pi * (x - low) / (high - low)) for k in range(1, 7)]
        return np.stack([x == low, x == high, *waves]).astype(float)

    noise = torch.Generator().manual_seed(0)
    x, law = torch.full((chains,), high).double(), np.eye(len(kernel))[-1]
    for step in range(1, 41):
        draw = torch.randn(chains, dtype=torch.float64, generator=noise)
        x = langevin.step(
            x, drift(x), gamma, tau, lambda _, z=draw: z, lambda z: z.clamp(low, high)
        )
        law = law @ kernel
        if step in (1, 40):
            values = features(exact.points)
            expected = values @ law
            errors = np.sqrt((values**2 @ law - expected**2) / chains)
            assert (abs(features(x.numpy()).mean(1) - expected) < 4.5 * errors).all()


def test_projected_chain_tends_to_the_gibbs_measure_and_to_its_own_law_before():
    tau, quadratic = 0.3, {}
    reference = oracles.interval(-1.5, 1.5, 400)
    gibbs = oracles.gibbs(double_well, tau, reference)
    target = gibbs.mean(gibbs.points**2)
    for gamma in (0.02, 0.01, 0.005):
        exact = oracles.ProjectedLangevin(-1.5, 1.5, gamma, tau, 300)
        law = exact.law(drift(exact.points))
        assert law.masses.min() > -1e-12
        quadratic[gamma] = abs(law.mean(law.points**2) - target)
    assert quadratic[0.005] < quadratic[0.01] < quadratic[0.02] < 0.1
    wide = oracles.ProjectedLangevin(-8.0, 8.0, 0.2, 0.4, 300)
    free = wide.law(-wide.points)
    expected = bounds.langevin_variance(1.0, 0.2, 0.4)
    assert free.mean(free.points**2) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ArithmeticError, match="more nodes"):
        oracles.ProjectedLangevin(-1.0, 1.0, 1e-6, 0.1, 50).kernel(np.zeros(52))


@given(seeds, st.integers(1, 20), st.floats(0, 1))
def test_damping_of_a_sequence_is_its_closed_form(seed, steps, damping):
    start, *samples = np.random.default_rng(seed).standard_normal((steps + 1, 3))
    mean = start
    for sample in samples:
        mean = damping * mean + (1 - damping) * sample
    np.testing.assert_allclose(oracles.damped(start, samples, damping), mean, atol=1e-12)
