"""What a round will do, before it is played."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixadv.model.modules import is_input
from mixadv.model.parallel import is_spread
from mixadv.model.visits import positions
from mixadv.round.arena import Arena, Units
from mixadv.round.cost import Counts, count_passes
from mixadv.round.goals import Goals
from mixadv.round.outcome import Outcome
from mixadv.round.unit import mean_lengths, measure
from mixadv.solvers.base import Solver
from mixadv.solvers.weights import WeightsSolver


@dataclass(frozen=True)
class Explanation:
    """What a round will do; `str()` of it is a table."""

    solver: Solver
    site: list[str]
    unit: Units | None
    measured: bool
    passes: Counts
    positions: tuple[int, int] | None = None  # that δ acts on, of those at the site
    effective: float | None = None  # particles in the last round, None before one
    general_sum: bool = False
    weights: WeightsSolver | None = None  # around the solver

    @property
    def on_inputs(self) -> bool:
        """Whether an adversary moves the inputs."""
        return self.solver.perturbs

    @property
    def radius(self) -> Units | None:
        """Radius at the site; None without a ball or a δ, or while the unit is unknown."""
        radius = self.solver.radius
        if radius is None or self.unit is None or not self.on_inputs:
            return None
        if isinstance(self.unit, dict):
            return {name: radius * unit for name, unit in self.unit.items()}
        return radius * self.unit

    @property
    def adversary(self) -> str:
        """Whether the learner meets a mixture in each round, of points or of rows, or one point."""
        if self.solver.weighs:
            return f"mixed over {self.solver.weighs}" + ", δ pure" * bool(self.solver.steps)
        if self.passes.particles < 2:
            return "pure"
        known = "" if self.effective is None else f"{self.effective:.1f} effective of "
        return f"mixed, {known}{self.passes.particles} particles"

    @property
    def learner(self) -> str:
        """Whether θ is sampled, or trained as it stands."""
        learner = self.solver.learner()
        if learner is None or learner.temperature == 0:
            return "pure"
        many = f"{learner.steps} Langevin samples per round"
        return f"mixed, {many}, temperature {learner.temperature:g}"

    def _players(self) -> list[Solver]:
        """Return who plays on the weights and on the inputs."""
        outer = [] if self.weights is None else [self.weights]
        return [*outer, *([self.solver] if self.on_inputs else [])]

    @property
    def _read(self) -> str:
        """Return whose length the unit is."""
        return "the input" if all(map(is_input, self.site)) else "a real token's output"

    def __str__(self) -> str:
        s, p = self.solver, self.passes
        ball = "no ball" if s.radius is None else f"{s.radius:g}"
        if self.radius is not None and s.unit == "relative":
            ball += f" of the unit = {worded(self.radius)}"
        if s.unit == "absolute":
            unit = "1 (absolute)"
        elif self.unit is None:
            each = " at each" * (len(self.site) > 1)
            unit = f"mean L2 norm of {self._read}{each}, measured at the first round"
        else:
            how = "measured" if self.measured else "estimated from the embedding's rows"
            unit = f"{worded(self.unit)} = mean L2 norm of {self._read} ({how})"
        inputs = {
            "site": ", ".join(map(_named, self.site)),
            "unit": unit,
            "radius": f"{ball} ({s.norm} per {s.per})",
            **({} if s.box is None else {"box": "x + δ in [{:g}, {:g}]".format(*s.box)}),
        }
        rows = {
            "solver": " around ".join(f"{type(x).__name__} ({x.paper})" for x in self._players()),
            **({} if self.weights is None else {"weights": self.weights.described_ball()}),
            **(inputs if self.on_inputs else {"site": "no δ: the inputs stay as they are"}),
            "adversary": self.adversary + ", a payoff of its own" * self.general_sum,
            "learner": self.learner,
            "passes": str(p),
            "cost": f"about {p.plain_steps:.1f} plain steps",
        }
        if self.general_sum:
            rows["game"] = "general-sum: no duality gap; one δ for all calls of the model"
        if self.positions is not None:
            rows["where"] = "{} of {} positions".format(*self.positions)
        return "\n".join(f"{name:10}{text}" for name, text in rows.items())


def worded(unit: Units, digits: int = 4) -> str:
    """Return a length at the site in words, or that at each of its modules.

    Example:
        >>> worded({"words": 0.25, "layers.1": 4.0})
        '0.25 at words, 4 at layers.1'
    """
    if not isinstance(unit, dict):
        return f"{unit:.{digits}g}"
    return ", ".join(f"{value:.{digits}g} at {_named(name)}" for name, value in unit.items())


def _named(site: str) -> str:
    """Return the name of a site in words."""
    name = site.partition(":")[2]
    return f"the model's own input{name and f', {name}'}" if is_input(site) else site


def explain(
    arena: Arena,
    goals: Goals | None,
    outcome: Outcome | None = None,
) -> Explanation:
    """Return the explanation of a game after a round that came to `outcome`; see `Game.explain`."""
    general_sum = goals is not None and goals.general_sum
    retains = goals is not None and goals.retain is not None
    solver, unit = arena.solver, arena.calibration.unit
    measured, play = unit is not None or solver.unit == "absolute", None
    if goals is not None and solver.perturbs:
        lengths, calls = measure(arena, goals.closure, goals.where)
        play = (
            sum(int(positions(call.mask, call.shape)) for call in calls),
            sum(int(positions(None, call.shape)) for call in calls),
        )
        if unit is None and solver.unit == "relative":
            unit, measured = mean_lengths(arena, lengths, everywhere=False), True
    elif unit is None:
        unit = _estimated(arena)
    unit = 1.0 if solver.unit == "absolute" else unit
    counts = count_passes(arena.weights or solver, general_sum, retains)
    particles = outcome and outcome.effective_particles
    effective = None if particles is None else float(particles)
    found = unit, measured, counts, play, effective, general_sum, arena.weights
    return Explanation(solver, arena.site.names, *found)


def _estimated(arena: Arena) -> float | None:
    """Return the mean norm of the rows of the site, where that is an embedding."""
    modules = [m for _, m in arena.site.targets]
    if len(modules) != 1 or not isinstance(modules[0], nn.Embedding):
        return None
    with torch.no_grad():
        scale: Any = getattr(modules[0], "embed_scale", 1.0)
        weight: Any = modules[0].weight
        # Of sharded weights this process's rows: an estimate should not wait for the others.
        rows = weight.to_local() if is_spread(weight) else weight
        return float(rows.float().norm(dim=1).mean() * scale)


def solver_table(solvers: Iterable[type[Solver]]) -> str:
    """Return a Markdown table of solvers: passes and cost at their defaults.

    The cost is in plain training steps per batch, as `Counts.plain_steps` predicts it.
    """
    head = ["name", "class", "what it plays", "forwards", "δ-backwards", "backwards", "steps"]
    rows = [f"| {' | '.join(head)} | cost | paper |", "|---" * (len(head) + 2) + "|"]
    for cls in solvers:
        p = count_passes(cls())
        counts = f"{p.forwards} | {p.delta_backwards} | {p.theta_backwards} | {p.steps}"
        what = f"`{cls.name}` | `{cls.__name__}` | {cls.summary}"
        rows.append(f"| {what} | {counts} | {p.plain_steps:.1f} | {cls.paper} |")
    return "\n".join(rows)
