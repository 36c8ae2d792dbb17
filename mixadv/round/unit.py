"""The unit of lengths: the mean L2 norm of a real token's output at the site."""

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
from mixadv.round.arena import Arena
from mixadv.round.goals import Goals
from mixadv.round.passes import Passes


def measure_unit(arena: Arena, closures: Iterable[Closure]) -> float:
    """Return the mean L2 norm of a real token's output at the site, on this process alone.

    The mean is over the tokens of all closures. Nothing is left changed.
    """
    return mean_length(arena, [x for c in closures for x in measure(arena, c)[0]], everywhere=False)


def measure(arena: Arena, closure: Closure, where: Where = None) -> tuple[list[Tensor], list[Call]]:
    """Return the lengths that `measuring` notes in a pass, and the calls at the site."""
    lengths: list[Tensor] = []
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


def measuring(
    lengths: list[Tensor], leaves: list[Tensor] | None = None, add: bool = True
) -> Provide:
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
        lengths.append(torch.stack([(length * real).sum(), real.sum()]))
        if not add:
            return None
        leaf = torch.zeros_like(call.empty()).requires_grad_()
        if leaves is not None:
            leaves.append(leaf)
        return leaf

    return provide


def mean_length(arena: Arena, lengths: list[Tensor], everywhere: bool = True) -> float:
    """Return the mean of what `measuring` noted, over all processes where they share a round."""
    total = torch.stack([x.double().cpu() for x in lengths]).sum(0)
    if everywhere and parallel.world_size() > 1:
        total = total.to(lengths[0])  # on the device that the processes talk by
        parallel.add_up(total)
    length = float(total[0] / total[1])
    if (not math.isfinite(length) or length == 0) and arena.solver.unit == "relative":
        raise GameError(
            f"The mean norm at the site {arena.site.names} is {length}, so a relative radius means "
            "nothing there. Give lengths with unit='absolute'."
        )
    return length
