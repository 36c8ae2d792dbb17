"""Langevin particles have the exact law of their discretised chain: means, moments, atoms at ends.

A sum over coordinates of one payoff is as many independent games, so one run of a game in R
dimensions is R replicates, and each statement has its standard error.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixadv.games import Box, ContinuousGame, Gaussian, Langevin, Torus, solve
from theory import bounds, oracles

WIDE = 1e3
SIGMAS = 4.5


def run(game, x, y, steps, **parameters):
    """Yield both clouds `[N, R]` of every step, the start included."""
    method = Langevin(**parameters)
    draw = game.generator(0)
    players = method.play(game.particles(x), game.particles(y), game, steps, draw)
    clouds = next(players)
    for _ in range(steps):
        yield clouds.x.points, clouds.y.points
        clouds = players.send(game.slopes(clouds.x, clouds.y))
    yield clouds.x.points, clouds.y.points


def end(*args, **parameters):
    *_, last = run(*args, **parameters)
    return last


def agree(samples, mean, variance):
    """Sample means `[.., K]` of K replicates lie within standard errors of the exact mean."""
    error = np.sqrt(np.asarray(variance) / samples.shape[-1])
    assert (abs(samples.mean(-1).numpy() - mean) <= SIGMAS * error + 1e-12).all()


# Quadratic payoffs -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 60])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (3, 9)])
def test_means_of_clouds_follow_their_linear_recursion(steps, n, m):
    """With its variance; and so does the variance within a cloud, that of independent chains."""
    a, b, c, p, q = 1.5, 0.8, 1.2, 0.4, -0.7
    gamma, tau, replicates = 0.15, 0.3, 3000

    def payoff(x, y):
        return (a / 2 * x**2 + c * x * y - b / 2 * y**2 + p * x + q * y).sum()

    space = Box(-WIDE, WIDE, replicates)
    game = ContinuousGame(payoff, space, space)
    ones = torch.ones(1, replicates).double()
    clouds = end(
        game, ones.expand(n, -1), -2 * ones.expand(m, -1), steps, step_size=gamma, temperature=tau
    )
    matrix = np.eye(2) - gamma * np.array([[a, c], [-c, b]])
    mean, covariance = np.array([1.0, -2.0]), np.zeros((2, 2))
    for _ in range(steps):
        mean = matrix @ mean + gamma * np.array([-p, q])
        covariance = matrix @ covariance @ matrix.T + 2 * gamma * tau * np.diag([1 / n, 1 / m])
    if n == m:
        one = np.eye(1)
        known = oracles.DescentAscent(
            oracles.Quadratic(a * one, b * one, c * one, p * np.ones(1), q * np.ones(1)),
            gamma, tau, n,
        ).means([1.0, -2.0], steps)  # fmt: skip
        np.testing.assert_allclose(known.covariance, covariance)
        np.testing.assert_allclose(known.mean, mean)
    means = torch.stack([cloud.mean(0) for cloud in clouds])
    agree(means, mean, np.diag(covariance))
    products = (means - torch.tensor(mean)[:, None])[:, None] * (
        means - torch.tensor(mean)[:, None]
    )
    spread = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    agree(products, covariance, spread)
    for cloud, curvature in zip(clouds, (a, b), strict=True):
        exact = bounds.langevin_variance(curvature, gamma, tau, steps)
        agree(cloud.var(0), exact, 2 * exact**2 / (len(cloud) - 1))


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_second_moments_of_a_quadratic_are_those_of_the_matrix_chain(seed):
    """Thousands of independent chains of three correlated coordinates against one opponent."""
    draw = np.random.default_rng(seed)
    root = draw.standard_normal((3, 3))
    curvature = root @ root.T / 3 + 0.3 * np.eye(3)
    a = torch.tensor(curvature)
    gamma, tau, chains = 1.0 / np.linalg.eigvalsh(curvature)[-1], 0.4, 4000
    game = ContinuousGame(lambda x, y: x @ a @ x / 2 + 0 * y.sum(), Box(-WIDE, WIDE, 3), Box())
    exact = oracles.langevin_covariance(curvature, gamma, tau)
    begin = torch.tensor(draw.multivariate_normal(np.zeros(3), exact, chains))
    x, _ = end(game, begin, torch.zeros(1, 1), 12, step_size=gamma, temperature=tau)
    agree(x.T, np.zeros(3), np.diag(exact))
    products = (x[:, :, None] * x[:, None]).permute(1, 2, 0)
    agree(products, exact, np.outer(np.diag(exact), np.diag(exact)) + exact**2)


@pytest.mark.parametrize("coupling", [0.0, 0.7, 3.0])
def test_bilinear_particles_with_a_gaussian_reference_keep_its_law(coupling):
    """Whatever the coupling: the clouds' variance is that of the reference and the step's bias."""
    scale, tau, gamma, n, pairs = 0.8, 0.5, 0.1, 5, 2000
    c = coupling * torch.tensor([[1.0, 0.3], [-0.5, 0.8]]).double()

    def payoff(x, y):
        return ((x.view(pairs, 2) @ c) * y.view(pairs, 2)).sum()

    space = Gaussian(2 * pairs, scale)
    game = ContinuousGame(payoff, space, space)
    x, y = (space.sample(n, game.generator(k), game.dtype) for k in (1, 2))
    x, y = end(game, x, y, 60, step_size=gamma, temperature=tau)
    exact = bounds.langevin_variance(tau / scale**2, gamma, tau, 60, scale**2)
    for cloud in (x, y):
        agree(cloud.var(0), exact, 2 * exact**2 / (n - 1))
    zero = np.zeros((2, 2))
    game = oracles.Quadratic(zero, zero, c.numpy(), np.zeros(2), np.zeros(2))
    chain = oracles.DescentAscent(game.anchored(tau, scale), gamma, tau, n)
    matrix = np.linalg.matrix_power(chain.transition, 60)
    known = chain.means(np.zeros(4), 60).covariance + scale**2 / n * matrix @ matrix.T
    means = torch.cat([z.mean(0).view(pairs, 2) for z in (x, y)], 1).T
    products = means[:, None] * means
    agree(products, known, np.outer(np.diag(known), np.diag(known)) + known**2)


def test_magnetic_descent_on_a_grid_solves_quadratic_games_with_entropy():
    """E1 on an interval so wide that its ends do not matter, and E2 with a Gaussian reference."""
    a, b, c, p, q, tau = 1.0, 1.5, 0.8, 0.5, -0.4, 0.4

    def payoff(x, y):
        return (a / 2 * x**2 + c * x * y - b / 2 * y**2 + p * x + q * y).sum()

    box = Box(-6.0, 6.0)
    played = {"temperature": tau, "step_size": 0.05, "progress": False, "grid": 121}
    found = solve(ContinuousGame(payoff, box, box), "magnetic", 2000, **played)
    means = oracles.scalar_means(a, b, c, p, q)
    for side, mean, variance in zip(
        (found.learner, found.adversary), means, (tau / a, tau / b), strict=True
    ):
        assert side.mean.item() == pytest.approx(mean, abs=1e-6)
        second = (side.weights @ (side.points - mean) ** 2).item()
        assert second == pytest.approx(variance, rel=1e-6)
    line = Gaussian(1, 1.3)
    coupled = ContinuousGame(lambda x, y: 2.0 * (x * y).sum() + (x - y).sum(), line, line)
    found = solve(coupled, "magnetic", 3000, **{**played, "step_size": 0.02})
    one, pull = np.ones(1), tau / 1.3**2
    game = oracles.Quadratic(0 * np.eye(1), 0 * np.eye(1), 2 * np.eye(1), one, -one)
    for side, mean in zip(
        (found.learner, found.adversary), game.anchored(tau, 1.3).means(), strict=True
    ):
        assert side.mean.item() == pytest.approx(mean[0], abs=1e-5)
        second = (side.weights @ (side.points - mean[0]) ** 2).item()
        assert second == pytest.approx(tau / pull, rel=1e-5)


# Intervals and circles ---------------------------------------------------------------------------


def well(x):
    return (x**2 - 1) ** 2 + 0.2 * x


def downhill(x):
    return -4 * x * (x**2 - 1) - 0.2


@pytest.mark.parametrize("gamma", [0.12, 0.03])
def test_projected_particles_have_the_law_of_their_kernel_with_its_atoms(gamma):
    """From the right end, and from the stationary law, where they stay; and both players alike."""
    low, high, tau, count = -1.15, 1.3, 0.4, 20_000
    exact = oracles.ProjectedLangevin(low, high, gamma, tau)
    kernel = exact.kernel(downhill(exact.points))
    space = Box(low, high, 10)
    game = ContinuousGame(lambda x, y: (well(x) - well(y)).sum(), space, space)
    stationary = exact.law(downhill(exact.points)).masses
    begins = {
        "end": (np.eye(len(kernel))[-1], torch.full((count // 10, 10), high).double()),
        "law": (stationary, torch.tensor(
            np.random.default_rng(0).choice(exact.points, (count // 10, 10),
                                            p=stationary.clip(0) / stationary.clip(0).sum())
        )),
    }  # fmt: skip
    points = exact.points
    waves = [np.cos(k * np.pi * (points - low) / (high - low)) for k in range(1, 6)]
    features = np.stack([points == low, points == high, *waves])
    for law, begin in begins.values():
        steps = 15
        # one opponent is enough: it does not matter to the gradients
        x, _ = end(game, begin, begin[:1], steps, step_size=gamma, temperature=tau)
        _, y = end(game, begin[:1], begin, steps, step_size=gamma, temperature=tau)
        later = law @ np.linalg.matrix_power(kernel, steps)
        expected = features @ later
        variance = features**2 @ later - expected**2
        for cloud in (x, y):
            z = cloud.flatten()
            seen = [(z == low).double(), (z == high).double()]
            seen += [(k * math.pi * (z - low) / (high - low)).cos() for k in range(1, 6)]
            agree(torch.stack(seen), expected, variance)
    assert stationary[0] > 0.02  # the atoms are there to be seen


def test_bias_of_the_projected_chain_vanishes_with_its_step():
    """Distribution functions come as near to that of Gibbs as √γ, by the atoms at the ends."""
    low, high, tau = -1.15, 1.3, 0.4
    gibbs = oracles.gibbs(well, tau, oracles.interval(low, high, 400))
    apart = []
    for gamma in (0.04, 0.01, 0.0025):
        chain = oracles.ProjectedLangevin(low, high, gamma, tau, 400)
        law = chain.law(downhill(chain.points))
        below = law.masses.cumsum()[:-1]  # the atom at the right end comes last
        apart.append(abs(below - np.r_[0.0, gibbs.masses.cumsum()]).max())
        assert law.masses[0] + law.masses[-1] > 0.5 * apart[-1]
    assert apart[2] < 0.6 * apart[1] < 0.36 * apart[0] < 0.05


def mean_field(example, gamma, tau, steps, nodes):
    """The law of both players' infinite clouds after each step, from the uniform law."""
    low, high = example.bounds
    chain = oracles.ProjectedLangevin(low, high, gamma, tau, nodes)
    z = torch.tensor(chain.points)
    slope_x, slope_y = (
        torch.func.vmap(torch.func.vmap(torch.func.grad(example.payoff, k), (None, 0)), (0, None))
        for k in (0, 1)
    )
    fx, fy = slope_x(z, z).numpy(), slope_y(z, z).numpy()
    x = y = np.r_[0.0, oracles.interval(low, high, nodes).masses, 0.0]
    for _ in range(steps):
        x, y = x @ chain.kernel(-fx @ y), y @ chain.kernel(x @ fy)
    return chain.points, x, y


@pytest.mark.parametrize("name", ["squared distance", "parrilo", "saddle"])
def test_particles_of_a_game_have_the_law_of_infinitely_many_up_to_one_over_n(name):
    """Two moments of each player, in 200 replicates of 40 particles and of 10."""
    example, gamma, tau, steps = oracles.EXAMPLES[name], 0.02, 0.4, 60
    points, *laws = mean_field(example, gamma, tau, steps, 150)
    space = Box(*example.bounds, 200)
    game = ContinuousGame(lambda x, y: example.payoff(x, y).sum(), space, space)
    for count, bias in ((10, 0.03), (40, 0.0075)):
        x, y = (space.sample(count, game.generator(k), game.dtype) for k in (3, 4))
        clouds = end(game, x, y, steps, step_size=gamma, temperature=tau)
        for cloud, law in zip(clouds, laws, strict=True):
            for power in (1, 2):
                found = cloud.pow(power).mean(0)
                error = found.std().item() / math.sqrt(len(found))
                assert abs(found.mean().item() - law @ points**power) < SIGMAS * error + bias


def test_noise_alone_makes_the_circle_uniform_at_its_exact_rate():
    """The k-th wave fades by exp(−4π²k²·γτ) a step, at every step size."""
    gamma, tau, steps, count = 0.02, 0.3, 3, 20_000
    game = ContinuousGame(lambda x, y: 0 * (x + y).sum(), Torus(), Torus())
    x, _ = end(game, torch.zeros(count, 1), torch.zeros(1, 1), steps, step_size=gamma,
               temperature=tau)  # fmt: skip
    assert ((x >= 0) & (x < 1)).all()
    for k in (1, 2):

        def fade(j):
            return math.exp(-4 * math.pi**2 * j**2 * gamma * tau * steps)

        waves = (2 * math.pi * k * x[:, 0]).cos()
        agree(waves[None], fade(k), (1 + fade(2 * k)) / 2 - fade(k) ** 2)


def test_clouds_on_the_circle_fluctuate_like_independent_draws():
    """cos2π(x − y) turns the first harmonics of both clouds into one another: N·E|μ̂|² stays 1."""
    n, replicates, gamma, tau = 20, 400, 2e-3, 0.5
    space = Torus(replicates)
    game = ContinuousGame(lambda x, y: (2 * math.pi * (x - y)).cos().sum(), space, space)
    begin = torch.zeros(n, replicates), torch.full((n, replicates), 0.25)
    x, y = end(game, *begin, 150, step_size=gamma, temperature=tau)
    for cloud in (x, y):
        harmonic = torch.exp(2j * math.pi * cloud).mean(0).abs().square() * n
        error = harmonic.std().item() / math.sqrt(replicates)
        assert abs(harmonic.mean().item() - 1) < SIGMAS * error + 0.05
