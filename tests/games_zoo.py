"""Methods played by hand, games as modules to train, and the exact laws of MAT on a quadratic one.

A module holds one coordinate of θ for each of B replicates of a game f(θ, δ). It is called with
zeros and the site is its input, so a row of the input is δ. The closure's loss is f(θ, 0) and the
divergence is f(θ, δ) − f(θ, 0): with λ = 1 the objective is f(θ, δ), for MAT as for PGD.
"""

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import mixadv
from mixadv.games import MatrixGame
from mixadv.games.method import Answer, Profile


def profiles(players: Generator, answer: Callable[[Profile], Any], steps: int) -> list[Profile]:
    """Return every pair of strategies that a method plays and that counts."""
    profile, played = next(players), []
    while len(played) < steps:
        if profile.counts:
            played.append(profile)
        profile = players.send(answer(profile))
    return played


def answers(game: MatrixGame) -> Callable[[Profile], Answer]:
    """Return what a finite game sends to a method."""
    return lambda played: Answer(game.losses(played.y.exp()), game.gains(played.x.exp()))


class Duel(nn.Module):
    """B independent replicates of f(θ, δ), played by a learner and an adversary on the line."""

    def __init__(self, payoff: Callable[[Tensor, Tensor], Tensor], theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.double().clone())
        self.payoff = payoff

    def forward(self, delta: Tensor) -> Tensor:
        copies = len(delta) // len(self.theta)  # more than one where particles are stacked
        return self.payoff(self.theta.repeat(copies), delta.squeeze(1))

    def closure(self) -> tuple[Tensor, Tensor]:
        losses = self(self.theta.new_zeros(len(self.theta), 1))
        return losses, losses[:, None]


def gain(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return what δ adds to the loss of each row."""
    return (perturbed - clean).squeeze(1)


class Table(nn.Module):
    """B replicates of a matrix game, played by a learner on the simplex and a δ that picks columns.

    The input has length 1 and every entry alike, so that lengths may be relative. Where it is moved
    by δ the column is drawn with the probabilities softmax(40·δ): nearly one column for a δ of 0.2
    along it, all alike for δ = 0. The closure's loss is what the uniform columns gain.
    """

    def __init__(self, gains: np.ndarray, theta: Tensor) -> None:
        super().__init__()
        self.gains = torch.tensor(gains)
        self.theta = nn.Parameter(theta.double().clone())

    def columns(self, x: Tensor) -> Tensor:
        return (40 * x).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta.repeat(len(x) // len(self.theta), 1)
        return ((theta @ self.gains) * self.columns(x)).sum(1, keepdim=True)

    def closure(self) -> tuple[Tensor, Tensor]:
        rows, columns = len(self.theta), self.gains.shape[1]
        gained = self(torch.full((rows, columns), columns**-0.5).double())
        return gained.squeeze(1), gained

    def project(self) -> None:
        """Move θ to the nearest point of the simplex."""
        falling = self.theta.data.sort(1, descending=True).values
        excess = (falling.cumsum(1) - 1) / torch.arange(1, falling.shape[1] + 1)
        last = (falling > excess).sum(1, keepdim=True) - 1
        self.theta.data.sub_(excess.gather(1, last)).clamp_(min=0)


FREE = {"unit": "absolute", "normalize": "none", "radius": None, "start": "normal"}
PURE = {"particles": 1, "play_as": "mean", "temperature": 0.0}
RAW = mixadv.MAT(**FREE, **PURE, start_size=0.5, divergence=gain, mirror_step=0.0)
RAW = replace(RAW, mirror_unit="absolute")
BOXED = {"unit": "absolute", "normalize": "none", "radius": 1.0, "norm": "linf"}
PARTICLES = {"particles": 32, "play_as": "ensemble", "particle_batching": "stack"}


def train(
    duel: Duel,
    solver: mixadv.Solver,
    step_size: float,
    seed: int = 0,
    box: tuple[float, float] | None = None,
) -> mixadv.GameOptimizer:
    """Wrap SGD so that each replicate is played as if it were alone.

    The objective is a mean over B rows: each takes steps of `step_size` at a rate of B times that,
    and has noise of the solver's temperature at one of τ/B.
    """
    rows = len(duel.theta)
    base = torch.optim.SGD(duel.parameters(), lr=step_size * rows)
    if box is not None:  # before the learner's own hook: it averages what the projection leaves
        base.register_step_post_hook(lambda *_: duel.theta.data.clamp_(*box))
    if isinstance(solver, mixadv.MAT):
        solver = replace(solver, learner_temperature=solver.learner_temperature / rows)
    return mixadv.wrap(base, duel, solver, site="input", seed=seed)


def trajectory(optimizer: mixadv.GameOptimizer, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ `[T, B]` before each round, and points and weights of what was played in it."""
    duel, game = optimizer.game.model, optimizer.game
    theta, points, weights = [], [], []
    for _ in range(rounds):
        theta.append(duel.theta.detach().clone())
        optimizer.step(duel.closure)
        points.append(game.strategy.points[0].squeeze(2))
        weights.append(game.strategy.weights.expand_as(points[-1]))
    return torch.stack(theta), torch.stack(points), torch.stack(weights)


class Quadratic(NamedTuple):
    """f = ½aθ² + cθδ − ½bδ² + pθ + qδ; with entropy τ for both players its equilibrium is Gaussian.

    Learner N(m_θ, τ/a), adversary N(m_δ, τ/b), with a·m_θ + c·m_δ = −p and b·m_δ − c·m_θ = q.
    """

    a: float
    b: float
    c: float
    p: float
    q: float

    def payoff(self, theta: Tensor, delta: Tensor) -> Tensor:
        a, b, c, p, q = self
        return a * theta**2 / 2 + c * theta * delta - b * delta**2 / 2 + p * theta + q * delta

    def means(self, attention: float = 1.0) -> tuple[float, float]:
        """Return (m_θ, m_δ), the latter for an adversary whose mean is `attention` times best."""
        a, b, c, p, q = self
        theta = -(b * p + attention * c * q) / (a * b + attention * c * c)
        return theta, attention * (c * theta + q) / b


class Law(NamedTuple):
    """A quantity of a round, c_0 + c_1·θ_t + Σ_j c_j·ξ_j with ξ standard normal: its c `[2 + J]`.

    Every quantity of MAT on a quadratic game is one, so all laws are exact and Gaussian.
    """

    form: np.ndarray
    theta: np.ndarray  # θ_{t+1}

    @property
    def factor(self) -> float:
        """F of θ_{t+1} = F·θ_t + g + noise."""
        return float(self.theta[1])

    def moments(self, mean: float, variance: float) -> tuple[float, float]:
        """Return mean and variance where θ_t has those given."""
        first, slope, noise = self.form[0], self.form[1], self.form[2:]
        return first + slope * mean, slope**2 * variance + float(noise @ noise)

    @property
    def stationary(self) -> tuple[float, float]:
        """Mean and variance after many rounds: θ_t is an autoregression."""
        noise = self.theta[2:]
        mean = self.theta[0] / (1 - self.factor)
        return self.moments(mean, float(noise @ noise) / (1 - self.factor**2))


class Laws(NamedTuple):
    """What a round of MAT plays: θ_{t+1}, the last sample of θ, a particle, its damped mean."""

    theta: Law
    sample: Law
    particle: Law
    played: Law


def laws(game: Quadratic, solver: mixadv.MAT, step_size: float) -> Laws:
    """Return the exact laws of a round of MAT, by the recursions of its two players.

    No torch and no code of the library: affine forms in (1, θ_t, ξ). The order of the ξ is that of
    the draws: M starts, M for each step of δ, one for each sample of θ.
    """
    a, b, c, p, q = game
    count = solver.particles
    draws = iter(np.eye(2 + (solver.steps + 1) * count + solver.learner_steps))
    constant, start = next(draws), next(draws)

    def noise() -> np.ndarray:
        return np.array([next(draws) for _ in range(count)])

    def weight(k: int) -> float:
        return 1 / (k + 1) if solver.damping == "uniform" else 1 - float(solver.damping)

    delta = damped = solver.initial_size * noise()
    for k in range(solver.steps):
        drift = c * start - b * delta + q * constant
        spread = np.sqrt(2 * solver.step_size * solver.temperature)
        delta = delta + solver.step_size * drift + spread * noise()
        damped = damped + weight(k) * (delta - damped)
    played = (damped if solver.play_as == "mean" else delta).mean(0)

    theta = mean = start
    spread = np.sqrt(2 * step_size * solver.learner_temperature)
    for k in range(solver.learner_steps):
        theta = theta - step_size * (a * theta + c * played + p * constant) + spread * next(draws)
        mean = mean + weight(k) * (theta - mean)
    end = solver.round_damping * start + (1 - solver.round_damping) * mean
    return Laws(*(Law(form, end) for form in (end, theta, delta[0], played)))
