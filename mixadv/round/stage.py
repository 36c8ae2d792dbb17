"""One round of the game: the object a solver plays on.

A solver's `play(stage)` is a generator. It yields an objective for every pass that only accumulates
gradients, and `Step(objective)` for the last pass before an optimizer step; between two yields the
caller has run the backward pass, after a `Step` also the learner's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths import gauss_newton
from mixadv.maths.contrastive import directions
from mixadv.maths.divergence import Divergence, divergence
from mixadv.model import scaling
from mixadv.model.closure import Closure, Reading, parse_output
from mixadv.model.contexts import cast_anew, no_grad, reusable, without_autocast
from mixadv.model.gradients import gradients_untouched
from mixadv.model.modules import functional, unwrap
from mixadv.model.parallel import local
from mixadv.model.recompute import NO_GRADIENT, Cut
from mixadv.model.replay import Noise, Replay
from mixadv.model.visits import Call, Pass, Provide
from mixadv.players import boundary
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Begin, Rule, Strategy, by_row
from mixadv.round import routes

if TYPE_CHECKING:
    from mixadv.game import Game


_DIFFERENTIATED_TWICE = (
    "{} differentiates the clean pass twice, which reentrant checkpointing does not allow: set "
    "use_reentrant=False."
)


class Stage:
    """One play of the game on one batch.

    Attributes:
        memory: what the solver keeps from round to round, by name: tensors, or lists of them.
        forwards: runs of the closure so far; a pass over M stacked copies counts as M.
        delta_backwards: backwards with respect to δ alone.
        theta_backwards: backwards that build the learner's gradients.
    """

    def __init__(self, game: Game, closure: Closure) -> None:
        self.game = game
        self.closure = closure
        self.replay = Replay(game.model, game.solver.fresh_dropout, game.stateful_buffers())
        self.parameters = game.parameters()  # listed once: passes are many
        self.memory = dict(game.memory)  # becomes the game's when the round ends well
        self.calls: list[Call] = []
        self.calls_per_pass: int | None = None
        self.passes: list[Pass] = []
        self.played: Strategy | None = None
        self.payoff: Tensor | None = None
        self.clean_loss: Tensor | None = None
        self.fallen: list[Tensor] = []
        self.forwards = self.delta_backwards = self.theta_backwards = 0
        self._clean: Reading | None = None
        self.cut = Cut()
        self._incoming: Tensor | None = None
        self._samples = 1

    # The adversary ---------------------------------------------------------------------------

    def start(self, ascent: Ascent, begin: Begin | None = None) -> Strategy:
        """Return the adversary's start points, leaves that require grad.

        Args:
            ascent: how to start.
            begin: `begin(index, call)` gives the one point `[B, ...]` of each call instead.
        """
        return Strategy.begin(ascent, self.game.noise, self.calls, self.game.scale, begin)

    def origin(self, ascent: Ascent) -> Strategy:
        """Return δ = 0, as a point that requires grad."""
        return self.start(ascent, lambda index, call: torch.zeros_like(call.empty()))

    @property
    def site(self) -> list[str]:
        """Names of the modules at whose output δ is added."""
        return self.game.site.names

    def constant(self, name: str, kind: str, like: Tensor) -> Tensor:
        """Return a draw that is the same in every round: it depends on seed and name alone."""
        noise = Noise(self.game.seed)
        noise.begin(name, 0)
        return noise(kind, like)

    def draw(self, ascent: Ascent, call: Call) -> Tensor:
        """Return the ascent's own start at a call, `[B, ...]`."""
        return ascent.begin(call.empty(), call.mask, self.game.noise)

    def payoffs(
        self,
        q: Strategy,
        payoff: str | Divergence,
        ascent: Ascent,
        route: routes.RouteFunction | None = None,
        deviation_weight: float = 0.0,
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        """Return the strategy, each particle's payoff and its gradient with respect to δ alone.

        Args:
            q: where to evaluate, M particles.
            payoff: `"loss"`, or a divergence from the clean predictions, by name or callable.
            ascent: says by which route many particles are computed.
            route: another route than the ascent's.
            deviation_weight: weight of the cosine distance between the perturbed and the clean
                representation, added to the payoff.

        Returns:
            Payoffs `[M, B]`, or `[M, 1]` where only a scalar loss is known, and per call at the
            site the gradients `[M, B, ...]` of each sample's own payoff.
        """
        gains = self.reader(payoff, deviation_weight)
        chosen = route or routes.ROUTES[routes.chosen(self, q, ascent)]
        begun = len(self.passes)
        with self.frozen(), self.format(ascent):
            values, gradients, predictions = chosen(self, q, gains)
        del self.passes[begun:]  # nothing differentiates them again, and each holds its δ
        self.delta_backwards += q.size
        if ascent.turns and payoff in gauss_newton.CURVED and predictions is not None:
            gradients = boundary.turn(q, gradients, predictions, self.clean())
        # A payoff that is not finite belongs to a δ that falls back to 0, where a divergence is 0.
        values = torch.where(values.isfinite(), values, torch.zeros_like(values))
        self.payoff = (q.weights * values).sum(0).mean() / self.samples_in(values, payoff)
        return q, values, gradients

    def reader(self, payoff: str | Divergence, deviation_weight: float = 0.0) -> routes.Gains:
        """Return what reads the payoffs of a pass; the arguments are those of `payoffs`."""
        target = None if payoff == "loss" else self._predictions(self.clean()).detach()
        measure = None if target is None else divergence(payoff)

        clean = directions(self.clean().representation.detach()) if deviation_weight else None

        def gains(reading: Reading, copies: int = 1) -> Tensor:
            if target is None or measure is None:
                gained = self._gains(reading, copies)
            else:
                gained = reading.diverge(_copies(target, copies), measure)
            if clean is None:
                return gained
            away = 1 - (directions(reading.representation) * _copies(clean, copies)).sum(-1)
            return gained + deviation_weight * _spread(away.to(gained.dtype), len(gained))

        return gains

    def samples_in(self, values: Tensor, payoff: str | Divergence) -> int:
        """Return how many samples each of the payoffs `[M, B]` or `[M, 1]` is the sum of."""
        return self._samples if payoff == "loss" and values.shape[1] == 1 else 1

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        """Return δ = 0 and each sample's own gradient there, from the clean pass itself.

        The clean pass keeps its graph for the learner: one backward for δ and no pass more.
        """

        def read(clean: Reading) -> Tensor:
            gained = self._gains(clean)
            self.payoff = gained.detach().mean() / (1 if clean.loss.dim() else self._samples)
            return gained

        return self._slope(ascent, read)

    def _slope(
        self, ascent: Ascent, read: Callable[[Reading], Tensor]
    ) -> tuple[Strategy, list[Tensor]]:
        """Return δ = 0 and the gradient there of what is read of the clean pass."""
        again = self.game.solver.recompute
        if self.game.leaf_backward and not again:
            raise GameError(_DIFFERENTIATED_TWICE.format(type(self.game.solver).__name__))
        zero = self.origin(ascent)
        with ExitStack() as alone:
            if again:
                alone.enter_context(self.frozen())
                alone.enter_context(local(self.game.model))
            clean = self.run(self.at(zero, 0))
            gradients = self.differentiate(read(clean), zero.points, keep=not again)
        self._keep_clean(self.cut.off(clean, _nowhere) if again else clean)
        self.delta_backwards += 1
        return zero, gradients

    def move(
        self, q: Strategy, how: Ascent | Rule, gradients: list[Tensor] | None = None
    ) -> Strategy:
        """Return the strategy after one move of the ascent.

        Args:
            q: the points to move.
            how: the ascent to move by, or a rule for each call at the site.
            gradients: as `payoffs` returns them; None takes what the backward of the last
                `loss(q)` left on the points, scaled back to each sample's own payoff.
        """
        if gradients is None:
            gradients = self._own_gradients(q)
        rule = _by(how) if isinstance(how, Ascent) else how
        q, fallen = q.move(gradients, rule, self.game.noise)
        before = self.fallen or fallen
        self.fallen = [old | new for old, new in zip(before, fallen, strict=True)]
        return q

    def ascend(
        self,
        payoff: str | Divergence,
        ascent: Ascent,
        deviation_weight: float = 0.0,
        begin: Begin | None = None,
    ) -> Strategy:
        """Return where the ascent ends after its K steps, detached; `begin` as for `start`."""
        leaps = ascent.leaps and begin is None
        q = self.leap(payoff, ascent) if leaps else self.start(ascent, begin)
        for _ in range(ascent.steps - leaps):
            q, _, gradients = self.payoffs(q, payoff, ascent, deviation_weight=deviation_weight)
            q = self.move(q, ascent, gradients)
        return q.detach()

    def leap(self, kind: str | Divergence, ascent: Ascent) -> Strategy:
        """Return the first move of an ascent that begins by Gauss–Newton; see `gauss_newton`."""
        zero, gradients = self.second_order(kind, ascent)
        size = ascent.step_size if ascent.radius is None else ascent.radius
        return self.move(zero, replace(ascent, step_size=size), gradients)

    def second_order(self, kind: str | Divergence, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        """Return δ = 0 and the direction that `gauss_newton` finds there.

        The clean pass keeps its graph for the learner: one backward for δ and no pass more.
        """
        if kind not in gauss_newton.CURVED + gauss_newton.FLAT:
            raise GameError(f"direction='gauss_newton' is for divergences, and not for {kind!r}.")

        def read(clean: Reading) -> Tensor:
            predictions = self._predictions(clean)
            weights = gauss_newton.cotangent(predictions.detach(), kind, clean.mask)
            return (predictions * weights).flatten(1).sum(1)

        zero, gradients = self._slope(ascent, read)
        if not ascent.turns or kind in gauss_newton.FLAT:
            rows = len(self._predictions(self.clean()))
            fits = all(g.shape[1] % rows == 0 for g in gradients)
            drawn = self.game.noise("uniform", gradients[0].new_empty(1, rows if fits else 1))
            gradients = [by_row(drawn.sign().to(g), g) * g for g in gradients]
        return zero, gradients

    # The learner -----------------------------------------------------------------------------

    def clean(self) -> Reading:
        """Return the clean pass; run once between two optimizer steps and shared."""
        return self._clean or self._keep_clean(self.part(_nowhere))

    def plain_loss(self) -> Tensor:
        """Return the clean loss, 0-d, as an objective of its own."""
        return self._keep_clean(self.run(_nowhere)).objective

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        """Return the task loss, 0-d: clean, or at the strategy (its expectation, if mixed).

        A pass before the `last` one only accumulates: its gradients stay on this process.
        """
        if not last:
            with local(self.game.model):
                return self.loss(q, clean=clean)
        if q is None:
            return self.clean().objective
        self.played = q
        if q.size > 1:
            losses = routes.readings(self, q.detach(), _losses, auto=False)
            return (q.weights * losses).mean(1).sum()
        objective = self.read(q).objective
        if clean:
            self.clean_loss = objective.detach()
        return objective

    def read(self, q: Strategy) -> Reading:
        """Return the pass at a point: loss, predictions, and the representation if one is read."""
        self.played = q
        reading = self.run(self.at(q, 0))
        self._samples = self._count(reading)
        objective = reading.objective
        self.payoff = objective.detach()
        if objective.requires_grad:
            objective.register_hook(self._remember_incoming)
        return reading._replace(loss=objective)

    def divergence(self, q: Strategy, kind: str | Divergence, fixed: bool = False) -> Tensor:
        """Return the expected divergence between perturbed and clean predictions, 0-d.

        Gradients reach θ through both arguments, or, where the clean predictions are `fixed`,
        through the perturbed ones alone; the points are constants.
        """
        measure, clean = divergence(kind), self._predictions(self.clean())
        clean = clean.detach() if fixed else clean

        def gains(reading: Reading, copies: int) -> Tensor:
            return reading.diverge(_copies(clean, copies), measure)

        self.played = q = q.detach()
        gained = routes.readings(self, q, gains)  # fills q where no ascent came before
        expected = (q.weights * gained).mean(1).sum()
        self.payoff = expected.detach()
        return expected

    def proximal(self, kind: str | Divergence) -> Tensor:
        """Return the divergence of the predictions from those of the teacher, 0-d."""
        clean = self.clean()
        assert self.game.learner is not None
        teacher = functional(self.game.model, self.game.learner.teacher_weights(), self.closure)
        with no_grad():
            target = self._predictions(self.run(_nowhere, teacher))
        measure = divergence(kind)
        reading = clean._replace(predictions=self._predictions(clean))
        return reading.diverge(target.detach(), measure).mean()

    # Passes ----------------------------------------------------------------------------------

    def part(self, provide: Provide) -> Reading:
        """Run a pass of an objective that has another pass after it."""
        if not self.game.solver.recompute:
            return self.run(provide)
        with no_grad():
            reading = self.run(provide)
        return self.cut.off(reading, provide)

    def run(self, provide: Provide, closure: Closure | None = None, copies: int = 1) -> Reading:
        """Run one pass of the closure and read its result."""
        represents = self.game.representation
        with (
            local(self.game.model) if self.cut.more else nullcontext(),  # another backward follows
            cast_anew(),
            self.replay.run(),
            self.game.site.run(provide) as current,
            gradients_untouched(self.parameters),
            reusable(self.game.solver.differentiates_twice or self.game.solver.leaps),
            represents.run() if represents else nullcontext(),
        ):
            result = (closure or self.closure)()
        self.passes.append(current)
        self.forwards += copies
        self._count_calls(len(current.calls))
        if copies == 1:
            self.calls = current.calls
        reading = parse_output(result, current.tokens(), unwrap(self.game.model))
        if represents is not None:
            reading = reading._replace(hidden=represents.take())
        if self.game.scaling is not None:
            reading = reading.widened()
        if reading.loss.shape == (1,) and current.calls and current.calls[0].shape[0] > 1:
            return reading._replace(loss=reading.loss[0])
        return reading

    def _count_calls(self, calls: int) -> None:
        """Check that each pass of the round calls the site as often as its first one."""
        if calls == 0:
            raise GameError(self.game.site.not_called())
        self.calls_per_pass = self.calls_per_pass or calls
        if calls != self.calls_per_pass:
            raise GameError(
                f"The site {self.game.site.names} was called {calls} times in this pass and "
                f"{self.calls_per_pass} times before. A closure must run the same forward in "
                "every pass of a round."
            )

    def at(self, q: Strategy, particle: int) -> Provide:
        """Return what adds one particle of the strategy at the site."""

        def provide(index: int, call: Call, output: Tensor) -> Tensor:
            q.fill(index, call)
            point = q.points[index][particle]
            return point if q.unit == 1 else q.unit * point

        return provide

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze the learner's parameters: gradients with respect to δ alone, and less memory."""
        live = [p for p in self.parameters if p.requires_grad]
        for parameter in live:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in live:
                parameter.requires_grad_(True)

    def format(self, ascent: Ascent) -> AbstractContextManager[Any]:
        """Return what to run the ascent's own passes in."""
        if ascent.ascent_dtype is None:
            return nullcontext()
        return torch.autocast(self.parameters[0].device.type, torch.bfloat16)

    def differentiate(
        self,
        values: Tensor,
        leaves: list[Tensor],
        predictions: Tensor | None = None,
        keep: bool = False,
    ) -> list[Tensor]:
        """Return the gradients of a sum of payoffs with respect to leaf perturbations.

        Args:
            values: the payoffs, of any shape.
            leaves: the perturbations.
            predictions: what the payoffs may be computed from, which tells their scale in fp16.
            keep: the graph, for another backward.
        """
        self._depends(values)
        if self.game.scaling is None:
            return self._backward(values, leaves, torch.ones_like(values), keep)
        rows = all(x.shape[: values.dim()] == values.shape for x in leaves)
        scale = scaling.of_predictions(values, predictions, self.game.scaling if rows else "batch")
        followed = scale is None
        if scale is None:
            scale = scaling.following(self.memory, values, self._samples)
        gradients = self._backward(values, leaves, scale.to(values.dtype).expand_as(values), keep)
        if followed:
            scaling.follow(self.memory, scale, gradients)
        return [scaling.divided(g, scale) for g in gradients]

    def _backward(
        self, values: Tensor, leaves: list[Tensor], weights: Tensor, keep: bool
    ) -> list[Tensor]:
        """Return the gradients of a weighted sum."""
        inputs = None if self.game.leaf_backward else leaves
        with without_autocast(values):
            torch.autograd.backward(values, weights, retain_graph=keep, inputs=inputs)
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

    def deliver(self, objective: Tensor, backward: Callable[[Tensor], object] | None) -> None:
        """Run the backward pass of an objective."""
        with without_autocast(objective):
            (backward or torch.autograd.backward)(objective)
        self.theta_backwards += 1

    def renew(self) -> None:
        """Forget what belongs to the weights before the learner's step."""
        self._clean = None
        self.cut.clear()
        self.passes.clear()
        self.replay.renew()
        torch.clear_autocast_cache()  # of a checkpoint's recompute too

    # Helpers ---------------------------------------------------------------------------------

    def _depends(self, payoff: Tensor) -> None:
        if not payoff.requires_grad:
            raise GameError(
                f"The payoff has no gradient with respect to δ at {self.game.site.names}: in this "
                "round the closure detached it, or ran under no_grad."
            )

    def _keep_clean(self, reading: Reading) -> Reading:
        self._clean, self._samples = reading, self._count(reading)
        if self.clean_loss is None:
            self.clean_loss = reading.objective.detach()
        return reading

    def _count(self, reading: Reading) -> int:
        """B: the number of per-sample losses, else of predictions, else of rows at the site."""
        if reading.loss.dim():
            return len(reading.loss)
        if reading.predictions is not None:
            return len(reading.predictions)
        return self.calls[0].shape[0] if self.calls else 1

    def _gains(self, reading: Reading, copies: int = 1) -> Tensor:
        """Each sample's loss `[B]`; a scalar loss is multiplied by B and stays one number `[1]`."""
        self._samples = self._count(reading) // copies
        losses = _losses(reading, copies)
        return losses if reading.loss.dim() else losses * self._samples

    def _own_gradients(self, q: Strategy) -> list[Tensor]:
        if self._incoming is None or all(point.grad is None for point in q.points):
            raise GameError(NO_GRADIENT.format("δ"))
        scale = self._samples / self._incoming
        return [torch.zeros_like(x) if x.grad is None else x.grad * scale for x in q.points]

    def _remember_incoming(self, gradient: Tensor) -> None:
        # 1/K of FreeLB, a loss scale, 1/accumulation: whatever multiplies the loss on its way.
        self._incoming = gradient.detach()

    @staticmethod
    def _predictions(reading: Reading) -> Tensor:
        if reading.predictions is None:
            raise GameError(
                "This solver compares predictions, and the closure returned a loss alone. Return "
                "(loss, logits), or the model's whole output, from the closure; of several heads "
                "with as many classes (loss, torch.stack([one, other], 1)). In a Trainer: outputs "
                "with logits, from forward_pass."
            )
        return reading.predictions


def _nowhere(index: int, call: Call, output: Tensor) -> None:
    """Add nothing at the site."""


def _by(ascent: Ascent) -> Rule:
    return lambda index, *move: ascent.move(*move)


def _spread(values: Tensor, rows: int) -> Tensor:
    """Return values of samples for `rows` payoffs: several of a sample, or one of several."""
    if rows % len(values) == 0:
        each = rows // len(values)
        return (values / each).repeat_interleave(each)
    if len(values) % rows == 0:
        return values.unflatten(0, (rows, -1)).sum(1)
    raise GameError(
        f"The representation has {len(values)} rows and the closure returned {rows} losses, which "
        "do not belong to each other: return one loss per sample, or name another source=."
    )


def _copies(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, *[1] * (x.dim() - 1))


def _losses(reading: Reading, copies: int) -> Tensor:
    """The losses as `[B]`, or `[1]` for a scalar one."""
    if copies > 1 and not reading.loss.dim():
        raise GameError(
            "particle_batching='stack' needs one loss per sample, and the closure returned a "
            "scalar: return losses [B] (reduction='none'), or use particle_batching='loop'."
        )
    return reading.loss.reshape(-1)
