"""An adversary that is held: what a round asks of the learner, the strategy being what it was.

It is found at some weights, and met again at others. Where the adversary is paid the task loss that
is the loss it expects from the strategy in play. Where it is paid a divergence it is the objective
of the solver's play up to the first optimizer step, every move of the adversary as it was.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from mixadv.maths.divergence import Divergence
from mixadv.model.closure import MeanOver
from mixadv.model.contexts import aside
from mixadv.players.strategy import Strategy
from mixadv.round.in_play import in_play
from mixadv.round.parts import Parts
from mixadv.round.stage import Stage
from mixadv.round.taped import Tape, Taped
from mixadv.round.update import Update
from mixadv.round.wrapped import Wrapped
from mixadv.solvers.play import Moves, Play, Step

Held = Callable[[Moves], Play]
"""Plays a round against the strategy that is held."""


def hold(stage: Stage) -> Held:
    """Find what the adversary plays on a stage, and hold it."""
    solver = stage.arena.solver
    if solver.gain == "loss":
        return partial(_paid, in_play(stage))
    tape = Tape()
    in_play(stage, Taped(stage, tape.note))
    return lambda moves: solver.play(Taped(moves, tape.again().repeat))


def objectives(stage: Stage, held: Held) -> Tensor:
    """Return what the learner minimises, `[B]`, or `[1]` where that of each sample is not known."""
    parts = Parts(stage)
    total = torch.zeros(())
    with closing(held(parts)) as play:
        for move in play:
            total = total + (move.objective if isinstance(move, Step) else move)
            if isinstance(move, Step):
                break
    return parts.of_samples(total)


def differentiate(stage: Stage, held: Held) -> None:
    """Add the gradient of what the learner minimises to that of its weights."""
    with closing(Update(stage.arena, [stage], lambda moves: held(_Whole(moves)))) as update:
        next(update.turns(partial(_backward, stage)))


class _Whole(Wrapped):
    """A stage on which a strategy is played whole, where a particle would be drawn per sample."""

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        return self.stage.divergence(q, kind, fixed, False, over)


def _paid(q: Strategy, moves: Moves) -> Play:
    yield Step(moves.loss(q))


def _backward(stage: Stage, objective: Tensor) -> None:
    """Leave no gradient on what the closure has besides the weights, such as a head of its own."""
    known = [*stage.passes.parameters, *stage.passes.cut.leaves()]
    with aside(stage.arena.besides(stage.goals, objective, known)):
        torch.autograd.backward(objective)
