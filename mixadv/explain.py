"""What a round will do, before it is played."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixadv import first_round
from mixadv.ascent import Ascent
from mixadv.closure import Closure, Reading
from mixadv.modules import INPUT
from mixadv.parallel import is_spread
from mixadv.site import Call
from mixadv.solvers import SOLVERS
from mixadv.stage import Step
from mixadv.strategy import Strategy

if TYPE_CHECKING:
    from mixadv.game import Game
    from mixadv.solvers.base import Solver


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


@dataclass(frozen=True)
class Explanation:
    """What a round will do; `str()` of it is a table."""

    solver: Solver
    site: list[str]
    unit: float | None
    measured: bool
    passes: Passes

    @property
    def radius(self) -> float | None:
        """Radius at the site; None without a ball, or while the unit is unknown."""
        if self.solver.radius is None or self.unit is None:
            return None
        return self.solver.radius * self.unit

    def __str__(self) -> str:
        s, p = self.solver, self.passes
        ball = "no ball" if s.radius is None else f"{s.radius:g}"
        if self.radius is not None and s.unit == "site":
            ball += f" of the unit = {self.radius:.4g}"
        if s.unit == "absolute":
            unit = "1 (absolute)"
        elif self.unit is None:
            unit = "mean L2 norm of a real token's output, measured at the first round"
        else:
            how = "measured" if self.measured else "estimated from the embedding's rows"
            unit = f"{self.unit:.4g} = mean L2 norm of a real token's output ({how})"
        rows = {
            "solver": f"{type(s).__name__} ({s.paper})",
            "site": ", ".join("the model's own input" if n == INPUT else n for n in self.site),
            "unit": unit,
            "radius": f"{ball} ({s.norm} per {s.per})",
            "passes": f"{p.forwards} forwards, {p.delta_backwards} backwards for δ, "
            f"{p.theta_backwards} backwards, {p.steps} optimizer steps",
            "cost": f"about {p.plain_steps:.1f} plain steps",
        }
        return "\n".join(f"{name:8}{text}" for name, text in rows.items())


def explain(game: Game, closure: Closure | None) -> Explanation:
    """Return the explanation of a game; see `Game.explain`."""
    unit, measured = game.unit, game.unit is not None
    if game.solver.unit == "absolute":
        unit, measured = 1.0, True
    elif unit is None and closure is not None:
        unit, measured = first_round.measure_unit(game, [closure]), True
    elif unit is None:
        unit = _estimated(game)
    return Explanation(game.solver, game.site.names, unit, measured, passes(game.solver))


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
        self, q: Strategy, payoff: Any, ascent: Ascent, deviation: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        self.ascends = True
        if payoff != "loss" or deviation:
            self.clean()
        self.forwards += q.size
        self.delta_backwards += q.size
        return torch.zeros(q.size, 1), [torch.zeros_like(p) for p in q.points]

    def move(self, q: Strategy, how: Any, gradients: Any = None) -> Strategy:
        return q

    def ascend(
        self, payoff: Any, ascent: Ascent, deviation: float = 0.0, begin: Any = None
    ) -> Strategy:
        q = self.start(ascent)
        leaps = ascent.leaps and begin is None
        if leaps:
            self.leap(payoff, ascent)
        for _ in range(ascent.steps - leaps):
            self.payoffs(q, payoff, ascent, deviation)
        return q

    def read(self, q: Strategy) -> Reading:
        self.loss(q)
        return _REHEARSED

    def loss(self, q: Strategy | None = None, last: bool = True) -> Tensor:
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


def _estimated(game: Game) -> float | None:
    """Return the mean norm of the rows of the site, where that is an embedding."""
    modules = [m for _, m in game.site.targets]
    if len(modules) != 1 or not isinstance(modules[0], nn.Embedding):
        return None
    with torch.no_grad():
        scale: Any = getattr(modules[0], "embed_scale", 1.0)
        weight: Any = modules[0].weight
        # Of sharded weights this process's rows: an estimate should not wait for the others.
        rows = weight.to_local() if is_spread(weight) else weight
        return float(rows.float().norm(dim=1).mean() * scale)


def solver_table() -> str:
    """Return a Markdown table of the registered solvers: passes and cost at their defaults.

    The cost is in plain training steps per batch, as `Passes.plain_steps` predicts it.
    """
    head = ["name", "class", "what it plays", "forwards", "δ-backwards", "backwards", "steps"]
    rows = [f"| {' | '.join(head)} | cost | paper |", "|---" * (len(head) + 2) + "|"]
    for name, cls in SOLVERS.items():
        p = passes(cls())
        counts = f"{p.forwards} | {p.delta_backwards} | {p.theta_backwards} | {p.steps}"
        what = f"`{name}` | `{cls.__name__}` | {cls.summary}"
        rows.append(f"| {what} | {counts} | {p.plain_steps:.1f} | {cls.paper} |")
    return "\n".join(rows)
