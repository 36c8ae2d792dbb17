"""The passes of one round: running the closure, and differentiating what it gives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.box import Room, room_around
from mixadv.model import contexts, scaling
from mixadv.model.closure import Closure, Reading, parse_output
from mixadv.model.contexts import cast_anew, gradients_untouched, no_grad, without_autocast
from mixadv.model.heads import read_by
from mixadv.model.modules import unwrap
from mixadv.model.parallel import local
from mixadv.model.places import placed
from mixadv.model.private_torch import KEEPING_BUFFERS
from mixadv.model.recompute import Cut
from mixadv.model.replay import Replay
from mixadv.model.visits import Call, Pass, Provide
from mixadv.model.walk import modules
from mixadv.players.ascent import Ascent
from mixadv.players.rows import of_rows
from mixadv.players.strategy import Strategy
from mixadv.round.arena import Arena, Memory, leaves_besides, modes_of
from mixadv.round.gains import one_sample
from mixadv.round.goals import Goals, Whose
from mixadv.round.labels import Labels


class Passes:
    """Runs the closures of one round, as often as the solver asks."""

    def __init__(self, arena: Arena, goals: Goals, memory: Memory) -> None:
        self.arena = arena
        self.goals = goals
        self.memory = memory  # which the round changes
        listed = modules(arena.model)  # once: passes are many
        slots = arena.stateful.get(modes_of(listed))
        fresh = arena.solver.fresh_dropout
        adversaries = (arena.solver, arena.weights)
        ours = all(type(x).__module__.startswith("mixadv.") for x in adversaries if x is not None)
        self.replay = Replay(listed, fresh, slots, lambda: arena.noise.number("masks"), ours)
        self.cut = Cut()
        self.parameters = arena.parameters(listed)
        self.calls: list[Call] = []  # that δ is made for
        self.seen: list[tuple[str, Tensor]] = []  # site and x of each, where there is a box
        self.kept: list[Pass] = []  # that a backward may come back to
        self.forwards = 0  # a pass over M stacked copies counts as M
        self.theta_backwards = 0
        self._calls_per_pass: dict[Whose, int] = {}
        self._still: dict[Whose, list[bool]] = {}  # which calls of a first pass ran under no_grad
        self._labels = Labels(check=not arena.calibration.checked)
        self._read: Tensor | None = None  # which predictions the loss reads
        self._asked = False  # the loss, which may not tell

    def run(
        self,
        provide: Provide,
        closure: Closure | None = None,
        copies: int = 1,
        whose: Whose = "closure",
    ) -> Reading:
        """Run one pass of a closure and return what it gave.

        Args:
            provide: gives δ.
            closure: what runs in place of the one of the round.
            copies: in which the batch is stacked.
            whose: closure of the round runs.
        """
        own = whose == "closure"
        arena, represents = self.arena, self.arena.representation if own else None
        twice = arena.solver.differentiates_twice or arena.solver.leaps
        with (
            local(arena.model) if self.cut.more else nullcontext(),  # another backward follows
            cast_anew(),
            self.replay.run(own),
            arena.site.run(self._noting(provide), copies, self.goals.general_sum, whose) as current,
            gradients_untouched(self.parameters),
            KEEPING_BUFFERS if twice else nullcontext(),
            represents.run() if represents else nullcontext(),
        ):
            result = (closure or getattr(self.goals, whose))()
        self.kept.append(current)
        self.forwards += copies
        if whose == "retain":  # at δ = 0, at the site or elsewhere
            return parse_output(result)
        if arena.solver.perturbs:
            self._check_calls(current, whose)
        self._note_calls(current, copies)
        reading = parse_output(result, current.tokens(), unwrap(arena.model))
        reading = self._count_predictions(reading, copies) if own else reading
        if own and arena.solver.reads_labels and copies == 1:
            reading = self._labels.in_(reading, result, current.tokens())
        if represents is not None:
            reading = reading._replace(hidden=represents.take())
        if arena.calibration.scaling is not None:
            reading = reading.widened()
        first = next(iter(current.calls), None)
        if reading.loss.shape == (1,) and not one_sample(reading, first):
            reading = reading._replace(loss=reading.loss[0])
        owners = None if first is None else of_rows(first.owners)
        return reading._replace(samples=self._count(reading) // copies, owners=owners)

    def _count_predictions(self, reading: Reading, copies: int) -> Reading:
        """Count the predictions per token that the loss reads, where no labels tell which."""
        predictions = reading.predictions
        if predictions is None or self.arena.solver.compares is None:
            return reading
        if predictions.dim() != 3 or reading.labelled:
            return reading
        if self._read is None:
            self._read, self._asked = read_by(reading.loss, predictions), True
        if self._read is None:
            return reading
        read = self._read.repeat(copies, 1)
        mask = reading.mask if reading.may is None else reading.may
        return reading._replace(mask=read if mask is None else read & (mask > 0))

    def part(self, provide: Provide, whose: Whose = "closure") -> Reading:
        """Run a pass of an objective that has another pass after it."""
        if not self.arena.solver.recompute:
            return self.run(provide, whose=whose)
        # Without a graph the loss would not tell which of its tokens count.
        asks = self.arena.calibration.unlabelled and not self._asked
        with local(self.arena.model) if asks else no_grad():
            reading = self.run(provide, whose=whose)
        return self.cut.off(reading, provide)

    def _noting(self, provide: Provide) -> Provide:
        """Return what notes x of each call of a round's first pass, where there is a box."""
        if self.arena.solver.box is None:
            return provide

        def noted(index: int, call: Call, output: Tensor) -> Tensor | None:
            if index == len(self.seen):
                self.seen.append((call.site, output.detach()))
            return provide(index, call, output)

        return noted

    def room(self, ascent: Ascent, index: int) -> Room | None:
        """Return how far δ may move at a call, in units; None without a box."""
        if ascent.box is None:
            return None
        site, x = self.seen[index]
        return room_around(x, ascent.box, self.arena.scale(site))

    def at(self, q: Strategy, particle: int = 0) -> Provide:
        """Return what adds one particle of the strategy at the site."""

        def provide(index: int, call: Call, output: Tensor) -> Tensor | None:
            points = q.point(index, call)
            if points is None:
                return None
            return self.added(q, index, points[particle], call, output)

        return provide

    def added(
        self, q: Strategy, index: int, point: Tensor, call: Call, x: Tensor, copies: int = 1
    ) -> Tensor:
        """Return what a point of the strategy adds to a call at the site, which returned x.

        Whatever other x the point was found at, it is kept in the box around this one.
        """
        delta = point if q.units[index] == 1 else q.units[index] * point
        if self.goals.general_sum:
            delta = placed(delta, q.masks[index], call, copies)
        box = self.arena.solver.box
        return delta if box is None else room_around(x.detach(), box).kept(delta)

    def _note_calls(self, current: Pass, copies: int) -> None:
        """Note the calls of a pass: of one δ for all calls, those that it was made for."""
        known = self.goals.general_sum and self.calls
        if copies == 1 and not known:
            self.calls = current.places

    def _check_calls(self, current: Pass, whose: Whose) -> None:
        """Check that each pass of a closure calls the site as often as its first one."""
        site, calls = self.arena.site, len(current.calls)
        first = self._still.setdefault(whose, current.still)
        taken = calls == 0 and not current.grad and any(first)  # all for calls of the last round
        if taken or (first != current.still and any(first + current.still)):
            raise GameError(
                f"The closure calls the site {site.names} under no_grad, at other places than in "
                "the round before, by which a pass without gradients goes: make the same calls in "
                "every round, or set recompute=False."
            )
        if calls == 0:
            raise GameError(site.not_called())
        before = self._calls_per_pass.setdefault(whose, calls)
        if calls != before:
            raise GameError(
                f"The site {site.names} was called {calls} times in this pass and "
                f"{before} times before. A closure must run the same forward in "
                "every pass of a round."
            )

    def _count(self, reading: Reading) -> int:
        """B: the number of per-sample losses, else of predictions, else of rows at the site."""
        if reading.loss.dim():
            return len(reading.loss)
        if reading.predictions is not None:
            return len(reading.predictions)
        return self.calls[0].shape[0] if self.calls else 1

    def frozen(self) -> AbstractContextManager[None]:
        """Freeze the learner's parameters: gradients with respect to δ alone, and less memory."""
        return contexts.frozen(self.parameters)

    @contextmanager
    def ascending(self, ascent: Ascent) -> Iterator[None]:
        """Run the ascent's own passes: none is kept, for each holds its δ."""
        begun = len(self.kept)
        with self.frozen(), self.autocast(ascent):
            yield
        del self.kept[begun:]

    def autocast(self, ascent: Ascent) -> AbstractContextManager[Any]:
        """Return what to run the ascent's own passes in."""
        if ascent.ascent_dtype is None:
            return nullcontext()
        return torch.autocast(self.parameters[0].device.type, torch.bfloat16)

    def differentiate(
        self,
        values: Tensor,
        leaves: Sequence[Tensor],
        samples: int = 1,
        predictions: Tensor | None = None,
        keep: bool = False,
    ) -> list[Tensor]:
        """Return the gradients of a sum of payoffs with respect to leaf perturbations.

        The scale of fp16 follows from the predictions, if the payoffs are computed from them, else
        from the samples of the pass. `keep` keeps the graph, for another backward.
        """
        if not values.requires_grad:
            raise GameError(
                f"The payoff has no gradient with respect to δ at {self.arena.site.names}: in this "
                "round the closure detached it, or ran under no_grad."
            )
        way = self.arena.calibration.scaling
        if way is None:
            return self._backward(values, leaves, torch.ones_like(values), keep)
        rows = all(x.shape[: values.dim()] == values.shape for x in leaves)
        scale = scaling.of_predictions(values, predictions, way if rows else "batch")
        followed = scale is None
        if scale is None:
            scale = scaling.following(self.memory, values, samples)
        gradients = self._backward(values, leaves, scale.to(values.dtype).expand_as(values), keep)
        if followed:
            scaling.follow(self.memory, scale, gradients)
        return [scaling.divided(g, scale) for g in gradients]

    def _backward(
        self, values: Tensor, leaves: Sequence[Tensor], weights: Tensor, keep: bool
    ) -> list[Tensor]:
        """Return the gradients of a weighted sum."""
        whole = self.arena.calibration.leaf_backward  # which reaches a head outside of the model
        inputs, others = (None, leaves_besides(values, leaves)) if whole else (leaves, [])
        with without_autocast(values), contexts.aside(others):
            torch.autograd.backward(values, weights, retain_graph=keep, inputs=inputs)
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

    def deliver(self, objective: Tensor, backward: Callable[[Tensor], object] | None) -> None:
        """Run the backward pass of an objective."""
        with without_autocast(objective):
            (backward or torch.autograd.backward)(objective)
        self.theta_backwards += 1

    def forget(self) -> None:
        """Forget the graphs that belong to the weights there were."""
        self.cut.clear()
        self.kept.clear()
        torch.clear_autocast_cache()  # of a checkpoint's recompute too

    def renew(self) -> None:
        """Forget what belongs to the weights before the learner's step."""
        self.forget()
        self.replay.renew()

    def undo(self) -> None:
        """Put random state and buffers back to where the round found them."""
        self.replay.undo()
        self.arena.site.forget(self.kept)

    def close(self) -> None:
        """Take the hooks away."""
        self.kept.clear()
        self.arena.site.detach()


def nowhere(index: int, call: Call, output: Tensor) -> None:
    """Add nothing at the site."""
