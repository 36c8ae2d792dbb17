"""The strategy that a round would leave in play, and what it is paid."""

import math
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from mixadv.model.closure import Closure
from mixadv.model.masks import Where
from mixadv.players.strategy import Strategy
from mixadv.round import routes
from mixadv.round.gains import gains_of, shared
from mixadv.round.rounds import Rounds
from mixadv.round.stage import Stage
from mixadv.solvers.play import Moves, Step


@contextmanager
def standing(
    rounds: Rounds, closure: Closure, where: Where = None, adversary: Closure | None = None
) -> Iterator[Stage]:
    """Rehearse the round to come against a learner that stands still."""
    rehearsal = rounds.rehearse(closure, where, adversary)
    with rehearsal as stage, stage.passes.frozen(), warnings.catch_warnings():
        # Of reentrant checkpoints: here neither weights nor a fixed δ require grad.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        yield stage


def in_play(stage: Stage, moves: Moves | None = None) -> Strategy:
    """Return what a round leaves as its strategy, against a learner that stands still.

    `moves` wraps the stage, to see what is asked of it.
    """
    solver = stage.arena.solver
    with closing(solver.play(moves or stage)) as play:
        for move in play:
            objective = move.objective if isinstance(move, Step) else move
            if isinstance(move, Step) and not solver.replays_batch:
                break
            if stage.played is not None and objective.requires_grad:
                stage.passes.differentiate(objective, stage.played.points)
    return (stage.played or stage.origin(solver)).detach()  # plain training plays δ = 0


def payoffs_of(stage: Stage, q: Strategy) -> Tensor:
    """Return each particle's payoff, `[M, B]`, or `[M, 1]` where only a scalar loss is known."""
    goals = stage.goals
    gain = "loss" if goals.general_sum else stage.arena.solver.gain
    gains = gains_of(gain, stage.clean)
    values, samples = routes.readings(stage.passes, q, gains, whose=goals.payer)
    values = values.detach()
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.to(wide) / shared(values, gain, samples)


def finite(payoffs: Tensor) -> Tensor:
    """Return the payoffs, those that are not finite below all others."""
    return torch.where(payoffs.isfinite(), payoffs, -math.inf)


def best(q: Strategy, payoffs: Tensor) -> Strategy:
    """Return the pure strategy that plays in each row the particle that pays most."""
    if not q.knows(payoffs.shape[1]):  # one for the batch
        payoffs = payoffs.mean(1, keepdim=True)
    return q.choose(payoffs.argmax(0))
