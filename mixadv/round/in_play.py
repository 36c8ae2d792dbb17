"""The strategy that a round would leave in play, and what it is paid."""

import math
from contextlib import closing

import torch
from torch import Tensor

from mixadv.players.strategy import Strategy
from mixadv.round import routes
from mixadv.round.gains import gains_of, shared
from mixadv.round.stage import Stage
from mixadv.solvers.play import Step


def in_play(stage: Stage) -> Strategy:
    """Return what a round leaves as its strategy, against a learner that stands still."""
    solver = stage.arena.solver
    with closing(solver.play(stage)) as play:
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
