"""What a set is that the players of a continuous game choose from."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class Space:
    """A set with a reference measure; points are rows of `[N, dim]`."""

    dim: int
    bounded: ClassVar[bool] = True

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
        """Return how far a point of the set can be from the nearest node of the grid."""
        raise NotImplementedError


def check_points(who: str, points: Tensor, space: Space) -> None:
    """Raise unless the points `[N, dim]` are points of the space."""
    if points.dim() != 2 or points.shape[1] != space.dim or len(points) == 0:
        raise ValueError(
            f"{who} must be points of shape [N, {space.dim}] with N at least 1, got "
            f"{list(points.shape)}."
        )
    out = ~space.holds(points)
    if out.any():
        raise ValueError(
            f"{who} has {int(out.sum())} points outside {space}, the first is "
            f"{points[out][0].tolist()}: project them."
        )
