"""Three ways to compute the payoffs of many particles; wherever each is allowed they agree.

* loop: one pass per particle; always works.
* vmap: one vectorised pass over δ (`torch.func.vmap`), with the same dropout for all.
* stack: one pass over a batch that repeats the model's inputs M times; only without dropout and
  batch statistics, and with predictions or one loss per sample.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mixadv.model.closure import Reading
from mixadv.model.modules import bound, unwrap
from mixadv.model.parallel import world_size
from mixadv.model.private_torch import unmapped
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.round.gains import Gains
from mixadv.round.goals import Whose
from mixadv.round.passes import Passes


class Payoffs(NamedTuple):
    """What a route returns."""

    values: Tensor  # [M, B], or fewer where samples share one
    gradients: list[Tensor]  # per call at the site, [M, B, ...]
    predictions: Tensor | None  # [M, B, ...], detached; None where the closure returned none
    samples: int  # B


Route = Callable[[Passes, Strategy, Gains], Payoffs]


def loop(passes: Passes, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles one after another."""
    values, gradients, predictions, samples = [], [], [], 1
    for particle in range(q.size):
        leaves: list[Tensor] = []

        def provide(index: int, call: Call, output: Tensor, m: int = particle) -> Tensor | None:
            points = q.point(index, call)
            if points is None:
                return None
            if index == len(leaves):  # noqa: B023
                leaves.append(points[m].detach().requires_grad_())  # noqa: B023
            return passes.added(q, index, leaves[index], call, output)  # noqa: B023

        reading = passes.run(provide, whose=passes.goals.payer)
        value, samples = gains(reading, 1), reading.samples
        gradients.append(passes.differentiate(value, leaves, samples, _source(reading)))
        values.append(value.detach())
        predictions.append(reading.predictions)
    seen = None if predictions[0] is None else torch.stack(predictions).detach()
    columns = [torch.stack(g) for g in zip(*gradients, strict=True)]
    return Payoffs(torch.stack(values), columns, seen, samples)


class _Mapped(NamedTuple):
    """What is read in a pass that `torch.func.vmap` runs, outside of it."""

    source: Tensor | None
    predictions: Tensor | None
    samples: int


def vmapped(passes: Passes, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles by `torch.func.vmap` over δ."""
    if not q.points:  # nothing to map over before the first call at the site
        return loop(passes, q, gains)
    leaves = [point.detach().requires_grad_() for point in q.points]
    seen: list[_Mapped] = []

    def evaluate(*points: Tensor) -> Tensor:
        # The random state is set inside the mapped function, so that chunks replay it too.
        def provide(index: int, call: Call, output: Tensor) -> Tensor:
            return passes.added(q, index, points[index], call, output)

        reading = passes.run(provide, whose=passes.goals.payer)
        source, predictions = unmapped(_source(reading)), unmapped(reading.predictions)
        seen.append(_Mapped(source, predictions, reading.samples))
        return gains(reading, 1)

    before = passes.forwards
    values = torch.func.vmap(evaluate, randomness="same")(*leaves)
    passes.forwards = before + q.size
    source, predictions, samples = seen[0]
    gradients = passes.differentiate(values, leaves, samples, source)
    predictions = None if predictions is None else predictions.detach()
    return Payoffs(values.detach(), gradients, predictions, samples)


def stacked(passes: Passes, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles in one batch of M copies."""
    if not q.points:
        return loop(passes, q, gains)
    leaves = [point.detach().flatten(0, 1).requires_grad_() for point in q.points]
    reading = _stacked_pass(passes, q, leaves, passes.goals.payer)
    values, samples = gains(reading, q.size), reading.samples
    gradients = passes.differentiate(values, leaves, samples, _source(reading))
    predictions = reading.predictions
    predictions = None if predictions is None else _apart(predictions.detach(), q)
    columns = [_apart(g, q) for g in gradients]
    return Payoffs(_apart(values.detach(), q), columns, predictions, samples)


def tried(passes: Passes, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles in one batch, or one after another where that fails."""
    return _or_apart(passes, lambda: stacked(passes, q, gains), lambda: loop(passes, q, gains))


ROUTES: dict[str, Route] = {"loop": loop, "vmap": vmapped, "stack": stacked, "auto": tried}


FEW = 256
"""Tokens of a particle up to which a stack of particles is worth its memory, measured on a CPU."""


def chosen(passes: Passes, q: Strategy, ascent: Ascent) -> str:
    """Return the route of this round: `"auto"` tries stacks of small batches, where they fit."""
    if q.size == 1:
        return "loop"
    if ascent.particle_batching != "auto":
        return ascent.particle_batching
    arena = passes.arena
    stacks = few(passes) and arena.modes in arena.calibration.stackable
    return "auto" if stacks else "loop"


def few(passes: Passes) -> bool:
    """Return whether a batch is so small that `"auto"` stacks it.

    Never on several processes, whose batches differ: they would run forwards of different numbers.
    Never where one graph is kept at a time.
    """
    tokens = sum(math.prod(call.shape[:2]) for call in passes.calls)
    return 0 < tokens <= FEW and world_size() == 1 and not passes.arena.solver.recompute


def readings(
    passes: Passes, q: Strategy, gains: Gains, auto: bool = True, whose: Whose = "closure"
) -> tuple[Tensor, int]:
    """Return each particle's payoff `[M, B]` with gradients to θ, and B: the learner's side.

    Stacked where the solver's route says so, else one pass after another (`vmap` is not for the
    learner's backward: checkpointing and distributed hooks would not see it). `auto` is whether
    `"auto"` may stack, not so for a loss, which may be a scalar.
    """
    route = chosen(passes, q, passes.arena.solver)

    def together() -> tuple[Tensor, int]:
        reading = _stacked_pass(passes, q, [p.flatten(0, 1) for p in q.points], whose)
        return _apart(gains(reading, q.size), q), reading.samples

    def apart() -> tuple[Tensor, int]:
        values, samples = [], 1
        for m in range(q.size):
            run = passes.run if m == q.size - 1 else passes.part
            reading = run(passes.at(q, m), whose=whose)
            values.append(gains(reading, 1))
            samples = reading.samples
        return torch.stack(values), samples

    if route == "auto" and auto:
        return _or_apart(passes, together, apart)
    return together() if route == "stack" else apart()


_Result = TypeVar("_Result")


def _or_apart(
    passes: Passes, together: Callable[[], _Result], apart: Callable[[], _Result]
) -> _Result:
    """Return what a stack gives, or else, here and in later rounds, what pass after pass does.

    The first round knows one batch and one closure, and others may not stack.
    """
    forwards, kept = passes.forwards, len(passes.kept)
    try:
        return together()
    except Exception as error:  # whatever is wrong with the closure itself is raised below
        failed = f"{type(error).__name__}: {error}"
        passes.forwards = forwards
        passes.arena.site.forget(passes.kept[kept:])
        del passes.kept[kept:]
    found, arena = apart(), passes.arena
    warnings.warn(
        f"Particles in one batch failed ({failed:.200}), and are played one after another from "
        "now on. particle_batching='loop' does so without trying.",
        stacklevel=2,
    )
    stackable = arena.calibration.stackable - {arena.modes}
    arena.calibration = replace(arena.calibration, stackable=stackable)
    return found


def _stacked_pass(passes: Passes, q: Strategy, points: list[Tensor], whose: Whose) -> Reading:
    def provide(index: int, call: Call, output: Tensor) -> Tensor:
        return passes.added(q, index, points[index], call, output, q.size)

    arena = passes.arena
    with _repeated(arena.model, q.size, arena.site.constant):
        return passes.run(provide, copies=q.size, whose=whose)


def _apart(stacked: Tensor, q: Strategy) -> Tensor:
    return stacked.unflatten(0, (q.size, -1))


def _source(reading: Reading) -> Tensor | None:
    """Return what payoffs are computed from, if from the predictions alone."""
    return reading.predictions if reading.hidden is None else None


@contextmanager
def _repeated(model: nn.Module, copies: int, constant: set[str]) -> Iterator[None]:
    """Repeat every batched input of the model, but for those known to be constant.

    Such as once had other sizes than the batch are noted: it may come to have theirs.
    """

    def repeat(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arguments = bound(module, args, kwargs)
        main = arguments.get(getattr(module, "main_input_name", "input_ids"))
        tensors = [v for v in arguments.values() if isinstance(v, Tensor) and v.dim()]
        rows = len(main if isinstance(main, Tensor) else tensors[0])

        def many(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or name in constant:
                return value
            if len(value) != rows:
                constant.add(name)
                return value
            return value.repeat(copies, *[1] * (value.dim() - 1))

        named = zip(arguments, args, strict=False)  # those by position come first
        return tuple(many(*pair) for pair in named), {k: many(k, v) for k, v in kwargs.items()}

    handle = unwrap(model).register_forward_pre_hook(repeat, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
