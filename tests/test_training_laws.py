"""The wrapped optimizer on a quadratic game: the laws of both players are known exactly.

`optimizer.step(closure)` is run as on any model. MAT's adversary starts anew each round and the
learner where it was, so a round is an autoregression θ_{t+1} = F·θ_t + g + noise, and every
quantity of it an affine form in θ_t and the draws. These laws, written once more in numpy, are what
training is compared with; with uniform damping and many small steps they tend to the equilibrium
of the game with entropy, N(m_θ, τ/a) and N(m_δ, τ/b).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.games_zoo import RAW, Duel, Quadratic, laws, train

GAME = Quadratic(a=1.0, b=2.0, c=1.0, p=0.7, q=-0.4)
TEMPERATURE, LEARNER_STEP, STEP = 0.3, 0.2, 0.15
NOISY = replace(
    RAW,
    steps=16,
    step_size=STEP,
    temperature=TEMPERATURE,
    learner_steps=16,
    learner_temperature=TEMPERATURE,
    round_damping=0.5,
    samples=1,
)
UNIFORM = replace(NOISY, damping="uniform")

games = st.builds(Quadratic, *[st.floats(0.5, 2)] * 3, *[st.floats(-2, 2), st.floats(0.1, 2)])


class EachOnce:
    """Noise that is 1 once for each row from the third on: draw j is that of row 2 + j alone."""

    drawn = 2

    def begin(self, player, round, rank=None):
        if player == "adversary":
            self.drawn = 2

    def __call__(self, kind, like):
        rows = like.view(-1, self.rows)
        noise = torch.zeros_like(rows)
        for row in noise:
            row[self.drawn] = 1
            self.drawn += 1
        return noise.view_as(like)


@given(
    game=games,
    damping=st.just("uniform") | st.floats(0, 0.9),
    round_damping=st.floats(0, 0.9),
    counts=st.tuples(*[st.integers(1, 4)] * 3),
    play_as=st.sampled_from(["mean", "ensemble"]),
    route=st.sampled_from(["loop", "stack", "vmap"]),
)
def test_every_draw_enters_a_round_as_the_algorithm_says(
    game, damping, round_damping, counts, play_as, route
):
    """The first rows are without noise, from θ = 0 and θ = 1; each other row has one draw."""
    steps, learner_steps, particles = counts
    words = {
        "damping": damping,
        "round_damping": round_damping,
        "play_as": play_as,
        "particle_batching": route,
    }
    counts = {"steps": steps, "learner_steps": learner_steps, "particles": particles}
    solver = replace(NOISY, **words, **counts)
    law = laws(game, solver, LEARNER_STEP)
    rows = len(law.theta.form)
    optimizer = train(Duel(game.payoff, torch.eye(rows)[1]), solver, LEARNER_STEP)
    optimizer.game.rounds.arena.noise = optimizer.game.learner.noise = noise = EachOnce()
    noise.rows = rows
    optimizer.step(optimizer.game.model.closure)
    assert noise.drawn == rows

    def coefficients(values):
        return np.concatenate([values[:1], values[1:] - values[0]])

    points = optimizer.game.strategy.points[0].squeeze(2)
    found = {
        "theta": optimizer.game.model.theta.detach(),
        "sample": optimizer.game.learner_samples[-1]["theta"],
        "played" if play_as == "mean" else "particle": points[0],
    }
    for name, values in found.items():
        form = coefficients(values.numpy())
        np.testing.assert_allclose(form, getattr(law, name).form, rtol=1e-9, atol=1e-12)


def assert_law(values, mean, variance):
    """Mean and variance of a sample, within 4.5 standard errors of those of a normal law."""
    count = values.numel()
    assert abs(values.mean() - mean) < 4.5 * math.sqrt(variance / count)
    assert abs(values.var() - variance) < 4.5 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize("rows", [4000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "solver",
    [
        UNIFORM,
        replace(NOISY, damping=0.3),
        replace(NOISY, damping=0.0, round_damping=0.0),
        replace(UNIFORM, play_as="ensemble", particles=8, particle_batching="stack"),
    ],
    ids=["mean", "exponential", "undamped", "ensemble"],
)
def test_both_players_have_the_law_of_the_discrete_chain(solver, rows):
    """Of each replicate's time average, live weights, last sample, and of what was played."""
    rounds = 18
    law = laws(GAME, solver, LEARNER_STEP)
    duel = Duel(GAME.payoff, torch.zeros(rows))
    optimizer = train(duel, solver, LEARNER_STEP)
    for _ in range(rounds):
        optimizer.step(duel.closure)
    assert abs(law.theta.factor) ** (rounds - 1) < 1e-5  # so stationary
    game = optimizer.game
    assert_law(duel.theta.detach(), *law.theta.stationary)
    assert_law(game.learner_samples[-1]["theta"], *law.sample.stationary)
    played = law.played if solver.play_as == "mean" else law.particle
    assert_law(game.strategy.points[0][0], *played.stationary)

    powers = law.theta.factor ** np.arange(rounds + 1)
    mean, noise = law.theta.stationary[0], law.theta.theta[2:]
    spread = float(noise @ noise) * float(np.square(powers[:-1].cumsum()).sum()) / rounds**2
    with game.averaged():
        assert_law(duel.theta.detach().clone(), mean * (1 - powers[1:].mean()), spread)


@given(
    game=games,
    damping=st.just("uniform") | st.floats(0, 0.9),
    steps=st.integers(1, 60),
    play_as=st.sampled_from(["mean", "ensemble"]),
)
def test_means_are_those_of_the_equilibrium_but_for_the_adversarys_start(
    game, damping, steps, play_as
):
    """The adversary starts each round at 0: its mean is 1 − κ of the best, κ what damping keeps.

    κ = rᴷ for what is not damped, the damped mean of r, r², … for what is, with r = 1 − γ_δ·b. The
    learner starts where it was and has no bias.
    """
    solver = replace(NOISY, damping=damping, steps=steps, play_as=play_as, round_damping=0.8)
    law = laws(game, solver, LEARNER_STEP)
    powers = (1 - STEP * game.b) ** np.arange(1, steps + 1)
    if play_as == "ensemble":
        kept = powers[-1]
    elif damping == "uniform":
        kept = powers.mean()
    else:
        late = damping ** np.arange(steps - 1, -1, -1)
        kept = damping**steps + (1 - damping) * late @ powers
    theta, delta = game.means(1 - kept)
    assert law.theta.stationary[0] == pytest.approx(theta, abs=1e-9)
    assert law.sample.stationary[0] == pytest.approx(theta, abs=1e-9)
    assert law.played.stationary[0] == pytest.approx(delta, abs=1e-9)


def test_laws_tend_to_the_equilibrium_with_entropy():
    """With uniform damping, to first order in γ and 1/(γ·K): all errors halve with both."""
    errors = []
    for scale in (3, 6, 12):
        steps = {"steps": 8 * scale**2, "learner_steps": 8 * scale**2, "step_size": STEP / scale}
        law = laws(GAME, replace(UNIFORM, **steps), LEARNER_STEP / scale)
        (theta, spread), (_, width), (delta, _) = (
            law.sample.stationary,
            law.particle.stationary,
            law.played.stationary,
        )
        means = np.subtract((theta, delta), GAME.means())
        variances = spread * GAME.a / TEMPERATURE - 1, width * GAME.b / TEMPERATURE - 1
        errors.append([*means, *variances, law.theta.stationary[1]])
    ratios = np.divide(errors[1:], errors[:-1])
    np.testing.assert_allclose(ratios, 0.5, atol=0.07)
    assert np.abs(errors[-1]).max() < 0.06


def test_damping_converges_where_alternating_best_responses_diverge():
    """F → −c²/(ab) without damping between rounds; half of it is taken back with β' = ½."""
    game = Quadratic(a=1.0, b=1.0, c=1.5, p=0.0, q=0.0)
    cold = {"temperature": 0.0, "learner_temperature": 0.0, "start": "zero", "damping": 0.0}
    for round_damping, limit in ((0.0, -2.25), (0.5, -0.625)):
        solver = replace(NOISY, **cold, steps=32, learner_steps=32, round_damping=round_damping)
        factor = laws(game, solver, LEARNER_STEP).theta.factor
        assert factor == pytest.approx(limit, rel=0.02)
        duel = Duel(game.payoff, torch.ones(1))
        optimizer = train(duel, solver, LEARNER_STEP)
        for _ in range(6):
            optimizer.step(duel.closure)
        assert duel.theta.item() == pytest.approx(factor**6, rel=1e-9)
