"""When the adversary plays, and in how large a ball: plain training elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mixadv.checks import check_integer
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step
from mixadv.solvers.weights import WeightsSolver


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Say when the adversary plays, and within what radius; other updates are plain training.

    Counted in updates: rounds, those of micro-batches that share an optimizer step as one (a game
    beside an optimizer it does not know counts every round). A round that is not played takes as
    many optimizer steps as the solver's rounds do, on the clean loss; what the solver does to θ
    after a step, MAT's noise and damping, goes on.

    Attributes:
        start: updates of plain training before the adversary's first one.
        every: it plays each n-th update from there.
        radius: the solver's radius as a function of the updates since `start`; None leaves it. One
            that a module defines pickles with the game, a lambda does not. Of a solver that moves
            the weights it is theirs: where it is 0 the solver inside plays alone, at its own cost.

    Example:
        >>> warm_up = Schedule(start=2, every=3, radius=lambda update: min(0.2, 0.1 * update))
        >>> [update for update in range(10) if warm_up.plays(update)]
        [2, 5, 8]
    """

    start: int = 0
    every: int = 1
    radius: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        check_integer("Schedule", "start", self.start, 0)
        check_integer("Schedule", "every", self.every, 1)
        if self.radius is not None and not callable(self.radius):
            raise TypeError(
                f"Schedule: radius must be a function of the update, got {self.radius!r}: a "
                "constant one is the solver's radius="
            )

    def plays(self, update: int) -> bool:
        """Return whether the adversary plays in an update."""
        return update >= self.start and (update - self.start) % self.every == 0

    def moves(self, solver: Solver, stage: Moves, update: int) -> Play:
        """Return the moves of a round."""
        if not self.plays(update):
            learner = solver.learner()
            return _plain(stage, 1 if learner is None else learner.steps)
        if self.radius is not None:
            solver = replace(solver, radius=self.radius(update - self.start))
        return solver.play(stage)

    def weights(self, weights: WeightsSolver | None, update: int) -> WeightsSolver | None:
        """Return the adversary of weights that plays in an update; `radius` is then its own."""
        if weights is None or not self.plays(update):
            return None
        if self.radius is None:
            return weights
        radius = self.radius(update - self.start)
        return replace(weights, radius=radius) if radius else None


def _plain(stage: Moves, steps: int) -> Play:
    for _ in range(steps):
        yield Step(stage.plain_loss())
