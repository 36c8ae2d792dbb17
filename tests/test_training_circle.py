"""The wrapped optimizer on cos 2π(x − y), where the players turn on a circle.

The gap of strategies is |μ̂| + |ν̂|, with μ̂ = E exp(2πix): 2 for every pure play, 0 for the uniform
laws, which are the equilibrium at every temperature.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import mixadv
from tests.games_zoo import PARTICLES, RAW, Duel, train, trajectory

TURN = 2 * math.pi


def aligned(theta, delta):
    return (TURN * (theta - delta)).cos()


def wave(x, n=1):
    return torch.polar(torch.ones_like(x), TURN * n * x)


CIRCLE = {"unit": "absolute", "normalize": "none", "radius": None, "start": "zero"}


def test_pure_best_responses_on_a_circle_stand_still():
    """θ is at the top of what δ = θ pays: no slope, and a gap of 2 in each round and over time."""
    solver = mixadv.PGD(**CIRCLE, steps=40, step_size=0.02)
    optimizer = train(Duel(aligned, torch.tensor([0.1, 0.2, -0.3])), solver, 0.02)
    theta, points, _ = trajectory(optimizer, 20)
    torch.testing.assert_close(points[:, 0], theta, rtol=0, atol=1e-6)
    assert (wave(theta).mean(0).abs() + wave(points[:, 0]).mean(0).abs() > 2 - 1e-6).all()


def test_simultaneous_play_on_a_circle_is_a_chase_without_end():
    """Both turn at the same constant speed: their distance, and so the payoff, never changes."""
    step_size, rounds, start = 0.02, 300, torch.tensor([0.1, 0.2, -0.3]).double()
    solver = mixadv.FreeAT(**CIRCLE, steps=1, step_size=step_size)
    optimizer = train(Duel(aligned, start), solver, step_size)
    theta, points, _ = trajectory(optimizer, rounds)
    speed = step_size * TURN * (TURN * start).sin()
    expected = start + torch.arange(rounds)[:, None] * speed
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(theta - points[:, 0], start.expand_as(theta), rtol=0, atol=1e-9)


def wave_of_chain(n, steps, step_size, temperature):
    """E exp(2πin(δ_K − θ)) by δ_0 − θ on a grid of the circle, for a Langevin chain against θ."""
    grid, modes = np.arange(256) / 256, np.fft.fftfreq(256, 1 / 256)
    moved = grid - step_size * TURN * np.sin(TURN * grid)
    noise = np.exp(-((TURN * modes) ** 2) * step_size * temperature)
    step = np.exp(1j * TURN * np.outer(moved, modes)) * noise
    values = np.exp(1j * TURN * n * grid)
    for _ in range(steps):
        values = step @ np.fft.fft(values) / 256
    return values


HOT = replace(
    RAW,
    **{**CIRCLE, **PARTICLES},
    steps=8,
    step_size=0.01,
    temperature=2.0,
    learner_steps=1,
    learner_temperature=2.0,
    damping=0.0,
    round_damping=0.0,
    average=None,
)


@pytest.mark.parametrize("rows", [1000, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("temperature", "least", "most"), [(0.02, 0.9, 1.0), (2.0, 0.1, 0.2)])
def test_temperature_spreads_the_ensemble_as_far_as_its_discrete_chain(
    temperature, least, most, rows
):
    """Two Fourier coefficients of K steps from δ = 0 against θ = ¼, by quadrature."""
    solver = replace(HOT, temperature=temperature, steps=20)
    theta, points, _ = trajectory(
        train(Duel(aligned, torch.full((rows,), 0.25)), solver, 0.01), rounds=1
    )
    for n in (1, 2):
        found = complex(wave(points - theta, n).mean())
        expected = wave_of_chain(n, 20, 0.01, temperature)[-64]
        error = math.sqrt((1 - abs(expected) ** 2) / points.numel())
        assert abs(found - expected) < 4 * error
        if n == 1:
            assert least < abs(found) < most


@pytest.mark.parametrize("rounds", [150, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("particles", "play_as"), [(1, "mean"), (32, "ensemble")])
def test_means_over_time_are_an_equilibrium_on_the_circle(particles, play_as, rounds):
    """Of each replicate by itself, also with the paper's one particle.

    With z = exp(2πiθ) and ν̂_t the coefficient of what was played, a Langevin step of θ has
    E z_{t+1} = ρ·z_t·exp(2πid), |d| ≤ 2πγ|ν̂_t|, ρ = exp(−4π²γτ). Summed over T rounds,
    (1 − ρ)|μ̂| ≤ 2/T + 4π²γρ·mean|ν̂_t| + √((1 − ρ²)/T), the last a martingale's. The adversary's
    chain against θ has E ν̂_t = r·z_t but for e, what is left of its start, and noise of 1/√M.
    """
    rows, step_size = 256, 0.01
    duel = Duel(aligned, torch.full((rows,), 0.25))
    solver = replace(HOT, particles=particles, play_as=play_as)
    theta, points, _ = trajectory(train(duel, solver, step_size), rounds)
    gaps = wave(theta).mean(0).abs() + wave(points).mean((0, 1)).abs()

    chain = wave_of_chain(1, HOT.steps, HOT.step_size, HOT.temperature)
    r, e = abs(chain.mean()), abs(chain - chain.mean()).max()
    rho = math.exp(-(TURN**2) * step_size * HOT.learner_temperature)
    played = min(1.0, r + e + particles**-0.5)
    pushed = TURN**2 * step_size * rho * played
    learner = (2 / rounds + pushed + math.sqrt((1 - rho**2) / rounds)) / (1 - rho)
    adversary = r * learner + e + (particles * rounds) ** -0.5
    assert gaps.mean() < learner + adversary < 0.75
    assert gaps.max() < 0.75
