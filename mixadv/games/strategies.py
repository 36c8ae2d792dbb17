"""What players of a game play, what that pays, and how far it is from the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """Both players' strategies: weights `[..., m]` and `[..., n]`, or particles."""

    learner: Any
    adversary: Any


class Particles(NamedTuple):
    """A mixed strategy of finitely many points: Σ_i w_i δ_(x_i).

    Attributes:
        points: `[N, dim]`.
        log_weights: `[N]`.
    """

    points: Tensor
    log_weights: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights `[N]`, of sum 1."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """Mean point, `[dim]`."""
        return self.weights @ self.points


class Slopes(NamedTuple):
    """What each particle pays or earns against the other side, and where that grows.

    Attributes:
        losses: `[N]`, of the learner's points.
        gains: `[M]`, of the adversary's points.
        uphill_x: gradients of `losses`, `[N, dim]`.
        uphill_y: gradients of `gains`, `[M, dim]`.
    """

    losses: Tensor
    gains: Tensor
    uphill_x: Tensor
    uphill_y: Tensor


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
