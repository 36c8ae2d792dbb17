"""Zero-sum games on continuous sets: a differentiable payoff of two points.

F(μ, ν) = ∬ f(x, y) dμ(x) dν(y),   the learner's μ minimises, the adversary's ν maximises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from mixadv.checks import check_integer, check_number
from mixadv.games.matrix import gap, numbers
from mixadv.games.spaces import REACH, Space
from mixadv.games.strategies import Gap, PairPayoff, Particles, check_finite
from mixadv.maths.geometry import unit

NODES = {1: 1001, 2: 65}
"""Nodes per dimension of the grid a gap is judged on, where none is given."""


class ContinuousGame(PairPayoff):
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
        payoff: Callable[[Tensor, Tensor], Tensor],
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
        super().__init__(payoff, dtype)
        jumps = isinstance(lipschitz, float) and lipschitz == math.inf
        if lipschitz is not None and not jumps:
            check_number("ContinuousGame", "lipschitz", lipschitz)
        self.learner, self.adversary = self.spaces = learner, adversary
        self.lipschitz, self.device = lipschitz, _device(device)
        draw = self.generator(0)
        self.check(*(space.sample(64, draw, dtype) for space in self.spaces))

    def __repr__(self) -> str:
        return f"ContinuousGame({self.learner}, {self.adversary}, {self.dtype})"

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

    def cloud(self, who: str, points: Tensor | Particles, side: int) -> Particles:
        """Return a strategy of a side, 0 or 1; raise unless its points are in the side's set."""
        cloud, space = self.particles(points), self.spaces[side]
        if cloud.points.dim() != 2 or cloud.points.shape[1] != space.dim or not len(cloud.points):
            raise ValueError(
                f"{who} must be points of shape [N, {space.dim}] with N at least 1, got "
                f"{list(cloud.points.shape)}."
            )
        out = ~space.holds(cloud.points)
        if out.any():
            raise ValueError(
                f"{who} has {int(out.sum())} points outside {space}, the first is "
                f"{cloud.points[out][0].tolist()}: project them."
            )
        return cloud

    def smoothness(self, seed: int = 0, draws: int = 64) -> float:
        """Return the largest spectral norm of f's second derivatives at drawn pairs."""
        draw, split = self.generator(seed), self.learner.dim
        pairs = torch.cat([space.sample(draws, draw, self.dtype) for space in self.spaces], 1)
        second = vmap(jacrev(jacrev(lambda z: self.number(z[:split], z[split:]))))
        return torch.linalg.matrix_norm(second(pairs), 2).max().item()

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator of draws on the game's device."""
        return torch.Generator(self.device).manual_seed(seed)

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
            for space in self.spaces
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
        mu, nu = self.cloud("learner", mu, 0), self.cloud("adversary", nu, 1)
        size = self.judging_grid(grid)
        if size is not None:
            return self._gap_on_grid(mu, nu, size)
        check_integer("duality_gap", "restarts", restarts, 1)
        check_integer("duality_gap", "steps", steps, 0)
        check_integer("duality_gap", "seed", seed, 0)
        draw = self.generator(seed)
        earned = self._climbed(mu, 1, restarts, steps, draw)
        paid = -self._climbed(nu, 0, restarts, steps, draw)
        how = f"projected gradient, {restarts} restarts × {steps} steps"
        return Gap((earned - paid).clamp(min=0), "lower bound", math.nan, how)

    def judging_grid(self, grid: int | None) -> int | None:
        """Return the nodes per dimension to judge a gap on; None where there is no grid."""
        return NODES.get(max(self.learner.dim, self.adversary.dim)) if grid is None else grid

    def _gap_on_grid(self, mu: Particles, nu: Particles, size: int) -> Gap:
        """Return the gap over all points of a grid.

        Its error is what the slopes at the nodes leave room for between them: a grid that is too
        coarse to show the payoff's oscillations does not show its slopes either, so there give
        `lipschitz`.
        """
        xs, ys = (reference.points for reference in self.grid(size))
        losses, gains = self.losses(xs, nu), self.gains(ys, mu)
        check_finite("its mean", losses, x=xs)
        check_finite("its mean", gains, y=ys)
        value = gap(losses, gains)
        how = f"a grid of {len(xs)} and {len(ys)} points"
        if not (self.learner.bounded and self.adversary.bounded):
            how += f" within {REACH:g} standard deviations"
            return Gap(value, "lower bound", math.nan, how)
        error = self._slope(xs, nu, 0) * self.learner.covering(size)
        error += self._slope(ys, mu, 1) * self.adversary.covering(size)
        return Gap(value, "grid", error, how)

    def _slope(self, nodes: Tensor, rival: Particles, side: int) -> float:
        if self.lipschitz is not None:
            return self.lipschitz
        return self.climb(rival, side)(nodes)[0].norm(dim=1).max().item()

    def _climbed(
        self, rival: Particles, side: int, restarts: int, steps: int, draw: torch.Generator
    ) -> Tensor:
        """Return the most (learner: minus the least) that climbs from random starts reach."""
        space, sign = (self.adversary, 1) if side else (self.learner, -1)
        climb = self.climb(rival, side)
        x, reached = space.sample(restarts, draw, self.dtype), []
        for step in range(steps + 1):
            uphill, payoffs = climb(x)
            reached.append((sign * payoffs).max())
            length = space.diameter / 2 * (1 - step / (steps + 1))
            x = space.project(x + sign * length * unit(uphill))
        return torch.stack(reached).max()


def _device(device: Any) -> torch.device:
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that torch finds here, got {device!r}: {error}"
        ) from error
