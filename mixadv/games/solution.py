"""What is kept of the strategies that a method plays, and the solution with its certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mixadv.games.continuous import ContinuousGame
from mixadv.games.matrix import MatrixGame, gap
from mixadv.games.method import Answer, Method, Profile, Strategy
from mixadv.games.particles import Clouds, ParticleMethod
from mixadv.games.strategies import Gap, Pair, Particles, Slopes

Reply = TypeVar("Reply", covariant=True)

KEPT = 8192
"""Particles kept of the clouds along the way, whose union is the average strategy."""


@dataclass(frozen=True)
class Solution:
    """Both strategies of a game, with the gap that certifies them.

    Attributes:
        game: what was played.
        method: how.
        learner: the learner's strategy: weights `[..., m]`, or particles.
        adversary: the adversary's.
        average: both strategies, averaged over the steps; of particles a sample of that.
        last: both strategies of the last step.
        value: mean payoff of `learner` against `adversary`, 0-d or `[g]`; the value of the game
            lies within the gap of it.
        gap: the duality gap of `learner` and `adversary`.
        gaps: its history, `[records]` or `[records, g]`.
        steps: the step of each record.
    """

    game: MatrixGame | ContinuousGame
    method: Method | ParticleMethod
    learner: Tensor | Particles
    adversary: Tensor | Particles
    average: Pair = field(repr=False)
    last: Pair = field(repr=False)
    value: Tensor
    gap: Gap
    gaps: Tensor = field(repr=False)
    steps: list[int] = field(repr=False)

    def plot(self, game: int = 0, axes: Any = None) -> Any:
        """Draw the gap against the steps and both strategies, side by side.

        Needs matplotlib.

        Args:
            game: which of a batch.
            axes: three matplotlib axes; None makes them.

        Returns:
            The axes: gap, learner, adversary.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            axes = plt.subplots(1, 3, figsize=(12, 3.5))[1]
        history = (self.gaps[:, game] if self.gaps.dim() == 2 else self.gaps).cpu().numpy()
        axes[0].plot(self.steps, history)
        axes[0].set(xlabel="step", ylabel="duality gap", title=self.method.name, xscale="log")
        if history.any():  # a gap that is 0 throughout has no logarithm
            axes[0].set_yscale("log")
        for place, who in zip(axes[1:], ("learner", "adversary"), strict=True):
            _draw(place, getattr(self, who), game)
            place.set(title=who)
        axes[0].figure.tight_layout()
        return axes


def duality_gap(
    game: MatrixGame | ContinuousGame,
    learner: Tensor | Particles,
    adversary: Tensor | Particles,
    **how: Any,
) -> Gap:
    """Return max_y F(learner, y) − min_x F(x, adversary): 0 at equilibria, else positive.

    Args:
        game: finite or continuous.
        learner: weights `[..., m]`, or particles.
        adversary: weights `[..., n]`, or particles.
        how: for continuous games, see `ContinuousGame.duality_gap`.

    Example:
        >>> import torch
        >>> game = MatrixGame([[1.0, 0.0], [0.0, 1.0]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> print(duality_gap(game, half, half), duality_gap(game, torch.eye(2)[0], half))
        0 (exact) 0.5 (exact)
    """
    if isinstance(game, ContinuousGame):
        return game.duality_gap(learner, adversary, **how)
    if isinstance(game, MatrixGame):
        x, y = game.weights("learner", learner, 0), game.weights("adversary", adversary, 1)
        return Gap(game.duality_gap(x, y, **how))
    raise TypeError(f"game must be a MatrixGame or a ContinuousGame, got {type(game).__name__}.")


class Ledger(Protocol[Strategy, Reply]):
    """What answers the profiles that a method plays, and keeps what a solution is made of."""

    method: Any

    def answer(self, profile: Profile[Strategy]) -> Reply:
        """Return what the game says to a profile; keep the profile if it counts."""
        ...

    def gap(self) -> Tensor:
        """Return the gap of the method's output so far."""
        ...

    @property
    def output(self) -> Pair:
        """The strategies that the method's bound is about: its "average", "last" or "best" ones."""
        return getattr(self, self.method.output)


class Means(Ledger[Tensor, Answer]):
    """The strategies of a finite game that were played: their mean, the last, the best."""

    def __init__(self, game: MatrixGame, method: Method) -> None:
        self.game, self.method = game, method
        self.count = 0

    def answer(self, profile: Profile[Tensor]) -> Answer:
        """Return what rows pay and columns earn against a profile; keep it if it counts."""
        pair = Pair(profile.x.exp(), profile.y.exp())
        answer = Answer(self.game.losses(pair.adversary), self.game.gains(pair.learner))
        if profile.counts:
            self._keep(pair, answer)
        return answer

    def _keep(self, pair: Pair, answer: Answer) -> None:
        """Take in a step; a mean of strategies, not of their logarithms, is one."""
        self.count += 1
        self.last, self.answered = pair, answer
        if self.count == 1:
            self.mean = [v.clone() for v in (*pair, *answer)]
            self.least, self.best = gap(*answer), pair
            return
        for mean, new in zip(self.mean, (*pair, *answer), strict=True):
            mean.lerp_(new, 1 / self.count)
        if self.method.output == "best":
            found = gap(*answer)
            better = (found < self.least)[..., None]
            self.least = torch.minimum(found, self.least)
            self.best = Pair(*map(torch.where, (better, better), pair, self.best))

    @property
    def average(self) -> Pair:
        """The mean strategies."""
        return Pair(self.mean[0], self.mean[1])

    def gap(self) -> Tensor:
        """Return the gap of the method's output; the game is linear, so its answers average."""
        if self.method.output == "average":
            return gap(self.mean[2], self.mean[3])
        return self.least if self.method.output == "best" else gap(*self.answered)


class Snapshots(Ledger[Particles, Slopes]):
    """The clouds that were played: the last one, and a sample of all of them.

    Play goes in cycles, and a few whole clouds could be but a few phases of a cycle: so a few
    particles of every cloud are kept instead, unless there is room for all.

    Payoffs are linear in a strategy. So the gap of the average on a grid needs what its nodes pay
    and earn against the particles that are new since the last record, and the whole history costs
    what one gap does. Without a grid each record is a search of its own, and there are few.
    """

    def __init__(
        self, game: ContinuousGame, method: ParticleMethod, steps: int, grid: int | None
    ) -> None:
        self.game, self.method, self.grid = game, method, grid
        self.every, self.share = math.ceil(steps / KEPT), max(1, KEPT // steps)
        size = game.judging_grid(grid)
        self.nodes = None if size is None else game.grid(size)
        self.record_every = math.ceil(steps / (5 if self.nodes is None else 50))
        self.kept: list[Clouds] = []
        self.count, self.judged, self.draw = 0, 0, game.generator(0)
        self.paid = self.earned = torch.zeros((), dtype=game.dtype, device=game.device)

    def answer(self, profile: Clouds) -> Slopes:
        """Return what the particles pay and earn, and where that grows; keep some of them."""
        self.last = Pair(profile.x, profile.y)
        if self.count % self.every == 0:
            self.kept.append(Profile(self._some(profile.x), self._some(profile.y)))
        self.count += 1
        return self.game.slopes(profile.x, profile.y)

    def _some(self, cloud: Particles) -> Particles:
        """Return `share` particles drawn by weight, at even distances of cumulated weight.

        It is cumulated along the first coordinate, where neighbours stand for one another.
        """
        if len(cloud.points) <= self.share:
            return cloud
        order = cloud.points[:, 0].argsort()
        cumulated = cloud.weights[order].cumsum(0)
        begin = torch.rand(1, generator=self.draw, dtype=cumulated.dtype, device=cumulated.device)
        marks = (torch.arange(self.share, device=begin.device) + begin) / self.share
        drawn = torch.searchsorted(cumulated, marks * cumulated[-1]).clamp(max=len(order) - 1)
        return self.game.particles(cloud.points[order[drawn]])

    @property
    def average(self) -> Pair:
        """The mean strategies: all kept particles, those of each cloud with the same mass."""
        return _union(self.kept)

    def gap(self) -> Tensor:
        """Return the gap of the method's output; raise if its particles left for infinity."""
        if not all(cloud.points.isfinite().all() for cloud in self.last):
            raise FloatingPointError(
                f"The particles left for infinity within {self.count} steps: give a step_size "
                "below 2/smoothness of the payoff, or sets that are bounded."
            )
        if self.method.output == "last" or self.nodes is None:
            return self.game.duality_gap(*self.output, grid=self.grid).value
        new = self.kept[self.judged :]
        if new:
            mu, nu = _union(new)
            paid = self.game.losses(self.nodes[0].points, nu)
            earned = self.game.gains(self.nodes[1].points, mu)
            self.paid = self.paid + len(new) * paid
            self.earned = self.earned + len(new) * earned
            self.judged = len(self.kept)
        return gap(self.paid / self.judged, self.earned / self.judged)


def _draw(axes: Any, strategy: Tensor | Particles, game: int) -> None:
    if isinstance(strategy, Tensor):
        weights = (strategy[game] if strategy.dim() == 2 else strategy).cpu().numpy()
        axes.bar(range(len(weights)), weights)
        axes.set(xlabel="action", ylabel="weight")
        axes.xaxis.get_major_locator().set_params(integer=True)
        return
    points, weights = strategy.points.cpu().numpy(), strategy.weights.cpu().numpy()
    if points.shape[1] == 1:
        bins = len(points) if len(points) < 500 else 60  # as many as nodes, or they beat
        axes.hist(points[:, 0], bins=bins, weights=weights)
        axes.set(xlabel="point", ylabel="weight")
        return
    axes.scatter(points[:, 0], points[:, 1], s=4 + 400 * weights, alpha=0.5)
    axes.set(xlabel="first coordinate", ylabel="second coordinate")
    axes.set_aspect("equal", "datalim")


def _union(clouds: list[Clouds]) -> Pair:
    share = math.log(len(clouds))

    def joined(sides: list[Particles]) -> Particles:
        points = torch.cat([side.points for side in sides])
        return Particles(points, torch.cat([side.log_weights for side in sides]) - share)

    return Pair(joined([cloud.x for cloud in clouds]), joined([cloud.y for cloud in clouds]))
