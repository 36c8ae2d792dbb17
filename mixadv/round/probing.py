"""Whether a closure that a framework hands to `step` plays a round itself."""

from contextlib import ExitStack
from typing import Any

from mixadv.model import parallel
from mixadv.model.closure import Closure
from mixadv.model.contexts import gradients_kept
from mixadv.model.private_torch import sequence_number
from mixadv.model.replay import Replay
from mixadv.model.values import copying
from mixadv.model.walk import modules
from mixadv.round import validate
from mixadv.round.rounds import Rounds


def plays_itself(rounds: Rounds, closure: Closure) -> tuple[Any, bool]:
    """Run a closure once and return its result, and whether it plays rounds itself, or nothing.

    If it does not, random state, buffers and gradients are put back. Lightning gives a closure that
    does nothing where the loop has played by hand.
    """
    validate.check_closure(closure)
    model = rounds.arena.model
    replay, before = Replay(modules(model), alone=False), rounds.round
    nodes = sequence_number()
    with gradients_kept(rounds.arena.parameters()) as release:
        try:
            with ExitStack() as rounds.probing:
                rounds.probing.enter_context(parallel.local(model))
                rounds.probing.enter_context(copying(model))
                result = closure()
            idle = result is None and sequence_number() == nodes
            played = rounds.round > before or idle
        except BaseException:
            replay.undo()
            raise
        finally:
            rounds.probing = None
        if played:
            release()
        else:
            replay.undo()
    return result, played
