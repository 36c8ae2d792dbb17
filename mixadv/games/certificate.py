"""The duality gap of a pair of strategies, whatever the game."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixadv.games.continuous import ContinuousGame
from mixadv.games.matrix import MatrixGame
from mixadv.games.strategies import Gap, Particles


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
