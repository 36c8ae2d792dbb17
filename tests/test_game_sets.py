"""The sets of continuous games, and the gaps that are judged on their grids or by climbing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixadv.games import Ball, Box, ContinuousGame, Gaussian, Particles, Torus

seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, 3)
ends = st.tuples(st.floats(-5, 5), st.floats(0.01, 5))
boxes = st.lists(ends, min_size=1, max_size=3).map(
    lambda pairs: Box([low for low, _ in pairs], [low + width for low, width in pairs])
)
balls = st.builds(Ball, dims, st.floats(0.1, 5))
tori = st.builds(Torus, dims)
gaussians = st.builds(Gaussian, dims, st.floats(0.1, 5))
bounded = st.one_of(boxes, balls, tori)
spaces = st.one_of(bounded, gaussians)


def draws(space, count, seed, spread=1.0):
    """Points in and around the set."""
    noise = torch.Generator().manual_seed(seed)
    points = space.sample(count, noise, torch.float64)
    return points + spread * torch.randn(points.shape, generator=noise, dtype=torch.float64)


def distances(space, x, y):
    """Of all pairs, `[N, M]`."""
    apart = (x[:, None] - y[None]).abs()
    if isinstance(space, Torus):
        apart = torch.minimum(apart % 1, -apart % 1)
    return apart.norm(dim=2)


# Sets ------------------------------------------------------------------------------------------


@given(spaces, seeds, st.sampled_from([1e-18, 1e-3, 1.0, 100.0]))
def test_projection_brings_every_point_to_the_nearest_of_the_set(space, seed, spread):
    x = draws(space, 20, seed, spread)
    projected = space.project(x)
    assert space.holds(projected).all()
    torch.testing.assert_close(space.project(projected), projected, rtol=1e-12, atol=0)
    rivals = space.sample(50, torch.Generator().manual_seed(1), torch.float64)
    nearest = distances(space, x, rivals).min(1).values
    assert (distances(space, x, projected).diagonal() <= nearest + 1e-9).all()


@given(dims, seeds, st.sampled_from([1e-18, 1.0, 1e6]))
def test_circle_closes(dim, seed, spread):
    noise = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(20, dim, generator=noise, dtype=torch.float64)
    wrapped = Torus(dim).project(x)
    assert (wrapped >= 0).all()
    assert (wrapped < 1).all()
    assert torch.equal(Torus(dim).project(wrapped), wrapped)
    assert distances(Torus(dim), x, wrapped).diagonal().max() <= 1e-9 * max(1, spread)


@given(spaces, seeds)
def test_draws_lie_in_the_set_and_follow_from_the_seed(space, seed):
    x, again = (
        space.sample(50, torch.Generator().manual_seed(seed), torch.float64) for _ in range(2)
    )
    assert torch.equal(x, again)
    assert x.shape == (50, space.dim)
    torch.testing.assert_close(space.project(x), x, rtol=1e-12, atol=1e-12)
    assert distances(space, x, x).max() <= space.diameter * (1 + 1e-9) or not space.bounded


@given(bounded, seeds, st.integers(2, 9))
def test_every_point_of_the_set_is_near_a_node_of_the_grid(space, seed, size):
    nodes, log_weights = space.grid(size)
    assert space.holds(nodes).all()
    torch.testing.assert_close(log_weights.exp().sum(), torch.ones((), dtype=torch.float64))
    assert len(torch.unique(nodes, dim=0)) == len(nodes)
    x = space.sample(200, torch.Generator().manual_seed(seed), torch.float64)
    assert distances(space, x, nodes).min(1).values.max() <= space.covering(size) * (1 + 1e-12)


@given(gaussians, st.integers(40, 60))
def test_grid_of_a_gaussian_has_its_moments(space, size):
    nodes, log_weights = space.grid(size if space.dim < 3 else 21)
    second = nodes.T @ (log_weights.exp()[:, None] * nodes)
    expected = space.scale**2 * torch.eye(space.dim, dtype=torch.float64)
    torch.testing.assert_close(second, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("dim", "size"), [(1, 41), (2, 21), (3, 11)])
def test_grid_of_a_ball_has_the_second_moment_of_the_uniform_law(dim, size):
    points, log_weights = Ball(dim, 2.0).grid(size)
    found = (log_weights.exp() * points.square().sum(1)).sum()
    assert float(found) == pytest.approx(4 * dim / (dim + 2), rel=0.02)
    assert float(log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-12)


@given(gaussians, seeds)
def test_score_is_the_slope_of_the_log_density(space, seed):
    x = draws(space, 10, seed).requires_grad_()
    density = torch.distributions.Normal(torch.zeros_like(x), space.scale).log_prob(x).sum()
    torch.testing.assert_close(space.score(x), torch.autograd.grad(density, x)[0])
    fall = space.score(x) - space.score(x + 1)
    torch.testing.assert_close(fall, torch.full_like(x, space.curvature))


def kolmogorov(uniforms):
    """√n times the largest distance from the uniform distribution function."""
    ordered = uniforms.sort().values
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    apart = torch.maximum(steps[1:] - ordered, ordered - steps[:-1])
    return math.sqrt(len(ordered)) * apart.max().item()


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_draws_from_a_ball_are_uniform(dim):
    """‖x‖/R has distribution function r^d, a coordinate of a direction a symmetric one."""
    ball, count = Ball(dim, 3.0), 20_000
    x = ball.sample(count, torch.Generator().manual_seed(dim), torch.float64)
    assert kolmogorov((x.norm(dim=1) / 3) ** dim) < 1.95  # exceeded once in a thousand
    error = 3 / math.sqrt((dim + 2) * count)
    assert x.mean(0).abs().max() < 4 * error
    covariance = x.T @ x / count
    expected = 9 / (dim + 2) * torch.eye(dim, dtype=torch.float64)
    assert (covariance - expected).abs().max() < 4 * 9 / math.sqrt(count)


@pytest.mark.parametrize("space", [Box([-1.0, 2.0], [0.5, 2.5]), Torus(2)])
def test_draws_from_boxes_and_circles_are_uniform(space):
    x = space.sample(20_000, torch.Generator().manual_seed(0), torch.float64)
    low, high = (torch.tensor(v) for v in ((-1.0, 2.0), (0.5, 2.5)))
    unit = (x - low) / (high - low) if isinstance(space, Box) else x
    for coordinate in unit.T:
        assert kolmogorov(coordinate) < 1.95
    assert abs(np.corrcoef(unit.T.numpy())[0, 1]) < 4 / math.sqrt(len(x))


# Gaps ------------------------------------------------------------------------------------------


def cloud(space, count, seed):
    """Random points with random weights."""
    noise = torch.Generator().manual_seed(seed)
    points = space.sample(count, noise, torch.float64)
    return Particles(points, torch.randn(count, generator=noise).double().log_softmax(0))


def waves(seed, degree=3):
    """A random sum of waves in x and y: smooth, with many local maxima; and its slope's bound."""
    draw = torch.Generator().manual_seed(seed)
    shape = (2 * degree + 1, 2 * degree + 1)
    size, phase = torch.randn(shape, generator=draw).double(), torch.rand(shape, generator=draw)
    k = torch.arange(-degree, degree + 1).double()

    def payoff(x, y):
        angles = 2 * math.pi * (k[:, None] * x + k * y + phase)
        return (size * angles.cos()).sum()

    return payoff, 2 * math.pi * max((size.abs() * z.abs()).sum().item() for z in (k, k[:, None]))


@given(seeds, st.sampled_from([Torus(), Box(-0.3, 0.4), Box(0.0, 2.0)]), st.integers(1, 5))
def test_gap_on_a_grid_brackets_that_on_a_much_finer_one(seed, space, particles):
    payoff, lipschitz = waves(seed)
    mu, nu = cloud(space, particles, seed), cloud(space, particles, seed + 1)
    for size, bound in ((4, lipschitz), (37, lipschitz), (101, None)):
        game = ContinuousGame(payoff, space, space, lipschitz=bound)
        coarse = game.duality_gap(mu, nu, grid=size)
        # nodes of the coarse grid are among those of the fine one
        fine = game.duality_gap(mu, nu, grid=10 * size - 9 * (not isinstance(space, Torus)))
        assert coarse.kind == "grid"
        assert coarse.value <= fine.value + 1e-9
        assert fine.value <= coarse.value + coarse.error


def test_gap_on_a_grid_is_exact_where_best_responses_are_nodes():
    game = ContinuousGame(lambda x, y: (x * y).sum(), Box(-1, 1), Box(-1, 1))
    mu, nu = cloud(game.learner, 5, 0), cloud(game.adversary, 7, 1)
    for size in (2, 3, 100):
        torch.testing.assert_close(
            game.duality_gap(mu, nu, grid=size).value, (mu.mean.abs() + nu.mean.abs())[0]
        )


@settings(max_examples=15)
@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_gap_of_the_bilinear_game_is_known_in_every_dimension(seed, particles, dim):
    """On balls of radius R it is R·(|E x| + |E y|), on [−1, 1]^d the same in the sum norm."""
    for space, norm in ((Ball(dim, 2.0), 2), (Box(-1.0, 1.0, dim), 1)):
        game = ContinuousGame(lambda x, y: x @ y, space, space)
        mu, nu = cloud(space, particles, seed), cloud(space, particles, seed + 1)
        reach = space.radius if isinstance(space, Ball) else 1.0
        exact = reach * (mu.mean.norm(p=norm) + nu.mean.norm(p=norm)).item()
        found = game.duality_gap(mu, nu, restarts=8, steps=60)
        if dim < 3:
            assert found.kind == "grid"
            assert found.value <= exact * (1 + 1e-9) <= found.value + found.error + 1e-9
        else:
            assert found.kind == "lower bound"
            assert 0.98 * exact <= found.value <= exact * (1 + 1e-9)


@settings(max_examples=10)
@given(seeds)
def test_climbing_never_exceeds_the_gap_and_finds_it_among_many_local_maxima(seed):
    """Σ_i cos2π(x_i − y_i) on the torus of three dimensions has the gap of each circle, added."""

    def payoff(x, y):
        return (2 * math.pi * (x - y)).cos().sum()

    game = ContinuousGame(payoff, Torus(3), Torus(3))
    mu, nu = cloud(game.learner, 4, seed), cloud(game.adversary, 3, seed + 1)
    exact = sum(
        (side.weights.to(torch.cdouble) @ torch.exp(2j * math.pi * side.points)).abs().sum()
        for side in (mu, nu)
    )
    few, many = (game.duality_gap(mu, nu, restarts=k, steps=40).value for k in (1, 16))
    assert few <= exact * (1 + 1e-9)
    assert 0.99 * exact <= many <= exact * (1 + 1e-9)


def test_what_a_gap_is_worth_can_be_read():
    def text(space, lipschitz=None, **how):
        game = ContinuousGame(lambda x, y: x @ y, space, space, lipschitz=lipschitz)
        point = torch.full((1, space.dim), 0.5)
        return str(game.duality_gap(point, point, **how))

    assert text(Box(-1, 1)) == "1 + about 0.001 (a grid of 1001 and 1001 points)"
    assert text(Box(-1, 1, 2), grid=5).startswith("2 + about")
    assert text(Box(-1, 1), lipschitz=math.inf, grid=11).startswith("1 + about inf")
    climbed = text(Box(-1, 1, 3), restarts=7, steps=9)
    assert climbed == "≥ 3 (lower bound: projected gradient, 7 restarts × 9 steps)"
    unbounded = text(Gaussian(1, 2.0), grid=9)
    how = "(lower bound: a grid of 9 and 9 points within 6 standard deviations)"
    assert unbounded.endswith(how)
