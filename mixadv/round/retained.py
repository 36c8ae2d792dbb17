"""What the learner retains, at δ = 0, before the moves of a solver."""

from mixadv.errors import GameError
from mixadv.model.parallel import local
from mixadv.round.passes import nowhere
from mixadv.round.stage import Stage
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Play, Step


def retaining(stage: Stage, play: Play, solver: Solver) -> Play:
    """Yield the moves of a solver, those of each optimizer step behind what is retained."""
    learner = solver.learner()
    for _ in range(1 if learner is None else learner.steps):
        if stage.goals.retain is not None:
            with local(stage.arena.model):  # another backward follows
                objective = stage.passes.run(nowhere, whose="retain").objective
            if not objective.requires_grad:
                raise GameError(
                    "retain= returned a loss that no weight leads to: it was detached, or ran "
                    "under no_grad. Return what the learner is to minimise at δ = 0."
                )
            stage.retained = objective.detach()
            yield objective
        for move in play:
            yield move
            if isinstance(move, Step):
                break
    for move in play:
        if stage.goals.retain is not None:
            raise GameError(
                f"{type(solver).__name__}.play takes more optimizer steps than its learner() "
                "says, and what is retained belongs to each: return Learner(steps=…) from it."
            )
        yield move
