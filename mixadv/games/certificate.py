"""Duality gaps, each with the word that says what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mixadv.games.matrix import MatrixGame, numbers

if TYPE_CHECKING:
    from mixadv.games.continuous import ContinuousGame, Particles


@dataclass(frozen=True)
class Gap:
    """A duality gap: what both players together could still win by deviating.

    Attributes:
        value: at least 0; 0-d, or `[g]` for a batch of games.
        kind: `"exact"`; `"grid"`: over all points of a grid, so that the gap over the whole sets
            lies between `value` and `value + error` (an estimate, where the game does not know its
            Lipschitz constant and the slope at the nodes stands for it); or `"lower bound"`: over
            the deviations that were found.
        error: see `kind`; nothing is known where it is NaN.
        response: which deviations were tried.
    """

    value: Tensor
    kind: Literal["exact", "grid", "lower bound"] = "exact"
    error: float = 0.0
    response: str = "every row and column"

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        most = self.value.max().item()
        gap = f"{most:.3g}" if self.value.dim() == 0 else f"{most:.3g} at most"
        if self.kind == "exact":
            return f"{gap} (exact)"
        if self.kind == "grid":
            return f"{gap} + about {self.error:.2g} ({self.response})"
        return f"≥ {gap} (lower bound: {self.response})"


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
        >>> game = MatrixGame([[1.0, 0.0], [0.0, 1.0]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> print(duality_gap(game, half, half), duality_gap(game, torch.eye(2)[0], half))
        0 (exact) 0.5 (exact)
    """
    if isinstance(game, MatrixGame):
        x = check_weights("learner", learner, game, 0)
        y = check_weights("adversary", adversary, game, 1)
        return Gap(game.duality_gap(x, y, **how))
    if not hasattr(game, "duality_gap"):
        raise TypeError(
            f"game must be a MatrixGame or a ContinuousGame, got {type(game).__name__}."
        )
    return game.duality_gap(learner, adversary, **how)  # pyright: ignore


def check_weights(who: str, weights: Any, game: MatrixGame, side: int) -> Tensor:
    """Return weights `[..., size]` of a player as a tensor; raise unless they are a strategy."""
    size = game.shape[side]
    weights = numbers(who, weights, game.payoff.dtype, game.payoff.device)
    if weights.shape[-1:] != (size,) or not weights.numel():
        raise ValueError(
            f"{who} must be weights of shape [..., {size}], got {list(weights.shape)}."
        )
    total = weights.sum(-1)
    if not (weights >= 0).all() or not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise ValueError(
            f"{who} must be weights on the simplex: at least 0 and of sum 1, got "
            f"{weights.min().item():g} to {weights.max().item():g} and a sum of "
            f"{total.flatten()[0].item():g}."
        )
    return weights
