"""The adversary's start: the strategy that an ascent begins from."""

from collections.abc import Callable, Sequence

from torch import Tensor

from mixadv.maths.box import Room
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent, Draw
from mixadv.players.rows import repeat_mask, repeat_owners
from mixadv.players.strategy import Strategy

Begin = Callable[[int, Call], Tensor]
"""`begin(index, call)`: the start `[B, ...]` at a call of the site."""

Scale = Callable[[str], float]
"""`scale(site)`: what one unit of length is at a module of the site, by its name."""


Rooms = Callable[[int], Room | None]
"""`rooms(index)`: how far δ may move at a call of the site; None is no box."""


class Opening(Strategy):
    """A start whose points `begin` draws in a round's first pass, as the site is called."""

    def __init__(self, begin: Begin, size: int, scale: Scale, leaf: bool = True) -> None:
        super().__init__(())
        self._begin = begin
        self._scale = scale
        self._size = size
        self._leaf = leaf

    @property
    def size(self) -> int:
        """M, the number of particles."""
        return self._size

    def point(self, index: int, call: Call) -> Tensor:
        """Return the particles at a call, drawn if it is a new one."""
        if index == len(self._points):
            drawn = self._begin(index, call).requires_grad_(self._leaf)
            self._points, self._masks = (*self._points, drawn), (*self._masks, call.mask)
            self._owners = (*self._owners, call.owners)
            self.units = (*self.units, self._scale(call.site))
        return self._points[index]

    def detach(self) -> Strategy:
        """Return the start without gradients; what was not drawn yet is drawn without them."""
        if self._points:
            return super().detach()

        def begin(index: int, call: Call) -> Tensor:
            return self.point(index, call).detach()

        return Opening(begin, self._size, self._scale, leaf=False)


def opening(
    ascent: Ascent,
    draw: Draw,
    calls: Sequence[Call],
    scale: Scale,
    begin: Begin | None = None,
    rooms: Rooms = lambda index: None,
) -> Strategy:
    """Return the adversary's start: at the calls of an earlier pass, else drawn in the first one.

    `begin` gives the one point of each call, where it is not the ascent's own start; where there is
    a box it is projected into its room.
    """

    def start(index: int, call: Call) -> Tensor:
        room = rooms(index)
        if begin is not None:
            point = begin(index, call)
            return (point if room is None else ascent.project(point, call.owners, room))[None]
        size = (ascent.particles * call.shape[0], *call.shape[1:])
        like = call.empty().new_empty(size)
        mask = repeat_mask(call.mask, ascent.particles)
        owned = repeat_owners(call.owners, ascent.particles)
        room = None if room is None else room.repeat(ascent.particles)
        point = ascent.begin(like, mask, draw, owned, room)
        return point.unflatten(0, (ascent.particles, -1))

    if not calls:
        return Opening(start, ascent.particles, scale)
    points = [start(index, call).requires_grad_() for index, call in enumerate(calls)]
    owners = [call.owners for call in calls]
    units = [scale(call.site) for call in calls]
    return Strategy(points, [call.mask for call in calls], None, units, owners)
