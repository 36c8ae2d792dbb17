"""The first round of a game: closure, site and solver checked against each other.

Costs a few passes once. Later rounds are not checked, and read nothing from the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.divergence import divergence
from mixadv.maths.geometry import norms
from mixadv.model import parallel
from mixadv.model.closure import Closure, Reading, parse_output
from mixadv.model.compiled_site import CompiledSite
from mixadv.model.contexts import no_grad
from mixadv.model.gradients import gradients_kept
from mixadv.model.replay import Noise
from mixadv.model.scaling import KEY, Formats
from mixadv.model.visits import Call, Provide
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.round import routes, validate
from mixadv.round.carried import Carried
from mixadv.round.cost import passes
from mixadv.round.stage import Stage

if TYPE_CHECKING:
    from mixadv.game import Game

# Where a start changes the predictions as much as rounding does, the gradient of the symmetric KL
# there has a cosine of 0.1 to 0.5 with the exact one; at twice that change one of 0.8 to 0.95, at
# five times one of 0.97 (MiniLM, fp32 and bf16 autocast).
NOISE_FLOOR = 2.0

_TRIES = 8  # to find the scale of a loss in fp16
_SHARDED_REENTRANT = (
    "Reentrant checkpointing allows no backward to δ alone, without which weights that are sharded "
    "by fully_shard would take gradients of the ascent: set use_reentrant=False."
)


def check(game: Game, closure: Closure) -> None:
    """Check a closure, a site and a solver against each other; nothing is left changed."""
    found = game.unit, game.leaf_backward, game.scaling, game.memory
    game.scaling = None
    try:
        with _no_trace(Stage(game, closure)) as stage:
            stage.replay.fresh = False  # passes are compared
            with gradients_kept(game.parameters()):
                plain = _plain_pass(stage)
            with game.site.learning():
                with Formats() as formats:
                    zero, lengths, slopes = _pass_at_zero(stage)
                if torch.float16 in formats.seen:
                    game.scaling = "batch"
                    slopes = _measure_scaling(stage)
            if isinstance(game.site, CompiledSite):
                zero, *_ = _pass_at_zero(stage)
                stage.run(_measuring([]))  # the learner's passes take another graph
            _check_replay(plain, zero)
            _check_reading(game, zero, stage)
            if game.unit is None:
                game.unit = _mean_length(game, lengths)
            _check_noise_floor(game, stage, zero, _check_slopes(game, slopes))
            _check_route(game, closure, formats.low)
    except BaseException:
        game.unit, game.leaf_backward, game.scaling, game.memory = found
        raise


@contextmanager
def _no_trace(stage: Stage) -> Iterator[Stage]:
    """Put back at the end what passes change, and take the hooks away."""
    try:
        yield stage
    finally:
        stage.replay.undo()
        stage.game.site.forget(stage.passes)
        stage.passes.clear()
        stage.game.site.detach()


def measure_unit(game: Game, closures: Iterable[Closure]) -> float:
    """Return the mean L2 norm of a real token's output at the site, on this process alone.

    The mean is over the tokens of all closures. Nothing is left changed.
    """
    lengths: list[Tensor] = []
    for closure in closures:
        own: list[Tensor] = []
        with _no_trace(Stage(game, closure)) as stage, no_grad(), game.site.learning():
            stage.run(_measuring(own, add=False))
        lengths += own
    return _mean_length(game, lengths, everywhere=False)


def _plain_pass(stage: Stage) -> Reading:
    """Run the closure without hooks."""
    with stage.replay.run():
        reading = parse_output(stage.closure())
    loss = reading.loss.detach()
    if not bool(loss.isfinite().all()):
        raise GameError(
            f"The first loss is {float(loss.mean())}: the model, its inputs or its labels are at "
            "fault before any adversary acts. Check labels, learning rate and number format."
        )
    validate.check_depends(reading.loss)
    return reading


def _pass_at_zero(stage: Stage) -> tuple[Reading, list[Tensor], list[Tensor]]:
    """Run a pass at δ = 0, check that δ is on the way to the loss, and return the gradients."""
    game = stage.game
    lengths: list[Tensor] = []
    leaves: list[Tensor] = []
    with stage.frozen():
        reading = stage.run(_measuring(lengths, leaves))
        _check_unpacked(stage)
        total = reading.objective
        if not total.requires_grad:
            raise GameError(_no_gradient(game))
        try:
            gradients = stage.differentiate(total, leaves)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            if parallel.sharded(game.model):
                raise GameError(_SHARDED_REENTRANT) from error
            game.leaf_backward = True  # reentrant checkpointing allows only a plain backward
            reading = stage.run(_measuring(lengths, leaves := []))
            gradients = stage.differentiate(reading.objective, leaves)
    if all(leaf.grad is None for leaf in leaves):
        raise GameError(_no_gradient(game))
    return reading, lengths, gradients


def _measure_scaling(stage: Stage) -> list[Tensor]:
    """Find the scale of fp16, and whether each sample has one; return the scaled gradients."""
    game, leaves = stage.game, []
    gradients: list[Tensor] = []
    with stage.frozen():
        for _ in range(_TRIES):
            before = stage.memory.get(KEY)
            values = stage.reader("loss")(stage.run(_measuring([], leaves := [])), 1)
            gradients = stage.differentiate(values, leaves)
            settled = before is not None and bool(before[0] == stage.memory[KEY][0])
            if parallel.agreed(settled and any(bool(g.any()) for g in gradients), gradients[0]):
                break
    counted = passes(game.solver)
    carries = counted.theta_backwards > counted.steps and not game.solver.replays_batch
    if carries and not (game.leaf_backward or parallel.sharded(game.model)):
        _measure_carried(stage)
    game.memory = {KEY: stage.memory[KEY], **game.memory}
    with stage.frozen():
        predictions = stage.run(_measuring([], leaves := [])).predictions
        if predictions is not None and all(len(x) == len(predictions) for x in leaves):
            reached = stage.differentiate(predictions[0].sum(), leaves)
            game.scaling = "batch" if any(bool(g[1:].any()) for g in reached) else "sample"
    return gradients


def _measure_carried(stage: Stage) -> None:
    """Lower the scale until gradients of weights, which `game.loss` carries, are finite."""
    for _ in range(_TRIES):
        before = stage.memory[KEY][0]
        Carried(stage).add(stage.run(lambda *_: None).objective)
        if bool(before <= stage.memory[KEY][0]):
            break


def _measuring(
    lengths: list[Tensor], leaves: list[Tensor] | None = None, add: bool = True
) -> Provide:
    """Return what notes the lengths of real tokens and adds a zero leaf at the site."""
    lengths.clear()

    def provide(index: int, call: Call, output: Tensor) -> Tensor | None:
        per = "token" if output.dim() == 3 else "sample"
        wide = torch.promote_types(output.dtype, torch.float32)
        length = norms(output.detach().to(wide), "l2", per)
        real = torch.ones_like(length) if call.mask is None else call.mask.expand_as(length)
        lengths.append(torch.stack([(length * real).sum(), real.sum()]))
        if not add:
            return None
        leaf = torch.zeros_like(call.empty()).requires_grad_()
        if leaves is not None:
            leaves.append(leaf)
        return leaf

    return provide


def _mean_length(game: Game, lengths: list[Tensor], everywhere: bool = True) -> float:
    total = torch.stack([x.double().cpu() for x in lengths]).sum(0)
    if everywhere and parallel.world_size() > 1:
        total = total.to(lengths[0])  # on the device that the processes talk by
        parallel.add_up(total)
    length = float(total[0] / total[1])
    if (not math.isfinite(length) or length == 0) and game.solver.unit == "relative":
        raise GameError(
            f"The mean norm at the site {game.site.names} is {length}, so a relative radius means "
            "nothing there. Give lengths with unit='absolute'."
        )
    return length


def _check_unpacked(stage: Stage) -> None:
    if _packed(stage):
        raise GameError(
            "The batch is packed (positions restart within a row), so a row is not one sample "
            "and per-sample norms mean nothing. Use per='token', or unpacked batches."
        )


def _packed(stage: Stage) -> bool:
    if stage.game.solver.per == "token":
        return False
    context = stage.passes[-1].context
    positions, mask = context.get("position_ids"), context.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts &= (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    return bool(restarts.any())


def _no_gradient(game: Game) -> str:
    return (
        f"The loss has no gradient with respect to δ at {game.site.names}: the path from there to "
        "the loss is detached or runs under no_grad, or the site "
        "lies in a reentrant checkpoint (use_reentrant=False helps then)."
    )


def _check_replay(plain: Reading, zero: Reading) -> None:
    a, b = float(plain.objective.detach()), float(zero.objective.detach())
    tolerance = 1e-2 if torch.finfo(_compute_dtype(plain.loss)).eps > 1e-5 else 1e-4
    if abs(a - b) > tolerance * (1 + abs(a)):
        raise GameError(
            f"Two passes of the closure with the same random state gave losses {a:.6g} and "
            f"{b:.6g}. A round runs the closure several times: draw batches, augmentation and "
            "other randomness outside of it, or with torch's generators."
        )


def _check_reading(game: Game, reading: Reading, stage: Stage) -> None:
    solver = game.solver
    if solver.compares is not None:
        predictions = stage._predictions(reading)
        if not predictions.requires_grad:
            raise GameError(
                f"The predictions do not depend on δ at {game.site.names}: return the logits that "
                "the loss was computed from, not detached."
            )
        if predictions.shape[-1] == 1 and solver.compares in ("kl", "symmetric_kl", "js"):
            raise GameError(
                f"The predictions have one column, of which {solver.compares!r} is always 0. "
                "Choose divergence='squared_error' (payoff= for PGD) for regression."
            )
        values = reading.diverge(predictions.detach(), divergence(solver.compares))
        if values.shape != predictions.shape[:1]:
            raise GameError(
                f"The divergence returned shape {list(values.shape)} for predictions of shape "
                f"{list(predictions.shape)}; it must give one value per prediction."
            )
    if reading.hidden is not None and not reading.hidden.requires_grad:
        raise GameError(
            f"The representation read from the model does not depend on δ at {game.site.names}: "
            "name another module with source=, or another representation=."
        )
    scalar = reading.loss.dim() == 0
    if solver.gain == "loss" and solver.normalize == "none" and solver.steps and scalar:
        raise GameError(
            f"{type(solver).__name__} moves by the raw gradient of each sample's loss, and the "
            "closure returned one number for the batch. Return one loss per sample [B] "
            "(reduction='none'), or set normalize='steepest'."
        )


def _check_slopes(game: Game, gradients: list[Tensor]) -> bool:
    """Warn if no gradient moves δ; return whether one does.

    Not an error: heads and adapters often start at zero, and move in a step or two.
    """
    if any(bool(g.any()) for g in gradients):
        return True
    warnings.warn(
        f"The gradient with respect to δ at {game.site.names} is exactly zero in the first round: "
        "weights on the way to the loss that start at zero, or a function such as round(). No "
        "ascent moves until that changes.",
        stacklevel=6,
    )
    return False


def _check_noise_floor(game: Game, stage: Stage, zero: Reading, moves: bool) -> None:
    """Warn if the adversary's start `moves` the predictions by little more than rounding does.

    The gradient of a divergence there is a difference of almost equal predictions, and noise if
    they differ by rounding; the gradient of a loss needs no such difference. The passes are run
    whether it moves or not: of several processes, which wait for each other in a pass, it may in
    one alone.
    """
    solver = game.solver
    if solver.leaps or solver.initial_size == 0 or solver.radius == 0:
        return
    noise = Noise(game.seed)
    noise.begin("noise floor", 0)
    start = "uniform" if solver.start == "zero" else solver.start
    words = {f.name: getattr(solver, f.name) for f in fields(Ascent)}
    ascent = Ascent(**{**words, "particles": 1, "start": start})
    q = Strategy.begin(ascent, noise, stage.calls, game.scale)

    def rounding(index: int, call: Call, output: Tensor) -> Tensor:
        like = call.empty()
        size = like.shape[-1] if like.dim() == 3 else like[0].numel()
        eps = torch.finfo(_compute_dtype(output)).eps
        length = eps * (game.unit or 1.0) / math.sqrt(size)
        return length * noise("uniform", like).sign()

    # A compiled model would have to make a graph for passes without gradients.
    quiet = stage.frozen() if isinstance(game.site, CompiledSite) else no_grad()
    with quiet, stage.format(solver):
        change = _distance(stage.run(stage.at(q.detach(), 0)), zero)
        floor = _distance(stage.run(rounding), zero)
    if moves and change <= NOISE_FLOOR * floor:
        warnings.warn(
            f"{type(solver).__name__} starts below the noise floor: δ of size "
            f"{solver.initial_size:g} (start_size, or radius={solver.radius}) moves the "
            f"predictions by {change:.2g}, rounding alone by {floor:.2g}: what the adversary sees "
            "is largely noise. Enlarge them, or compute in a wider number format.",
            stacklevel=6,
        )


def _distance(a: Reading, b: Reading) -> float:
    """Return the root mean square difference of two passes' predictions, or else losses."""
    one, other = ((r.loss if r.predictions is None else r.predictions).detach() for r in (a, b))
    return float((one.double() - other.double()).square().mean().sqrt())


def _compute_dtype(output: Tensor) -> torch.dtype:
    kind = output.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return output.dtype


def _check_route(game: Game, closure: Closure, low: bool) -> None:
    """Check that the route for many particles agrees with one pass after another.

    Divergences of close predictions are rounded much in a low format; other dropout is far off.
    """
    solver, slack = game.solver, 0.3 if low else 1e-3
    if solver.particles == 1 or solver.particle_batching == "loop":
        return
    if solver.particle_batching == "auto":
        _learn_to_stack(game, closure, slack)
        return
    if parallel.sharded(game.model) and solver.particle_batching == "vmap":
        raise GameError(
            "particle_batching='vmap' cannot gather weights that are sharded by fully_shard. Use "
            "particle_batching='loop', or 'stack' where there is no dropout."
        )
    _compare_routes(game, closure, solver.particle_batching, slack)


def _learn_to_stack(game: Game, closure: Closure, slack: float) -> None:
    """Note whether small batches of particles may be stacked, in the modes there are."""
    modes = game.modes()
    game.stackable = game.stackable - {modes}
    with _no_trace(Stage(game, closure)) as stage:
        stage.clean()
        if not routes.few(stage):
            return
    try:
        _compare_routes(game, closure, "stack", slack)
    except (GameError, torch.OutOfMemoryError):
        return
    game.stackable = game.stackable | {modes}


def _compare_routes(game: Game, closure: Closure, route: str, slack: float) -> None:
    """Raise GameError unless a route gives what one pass after another gives."""
    solver = game.solver
    try:
        with _no_trace(Stage(game, closure)) as stage:
            stage.clean()
            drawn = stage.replay.drew()
            q = stage.start(solver)
            one, other = (
                stage.payoffs(q.settled(), solver.gain, solver, route=each)[1:]
                for each in (routes.loop, routes.ROUTES[route])
            )
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
    for a, b in zip([one[0], *one[1]], [other[0], *other[1]], strict=True):
        if not torch.allclose(a, b, rtol=1e-2, atol=slack * float(a.abs().max())):
            raise GameError(
                f"particle_batching={route!r} disagrees with one pass after another (largest difference "
                f"{float((a - b).abs().max()):.2g} of {float(a.abs().max()):.2g}); batch "
                f"statistics are a reason. Use particle_batching={instead}."
            )
