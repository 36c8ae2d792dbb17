"""What a solve returns, and the gap that certifies it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mixadv.games.continuous import ContinuousGame
from mixadv.games.matrix import MatrixGame
from mixadv.games.method import Method
from mixadv.games.particles import ParticleMethod
from mixadv.games.strategies import Gap, Pair, Particles


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
