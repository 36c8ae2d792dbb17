"""Zero-sum games on continuous sets: a differentiable payoff of two points.

    F(μ, ν) = ∬ f(x, y) dμ(x) dν(y),   the learner's μ minimises, the adversary's ν maximises.

`f` is written for one pair of points; `torch.func.vmap` and `grad` make all pairs of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jacrev, vmap

from mixadv.checks import check_integer, check_number
from mixadv.games import deviations
from mixadv.games.certificate import Gap
from mixadv.games.matrix import numbers
from mixadv.games.spaces import Space, check_points

Payoff = Callable[[Tensor, Tensor], Tensor]

PAIRS = 1 << 20
"""Pairs of points evaluated at once: 8 MB of float64 per intermediate result."""


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


class ContinuousGame:
    """min_μ max_ν of the mean payoff under mixed strategies on two sets.

    Args:
        payoff: `f(x, y)` of one point `[dim]` each, plain torch, a number; the learner minimises.
        learner: the learner's set: `Box`, `Torus`, `Ball` or `Gaussian`.
        adversary: the adversary's.
        lipschitz: of f in either point, for error bars of gaps on a grid; None measures the slope
            at the nodes, which have to be close enough to show how f varies, and `math.inf` says
            that f jumps.
        dtype: of points and weights.
        device: of points and weights.

    Raises:
        TypeError: if a set is none, or the payoff returns no real tensor.
        ValueError: if the payoff is no number, or not finite at draws of the references.

    Example:
        >>> from mixadv.games import Box
        >>> game = ContinuousGame(lambda x, y: (x - y).square().sum(), Box(-1, 1), Box(-1, 1))
        >>> ends = torch.tensor([[-1.0], [1.0]])
        >>> print(game.duality_gap(torch.zeros(1, 1), ends, grid=5))
        0 + about 1 (a grid of 5 and 5 points)
    """

    def __init__(
        self,
        payoff: Payoff,
        learner: Space,
        adversary: Space,
        *,
        lipschitz: float | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        for who, space in (("learner", learner), ("adversary", adversary)):
            if not isinstance(space, Space):
                raise TypeError(
                    f"{who} must be a set such as Box(-1, 1), Torus(1), Ball(2) or Gaussian(1), "
                    f"got {space!r}."
                )
        if not callable(payoff):
            raise TypeError(f"payoff must be a function of two points, got {payoff!r}.")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real one, such as torch.float64, got {dtype}.")
        jumps = isinstance(lipschitz, float) and lipschitz == math.inf
        if lipschitz is not None and not jumps:
            check_number("ContinuousGame", "lipschitz", lipschitz)
        self.payoff, self.learner, self.adversary = payoff, learner, adversary
        self.lipschitz, self.dtype, self.device = lipschitz, dtype, _device(device)
        self._check()

    def __repr__(self) -> str:
        return f"ContinuousGame({self.learner}, {self.adversary}, {self.dtype})"

    # Payoffs -----------------------------------------------------------------------------------

    def payoffs(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Return f of all pairs of points `[N, dim]` and `[M, dim]`, as `[N, M]`."""
        along = vmap(vmap(self._number, (None, 0)), (0, None), chunk_size=_chunk(len(ys)))
        return along(xs, ys)

    def losses(self, xs: Tensor, nu: Particles) -> Tensor:
        """Return what each point `[N, dim]` of the learner pays against ν, `[N]`."""
        return vmap(self._against(nu, 0), chunk_size=_chunk(len(nu.points)))(xs)

    def gains(self, ys: Tensor, mu: Particles) -> Tensor:
        """Return what each point `[M, dim]` of the adversary earns against μ, `[M]`."""
        return vmap(self._against(mu, 1), chunk_size=_chunk(len(mu.points)))(ys)

    def value(self, mu: Particles, nu: Particles) -> Tensor:
        """Return the mean payoff, 0-d."""
        return mu.weights @ self.losses(mu.points, nu)

    def slopes(self, mu: Particles, nu: Particles) -> Slopes:
        """Return payoffs and gradients of all particles against the other side."""
        uphill_x, losses = self.climb(nu, 0)(mu.points)
        uphill_y, gains = self.climb(mu, 1)(nu.points)
        return Slopes(losses, gains, uphill_x, uphill_y)

    def climb(self, other: Particles, side: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return what maps points to gradients and payoffs of the player against the other side.

        Args:
            other: the other side's strategy.
            side: whose points they are: 0 the learner's, 1 the adversary's.
        """
        chunk = _chunk(len(other.points))
        return vmap(grad_and_value(self._against(other, side)), chunk_size=chunk)

    def particles(self, points: Tensor | Particles) -> Particles:
        """Return points `[N, dim]` as a strategy of equal weights; a strategy in the game's dtype.

        Raises:
            ValueError: if the weights of a strategy do not belong to its points, or have another
                sum than 1.
        """
        if isinstance(points, Particles):
            here = {"dtype": self.dtype, "device": self.device}
            cloud = Particles(points.points.to(**here), points.log_weights.to(**here))
            total = cloud.weights.sum().item()
            if cloud.log_weights.shape != cloud.points.shape[:1] or not abs(total - 1) < 1e-4:
                raise ValueError(
                    f"log_weights must be one for each of {len(cloud.points)} points, of weights "
                    f"with sum 1, got {list(cloud.log_weights.shape)} with sum {total:g}."
                )
            return cloud
        points = numbers("points", points, self.dtype, self.device)
        if points.dim() != 2:
            raise ValueError(f"points must be [N, dim], one per row, got {list(points.shape)}.")
        return Particles(points, points.new_full((len(points),), -math.log(max(1, len(points)))))

    # Certificates --------------------------------------------------------------------------------

    def grid(self, size: int) -> tuple[Particles, Particles]:
        """Return both references on grids of `size` nodes per dimension.

        Raises:
            ValueError: if that are too many nodes.
        """
        check_integer("grid", "size", size, 2)
        most = size ** max(self.learner.dim, self.adversary.dim)
        if most > 1 << 16:
            raise ValueError(
                f"A grid of {size} nodes per dimension in {self.learner.dim} and "
                f"{self.adversary.dim} dimensions has {most} nodes: take fewer, or play particles."
            )
        mu, nu = (
            Particles(*(v.to(self.device, self.dtype) for v in space.grid(size)))
            for space in (self.learner, self.adversary)
        )
        return mu, nu

    def duality_gap(
        self,
        mu: Particles | Tensor,
        nu: Particles | Tensor,
        *,
        grid: int | None = None,
        restarts: int = 64,
        steps: int = 100,
        seed: int = 0,
    ) -> Gap:
        """Return what both players could still win by deviating, and how well that is known.

        Args:
            mu: the learner's strategy, particles or points `[N, dim]` of equal weights.
            nu: the adversary's.
            grid: nodes per dimension on which all deviations are tried. None takes a fine grid in
                one and two dimensions; in more, the best of `restarts` projected gradient climbs
                of `steps` steps, a lower bound.
            restarts: see `grid`.
            steps: see `grid`.
            seed: of the restarts.
        """
        mu, nu = self.particles(mu), self.particles(nu)
        check_points("learner", mu.points, self.learner)
        check_points("adversary", nu.points, self.adversary)
        size = deviations.grid_size(self, grid)
        if size is None:
            return deviations.by_climbing(self, mu, nu, restarts, steps, seed)
        return deviations.on_grid(self, mu, nu, size)

    def smoothness(self, seed: int = 0, draws: int = 64) -> float:
        """Return the largest spectral norm of f's second derivatives at drawn pairs."""
        draw, split = self.generator(seed), self.learner.dim
        xs = self.learner.sample(draws, draw, self.dtype)
        ys = self.adversary.sample(draws, draw, self.dtype)
        second = vmap(jacrev(jacrev(lambda z: self._number(z[:split], z[split:]))))
        return torch.linalg.matrix_norm(second(torch.cat([xs, ys], 1)), 2).max().item()

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator of draws on the game's device."""
        return torch.Generator(self.device).manual_seed(seed)

    # Helpers -------------------------------------------------------------------------------------

    def _number(self, x: Tensor, y: Tensor) -> Tensor:
        return self.payoff(x, y).reshape(()).to(self.dtype)

    def _against(self, other: Particles, side: int) -> Callable[[Tensor], Tensor]:
        """Return the mean payoff of one point against the other side's strategy."""

        def mean(point: Tensor) -> Tensor:
            def one(against: Tensor) -> Tensor:
                pair = (point, against) if side == 0 else (against, point)
                return self._number(*pair)

            return other.weights @ vmap(one)(other.points)

        return mean

    def _check(self) -> None:
        draw = self.generator(0)
        x = self.learner.sample(1, draw, self.dtype)[0]
        y = self.adversary.sample(1, draw, self.dtype)[0]
        found = self.payoff(x, y)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"payoff must return a real tensor, got {kind}: compute it with torch from x and "
                "y, so that it can be differentiated."
            )
        if found.numel() != 1:
            raise ValueError(
                f"payoff must return one number for a pair of points [{len(x)}] and [{len(y)}], "
                f"got shape {list(found.shape)}: sum over the coordinates."
            )
        xs, ys = (s.sample(64, draw, self.dtype) for s in (self.learner, self.adversary))
        try:
            drawn = vmap(self._number)(xs, ys)
        except RuntimeError as error:
            raise TypeError(
                "payoff must be plain torch, which torch.func.vmap can run on many pairs of points "
                f"at once: no `if` on a tensor (use torch.where), no .item(). {error}"
            ) from error
        if not drawn.isfinite().all():
            i = int((~drawn.isfinite()).nonzero()[0])
            raise ValueError(
                f"payoff must be finite on the sets: it is {drawn[i].item()} at "
                f"x={xs[i].tolist()}, y={ys[i].tolist()}. Without a bound there is no value."
            )


def _device(device: Any) -> torch.device:
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that torch finds here, got {device!r}: {error}"
        ) from error


def _chunk(others: int) -> int:
    return max(1, PAIRS // max(1, others))
