"""The unit of lengths: the mean L2 norm of a real token's output, at each module of the site."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.geometry import norms
from mixadv.model import parallel
from mixadv.model.closure import Closure
from mixadv.model.contexts import no_grad
from mixadv.model.masks import Where
from mixadv.model.visits import Call, Provide
from mixadv.round.arena import Arena, Units
from mixadv.round.goals import Goals
from mixadv.round.passes import Passes

Lengths = list[tuple[str, Tensor]]
"""Per call at the site the module's name, and the sum and number of the lengths there, `[2]`."""


def measure_unit(arena: Arena, closures: Iterable[Closure]) -> float:
    """Return the mean L2 norm of a real token's output at a module, on this process alone.

    The mean is over the tokens of all closures. Nothing is left changed.
    """
    lengths = [x for c in closures for x in measure(arena, c)[0]]
    unit = mean_lengths(arena, lengths, everywhere=False)
    assert isinstance(unit, float)
    return unit


def measure(arena: Arena, closure: Closure, where: Where = None) -> tuple[Lengths, list[Call]]:
    """Return the lengths that `measuring` notes in a pass, and the calls at the site."""
    lengths: Lengths = []
    passes = Passes(arena, Goals(closure), {})
    arena.site.where = where
    try:
        with no_trace(passes), no_grad(), arena.site.learning():
            passes.run(measuring(lengths, add=False))
    finally:
        arena.site.where = None
    return lengths, passes.calls


@contextmanager
def no_trace(passes: Passes) -> Iterator[None]:
    """Put back at the end what passes change, and take the hooks away."""
    try:
        yield
    finally:
        passes.undo()
        passes.close()


def measuring(lengths: Lengths, leaves: list[Tensor] | None = None, add: bool = True) -> Provide:
    """Return what notes the lengths of real tokens and adds a zero leaf at the site."""
    lengths.clear()

    def provide(index: int, call: Call, output: Tensor) -> Tensor | None:
        per = "token" if output.dim() == 3 else "sample"
        wide = torch.promote_types(output.dtype, torch.float32)
        seen = output.detach().to(wide)
        real = torch.ones_like(norms(seen, "l2", per))
        if call.mask is not None:
            seen = torch.where(call.mask > 0, seen, torch.zeros_like(seen))
            real = norms(call.mask.expand_as(seen), "linf", per)
        length = norms(seen, "l2", per)
        lengths.append((call.site, torch.stack([(length * real).sum(), real.sum()])))
        if not add:
            return None
        leaf = torch.zeros_like(call.empty()).requires_grad_()
        if leaves is not None:
            leaves.append(leaf)
        return leaf

    return provide


def mean_lengths(arena: Arena, lengths: Lengths, everywhere: bool = True) -> Units:
    """Return the mean of what `measuring` noted, over all processes where they share a round.

    Of several modules one each, but for those where nothing was noted.
    """
    names, noted = arena.site.names, torch.stack([x.double().cpu() for _, x in lengths])
    total = torch.stack([noted[[site == name for site, _ in lengths]].sum(0) for name in names])
    if everywhere and parallel.world_size() > 1:
        total = total.to(lengths[0][1])  # on the device that the processes talk by
        parallel.add_up(total)
    means = {name: float(x[0] / x[1]) for name, x in zip(names, total, strict=True)}
    if arena.solver.unit == "relative":
        for name, mean in means.items():
            _check(name, mean)
    if len(names) == 1:
        return means[names[0]]
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def _check(name: str, mean: float) -> None:
    """Raise GameError unless the mean length at a module can be a unit."""
    if not math.isfinite(mean) or mean == 0:
        raise GameError(
            f"The mean norm at the site {name!r} is {mean}, so a relative radius has no "
            "meaning there. (It is nan if the module is not called, or called with padding only.) "
            "Give lengths with unit='absolute', or name another module with site=."
        )
