"""The box that x + δ must stay in, such as pixels in [0, 1], and its intersection with a ball.

    z = argmin ‖z − δ‖₂   over   ‖z‖ ≤ ε  and  low ≤ z ≤ high,      low = lo − x ≤ 0 ≤ hi − x = high

In L∞ both clamp. In L2 z = clip(t·δ) for one t in (0, 1], in L1 z = clip(δ shrunk by one
threshold): the norm of z is monotone in that number, which is found by bisection; then it is known
which coordinates the box stops, and the number follows from the others exactly. Clipping what was
projected onto the ball is the projection in L∞ alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from mixadv.maths.geometry import Norm, Per, norms

_HALVINGS = 40  # of an interval, for thresholds in fp32


class Room(NamedTuple):
    """How far each coordinate may move, 0 always among it; see `room_around`.

    Attributes:
        low: at most 0, `[B, ...]`.
        high: at least 0, `[B, ...]`.
    """

    low: Tensor
    high: Tensor

    def clamp(self, delta: Tensor) -> Tensor:
        """Return δ moved into the room, coordinate by coordinate; no norm of it grows."""
        return delta.clamp(self.low, self.high)

    def kept(self, delta: Tensor) -> Tensor:
        """Return δ, which lies in the room but for rounding, with its own gradient, inside."""
        return delta + (self.clamp(delta) - delta).detach()

    def repeat(self, times: int) -> Self:
        """Return the room of so many copies of the batch."""
        if times == 1:
            return self
        return type(self)(*(x.repeat(times, *[1] * (x.dim() - 1)) for x in self))


def within(x: Tensor, box: tuple[float, float]) -> bool:
    """Return whether all values lie in a box, up to a few roundings of their number format.

    Its ends are fractions where images are normalised, and the images at them are rounded.

    Example:
        >>> within((torch.tensor([0.0, 1.0]) - 0.4) / 0.3, (-0.4 / 0.3, 0.6 / 0.3))
        True
    """
    x, slack = x.detach(), 2 * torch.finfo(x.dtype).eps * max(map(abs, box))
    return box[0] - slack <= float(x.min()) <= float(x.max()) <= box[1] + slack


def room_around(x: Tensor, box: tuple[float, float], unit: float = 1.0) -> Room:
    """Return how far each coordinate of x may move within a box, in units of length.

    A coordinate outside of the box may come back to it, and move no further away.

    Args:
        x: `[B, ...]`.
        box: its lower and its upper end.
        unit: what one unit of δ's length is.

    Example:
        >>> room_around(torch.tensor([[0.25, 1.0]]), (0.0, 1.0)).high.tolist()
        [[0.75, 0.0]]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = box
    return Room((low - wide).clamp(max=0) / unit, (high - wide).clamp(min=0) / unit)


def project_into(
    delta: Tensor,
    room: Room,
    radius: float,
    norm: Norm = "l2",
    per: Per = "sample",
    owners: Tensor | None = None,
) -> Tensor:
    """Return the Euclidean projection of each group onto the ball and the room together.

    Args:
        delta: `[B, ...]`.
        room: of the same shape.
        radius: of the ball.
        norm: `"l1"`, `"l2"` or `"linf"`.
        per: as for `mixadv.maths.geometry.project`.
        owners: likewise.

    Example:
        >>> room = room_around(torch.tensor([[0.5, 0.9]]), (0.0, 1.0))
        >>> project_into(torch.tensor([[3.0, 4.0]]), room, 0.3, "linf")
        tensor([[0.3000, 0.1000]])
    """
    inside = room.clamp(delta)
    if norm == "linf":
        return inside.clamp(-radius, radius)
    caps = torch.where(delta > 0, room.high, -room.low)
    onto = _onto_l2_sphere if norm == "l2" else _onto_l1_sphere
    wide = delta.to(torch.promote_types(delta.dtype, torch.float32)).abs()
    length = norms(torch.minimum(wide, caps), norm, per, owners)
    magnitudes = onto(wide, caps.to(wide.dtype), radius, per, owners)
    found = (magnitudes * delta.sign()).to(delta.dtype)
    return torch.where(length <= radius, inside, room.clamp(found))


def _onto_l2_sphere(
    size: Tensor, caps: Tensor, radius: float, per: Per, owners: Tensor | None
) -> Tensor:
    """Return min(t·|δ|, caps) of length `radius`; the factor is halved in its logarithm."""
    length = norms(size, "l2", per, owners)
    low = (radius / torch.where(length > 0, length, 1.0)).clamp(max=1)  # caps only shorten
    high = torch.ones_like(low)
    for _ in range(_HALVINGS):
        middle = low.sqrt() * high.sqrt()
        far = norms(torch.minimum(middle * size, caps), "l2", per, owners) > radius
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    scaled = low * size
    free = (scaled < caps).to(size.dtype)
    stopped = norms(caps * (1 - free), "l2", per, owners)
    moving = norms(scaled * free, "l2", per, owners)
    rest = (radius**2 - stopped**2).clamp(min=0).sqrt()
    factor = torch.where(moving > 0, rest / torch.where(moving > 0, moving, 1.0), 1.0)
    return torch.minimum(factor * scaled, caps)


def _onto_l1_sphere(
    size: Tensor, caps: Tensor, radius: float, per: Per, owners: Tensor | None
) -> Tensor:
    """Return min((|δ| − t)₊, caps) of length `radius`."""
    high = norms(size, "linf", per, owners)
    low = torch.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        shrunk = (size - middle).clamp(min=0)
        far = norms(torch.minimum(shrunk, caps), "l1", per, owners) > radius
        low, high = torch.where(far, middle, low), torch.where(far, high, middle)
    shrunk = (size - high).clamp(min=0)
    free = ((shrunk > 0) & (shrunk < caps)).to(size.dtype)
    stopped = norms(torch.where(shrunk >= caps, caps, 0.0), "l1", per, owners)
    count = norms(free, "l1", per, owners)
    exact = (norms(size * free, "l1", per, owners) + stopped - radius) / count.clamp(min=1)
    threshold = torch.where(count > 0, exact, high)
    found = torch.minimum((size - threshold).clamp(min=0), caps)
    length = norms(found, "l1", per, owners)  # where |δ| is huge, a threshold is not exact
    return found * (radius / torch.where(length > radius, length, radius or 1.0)).clamp(max=1)
