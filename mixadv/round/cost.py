"""The passes of a round, counted by playing it without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.divergence import Divergence
from mixadv.model.closure import MeanOver, Reading
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.opening import Begin
from mixadv.players.strategy import Rule, Strategy
from mixadv.round.taped import Tape, Taped
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Step
from mixadv.solvers.weights import WeightsSolver


@dataclass(frozen=True)
class Counts:
    """Passes of one round; see `Outcome`."""

    forwards: int
    delta_backwards: int
    theta_backwards: int
    branches: int  # forward passes that these go through (two for a divergence)
    steps: int
    particles: int  # of the strategy that the learner meets, 0 where it meets none

    @property
    def plain_steps(self) -> float:
        """Predicted cost in plain steps: forward, backward of activations and backward of weights
        cost a third of one each (measured: 0.33 to 0.4).
        """
        return (self.forwards + self.delta_backwards + 2 * self.branches) / 3

    def __str__(self) -> str:
        forwards = _several(self.forwards, "forward")
        backwards = f"{_several(self.delta_backwards, 'backward')} for δ"
        steps = _several(self.steps, "optimizer step")
        return f"{forwards}, {backwards}, {self.theta_backwards} for the weights, {steps}"


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def count_passes(solver: Solver, general_sum: bool = False, retains: bool = False) -> Counts:
    """Return the passes of a round.

    Args:
        solver: plays it.
        general_sum: whether the adversary has a payoff of its own.
        retains: whether the learner minimises a term at δ = 0 besides.

    Raises:
        GameError: if the solver does more in a round than `Moves` has.
    """
    counts = _rehearse(solver, general_sum)[0]
    more = counts.steps * retains
    return replace(
        counts,
        forwards=counts.forwards + more,
        theta_backwards=counts.theta_backwards + more,
        branches=counts.branches + more,
    )


def ascends(solver: Solver) -> bool:
    """Return whether a round has passes of the ascent's own, beside those of the learner."""
    return _rehearse(solver)[1].ascends


def recomputes(solver: Solver) -> bool:
    """Return whether a backward of a round runs through several passes, which keep their graphs."""
    counts = count_passes(replace(solver, recompute=False))
    return counts.branches > counts.theta_backwards


def _rehearse(solver: Solver, general_sum: bool = False) -> tuple[Counts, "Rehearsal"]:
    stage, tape = Rehearsal(general_sum), Tape()
    if not isinstance(solver, WeightsSolver):
        return _counted(solver, stage, stage), stage
    solver, again = solver.on_inputs, Rehearsal(general_sum)
    first = _counted(solver, stage, Taped(stage, tape.note))
    second = _counted(solver, again, Taped(again, tape.repeat))
    counts = Counts(
        first.forwards + second.forwards,
        first.delta_backwards + second.delta_backwards,
        first.theta_backwards + second.theta_backwards,
        first.branches + second.branches,
        first.steps,
        first.particles,
    )
    return counts, stage


def _counted(solver: Solver, stage: "Rehearsal", moves: Moves) -> Counts:
    """Return what a stage counts while a solver plays."""
    thetas = steps = 0
    alone = replace(solver, **dict.fromkeys(solver.modules()))  # they have nothing to act on
    try:
        for move in alone.play(moves):
            thetas += 1
            if isinstance(move, Step):
                steps += 1
                stage.clean_known = False
    except Exception as error:
        raise GameError(
            f"The passes of {type(solver).__name__} cannot be counted: its play fails without a "
            f"model ({type(error).__name__}: {error}). It may call what mixadv.solvers.play.Moves "
            "has, and what it does must not depend on values."
        ) from error
    forwards = stage.forwards
    if solver.recompute:  # each pass that another follows is run again, for a backward of its own
        forwards, thetas = forwards + stage.branches - thetas, stage.branches
    return Counts(forwards, stage.delta_backwards, thetas, stage.branches, steps, stage.particles)


_ANSWERS = torch.zeros(2, dtype=torch.long)
_READING = Reading(torch.zeros(()), torch.zeros(2, 2), None, torch.zeros(2, 1), 2, answers=_ANSWERS)


@final
class Rehearsal(Moves):
    """Stands in for a stage, and counts the passes that a round would take."""

    def __init__(self, general_sum: bool = False) -> None:
        self.general_sum = general_sum
        self.memory: dict[str, Any] = {}
        self.forwards = self.delta_backwards = self.branches = self.particles = 0
        self.ascends = False
        self.clean_known = False
        self._used_clean = False

    @property
    def site(self) -> list[str]:
        return ["rehearsal"]

    @property
    def calls(self) -> list[Call]:
        return [Call(torch.Size([1, 1]), torch.float32, torch.device("cpu"), None)]

    def start(self, ascent: Ascent, begin: Begin | None = None) -> Strategy:
        return Strategy([torch.zeros(ascent.particles if begin is None else 1, 1, 1)])

    def draw(self, ascent: Ascent, call: Call) -> Tensor:
        return torch.zeros(1, 1)

    def constant(self, name: str, kind: str, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def payoffs(
        self, q: Strategy, payoff: str | Divergence, ascent: Ascent, deviation_weight: float = 0.0
    ) -> tuple[Strategy, Tensor, list[Tensor]]:
        self.ascends = True
        if (payoff != "loss" and not self.general_sum) or deviation_weight:
            self.clean()
        self.forwards += q.size
        self.delta_backwards += q.size
        return q, torch.zeros(q.size, 1), [torch.zeros_like(p) for p in q.points]

    def clean_gradients(self, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        if self.general_sum:
            q, _, gradients = self.payoffs(self.origin(ascent), "loss", ascent)
            return q, gradients
        self.clean()
        self.delta_backwards += 1
        q = self.origin(ascent)
        return q, [*q.points]

    def second_order(self, kind: str | Divergence, ascent: Ascent) -> tuple[Strategy, list[Tensor]]:
        return self.clean_gradients(ascent)

    def move(
        self, q: Strategy, how: Ascent | Rule, gradients: Sequence[Tensor] | None = None
    ) -> Strategy:
        if gradients is None and self.general_sum:
            self.payoffs(q, "loss", Ascent())
        return q

    def clean(self) -> Reading:
        self.forwards += not self.clean_known
        self._used_clean &= self.clean_known
        self.clean_known = True
        return _READING

    def learned(self) -> Reading:
        self._learn_clean()
        return _READING

    def plain_loss(self) -> Tensor:
        self.clean_known = False
        return self.loss()

    def loss(self, q: Strategy | None = None, last: bool = True, clean: bool = False) -> Tensor:
        if q is None:
            self._learn_clean()
        else:
            self.forwards += q.size
            self.branches += q.size
            self.particles = max(self.particles, q.size)
        return torch.zeros(())

    def losses(self, q: Strategy) -> Tensor:
        return self.loss(q)[None]

    def group_means(self, losses: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(count), torch.ones(count)

    def weighed(self, values: Tensor, weights: Tensor, sizes: Tensor | None = None) -> Tensor:
        return values.sum()

    def run_at(self, q: Strategy) -> Reading:
        self.loss(q)
        return _READING

    def divergence(
        self,
        q: Strategy,
        kind: str | Divergence,
        fixed: bool = False,
        sampled: bool = False,
        over: MeanOver = "samples",
    ) -> Tensor:
        if fixed:
            self.clean()
        else:
            self._learn_clean()
        self.particles = max(self.particles, q.size)
        return self.loss(q.mean() if sampled else q)

    def proximal(self, kind: str | Divergence, over: MeanOver = "samples") -> Tensor:
        self._learn_clean()
        self.forwards += 1
        return torch.zeros(())

    def _learn_clean(self) -> None:
        """Note that the learner's gradient goes through the clean pass."""
        self.clean()
        self.branches += not self._used_clean
        self._used_clean = True
