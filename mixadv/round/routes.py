"""Three ways to compute the payoffs of many particles; wherever each is allowed they agree.

* loop: one pass per particle; always works.
* vmap: one vectorised pass over δ (`torch.func.vmap`), with the same dropout for all.
* stack: one pass over a batch that repeats the model's inputs M times; only without dropout and
  batch statistics, and with predictions or one loss per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.model.closure import Reading
from mixadv.model.modules import bound, unwrap
from mixadv.model.parallel import world_size
from mixadv.model.private_torch import unmapped
from mixadv.model.visits import Call
from mixadv.players.strategy import Strategy

if TYPE_CHECKING:
    from mixadv.players.ascent import Ascent
    from mixadv.round.stage import Stage

Gains = Callable[[Reading, int], Tensor]


class Payoffs(NamedTuple):
    """What a route returns.

    Attributes:
        values: `[M, B]`, or fewer where samples share one.
        gradients: per call at the site, `[M, B, ...]`.
        predictions: `[M, B, ...]` of the passes, detached; None where the closure returned none.
    """

    values: Tensor
    gradients: list[Tensor]
    predictions: Tensor | None


RouteFunction = Callable[["Stage", Strategy, Gains], Payoffs]


def loop(stage: Stage, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles one after another."""
    values, gradients, predictions = [], [], []
    for particle in range(q.size):
        leaves: list[Tensor] = []

        def provide(index: int, call: Call, output: Tensor, m: int = particle) -> Tensor:
            q.fill(index, call)
            leaves.append(q.points[index][m].detach().requires_grad_())  # noqa: B023
            return _scaled(leaves[-1], q.unit)  # noqa: B023

        reading = stage.run(provide)
        value = gains(reading, 1)
        gradients.append(stage.differentiate(value, leaves, _source(reading)))
        values.append(value.detach())
        predictions.append(reading.predictions)
    told = None if predictions[0] is None else torch.stack(predictions).detach()
    columns = [torch.stack(g) for g in zip(*gradients, strict=True)]
    return Payoffs(torch.stack(values), columns, told)


def vmapped(stage: Stage, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles by `torch.func.vmap` over δ."""
    if not q.points:  # nothing to map over before the first call at the site
        return loop(stage, q, gains)
    leaves = [point.detach().requires_grad_() for point in q.points]
    sources: list[Tensor | None] = []
    told: list[Tensor | None] = []

    def one(*points: Tensor) -> Tensor:
        # The random state is set inside the mapped function, so that chunks replay it too.
        reading = stage.run(lambda i, call, output: _scaled(points[i], q.unit))
        sources.append(unmapped(_source(reading)))
        told.append(unmapped(reading.predictions))
        return gains(reading, 1)

    before = stage.forwards
    values = torch.func.vmap(one, randomness="same")(*leaves)
    stage.forwards = before + q.size
    gradients = stage.differentiate(values, leaves, sources[0])
    return Payoffs(values.detach(), gradients, None if told[0] is None else told[0].detach())


def stacked(stage: Stage, q: Strategy, gains: Gains) -> Payoffs:
    """Evaluate the particles in one batch of M copies."""
    if not q.points:
        return loop(stage, q, gains)
    leaves = [point.detach().flatten(0, 1).requires_grad_() for point in q.points]
    reading = _stacked_pass(stage, q, leaves)
    values = gains(reading, q.size)
    gradients = stage.differentiate(values, leaves, _source(reading))
    told = None if reading.predictions is None else _apart(reading.predictions.detach(), q)
    return Payoffs(_apart(values.detach(), q), [_apart(g, q) for g in gradients], told)


ROUTES: dict[str, RouteFunction] = {
    "loop": loop,
    "vmap": vmapped,
    "stack": stacked,
}


FEW = 256
"""Tokens of a particle up to which a stack of particles is worth its memory, measured on a CPU."""


def chosen(stage: Stage, q: Strategy, ascent: Ascent) -> str:
    """Return the route of this round: `"auto"` stacks small batches, where that is the same."""
    if q.size == 1:
        return "loop"
    if ascent.particle_batching != "auto":
        return ascent.particle_batching
    stacks = few(stage) and stage.game.modes() in stage.game.stackable
    return "stack" if stacks else "loop"


def few(stage: Stage) -> bool:
    """Return whether a batch is so small that `"auto"` stacks it.

    Never on several processes, whose batches differ: they would run forwards of different numbers.
    Never where one graph is kept at a time.
    """
    tokens = sum(math.prod(call.shape[:2]) for call in stage.calls)
    return 0 < tokens <= FEW and world_size() == 1 and not stage.game.solver.recompute


def readings(stage: Stage, q: Strategy, gains: Gains, auto: bool = True) -> Tensor:
    """Return each particle's payoff `[M, B]` with gradients to θ: the learner's side.

    Stacked where the solver's route says so, else one pass after another (`vmap` is not for the
    learner's backward: checkpointing and distributed hooks would not see it). `auto` is whether
    `"auto"` may stack, not so for a loss, which may be a scalar.
    """
    solver = stage.game.solver
    if chosen(stage, q, solver) == "stack" and (auto or solver.particle_batching == "stack"):
        reading = _stacked_pass(stage, q, [p.flatten(0, 1) for p in q.points])
        return _apart(gains(reading, q.size), q)
    passes = [*[stage.part] * (q.size - 1), stage.run]
    return torch.stack([gains(run(stage.at(q, m)), 1) for m, run in enumerate(passes)])


def _stacked_pass(stage: Stage, q: Strategy, points: list[Tensor]) -> Reading:
    with _repeated(stage.game.model, q.size):
        return stage.run(lambda i, call, output: _scaled(points[i], q.unit), copies=q.size)


def _apart(stacked: Tensor, q: Strategy) -> Tensor:
    return stacked.unflatten(0, (q.size, -1))


def _source(reading: Reading) -> Tensor | None:
    """Return what payoffs are computed from, if from the predictions alone."""
    return reading.predictions if reading.hidden is None else None


@contextmanager
def _repeated(model: nn.Module, copies: int) -> Iterator[None]:
    """Repeat every batched input of the model."""

    def repeat(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arguments = bound(module, args, kwargs)
        main = arguments.get(getattr(module, "main_input_name", "input_ids"))
        tensors = [v for v in arguments.values() if isinstance(v, Tensor) and v.dim()]
        rows = len(main if isinstance(main, Tensor) else tensors[0])

        def many(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == rows:
                return value.repeat(copies, *[1] * (value.dim() - 1))
            return value

        return tuple(many(a) for a in args), {k: many(v) for k, v in kwargs.items()}

    handle = unwrap(model).register_forward_pre_hook(repeat, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _scaled(point: Tensor, unit: float) -> Tensor:
    return point if unit == 1 else unit * point
