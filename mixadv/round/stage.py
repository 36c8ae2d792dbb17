"""One round of the game: what a solver plays on, and what it came to."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths import gauss_newton
from mixadv.maths.divergence import Divergence, divergence
from mixadv.model.closure import MeanOver, Reading
from mixadv.model.contexts import no_grad
from mixadv.model.modules import functional
from mixadv.model.noise import Noise
from mixadv.model.parallel import local
from mixadv.model.recompute import NO_GRADIENT
from mixadv.model.visits import Call
from mixadv.players import boundary
from mixadv.players.ascent import Ascent
from mixadv.players.opening import Begin, opening
from mixadv.players.strategy import Rule, Strategy
from mixadv.round import routes
from mixadv.round.arena import Arena, Memory
from mixadv.round.gains import (
    Arrived,
    check_weights,
    expected,
    gains_of,
    losses,
    losses_of_samples,
    repeated,
    shared,
)
from mixadv.round.goals import Goals
from mixadv.round.passes import Passes, nowhere
from mixadv.round.weighing import Weighed, group_means, one_per_sample
from mixadv.solvers.play import Moves


@final
class Stage(Moves):
    """One play of the game on one batch; see `Moves` for what a solver does on it.

    Attributes:
        passes: runs the closure.
        played: what the adversary played last.
        payoff: what it was paid, 0-d.
        clean_loss: task loss of the first clean pass, 0-d.
        retained: what the learner kept at δ = 0 in the last optimizer step, 0-d.
        weights: of rows or groups, where the adversary plays some.
        fallen: per call at the site `[B]`, the samples whose δ fell back to 0.
        delta_backwards: backwards with respect to δ alone.
    """

    def __init__(self, arena: Arena, goals: Goals, memory: Memory) -> None:
        self.arena = arena
        self.goals = goals
        self.passes = Passes(arena, goals, memory)
        self.memory = self.passes.memory
        self.played: Strategy | None = None
        self.payoff: Tensor | None = None
        self.clean_loss: Tensor | None = None
        self.retained: Tensor | None = None
        self.weights: Weighed | None = None
        self.fallen: list[Tensor] = []
        self.delta_backwards = 0
        self._clean: Reading | None = None
        self._arrived: Arrived | None = None

    @property
    def site(self) -> list[str]:
        return self.arena.site.names

    @property
    def calls(self) -> list[Call]:
        return self.passes.calls

    def start(self, ascent: Ascent, begin: Begin | None = None) -> Strategy:
        rooms = partial(self.passes.room, ascent)
        return opening(ascent, self.arena.noise, self.calls, self.arena.scale, begin, rooms)

    def draw(self, ascent: Ascent, call: Call) -> Tensor:
        return ascent.begin(call.empty(), call.mask, self.arena.noise, call.owners)

    def constant(self, name: str, kind: str, like: Tensor) -> Tensor:
        noise = Noise(self.arena.seed)
        noise.begin(name, 0)
        return noise(kind, like)

    def payoffs(
        self, q: Strategy, payoff: str | Divergence, ascent: Ascent, deviation_weight: float = 0.0
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        payoff = "loss" if self.goals.general_sum else payoff
        gains = gains_of(payoff, self.clean, deviation_weight)
        route = routes.ROUTES[routes.chosen(self.passes, q, ascent)]
        with self.passes.ascending(ascent):
            values, gradients, predictions, samples = route(self.passes, q, gains)
        self.delta_backwards += q.size
        if ascent.turns and payoff in gauss_newton.CURVED and predictions is not None:
            q, gradients = boundary.turn(q, gradients, predictions, self.clean())
        # A payoff that is not finite belongs to a δ that falls back to 0, where a divergence is 0.
        values = torch.where(values.isfinite(), values, torch.zeros_like(values))
        self.payoff = (q.weights * values).sum(0).mean() / shared(values, payoff, samples)
        return q, values, gradients

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        if self.goals.general_sum:
            zero = self.origin(ascent)
            return zero, self.payoffs(zero, "loss", ascent)[2]

        def gained(clean: Reading) -> Tensor:
            values = losses_of_samples(clean)
            self.payoff = values.detach().mean() / (1 if clean.loss.dim() else clean.samples)
            return values

        zero, gradients, _ = self._slope(ascent, gained)
        return zero, gradients

    def _slope(
        self, ascent: Ascent, gained: Callable[[Reading], Tensor]
    ) -> tuple[Strategy, list[Tensor], Reading]:
        """Return δ = 0, the gradient there of what is gained in the clean pass, and that pass."""
        passes, again = self.passes, self.arena.solver.recompute
        if self.arena.calibration.leaf_backward and not again:
            raise GameError(
                f"{type(self.arena.solver).__name__} differentiates the clean pass twice, which "
                "reentrant checkpointing does not allow: set use_reentrant=False."
            )
        zero = self.origin(ascent)
        with ExitStack() as alone:
            if again:
                alone.enter_context(passes.frozen())
                alone.enter_context(local(self.arena.model))
            clean = passes.run(passes.at(zero))
            values = gained(clean)
            gradients = passes.differentiate(values, zero.points, clean.samples, keep=not again)
        self.delta_backwards += 1
        kept = self._keep_clean(passes.cut.off(clean, nowhere) if again else clean)
        return zero, gradients, kept

    def move(
        self, q: Strategy, how: Ascent | Rule, gradients: Sequence[Tensor] | None = None
    ) -> Strategy:
        if gradients is None and self.goals.general_sum:
            with local(self.arena.model):  # between passes that only accumulate
                _, _, gradients = self.payoffs(q, "loss", self.arena.solver)
        if gradients is None:
            if self._arrived is None:
                raise GameError(NO_GRADIENT.format("δ"))
            gradients = self._arrived.gradients(q)
        own = isinstance(how, Ascent)
        rule = self._rule(how) if own else how
        q, fallen = q.move(gradients, rule, self.arena.noise, own and how.remembers)
        before = self.fallen or fallen
        self.fallen = [old | new for old, new in zip(before, fallen, strict=True)]
        return q

    def second_order(self, kind: str | Divergence, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        if kind not in gauss_newton.CURVED + gauss_newton.FLAT:
            raise GameError(f"direction='gauss_newton' is for divergences, and not for {kind!r}.")

        def gained(clean: Reading) -> Tensor:
            weights = gauss_newton.cotangent(clean.compared.detach(), kind, clean.mask)
            return (clean.compared * weights).flatten(1).sum(1)

        zero, gradients, _ = self._slope(ascent, gained)
        if not ascent.turns or kind in gauss_newton.FLAT:
            drawn = self.arena.noise("uniform", self._one_for_each_sample(zero))
            signs = zero.spread(drawn.sign()[None])
            gradients = [s.to(g) * g for s, g in zip(signs, gradients, strict=True)]
        return zero, gradients

    def clean(self) -> Reading:
        return self._clean or self._keep_clean(self.passes.part(nowhere))

    def learned(self) -> Reading:
        return self.clean()

    def plain_loss(self) -> Tensor:
        return self._keep_clean(self.passes.run(nowhere)).objective

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        if not last:
            with local(self.arena.model):
                return self.loss(q, clean=clean)
        if q is None:
            return self.clean().objective
        if q.size > 1:
            self.played = q = q.detach()
            values, _ = routes.readings(self.passes, q, losses, auto=False)
            return expected(q, values)
        objective = self.run_at(q).objective
        if clean:
            self.clean_loss = objective.detach()
        return objective

    def losses(self, q: Strategy) -> Tensor:
        self.played = q
        return one_per_sample(self.passes.run(self.passes.at(q)).loss)

    def group_means(self, losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return group_means(losses, self.goals.groups, count)

    def weighed(self, values: Tensor, weights: Tensor, sizes: Tensor | None = None) -> Tensor:
        self.weights = Weighed(weights, sizes)
        objective = (weights * values).sum()
        self._pay(objective)
        return objective

    def run_at(self, q: Strategy) -> Reading:
        self.played = q
        reading = self.passes.run(self.passes.at(q))
        objective = reading.objective
        self._arrived = Arrived(reading, objective)
        self._pay(objective)
        return reading._replace(loss=objective)

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        q, gained = self.divergences(q, kind, fixed, sampled, over)
        value = expected(q, gained)
        self._pay(value)
        return value

    def divergences(
        self, q: Strategy, kind: str | Divergence, fixed: bool, sampled: bool, over: MeanOver
    ) -> tuple[Strategy, Tensor]:
        """Return what is played of a strategy, and the divergence at each particle `[M, B]`."""
        measure, clean = divergence(kind), self.clean().compared
        clean = clean.detach() if fixed else clean

        def read(reading: Reading, copies: int) -> Tensor:
            return reading.diverge(repeated(clean, copies), measure, over)

        self.played = q = q.detach()
        if sampled and q.size > 1:
            check_weights(q, len(self.clean().compared))
            q = q.pick((1 + self.arena.noise("uniform", self._one_for_each_sample(q))) / 2)
        gained, _ = routes.readings(self.passes, q, read)  # draws q where no ascent came before
        return q, gained

    def proximal(self, kind: str | Divergence, over: MeanOver = "samples") -> Tensor:
        return self.proximals(kind, over).mean()

    def proximals(self, kind: str | Divergence, over: MeanOver) -> Tensor:
        """Return what `proximal` is the mean of, `[B]`."""
        clean, learner = self.clean(), self.arena.learner
        assert learner is not None
        teacher = functional(self.arena.model, learner.teacher_weights(), self.goals.closure)
        with no_grad():
            target = self.passes.run(nowhere, teacher).compared
        return clean.diverge(target.detach(), divergence(kind), over)

    def again(self) -> "Stage":
        """Return a stage to play the same round once more, on the same passes."""
        other = copy.copy(self)
        other.arena, other.memory, other._clean = self.arena.apart(), dict(self.memory), None
        return other

    def renew(self) -> None:
        """Forget what belongs to the weights before the learner's step."""
        self._clean = None
        self.passes.renew()

    def _rule(self, ascent: Ascent) -> Rule:
        def rule(index: int, delta: Tensor, *move: Any) -> Tensor:
            room = self.passes.room(ascent, index)
            if room is None:
                return ascent.move(delta, *move)
            return ascent.move(delta, *move, room=room.repeat(len(delta) // len(room.low)))

        return rule

    def _pay(self, objective: Tensor) -> None:
        """Note what the learner pays, unless the adversary is paid otherwise."""
        if not self.goals.general_sum:
            self.payoff = objective.detach()

    def _one_for_each_sample(self, q: Strategy) -> Tensor:
        """Return an empty tensor `[B]`, or `[1]` where it is not known which row is whose."""
        samples = len(self.clean().compared)
        return q.points[0].new_empty(samples if q.knows(samples) else 1)

    def _keep_clean(self, reading: Reading) -> Reading:
        self._clean = reading
        if self.clean_loss is None:
            self.clean_loss = reading.objective.detach()
        return reading
