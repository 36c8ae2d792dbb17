"""The sets the players of a continuous game choose from, each with its reference measure.

The reference is where strategies start, and what entropy is measured against: of mass 1, uniform on
bounded sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.maths import geometry, mirror

REACH = 6.0
"""A grid on R^d covers this many standard deviations of the reference to either side."""


class Space:
    """A set with a reference measure; points are rows of `[N, dim]`."""

    dim: int
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "dim", self.dim, 1)

    @property
    def diameter(self) -> float:
        """Largest distance of two points; of R^d, of two typical draws of its reference."""
        raise NotImplementedError

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw `[count, dim]` points from the reference, on the generator's device."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest points of the set, `[N, dim]`."""
        raise NotImplementedError

    def holds(self, x: Tensor) -> Tensor:
        """Return which points lie in the set, up to rounding, `[N]`."""
        return (self.project(x) - x).norm(dim=1) <= 1e-4 * self.diameter

    def score(self, x: Tensor) -> Tensor:
        """Return the gradient of the reference's log-density, `[N, dim]`."""
        return torch.zeros_like(x)

    @property
    def curvature(self) -> float:
        """How fast the score changes: its Lipschitz constant."""
        return 0.0

    def grid(self, size: int) -> tuple[Tensor, Tensor]:
        """Return nodes `[G, dim]` and the reference's log-weights there, `[G]`, in float64."""
        raise NotImplementedError

    def covering(self, size: int) -> float:
        """Return how far a point of the set can be from a grid; none covers R^d."""
        return math.inf


@dataclass(frozen=True)
class Box(Space):
    """A product of intervals.

    Args:
        low: left ends, a number or one per dimension.
        high: right ends.
        dim: number of dimensions where both ends are numbers.

    Example:
        >>> Box(-1.0, 1.0).grid(5)[0].flatten().tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """

    low: float | Sequence[float] = -1.0
    high: float | Sequence[float] = 1.0
    dim: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {len(end) for end in (self.low, self.high) if isinstance(end, Sequence)}
        if self.dim > 1 or not given:
            given.add(self.dim)
        if len(given) > 1 or 0 in given:
            raise ValueError(
                f"Box: low={self.low}, high={self.high} and dim={self.dim} differ in their number "
                "of dimensions."
            )
        [dim] = given
        ends = (self.low, self.high)
        ends = [tuple(end) if isinstance(end, Sequence) else (end,) * dim for end in ends]
        for low, high in zip(*ends, strict=True):
            if any(isinstance(end, float) and math.isinf(end) for end in (low, high)):
                raise ValueError(
                    f"Box: the interval [{low}, {high}] is unbounded. A game on R^d needs a "
                    "reference measure of mass 1, from which to start: use Gaussian(dim, scale)."
                )
            check_number("Box", "low", low, -math.inf)
            check_number("Box", "high", high, -math.inf)
            if low >= high:
                raise ValueError(f"Box: low must be below high, got [{low}, {high}].")
        for name, value in zip(("low", "high", "dim"), (*ends, dim), strict=True):
            object.__setattr__(self, name, value)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.low), like.new_tensor(self.high)

    @property
    def diameter(self) -> float:
        """Length of the diagonal."""
        return math.dist(self.low, self.high)  # pyright: ignore

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw uniform points."""
        x = _draws(torch.rand, count, self.dim, generator, dtype)
        low, high = self._ends(x)
        return low + (high - low) * x

    def project(self, x: Tensor) -> Tensor:
        """Clamp each coordinate."""
        return torch.clamp(x, *self._ends(x))

    def grid(self, size: int) -> tuple[Tensor, Tensor]:
        """Return evenly spaced nodes, the ends among them, of equal weight."""
        axes = [
            torch.linspace(low, high, size, dtype=torch.float64)
            for low, high in zip(self.low, self.high, strict=True)  # pyright: ignore
        ]
        return _even(axes)

    def covering(self, size: int) -> float:
        """Half the diagonal of a cell."""
        return self.diameter / (size - 1) / 2


@dataclass(frozen=True)
class Torus(Space):
    """[0, 1)^dim with ends joined; a payoff on it has period 1 in each coordinate.

    Example:
        >>> Torus().project(torch.tensor([[1.25], [-0.25]])).flatten().tolist()
        [0.25, 0.75]
    """

    dim: int = 1

    @property
    def diameter(self) -> float:
        """Distance to the opposite point."""
        return math.sqrt(self.dim) / 2

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw uniform points."""
        return _draws(torch.rand, count, self.dim, generator, dtype)

    def project(self, x: Tensor) -> Tensor:
        """Return the coordinates modulo 1."""
        return x % 1.0 % 1.0  # a tiny negative number modulo 1 rounds to 1

    def holds(self, x: Tensor) -> Tensor:
        """Return which points are finite: each is the same as one of [0, 1)^dim."""
        return x.isfinite().all(1)

    def grid(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the multiples of 1/size, of equal weight."""
        axis = torch.arange(size, dtype=torch.float64) / size
        return _even([axis] * self.dim)

    def covering(self, size: int) -> float:
        """Half the diagonal of a cell."""
        return math.sqrt(self.dim) / size / 2


@dataclass(frozen=True)
class Ball(Space):
    """The points of Euclidean norm up to `radius`.

    Example:
        >>> Ball(2, 1.0).project(torch.tensor([[3.0, 4.0]])).shape
        torch.Size([1, 2])
    """

    dim: int
    radius: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Ball", "radius", self.radius)
        if self.radius == 0:
            raise ValueError("Ball: radius must be above 0, got 0.")

    @property
    def diameter(self) -> float:
        """Twice the radius."""
        return 2 * self.radius

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw uniform points: a direction, and the dim-th root of a uniform number as length."""
        x = _draws(torch.randn, count, self.dim, generator, dtype)
        length = _draws(torch.rand, count, 1, generator, dtype) ** (1 / self.dim)
        return self.radius * length * geometry.unit(x)

    def project(self, x: Tensor) -> Tensor:
        """Shorten the points outside."""
        return geometry.project(x, self.radius)

    def grid(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the nodes of the cube around the ball, those outside projected onto it.

        A node weighs as much as lies in the ball of the cell around it, to a fifth of its side.
        """
        nodes = Box(-self.radius, self.radius, self.dim).grid(size)[0]
        nodes = nodes[nodes.norm(dim=1) <= self.radius + self.covering(size)]
        fifths = (torch.arange(5, dtype=torch.float64) - 2) / 5 * 2 * self.radius / (size - 1)
        inside = (nodes[:, None] + _even([fifths] * self.dim)[0]).norm(dim=2) <= self.radius
        points, which = torch.unique(self.project(nodes), dim=0, return_inverse=True)
        least = 1e-3  # a point that is reached by moving alone would never be
        mass = nodes.new_zeros(len(points))
        mass = mass.index_add_(0, which, inside.double().mean(1).clamp(min=least))
        return points, (mass / mass.sum()).log()

    def covering(self, size: int) -> float:
        """As in the cube: projection brings no point farther from one of the ball."""
        return Box(-self.radius, self.radius, self.dim).covering(size)


@dataclass(frozen=True)
class Gaussian(Space):
    """R^dim with the reference N(0, scale²·I).

    Example:
        >>> Gaussian(2, scale=3.0).score(torch.ones(1, 2)).tolist()
        [[-0.1111111119389534, -0.1111111119389534]]
    """

    dim: int = 1
    scale: float = 1.0

    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Gaussian", "scale", self.scale)
        if self.scale == 0:
            raise ValueError("Gaussian: scale must be above 0, got 0.")

    @property
    def diameter(self) -> float:
        """Root mean square distance of two draws."""
        return self.scale * math.sqrt(2 * self.dim)

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw from the reference."""
        return self.scale * _draws(torch.randn, count, self.dim, generator, dtype)

    def project(self, x: Tensor) -> Tensor:
        """Return the points: all of R^d is in the set."""
        return x

    def score(self, x: Tensor) -> Tensor:
        """Return −x/scale²."""
        return -x / self.scale**2

    @property
    def curvature(self) -> float:
        """1/scale²."""
        return 1 / self.scale**2

    def grid(self, size: int) -> tuple[Tensor, Tensor]:
        """Return nodes within six standard deviations, with the density's weights."""
        nodes = Box(-REACH * self.scale, REACH * self.scale, self.dim).grid(size)[0]
        return nodes, (-(nodes / self.scale).square().sum(1) / 2).log_softmax(0)


def _draws(
    law: Callable[..., Tensor], count: int, dim: int, draw: torch.Generator, dtype: torch.dtype
) -> Tensor:
    return law(count, dim, generator=draw, dtype=dtype, device=draw.device)


def _even(axes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return all points with coordinates on the axes, of equal weight."""
    nodes = torch.cartesian_prod(*axes).view(-1, len(axes))
    return nodes, mirror.uniform(len(nodes), dtype=nodes.dtype)
