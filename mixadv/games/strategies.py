"""What players of a game play, what that pays, and how far it is from the best.

A payoff `f` is written for one pair of points; `torch.func.vmap` and `grad` make all pairs of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

PAIRS = 1 << 20
"""Pairs of points evaluated at once: 8 MB of float64 per intermediate result."""


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
    """What each particle pays or earns against the other side, and where that grows."""

    losses: Tensor  # of the learner's points, `[N]`
    gains: Tensor  # of the adversary's points, `[M]`
    uphill_x: Tensor  # gradients of `losses`, `[N, dim]`
    uphill_y: Tensor  # gradients of `gains`, `[M, dim]`


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


class PairPayoff:
    """f(x, y) of one pair of points, at all pairs and in the mean over strategies."""

    def __init__(self, payoff: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        if not callable(payoff):
            raise TypeError(f"payoff must be a function of two points, got {payoff!r}.")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real one, such as torch.float64, got {dtype}.")
        if dtype.itemsize < 4:
            raise ValueError(f"{dtype} is too coarse for weights: dtype=torch.float32 or float64.")
        self.payoff, self.dtype = payoff, dtype

    def number(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f of one pair of points `[dim]`, 0-d."""
        return self.payoff(x, y).reshape(()).to(self.dtype)

    def payoffs(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Return f of all pairs of points `[N, dim]` and `[M, dim]`, as `[N, M]`."""
        along = vmap(vmap(self.number, (None, 0)), (0, None), chunk_size=_chunk(ys))
        return along(xs, ys)

    def losses(self, xs: Tensor, nu: Particles) -> Tensor:
        """Return what each point `[N, dim]` of the learner pays against ν, `[N]`."""
        return vmap(self._mean(nu, 0), chunk_size=_chunk(nu.points))(xs)

    def gains(self, ys: Tensor, mu: Particles) -> Tensor:
        """Return what each point `[M, dim]` of the adversary earns against μ, `[M]`."""
        return vmap(self._mean(mu, 1), chunk_size=_chunk(mu.points))(ys)

    def value(self, mu: Particles, nu: Particles) -> Tensor:
        """Return the mean payoff, 0-d."""
        return mu.weights @ self.losses(mu.points, nu)

    def slopes(self, mu: Particles, nu: Particles) -> Slopes:
        """Return payoffs and gradients of all particles against the other side."""
        uphill_x, losses = self.climb(nu, 0)(mu.points)
        uphill_y, gains = self.climb(mu, 1)(nu.points)
        return Slopes(losses, gains, uphill_x, uphill_y)

    def climb(self, rival: Particles, side: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return what maps points of a side, 0 or 1, to gradients and payoffs against a rival."""
        return vmap(grad_and_value(self._mean(rival, side)), chunk_size=_chunk(rival.points))

    def check(self, xs: Tensor, ys: Tensor) -> None:
        """Raise unless f is a finite real number at pairs of points `[N, dim]`, also by `vmap`."""
        found = self.payoff(xs[0], ys[0])
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"payoff must return a real tensor, got {kind}: compute it with torch from x and "
                "y, so that it can be differentiated."
            )
        if found.numel() != 1:
            raise ValueError(
                f"payoff must return one number for a pair of points {list(xs[0].shape)} and "
                f"{list(ys[0].shape)}, got shape {list(found.shape)}: sum over the coordinates."
            )
        try:
            drawn = vmap(self.number)(xs, ys)
        except RuntimeError as error:
            raise TypeError(
                "payoff must be plain torch, which torch.func.vmap can run on many pairs of points "
                f"at once: no `if` on a tensor (use torch.where), no .item(). {error}"
            ) from error
        check_finite("its value", drawn, x=xs, y=ys)

    def _mean(self, rival: Particles, side: int) -> Callable[[Tensor], Tensor]:
        """Return the mean payoff of one point against the other side's strategy."""

        def mean(point: Tensor) -> Tensor:
            def against(answer: Tensor) -> Tensor:
                return self.number(answer, point) if side else self.number(point, answer)

            return rival.weights @ vmap(against)(rival.points)

        return mean


def check_finite(what: str, payoffs: Tensor, **points: Tensor) -> None:
    """Raise unless the payoffs `[N]` at some points are finite."""
    bad = (~payoffs.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        where = ", ".join(f"{who}={nodes[i].tolist()}" for who, nodes in points.items())
        raise ValueError(
            f"payoff must be finite on the sets: {what} at {where} is {payoffs[i].item()}. Without "
            "a bound there is no value."
        )


def _chunk(rivals: Tensor) -> int:
    return max(1, PAIRS // max(1, len(rivals)))
