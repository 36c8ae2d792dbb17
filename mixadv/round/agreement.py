"""Whether the ways to compute many particles agree on this model and closure."""

from dataclasses import replace

import torch

from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.round import routes
from mixadv.round.arena import Arena, Memory, Modes
from mixadv.round.cost import count_passes
from mixadv.round.goals import Goals
from mixadv.round.stage import Stage
from mixadv.round.unit import no_trace


def check_batching(arena: Arena, goals: Goals, memory: Memory, low: bool) -> frozenset[Modes]:
    """Check that the route for many particles agrees with one pass after another.

    Returns the modes in which `"auto"` may stack small batches. In a `low` format divergences of
    close predictions are rounded much; other dropout is far off all the same.
    """
    solver, slack = arena.solver, 0.3 if low else 1e-3
    stackable = arena.calibration.stackable
    if solver.particle_batching == "loop":
        return stackable
    if max(solver.particles, count_passes(solver).particles) == 1:  # of the ascent, of what is met
        return stackable
    if solver.particle_batching == "auto":
        stacks = _stacks(arena, goals, memory, slack)
        return stackable | {arena.modes} if stacks else stackable - {arena.modes}
    if parallel.sharded(arena.model) and solver.particle_batching == "vmap":
        raise GameError(
            "particle_batching='vmap' cannot gather weights that are sharded by fully_shard. Use "
            "particle_batching='loop', or 'stack' where there is no dropout."
        )
    _compare(arena, goals, memory, solver.particle_batching, slack)
    return stackable


def _stacks(arena: Arena, goals: Goals, memory: Memory, slack: float) -> bool:
    """Return whether small batches of particles may be stacked, in the modes there are."""
    stage = Stage(arena, goals, dict(memory))
    with no_trace(stage.passes):
        stage.clean()
        if not routes.few(stage.passes):
            return False
    try:
        _compare(arena, goals, memory, "stack", slack)
    except (GameError, torch.OutOfMemoryError):
        return False
    return True


def _compare(arena: Arena, goals: Goals, memory: Memory, route: str, slack: float) -> None:
    """Raise GameError unless a route gives what one pass after another gives."""
    solver = arena.solver
    try:
        stage = Stage(arena, goals, dict(memory))
        with no_trace(stage.passes):
            stage.clean()
            drawn = stage.passes.replay.drew()
            several = solver.ascent(particles=max(2, solver.particles))
            q = stage.start(several).detach()
            each = (replace(solver, particle_batching=batching) for batching in ("loop", route))
            looped, routed = (stage.payoffs(q, solver.gain, ascent)[1:] for ascent in each)
    except (GameError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise GameError(
            f"particle_batching={route!r} failed on this model and closure "
            f"({type(error).__name__}: {error}). Use particle_batching='loop'."
        ) from error
    if route == "stack" and drawn:
        raise GameError(
            "particle_batching='stack' cannot replay dropout, and a pass of this model draws "
            "random numbers: use particle_batching='vmap' or 'loop'."
        )
    instead = "'vmap' or 'loop'" if route == "stack" else "'loop'"
    for a, b in zip([looped[0], *looped[1]], [routed[0], *routed[1]], strict=True):
        most = float(a.abs().nan_to_num(0, 0).max())
        # At padding gradients may be NaN: nothing is played there.
        if not torch.allclose(a, b, rtol=1e-2, atol=slack * most, equal_nan=True):
            raise GameError(
                f"particle_batching={route!r} disagrees with one pass after another (largest "
                f"difference {float((a - b).abs().nan_to_num(0).max()):.2g} of {most:.2g}); "
                f"batch statistics are a reason. Use particle_batching={instead}."
            )
