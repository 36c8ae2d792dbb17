"""The passes of a round, counted by playing it without a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixadv.model.closure import Reading
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Step


@dataclass(frozen=True)
class Passes:
    """Passes of one round.

    Attributes:
        forwards: runs of the closure.
        delta_backwards: backwards with respect to δ alone.
        theta_backwards: backwards that build the learner's gradients.
        branches: forward passes that these go through (two for a divergence).
        steps: optimizer steps.
    """

    forwards: int
    delta_backwards: int
    theta_backwards: int
    branches: int
    steps: int

    @property
    def plain_steps(self) -> float:
        """Predicted cost in plain steps: forward, backward of activations and backward of weights
        cost a third of one each (measured: 0.33 to 0.4).
        """
        return (self.forwards + self.delta_backwards + 2 * self.branches) / 3


def passes(solver: Solver) -> Passes:
    """Return the passes of a round, counted by playing it without a model."""
    return _rehearse(solver)[0]


def ascends(solver: Solver) -> bool:
    """Return whether a round has passes of the ascent's own, beside those of the learner."""
    played = _tried(solver)
    return played is None or played[1].ascends


def recomputes(solver: Solver) -> bool:
    """Return whether a backward of a round runs through several passes, which keep their graphs."""
    played = _tried(replace(solver, recompute=False))
    return played is None or played[0].branches > played[0].theta_backwards


def _tried(solver: Solver) -> tuple[Passes, _Rehearsal] | None:
    """Return what `_rehearse` returns, None for a solver that plays in a way of its own."""
    try:
        return _rehearse(solver)
    except Exception:
        return None


def _rehearse(solver: Solver) -> tuple[Passes, _Rehearsal]:
    stage: Any = _Rehearsal()
    thetas = steps = 0
    alone = replace(solver, **dict.fromkeys(solver.modules()))  # they have nothing to act on
    for move in alone.play(stage):
        thetas += 1
        if isinstance(move, Step):
            steps += 1
            stage.clean_known = False
    forwards = stage.forwards
    if solver.recompute:  # each pass that another follows is run again, for a backward of its own
        forwards, thetas = forwards + stage.branches - thetas, stage.branches
    counted = Passes(forwards, stage.delta_backwards, thetas, stage.branches, steps)
    return counted, stage


_REHEARSED = Reading(torch.zeros(()), None, None, torch.zeros(2, 1))


class _Rehearsal:
    """Stands in for a stage and counts passes."""

    def __init__(self) -> None:
        self.forwards = self.delta_backwards = self.branches = 0
        self.ascends = False
        self.clean_known = False
        self.memory: dict[str, Any] = {}
        self.calls = [Call(torch.Size([1, 1]), torch.float32, torch.device("cpu"), None)]
        self._used_clean = False

    def start(self, ascent: Ascent, begin: Any = None) -> Strategy:
        return Strategy([torch.zeros(ascent.particles, 1, 1)])

    def origin(self, ascent: Ascent) -> Strategy:
        return self.start(ascent)

    def clean(self) -> Reading:
        self.forwards += not self.clean_known
        self._used_clean &= self.clean_known
        self.clean_known = True
        return _REHEARSED

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        self.clean()
        self.delta_backwards += 1
        q = self.start(ascent)
        return q, q.points

    def leap(self, kind: Any, ascent: Ascent) -> Strategy:
        return self.second_order(kind, ascent)[0]

    def second_order(self, kind: Any, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        return self.clean_gradients(ascent)

    def payoffs(
        self, q: Strategy, payoff: Any, ascent: Ascent, deviation_weight: float = 0.0
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        self.ascends = True
        if payoff != "loss" or deviation_weight:
            self.clean()
        self.forwards += q.size
        self.delta_backwards += q.size
        return q, torch.zeros(q.size, 1), [torch.zeros_like(p) for p in q.points]

    def move(self, q: Strategy, how: Any, gradients: Any = None) -> Strategy:
        return q

    def ascend(
        self, payoff: Any, ascent: Ascent, deviation_weight: float = 0.0, begin: Any = None
    ) -> Strategy:
        q = self.start(ascent)
        leaps = ascent.leaps and begin is None
        if leaps:
            self.leap(payoff, ascent)
        for _ in range(ascent.steps - leaps):
            self.payoffs(q, payoff, ascent, deviation_weight)
        return q

    def read(self, q: Strategy) -> Reading:
        self.loss(q)
        return _REHEARSED

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        if q is None:
            self._learn_clean()
        else:
            self.forwards += q.size
            self.branches += q.size
        return torch.zeros(())

    def divergence(self, q: Strategy, kind: Any, fixed: bool = False) -> Tensor:
        self.clean() if fixed else self._learn_clean()
        self.forwards += q.size
        self.branches += q.size
        return torch.zeros(())

    def proximal(self, kind: Any) -> Tensor:
        self._learn_clean()
        self.forwards += 1
        return torch.zeros(())

    def _learn_clean(self) -> None:
        self.clean()
        self.branches += not self._used_clean
        self._used_clean = True
