"""What the first round of any game begins with, and all of it where nobody moves the inputs."""

import copy
from dataclasses import replace

import torch

from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.model.closure import Reading, parse_output
from mixadv.model.contexts import gradients_kept
from mixadv.model.modules import unwrap
from mixadv.model.scaling import KEY, Formats
from mixadv.model.values import copying
from mixadv.round import validate
from mixadv.round.arena import Arena, Calibration, Memory, leaves_besides
from mixadv.round.goals import Goals
from mixadv.round.passes import nowhere
from mixadv.round.readable import check_replay
from mixadv.round.slope import Slope
from mixadv.round.stage import Stage
from mixadv.round.unit import no_trace

TRIES = 8  # to find the scale of a loss in fp16


def calibrate_plain(arena: Arena, goals: Goals, memory: Memory) -> Calibration:
    """Check that a closure can be run again, and find the scale of its gradients in fp16.

    Nothing is left changed.
    """
    trial = copy.copy(arena)
    trial.calibration = replace(arena.calibration, scaling=None)
    stage = Stage(trial, goals, dict(memory))
    with no_trace(stage.passes):
        with gradients_kept(trial.parameters()), Formats() as formats:
            plain = plain_pass(stage)
        check_replay(plain, stage.passes.run(nowhere))
        others = leaves_besides(plain.objective, stage.passes.parameters)
        trial.calibration = replace(trial.calibration, outside=bool(others))
        if torch.float16 in formats.seen:
            trial.calibration = replace(trial.calibration, scaling="batch")
            _measure_scaling(stage)
    return replace(trial.calibration, checked=True, scale=stage.memory.get(KEY))


def plain_pass(stage: Stage) -> Reading:
    """Run the closure without the site's hooks."""
    model = stage.arena.model
    with stage.passes.replay.run(), copying(model):
        reading = parse_output(stage.goals.closure(), (), unwrap(model))
    loss = reading.loss.detach()
    if not loss.numel():
        raise GameError(
            "The closure returned no losses: its batch is empty. Leave such batches out."
        )
    if not bool(loss.isfinite().all()):
        raise GameError(
            f"The first loss is {float(loss.mean())}: the model, its inputs or its labels are at "
            "fault before any adversary acts. Check labels, learning rate and number format."
        )
    validate.check_depends(reading.loss)
    return reading


def _measure_scaling(stage: Stage) -> None:
    """Find the scale of fp16, of gradients of the weights."""
    memory, arena = stage.memory, stage.arena
    slope = Slope(arena, stage.passes.parameters)
    with slope.apart():
        for _ in range(TRIES):
            before = memory.get(KEY)
            slope.add(stage.passes, stage.passes.run(nowhere).objective)
            settled = before is not None and bool(before[0] == memory[KEY][0])
            if parallel.agreed(settled, stage.passes.parameters[0]):
                break
