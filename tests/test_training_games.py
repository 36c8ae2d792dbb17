"""The wrapped optimizer on games without a good pure equilibrium: where mixed play beats pure.

`optimizer.step(closure)` is run as on any model. Pure play (PGD, FreeAT) cycles, stands still or
pays the pure value; MAT's strategies settle, or their means over time are an equilibrium. With
those means (μ, ν) the duality gap is bounded thus. Let the learner's regret over T rounds against
what the adversary played be R, and let each q_t earn at least max_δ f(θ_t, δ) − ε_t. Then

    max_δ F(μ, δ) − min_θ F(θ, ν)  ≤  mean F(θ_t, q_t) + mean ε_t − min_θ mean F(θ, q_t)
                                   =  R/T + mean ε_t.

Regret of projected gradient steps η on [l, u] with slopes at most 1, from θ_0 (Zinkevich 2003):
R/T ≤ D²/(2ηT) + η/2, D the largest distance of θ_0 from a point of the set.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import mixadv
from mixadv.maths import mirror
from tests.games_zoo import BOXED, PARTICLES, RAW, Duel, train, trajectory


def regret(step_size, rounds, distance):
    return distance**2 / (2 * step_size * rounds) + step_size / 2


# f = xy on [−1, 1]², gap |E x| + |E y| -----------------------------------------------------------

XS = torch.tensor([0.5, -0.3, 0.4, 0.9]).double()


def product(theta, delta):
    return theta * delta


def gap(theta, delta):
    return theta.abs() + delta.abs()


def test_simultaneous_gradient_play_spirals_and_cycles_while_its_means_do_not():
    """FreeAT with one replay is gradient descent–ascent: the norm grows by √(1 + η²) a round."""
    step_size, rounds = 0.15, 400
    solver = mixadv.FreeAT(steps=1, step_size=step_size, **BOXED, start_size=0.1)
    optimizer = train(Duel(product, XS), solver, step_size, box=(-1, 1))
    theta, points, _ = trajectory(optimizer, rounds)
    delta = points[:, 0]
    length = torch.hypot(theta, delta)
    inside = (theta.abs().cummax(0).values < 1) & (delta.abs().cummax(0).values < 1)
    grown = (length[1:] / length[:-1])[inside[1:]]
    torch.testing.assert_close(grown, torch.full_like(grown, math.sqrt(1 + step_size**2)))
    late = slice(rounds // 2, None)
    assert (gap(theta, delta)[late] >= 1).all()
    assert ((theta[late] == 1).any(0) & (theta[late] == -1).any(0)).all()
    mean_gap = gap(theta.mean(0), delta.mean(0))
    assert (mean_gap <= 2 * regret(step_size, rounds, 2)).all()


SIGNS = {**BOXED, "normalize": "steepest", "step_size": 0.5, "steps": 4}


def test_pure_best_responses_never_settle():
    """PGD's δ is ±1 by the side that θ is on; θ steps over 0 for ever."""
    step_size, rounds = 0.07, 60
    optimizer = train(Duel(product, XS), mixadv.PGD(**SIGNS), step_size, box=(-1, 1))
    theta, points, _ = trajectory(optimizer, rounds)
    delta = points[:, 0]
    assert torch.equal(delta, theta.sign())
    late = theta[20:]
    torch.testing.assert_close(late[2:], late[:-2])
    torch.testing.assert_close((late[1:] - late[:-1]).abs(), torch.full_like(late[1:], step_size))
    assert (gap(theta, delta) > 1).all()
    bound = regret(step_size, rounds, 1 + XS.abs())
    assert (gap(theta.mean(0), delta.mean(0)) <= bound).all()


def test_langevin_particles_let_both_players_settle():
    """MAT's ensemble leans by no more than θ does, so that the game it is played in has a rest.

    The learner's K steps with uniform damping against one strategy, and β' = ½, are one step of
    η = lr·(1 − β')·(K + 1)/2 as long as no sample is projected.
    """
    rounds, rate, learner_steps = 100, 0.1, 3
    solver = replace(
        RAW,
        **BOXED,
        **PARTICLES,
        steps=8,
        step_size=0.3,
        temperature=0.5,
        learner_steps=learner_steps,
        learner_temperature=0.0,
        damping="uniform",
        round_damping=0.5,
    )
    duel = Duel(product, XS)
    optimizer = train(duel, solver, rate, box=(-1, 1))
    theta, points, weights = trajectory(optimizer, rounds)
    mean = (weights * points).sum(1)
    assert points.abs().max() == 1
    assert theta.abs().max() < 1
    late = gap(theta, mean)[rounds // 2 :].mean(0)
    assert (late < 0.3).all()
    missed = (theta.abs() - theta * mean).mean(0)
    bound = regret(rate * 0.5 * (learner_steps + 1) / 2, rounds, 1 + XS.abs()) + missed
    with optimizer.game.averaged():
        found = duel.theta.detach().clone()
    torch.testing.assert_close(found, (theta.sum(0) - theta[0] + duel.theta.detach()) / rounds)
    assert (gap(theta.mean(0), mean.mean(0)) <= bound).all()
    assert (bound < 0.5).all()


# Two thresholds against two shifts: pure value 1, mixed ½ -----------------------------------------


def errors(delta):
    """How far each of two classifiers errs: the first beyond δ = ½, the other beyond −½."""
    return (20 * (delta - 0.5)).sigmoid(), (20 * (-delta - 0.5)).sigmoid()


def mixed(theta, delta):
    """Choose the first classifier with probability θ."""
    first, second = errors(delta)
    return theta * first + (1 - theta) * second


def pure(theta, delta):
    """Choose the first classifier if θ > ½; gradients pass as if the choice were θ."""
    return mixed((theta > 0.5).double() + theta - theta.detach(), delta)


def robust_risk(weight):
    """The largest error over the ball of a mixture with this weight of the first classifier."""
    delta = torch.linspace(-1, 1, 201).double()
    return mixed(weight[..., None], delta).amax(-1)


def earned(points, weights):
    """What a strategy earns of the better classifier, and so of every mixture: `[..., B]`."""
    return torch.stack([(weights * e).sum(-2) for e in errors(points)]).amin(0)


ODDS = torch.tensor([0.9, 0.2, 0.51, 0.0]).double()


@pytest.mark.parametrize("kind", [mixadv.PGD, mixadv.FreeAT])
def test_pure_learners_pay_one_and_pure_adversaries_earn_nothing(kind):
    """Whichever classifier is held there is a shift that it errs on, and the other does not."""
    optimizer = train(Duel(pure, ODDS), kind(**SIGNS), 0.05, box=(0, 1))
    theta, points, weights = trajectory(optimizer, 120)
    chosen = theta > 0.5
    assert ((chosen[1:] != chosen[:-1])[40:].sum(0) > 40).all()  # for ever
    assert (robust_risk(chosen.double()) > 0.99).all()
    assert (earned(points, weights) < 0.01).all()


HEDGE = replace(
    RAW,
    **{**BOXED, **PARTICLES},
    start_size=50.0,  # projected: nearly all stand at ±1
    steps=5,
    step_size=0.0,
    mirror_step=4.0,
    learner_steps=1,
    learner_temperature=0.0,
    damping=0.0,
    round_damping=0.0,
)


def test_mixed_strategies_halve_the_risk():
    """A mixed learner against mirror weights on particles at the ends of the ball.

    Hedge for K steps at rate η_w from equal weights is within ε = log(M)/(η_w·K) of the best
    particle. The mean strategies' gap, of the learner's risk over ½ and the adversary's gain
    below, is at most R/T + ε; and what is played last is as good, where pure play cycles.
    """
    step_size, rounds = 0.03, 300
    optimizer = train(Duel(mixed, ODDS), HEDGE, step_size, box=(0, 1))
    theta, points, weights = trajectory(optimizer, rounds)
    assert (points.amin(1) == -1).all()
    assert (points.amax(1) == 1).all()
    missed = math.log(HEDGE.particles) / (HEDGE.steps * HEDGE.mirror_step)
    bound = regret(step_size, rounds, ODDS.clamp(min=1 - ODDS)) + missed
    assert (bound < 0.25).all()
    gains = earned(points.flatten(0, 1), weights.flatten(0, 1) / rounds)
    assert (robust_risk(theta.mean(0)) - gains <= bound).all()
    assert (robust_risk(theta[-100:]) < 0.6).all()
    assert (earned(points, weights)[-100:].mean(0) > 0.4).all()


def test_weights_and_learner_are_the_iterates_of_mirror_and_gradient_descent():
    """Step by step by hand, from the points that were drawn."""
    duel = Duel(mixed, ODDS)
    optimizer = train(duel, HEDGE, 0.05, box=(0, 1))
    theta = ODDS
    for _ in range(20):
        optimizer.step(duel.closure)
        q = optimizer.game.strategy
        points = q.points[0].squeeze(2)
        log_weights = mirror.uniform(len(points), dtype=torch.float64)[:, None]
        gains = mixed(theta, points) - mixed(theta, torch.zeros(1))
        for _ in range(HEDGE.steps):
            log_weights = mirror.step(log_weights, gains, HEDGE.mirror_step)
        torch.testing.assert_close(q.log_weights, log_weights, rtol=1e-12, atol=1e-12)
        first, second = errors(points)
        slope = (log_weights.exp() * (first - second)).sum(0)
        theta = (theta - 0.05 * slope).clamp(0, 1)
        torch.testing.assert_close(duel.theta.detach(), theta, rtol=1e-12, atol=1e-12)


def test_samples_of_a_pure_learner_mix_to_half_the_risk_of_each():
    """`game.mixture` of an even number of samples, at both shifts; each sample pays 1 at one."""
    duel = Duel(pure, ODDS)
    optimizer = train(duel, replace(HEDGE, samples=20), 0.05, box=(0, 1))
    trajectory(optimizer, 60)

    def predictions(shift):
        risk = duel(torch.full((len(ODDS), 1), shift).double())
        return torch.stack([risk, 1 - risk], 1).log()

    for shift in (-1.0, 1.0):
        risk = optimizer.game.mixture(partial(predictions, shift)).exp()[:, 0]
        torch.testing.assert_close(risk, torch.full_like(risk, 0.5), rtol=0, atol=1e-4)
    samples = torch.stack([sample["theta"] for sample in optimizer.game.learner_samples])
    assert (robust_risk((samples > 0.5).double()) > 0.99).all()


def test_the_mean_of_a_mixture_earns_nothing_where_the_mixture_earns_half():
    """The paper plays the mean: between two shifts lies the clean point, where no one errs."""
    strategies = []
    for play_as in ("ensemble", "mean"):
        duel = Duel(mixed, torch.full((4,), 0.501))
        optimizer = train(duel, replace(HEDGE, play_as=play_as), 0.0)
        strategies.append([x[0] for x in trajectory(optimizer, 1)[1:]])
    (points, weights), (mean, certain) = strategies
    torch.testing.assert_close(mean[0], (weights * points).sum(0))
    assert (earned(points, weights) > 0.3).all()
    assert (earned(mean, certain) < 0.01).all()
