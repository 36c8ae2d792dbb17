"""The first round of a game: closure, site and solver checked against each other.

Costs a few passes once. Later rounds are not checked, and read nothing from the device.
"""

import copy
import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.model.closure import Reading
from mixadv.model.compiled_site import CompiledSite
from mixadv.model.contexts import compute_dtype, gradients_kept, no_grad
from mixadv.model.noise import Noise
from mixadv.model.scaling import KEY, Formats
from mixadv.model.visits import Call
from mixadv.players.opening import opening
from mixadv.players.strategy import Strategy
from mixadv.round.agreement import check_batching
from mixadv.round.arena import Arena, Calibration, Memory, leaves_besides
from mixadv.round.carried import Carried
from mixadv.round.cost import count_passes
from mixadv.round.first_plain import TRIES, plain_pass
from mixadv.round.gains import losses_of_samples
from mixadv.round.goals import Goals, Whose
from mixadv.round.layout import check_batch, find_batch, find_texts
from mixadv.round.passes import nowhere
from mixadv.round.readable import (
    check_box,
    check_inputs,
    check_masks,
    check_owners,
    check_payoff,
    check_reading,
    check_replay,
    check_slopes,
    check_where,
    difference,
)
from mixadv.round.sharing import check_sharing
from mixadv.round.stage import Stage
from mixadv.round.unit import Lengths, mean_lengths, measuring, no_trace
from mixadv.round.weighing import check_rows

# Where a start changes the predictions as much as rounding does, the gradient of the symmetric KL
# there has a cosine of 0.1 to 0.5 with the exact one; at twice that change one of 0.8 to 0.95, at
# five times one of 0.97 (MiniLM, fp32 and bf16 autocast).
_NOISE_FLOOR = 2.0

_CHANGED_INPUT = (
    "The model sets requires_grad on what the site {} returns, no leaf once δ is added to it, as "
    "speech encoders do with their input: freeze the feature encoder "
    "(model.freeze_feature_encoder()), or name a module behind it with site=, such as the one "
    "that ends in feature_projection."
)


def calibrate(arena: Arena, goals: Goals, memory: Memory) -> Calibration:
    """Check closures, a site and a solver against each other, and return what was found out.

    Nothing is left changed. What was known of the unit stays as it is.
    """
    trial = copy.copy(arena)
    trial.calibration = replace(arena.calibration, scaling=None)
    stage = Stage(trial, goals, dict(memory))
    with no_trace(stage.passes):
        stage.passes.replay.fresh = False  # passes are compared
        with gradients_kept(trial.parameters()):
            plain = plain_pass(stage)
        with trial.site.learning():
            with Formats() as formats:
                zero, lengths, slopes = _pass_at_zero(stage)
                if find_batch(stage) | find_texts(stage):
                    zero, lengths, slopes = _pass_at_zero(stage)
            if torch.float16 in formats.seen:
                slopes = _measure_scaling(stage)
        if isinstance(trial.site, CompiledSite):
            zero, *_ = _pass_at_zero(stage)
            stage.passes.run(measuring([]))  # the learner's passes take another graph
        check_where(stage)
        check_box(stage)
        check_masks(stage)
        check_inputs(stage)
        check_owners(stage, zero)
        check_replay(plain, zero)
        if torch.float16 not in formats.seen:  # in which gradients that tell it may vanish
            check_batch(stage, zero)
        check_reading(trial, zero, stage.passes.kept[-1].context.get("labels"))
        unlabelled = trial.solver.compares is not None and _is_unlabelled(zero)
        trial.calibration = replace(trial.calibration, unlabelled=unlabelled)
        check_rows(zero.loss, goals.groups, trial.solver)
        paid = zero
        if goals.general_sum:
            check_sharing(stage)
            paid, _, slopes = _pass_at_zero(stage, "adversary")
            _check_paid(paid)
        check_payoff(trial.solver, paid)
        if trial.calibration.unit is None:
            trial.calibration = replace(trial.calibration, unit=mean_lengths(trial, lengths))
        _check_start(stage, paid, slopes)
        begun = trial.calibration.begin(memory)
        stackable = check_batching(trial, goals, begun, formats.low)
    return replace(trial.calibration, checked=True, stackable=stackable)


def _is_unlabelled(reading: Reading) -> bool:
    """Return whether predictions are per token, and no labels tell which of them count."""
    predictions = reading.predictions
    return predictions is not None and predictions.dim() == 3 and not reading.labelled


def _check_paid(reading: Reading) -> None:
    """Check that a payoff is finite: else each δ would fall back to 0, and nobody attack."""
    payoff = reading.loss.detach()
    if not bool(payoff.isfinite().all()):
        raise GameError(
            f"adversary= returned {float(payoff.mean())} at δ = 0: a payoff that is not finite has "
            "no ascent. Check its labels, and logarithms of what may be 0."
        )


def _pass_at_zero(stage: Stage, whose: Whose = "closure") -> tuple[Reading, Lengths, list[Tensor]]:
    """Run a pass at δ = 0, check that δ is on the way to the loss, and return the gradients."""
    arena, passes = stage.arena, stage.passes
    lengths: Lengths = []
    leaves: list[Tensor] = []
    with passes.frozen():
        try:
            reading = passes.run(measuring(lengths, leaves), whose=whose)
        except RuntimeError as error:
            if "requires_grad flags of leaf" in str(error):
                raise GameError(_CHANGED_INPUT.format(arena.site.names)) from error
            raise
        total = reading.objective
        if not total.requires_grad:
            raise GameError(_no_gradient(arena, whose))
        if whose == "closure":
            outside = bool(leaves_besides(total, leaves))
            arena.calibration = replace(arena.calibration, outside=outside)
        try:
            gradients = passes.differentiate(total, leaves)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            if parallel.sharded(arena.model):
                raise GameError(
                    "Reentrant checkpointing allows no backward to δ alone, without which weights "
                    "that are sharded by fully_shard would take gradients of the ascent: set "
                    "use_reentrant=False."
                ) from error
            # Reentrant checkpointing allows only a plain backward.
            arena.calibration = replace(arena.calibration, leaf_backward=True)
            reading = passes.run(measuring(lengths, leaves := []), whose=whose)
            gradients = passes.differentiate(reading.objective, leaves)
    if all(leaf.grad is None for leaf in leaves):
        raise GameError(_no_gradient(arena, whose))
    return reading, lengths, gradients


def _measure_scaling(stage: Stage) -> list[Tensor]:
    """Find the scale of fp16, and whether each sample has one; return the scaled gradients."""
    arena, passes = stage.arena, stage.passes
    arena.calibration = replace(arena.calibration, scaling="batch")
    leaves: list[Tensor] = []
    gradients: list[Tensor] = []
    with passes.frozen():
        for _ in range(TRIES):
            before = stage.memory.get(KEY)
            reading = passes.run(measuring([], leaves := []))
            values = losses_of_samples(reading)
            gradients = passes.differentiate(values, leaves, reading.samples)
            settled = before is not None and bool(before[0] == stage.memory[KEY][0])
            if parallel.agreed(settled and any(bool(g.any()) for g in gradients), gradients[0]):
                break
    counts = count_passes(arena.solver)
    several = counts.theta_backwards > counts.steps or stage.goals.retain is not None
    carries = several and not arena.solver.replays_batch
    if carries and not (arena.calibration.leaf_backward or parallel.sharded(arena.model)):
        _measure_carried(stage)
    scale, scaling = stage.memory[KEY], arena.calibration.scaling
    with passes.frozen():
        predictions = passes.run(measuring([], leaves := [])).predictions
        if predictions is not None and all(len(x) == len(predictions) for x in leaves):
            reached = passes.differentiate(predictions[0].sum(), leaves)
            scaling = "batch" if any(bool(g[1:].any()) for g in reached) else "sample"
    arena.calibration = replace(arena.calibration, scaling=scaling, scale=scale)
    return gradients


def _measure_carried(stage: Stage) -> None:
    """Lower the scale until gradients of weights, which `game.loss` carries, are finite."""
    for _ in range(TRIES):
        before = stage.memory[KEY][0]
        Carried(stage.passes).add(stage.passes.run(nowhere).objective, ())
        if bool(before <= stage.memory[KEY][0]):
            break


def _no_gradient(arena: Arena, whose: Whose) -> str:
    what = "adversary's payoff" if whose == "adversary" else "loss"
    return (
        f"The {what} has no gradient with respect to δ at {arena.site.names}: the path from there "
        f"to the {what} is detached or runs under no_grad, or the site "
        "lies in a reentrant checkpoint (use_reentrant=False helps then)."
    )


def _start(stage: Stage) -> Strategy:
    """Return a start of one particle; a start at zero gets the size that others have."""
    solver = stage.arena.solver
    noise = Noise(stage.arena.seed)
    noise.begin("noise floor", 0)
    start = "uniform" if solver.start == "zero" else solver.start
    ascent = solver.ascent(particles=1, start=start)
    return opening(ascent, noise, stage.passes.kept[-1].places, stage.arena.scale)


def _check_start(stage: Stage, zero: Reading, slopes: list[Tensor]) -> None:
    """Warn if no gradient moves δ, or what its start does to the predictions is mostly rounding.

    The gradient of a divergence there is a difference of almost equal predictions, and noise if
    they differ by rounding; the gradient of a loss needs no such difference. The passes are run
    whether it moves or not: of several processes, which wait for each other in a pass, it may in
    one alone. At δ = 0 all slopes are 0 of a payoff that is least there, such as a distance from
    what the model itself returned: the start tells then.
    """
    arena, passes = stage.arena, stage.passes
    solver = arena.solver
    moves = any(bool(g.any()) for g in slopes)
    if solver.leaps or solver.initial_size == 0 or solver.radius == 0:
        check_slopes(arena, moves)
        return
    q, noise = _start(stage), Noise(arena.seed)
    noise.begin("rounding", 0)

    def rounding(index: int, call: Call, output: Tensor) -> Tensor:
        like = call.empty()
        size = like.shape[-1] if like.dim() == 3 else like[0].numel()
        eps = torch.finfo(compute_dtype(output)).eps
        length = eps * arena.calibration.length(call.site) / math.sqrt(size)
        return length * noise("uniform", like).sign()

    whose = stage.goals.payer
    with passes.frozen(), passes.autocast(solver):
        started = passes.run(passes.at(q), whose=whose)
    still = not moves
    if parallel.sharded(arena.model):  # a backward is one of all processes
        still = parallel.agreed(still, slopes[0])
    if still and solver.start != "zero":
        moves = any(bool(g.any()) for g in passes.differentiate(started.objective, q.points))
    # A compiled model would have to make a graph for passes without gradients.
    quiet = passes.frozen() if isinstance(arena.site, CompiledSite) else no_grad()
    with quiet, passes.autocast(solver):
        change = _distance(started, zero)
        floor = _distance(passes.run(rounding, whose=whose), zero)
    check_slopes(arena, moves)
    if moves and change <= _NOISE_FLOOR * floor:
        warnings.warn(
            f"{type(solver).__name__} starts below the noise floor: δ of size "
            f"{solver.initial_size:g} (start_size, or radius={solver.radius}) moves the "
            f"predictions by {change:.2g}, rounding alone by {floor:.2g}, so the adversary's "
            "gradient is largely noise. Enlarge them, or compute in a wider number format.",
            stacklevel=6,
        )


def _distance(a: Reading, b: Reading) -> float:
    """Return the root mean square difference of two passes' predictions, or else losses."""
    first, second = ((r.loss if r.predictions is None else r.predictions).detach() for r in (a, b))
    return float(difference(first.double(), second.double()).square().mean().sqrt())
