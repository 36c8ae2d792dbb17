"""An update: the rounds on its micro-batches, which take their optimizer steps together.

With an adversary of the weights each step is played twice: at θ, for the gradient that the weights
are displaced by, and at θ + v, for the learner's. The weights are back before the optimizer steps.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.model.displaced import Rounding
from mixadv.round import validate
from mixadv.round.arena import Arena
from mixadv.round.retained import retaining
from mixadv.round.slope import Slope
from mixadv.round.stage import Stage
from mixadv.round.taped import Tape, Taped
from mixadv.solvers.play import Moves, Play, Step
from mixadv.solvers.weights import WeightsSolver

Parts = Iterator[tuple[Tensor, bool]]
"""What to differentiate, one after another, each with whether an optimizer step follows it."""

_ROUNDED = 0.5  # of the numbers, which a displacement leaves where they are


class Update:
    """The rounds of one update.

    Args:
        stages: one for each micro-batch; their objectives are averaged.
        play: plays the solver on a stage.
        weights: the adversary of weights, where one plays in this update.
        check: warn where the weights' number format is too coarse for their displacement.

    Attributes:
        playing: the stage of the objective that was yielded last.
        displacement: L2 norm of what the weights moved by in the last step, 0-d.
    """

    def __init__(
        self,
        arena: Arena,
        stages: Sequence[Stage],
        play: Callable[[Moves], Play],
        weights: WeightsSolver | None = None,
        check: bool = False,
    ) -> None:
        self.stages = stages
        self.playing = stages[0]
        self.displacement: Tensor | None = None
        self.weights = weights
        self._arena = arena
        self._check = check
        self._plays: list[Play] = []
        self._first: list[Parts] = []
        self._moved: list[Tensor] = []  # which weights the adversary moves
        self._again = [] if weights is None else [stage.again() for stage in stages]
        if weights is None:
            self._last = [self._parts(stage, play(stage)) for stage in stages]
            return
        self._moved = arena.displaced(stages[0].passes.parameters)
        tapes = [Tape() for _ in stages]
        self._first = [
            self._parts(stage, play(Taped(stage, tape.note, stage.arena.noise)))
            for stage, tape in zip(stages, tapes, strict=True)
        ]
        self._last = [
            self._parts(stage, play(Taped(stage, tape.repeat, stage.arena.noise)))
            for stage, tape in zip(self._again, tapes, strict=True)
        ]

    def objectives(self) -> Parts:
        """Yield what the learner differentiates, to the end of the rounds.

        Call `restore` between the backward that a step follows and that step.
        """
        stepped = True
        while stepped:
            stepped = False
            if self.weights is not None and not self._displace(self.weights):
                return
            for number, parts in enumerate(self._last):
                more = number < len(self.stages) - 1
                for part, last in self._until_step(self.stages[number], parts, alone=more):
                    stepped = last
                    yield part, last and not more
            self.restore()

    def turns(self, backward: Callable[[Tensor], object] | None) -> Iterator[Tensor]:
        """Deliver gradients step by step, and yield what was minimised in each."""
        total = torch.zeros(())
        for objective, last in self.objectives():
            self.playing.passes.deliver(objective, backward)
            total = total.to(objective) + objective.detach()
            if last:
                self.restore()
                self.stages[-1].passes.replay.settle()
                yield total
                total = torch.zeros(())

    def restore(self) -> None:
        """Put displaced weights back."""
        self._arena.away.restore(self._arena.model)

    def renew(self) -> None:
        """Forget what belongs to the weights before the learner's step."""
        for stage in [*self.stages, *self._again]:
            stage.renew()

    def close(self) -> None:
        """End the solvers' plays, wherever they stand, and put displaced weights back."""
        self.restore()
        for play in self._plays:
            play.close()
        self._plays.clear()
        self._first, self._last = [], []

    def _until_step(self, stage: Stage, parts: Parts, alone: bool) -> Parts:
        """Yield a micro-batch's part of what is differentiated before the next optimizer step.

        `alone` keeps the gradients of its passes on this process.
        """
        count, model = len(self.stages), self._arena.model
        last = False
        while not last:
            self.playing, self._arena.site.where = stage, stage.goals.where
            with parallel.local(model) if alone else nullcontext():
                part, last = next(parts, (None, False))
            if part is None:
                return
            yield part if count == 1 else part / count, last
        if count > 1:  # where the next one begins
            stage.passes.replay.arrive()
            stage.passes.replay.settle()

    def _displace(self, weights: WeightsSolver) -> bool:
        """Move the weights up the objective of the next step; False where no step is left."""
        arena, found = self._arena, False
        slope, moved = Slope(arena, self.stages[0].passes.parameters), self._moved
        with slope.apart(), parallel.local(arena.model):
            for stage, parts in zip(self.stages, self._first, strict=True):
                for part, _ in self._until_step(stage, parts, alone=True):
                    found = True
                    points = () if stage.played is None else stage.played.points
                    slope.add(stage.passes, part, points)
                stage.passes.forget()
            gradients = slope.take(moved, weights.shared) if found else []
        if not found:
            return False
        displacements = weights.displacements(moved, gradients)
        rounding = Rounding()
        if self._check:
            displacements = rounding.watch(moved, displacements)
        self.displacement = arena.away.move(arena.model, moved, displacements)
        if self._check and weights.radius and (lost := rounding.share()) > _ROUNDED:
            warnings.warn(
                f"{type(weights).__name__} moves the weights by less than their number format "
                f"holds: {lost:.0%} of the numbers to move stand where they stood. Enlarge "
                f"radius={weights.radius}, or keep the weights in fp32 and compute under autocast.",
                stacklevel=7,
            )
        self._check = False
        return True

    def _parts(self, stage: Stage, play: Play) -> Parts:
        """Yield what a play asks to differentiate, each with whether a step follows it."""
        self._plays.append(play)
        solver, passes = stage.arena.solver, stage.passes
        stepped = False
        for move in retaining(stage, play, solver):
            stepped = isinstance(move, Step)
            objective = move.objective if isinstance(move, Step) else move
            validate.check_objective(objective, solver)
            for part, last in passes.cut.parts(objective, stepped, passes.run):
                validate.check_depends(part)
                yield part, last
        if not stepped:
            raise GameError(
                f"{type(solver).__name__}.play ended without a Step: the last pass before an "
                "optimizer step is yielded as Step(objective)."
            )
