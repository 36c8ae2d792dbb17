"""Continuous games with known equilibria: what converges does, what must not does not.

Grid methods keep their proved bounds. A gap certifies strategies: against an equilibrium (μ*, ν*),
F(μ, ν*) − v and v − F(μ*, ν) are at most the gap over the whole sets, whatever found μ and ν.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixadv.games import (
    BestResponseDynamics,
    Box,
    ContinuousGame,
    Gaussian,
    GradientDescentAscent,
    Hedge,
    Langevin,
    MatrixGame,
    Torus,
    WassersteinFisherRao,
    duality_gap,
    solve,
)
from mixadv.games.method import Scene
from mixadv.maths import mirror
from tests.games_zoo import answers, profiles
from theory import bounds, oracles

seeds = st.integers(0, 2**32 - 1)
ATOMIC = ("squared distance", "distance", "parrilo", "saddle", "silent duel")
CIRCULAR = ("cosine", "stationary")
BOUNDS = {
    "hedge": bounds.hedge_optimal_steps,
    "anytime_hedge": bounds.anytime_hedge,
    "optimistic_hedge": lambda r, m, n, t: bounds.optimistic_hedge(r, m, n, t, 1 / r),
    "mirror_prox": lambda r, m, n, t: bounds.mirror_prox(m, n, t, 2 / r),
}


def product(x, y):
    return (x * y).sum()


def play(name):
    """A known example as a game."""
    example = oracles.EXAMPLES[name]
    space = Torus() if example.periodic else Box(*example.bounds)
    jumps = math.inf if name == "silent duel" else None
    return ContinuousGame(
        lambda x, y: example.payoff(x, y).sum(), space, space, lipschitz=jumps
    ), example


def measure(strategy):
    return oracles.Measure(strategy.points[:, 0].numpy(), strategy.weights.numpy())


def regrets(example, solution):
    """How far both strategies are from optimal, as seen by an equilibrium."""
    mu, nu = measure(solution.learner), measure(solution.adversary)
    f, best = example.payoff, (example.learner, example.adversary)
    paid = mu.mean(best[1].mean(f(mu.points[:, None], best[1].points)))
    earned = nu.mean(best[0].mean(f(best[0].points, nu.points[:, None])))
    return float(paid - example.value), float(example.value - earned)


# Methods on a grid -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("name", oracles.EXAMPLES)
def test_grid_methods_keep_their_bounds_on_every_example(name, method):
    game, example = play(name)
    nodes, steps = 101, 300
    solution = solve(game, method, steps, grid=nodes)
    payoff = game.payoffs(*(side.points for side in game.grid(nodes)))
    bound = BOUNDS[method]((payoff.max() - payoff.min()).item(), nodes, nodes, steps)
    assert solution.gap.value <= bound
    error = 0.05 if name == "silent duel" else solution.gap.error
    assert abs(solution.value - example.value) <= solution.gap.value + error
    slack = float(solution.gap) + error + 1e-9
    assert all(-error - 1e-9 <= regret <= slack for regret in regrets(example, solution))


def start(nodes, seed):
    """A random strategy on the nodes, with some weights far below others."""
    weights = torch.tensor(np.random.default_rng(seed).dirichlet(np.full(nodes, 0.5))) + 1e-6
    return weights / weights.sum()


@pytest.mark.parametrize("name", CIRCULAR)
@pytest.mark.parametrize("method", ["hedge", "mirror_prox"])
def test_circular_games_are_solved_from_any_start(name, method):
    """The uniform start is an equilibrium of theirs. Bounds are C1's, against the worst rival."""
    game = play(name)[0]
    nodes, steps = 64, 400
    begin = [start(nodes, seed) for seed in (1, 2)]
    payoff = game.payoffs(*(side.points for side in game.grid(nodes)))
    range_ = (payoff.max() - payoff.min()).item()
    eta = 2 / range_ if method == "mirror_prox" else 0.3
    solution = solve(game, method, steps, grid=nodes, start=tuple(begin), step_size=eta)
    farthest = sum(-weights.log().min().item() for weights in begin)
    bound = bounds.measure_hedge(farthest, range_, steps, eta)
    assert solution.gap.value <= (farthest / (eta * steps) if method == "mirror_prox" else bound)
    assert solution.gap.value < 0.1 * range_
    assert abs(solution.value) <= solution.gap.value + solution.gap.error
    if name == "cosine":
        harmonics = sum(
            oracles.first_harmonic(measure(s)) for s in (solution.learner, solution.adversary)
        )
        assert harmonics == pytest.approx(float(solution.gap), abs=solution.gap.error + 1e-12)


# Gap and value reached in 2000 steps, in units of the payoff; the distance to optimal atoms.
RESTARTED = {"squared distance": 1e-3, "distance": 1e-6, "parrilo": 1e-2, "saddle": 3e-3}


@pytest.mark.parametrize("name", RESTARTED)
def test_restarted_mirror_prox_finds_the_atoms_of_an_equilibrium(name):
    game, example = play(name)
    solution = solve(game, "restarted", 2000, grid=201)
    assert solution.gap.value <= RESTARTED[name]
    assert abs(solution.value - example.value) <= RESTARTED[name] + solution.gap.error
    x, y = measure(solution.learner), measure(solution.adversary)
    sides, near = [(x, example.learner), (y, example.adversary)], 0.15
    if name == "distance":  # any law of mean 0 is optimal
        assert abs(x.mean(x.points)) < 1e-5
        sides, near = sides[1:], 0.02
    for found, known in sides:
        for atom, mass in zip(*known, strict=True):
            around = abs(found.points - atom) <= near
            assert found.masses[around].sum() == pytest.approx(mass, abs=0.02)


def test_silent_duel_is_fought_with_its_density():
    """Density 1/(4t³) from 1/3 on: nobody fires before, and 5/8 have fired at one half."""
    game, _ = play("silent duel")
    solution = solve(game, "mirror_prox", 2000, grid=201)
    assert solution.gap.value < 3e-3
    assert solution.gap.error == math.inf
    assert abs(solution.value) < 1e-9
    for side in (solution.learner, solution.adversary):
        points, masses = measure(side)
        assert masses[points < 0.32].sum() < 0.01
        for t in (0.4, 0.5, 0.7, 0.9):
            fired = masses[points < t].sum() + masses[np.isclose(points, t)].sum() / 2
            assert fired == pytest.approx((9 - t**-2) / 8, abs=0.03)


def waves(game):
    """A trigonometric game in plain torch."""
    a, b = (torch.tensor(f) for f in game.frequencies)
    c = torch.tensor(game.coefficients)

    def payoff(x, y):
        angle = 2 * math.pi * (a[:, None] * x + b * y)
        return (c.real * angle.cos() - c.imag * angle.sin()).sum()

    return payoff


@settings(max_examples=15)
@given(seeds, st.integers(1, 3), st.sampled_from(["hedge", "optimistic_hedge", "mirror_prox"]))
def test_random_trigonometric_games_are_solved_as_by_a_linear_program(seed, degree, method):
    known, nodes = oracles.trigonometric(degree, seed), 40
    game = ContinuousGame(waves(known), Torus(), Torus(), lipschitz=max(known.lipschitz))
    circle = oracles.circle(nodes).points
    exact = oracles.equilibrium(known.payoff(circle, circle)).value
    solution = solve(game, method, 200, grid=nodes)
    assert abs(solution.value - exact) <= solution.gap.value + 1e-9
    range_ = np.ptp(known.payoff(circle, circle))
    assert solution.gap.value <= BOUNDS[method](range_, nodes, nodes, 200)
    fine = game.duality_gap(solution.learner, solution.adversary, grid=10 * nodes)
    assert solution.gap.value - 1e-9 <= fine.value <= solution.gap.value + solution.gap.error


@settings(max_examples=10)
@given(seeds, st.floats(-1.5, 0))
def test_entropy_on_the_circle_costs_at_most_its_bound(seed, log_temperature):
    """Magnetic descent run to its fixed point: the quantal response, within G1 of no gap."""
    known, tau, nodes = oracles.trigonometric(2, seed), 10**log_temperature, 48
    game = ContinuousGame(waves(known), Torus(), Torus(), lipschitz=max(known.lipschitz))
    circle = oracles.circle(nodes).points
    payoff = known.payoff(circle, circle)
    scaled = tau * np.ptp(payoff)
    steps = min(math.ceil(40 / math.log1p(4 * tau**2)), 4000)
    solution = solve(game, "magnetic", steps, grid=nodes, temperature=scaled)
    exact = oracles.quantal_response(payoff, scaled)
    remaining = 2 * math.log(nodes) / (1 + 4 * tau**2) ** steps
    for side, response in zip((solution.learner, solution.adversary), exact, strict=True):
        apart = abs(side.weights.numpy() - response).sum()
        assert apart <= math.sqrt(2 * remaining) + 1e-9
    left = math.sqrt(remaining) * np.ptp(payoff) + 1e-9
    assert solution.gap.value <= bounds.regularised_torus(scaled, known.lipschitz, (1, 1)) + left


@pytest.mark.parametrize("tau", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(2))
def test_entropy_makes_the_uniform_law_the_only_equilibrium_of_the_stationary_game(seed, tau):
    """From any start, by the bound of the contraction from the start's KL."""
    game, _ = play("stationary")
    circle = game.grid(32)[0]
    payoff, magnet = game.payoffs(circle.points, circle.points), circle.log_weights
    range_ = (payoff.max() - payoff.min()).item()
    eta = bounds.magnetic_step(range_, tau)
    begin = start(32, seed)
    x, y = begin.log(), begin.flip(0).log()
    steps = math.ceil(45 / math.log1p(eta * tau))
    for _ in range(steps):
        losses, gains = payoff @ y.exp(), payoff.T @ x.exp()
        x = mirror.magnetic_step(x, -losses, eta, tau, magnet)
        y = mirror.magnetic_step(y, gains, eta, tau, magnet)
    for log_weights in (x, y):
        assert (log_weights.exp() - 1 / 32).abs().max() < 1e-8


# Particles ---------------------------------------------------------------------------------------

# Steps, and the largest gap of the average in units of the payoff's range there.
MOVING = {"squared distance": 0.015, "cosine": 0.03, "parrilo": 0.025, "saddle": 0.03}
SLOWLY = {"distance": 0.02, "bilinear": 0.02, "stationary": 0.03}


def particles_solve(name, steps, size, most):
    game, example = play(name)
    low, high = example.bounds
    z = np.linspace(low, high, 201)
    range_ = np.ptp(example.payoff(z[:, None], z))
    found = solve(game, "wasserstein_fisher_rao", steps, particles=size, grid=201)
    assert found.gap.value <= most * range_
    assert found.gaps[-1] < 0.5 * found.gaps.max()
    slack = float(found.gap) + found.gap.error
    assert abs(found.value - example.value) <= slack
    assert all(-1e-9 <= regret <= slack for regret in regrets(example, found))
    for side in (found.learner, found.adversary, found.last.learner):
        torch.testing.assert_close(side.weights.sum().item(), 1.0)


@pytest.mark.parametrize("name", MOVING)
def test_particles_that_move_and_are_weighed_approach_an_equilibrium(name):
    particles_solve(name, 400, 32, MOVING[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOWLY | MOVING)
def test_more_particles_and_steps_bring_a_smaller_gap(name):
    particles_solve(name, 2000, 128, (SLOWLY | MOVING)[name] / 2)


@pytest.mark.slow
def test_last_particles_of_the_parrilo_game_sit_on_its_atoms():
    game, _ = play("parrilo")
    found = solve(game, "wasserstein_fisher_rao", 1000, particles=32, grid=201)
    points, masses = measure(found.last.adversary)
    assert masses[points > 0.9].sum() == pytest.approx(0.78, abs=0.05)
    assert masses[points < -0.9].sum() == pytest.approx(0.22, abs=0.05)
    assert found.last.learner.mean.item() == pytest.approx(0.2, abs=0.1)


def test_weights_alone_are_hedge_and_positions_alone_are_gradient_play():
    """Without steps of the points it is the finite game between them; without weights, descent."""
    game, _ = play("parrilo")
    clouds = [
        game.particles(s.sample(12, game.generator(k), game.dtype))
        for k, s in enumerate((game.learner, game.adversary))
    ]
    begin = tuple(cloud.points for cloud in clouds)
    method = WassersteinFisherRao(step_size=0.0, mirror_step=0.3, particles=12)
    weighed = solve(game, method, 50, start=begin, grid=50)
    finite = MatrixGame(game.payoffs(*begin))
    hedged = solve(finite, "hedge", 50, step_size=0.3)
    for side, points, weights in zip(weighed.last, begin, hedged.last, strict=True):
        assert torch.equal(side.points, points)
        torch.testing.assert_close(side.weights, weights, rtol=1e-9, atol=1e-12)
    moving = {"start": begin, "step_size": (0.01, 0.02), "particles": 12, "grid": 50}
    pushed = solve(game, "wasserstein_fisher_rao", 50, mirror_step=0.0, **moving)
    cold = solve(game, "langevin", 50, temperature=0.0, **moving)
    for side, same, points in zip(pushed.last, cold.last, begin, strict=True):
        assert torch.equal(side.points, same.points)
        assert not torch.equal(side.points, points)
        torch.testing.assert_close(side.weights, torch.full((12,), 1 / 12).double())


# What must not converge --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("bilinear", 0.9), ("cosine", 1.9)])
def test_gradient_descent_ascent_circles_around_a_mixed_equilibrium(name, least):
    """A point has a gap of |x| + |y| in xy, of 2 on the circle; no step changes that."""
    game, _ = play(name)
    begin = (torch.tensor([[0.6]]), torch.tensor([[0.5]]))
    method, steps = GradientDescentAscent(step_size=0.15 if name == "bilinear" else 0.02), 400
    solution = solve(game, method, steps, start=begin, grid=51)
    assert (solution.gaps + solution.gap.error >= least).all()
    clouds = profiles(
        method.play(*map(game.particles, begin), game, steps, game.generator(0)),
        lambda clouds: game.slopes(clouds.x, clouds.y),
        steps,
    )
    x = torch.cat([cloud.x.points for cloud in clouds])[:, 0]
    moved = (x[1:] - x[:-1]).abs()
    assert moved[-100:].mean() > 0.002
    if name == "bilinear":
        assert (x[1:] * x[:-1] < 0).sum() >= 10  # from side to side
        average = game.duality_gap(*solution.average, grid=51)
        assert average.value < 0.2


def test_gradient_descent_ascent_finds_a_pure_equilibrium():
    game, example = play("saddle")
    solution = solve(game, "gradient_descent_ascent", 500, grid=201)
    assert solution.gap.value < 1e-6
    assert solution.value.item() == pytest.approx(example.value, abs=1e-9)
    for side, known in zip(solution.last, (example.learner, example.adversary), strict=True):
        assert side.points.item() == pytest.approx(known.points[0], abs=1e-6)


@pytest.mark.parametrize("name", ["bilinear", "cosine", "squared distance"])
def test_best_responses_never_settle_on_a_grid(name):
    game, _ = play(name)
    ends = torch.zeros(50).double().index_fill(0, torch.tensor([7]), 1.0)
    solution = solve(game, "best_response_dynamics", 200, grid=50, start=(ends, ends.flip(0)))
    assert (solution.gaps >= 1).all()
    nodes = game.grid(50)[0].points
    matrix = MatrixGame(game.payoffs(nodes, nodes))
    played = profiles(
        BestResponseDynamics().play(
            ends.log(), ends.flip(0).log(), Scene(matrix.spread[None], 200)
        ),
        answers(matrix),
        200,
    )
    moves = [not torch.equal(a.y, b.y) for a, b in itertools.pairwise(played)]
    assert sum(moves[-40:]) >= 10


@pytest.mark.parametrize("name", ["matching pennies", "cosine"])
def test_last_strategies_of_hedge_leave_the_equilibrium_and_its_means_approach_it(name):
    if name == "cosine":
        circle = play(name)[0].grid(16)[0].points
        matrix = MatrixGame(play(name)[0].payoffs(circle, circle))
        begin = tuple(start(16, seed) for seed in (3, 4))
    else:
        matrix = MatrixGame([[1.0, -1.0], [-1.0, 1.0]])
        begin = (torch.tensor([0.6, 0.4]).double(), torch.tensor([0.5, 0.5]).double())
    players = Hedge(step_size=0.1).play(
        begin[0].log(), begin[1].log(), Scene(matrix.spread[None], 3000)
    )
    played = profiles(players, answers(matrix), 3000)
    gaps = torch.stack([matrix.duality_gap(p.x.exp(), p.y.exp()) for p in played])
    assert gaps.min() >= 0.5 * gaps[0]
    assert gaps[-500:].max() > 1.5  # of 2, at the corners
    solution = solve(matrix, "hedge", 3000, start=begin, step_size=0.1)
    assert solution.gap.value < 0.1
    assert duality_gap(matrix, *solution.last).value == gaps[-1]


# Clouds kept for the average ---------------------------------------------------------------------


def test_automatic_steps_are_stable_where_the_reference_is_steeper_than_the_payoff():
    """The pull towards N(0, s²) counts: τ/s² is 10⁴ times the payoff's own curvature here."""
    game = ContinuousGame(lambda x, y: 1e-2 * product(x, y), Gaussian(1, 0.1), Gaussian(1, 2.0))
    steps = Langevin(temperature=1.0).step_sizes(game, 100, 1.0)
    for size, scale in zip(steps, (0.1, 2.0), strict=True):
        torch.testing.assert_close(size * (1e-2 + 1 / scale**2), 0.1)


def test_average_is_of_the_whole_way_however_large_a_cloud_is(monkeypatch):
    """Two particles of each of 40 clouds of 20, drawn by weight: means agree to standard errors."""
    monkeypatch.setattr("mixadv.games.solution.KEPT", 80)
    game = ContinuousGame(lambda x, y: product(x, y) + product(x, x), Box(), Box())
    method = WassersteinFisherRao(particles=20, step_size=0.05, mirror_step=0.3)
    found = solve(game, method, 40, grid=5).average.learner
    assert len(found.points) == 80
    draw = game.generator(0)
    begin = [game.particles(s.sample(20, draw, game.dtype)) for s in (game.learner, game.adversary)]
    clouds = profiles(method.play(*begin, game, 40, draw), lambda c: game.slopes(c.x, c.y), 40)
    for step, cloud in enumerate(clouds):
        pair = found.points[2 * step : 2 * step + 2]
        assert torch.isin(pair, cloud.x.points).all()
    mean = torch.stack([cloud.x.mean for cloud in clouds]).mean()
    error = found.points.std() / math.sqrt(80)
    assert (found.mean - mean).abs() < 3 * error


def test_average_of_a_cycle_is_no_phase_of_it(monkeypatch):
    """The period of xy at γ = 0.5 is 2π/γ = 12.6 steps: every 25th cloud meets the same phase."""
    monkeypatch.setattr("mixadv.games.solution.KEPT", 16 * 32)
    game, _ = play("bilinear")
    for steps in (380, 400):
        still = Langevin(temperature=0.0, particles=32, step_size=0.5)
        solution = solve(game, still, steps, grid=3)
        assert game.duality_gap(*solution.last, grid=3).value > 0.3
        assert solution.gap.value < 0.1


@pytest.mark.parametrize("steps", [1, 7, 70])
def test_history_of_the_average_ends_at_its_gap(steps):
    """It is summed cloud by cloud, as payoffs are linear; the certificate sees the union."""
    game = ContinuousGame(lambda x, y: (x - y).square().sum(), Box(), Box())
    for method in ("langevin", "wasserstein_fisher_rao", "gradient_descent_ascent"):
        solution = solve(game, method, steps, particles=3, grid=40)
        torch.testing.assert_close(solution.gaps[-1], solution.gap.value)
        assert solution.steps[-1] == steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_formats_that_hold_no_weights_are_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match=r"too coarse for weights: dtype=torch\.float32"):
        ContinuousGame(lambda x, y: (x - y).square().sum(), Box(-1, 1), Box(-1, 1), dtype=dtype)
