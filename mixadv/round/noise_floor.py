"""Whether the adversary's start is told from the noise of rounding."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields

import torch
from torch import Tensor

from mixadv.model.closure import Reading
from mixadv.model.compiled_site import CompiledSite
from mixadv.model.contexts import compute_dtype, no_grad
from mixadv.model.replay import Noise
from mixadv.model.visits import Call
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import opening
from mixadv.round.stage import Stage

# Where a start changes the predictions as much as rounding does, the gradient of the symmetric KL
# there has a cosine of 0.1 to 0.5 with the exact one; at twice that change one of 0.8 to 0.95, at
# five times one of 0.97 (MiniLM, fp32 and bf16 autocast).
NOISE_FLOOR = 2.0


def check_noise_floor(stage: Stage, zero: Reading, moves: bool) -> None:
    """Warn if the adversary's start `moves` the predictions by little more than rounding does.

    The gradient of a divergence there is a difference of almost equal predictions, and noise if
    they differ by rounding; the gradient of a loss needs no such difference. The passes are run
    whether it moves or not: of several processes, which wait for each other in a pass, it may in
    one alone.
    """
    arena, passes = stage.arena, stage.passes
    solver = arena.solver
    if solver.leaps or solver.initial_size == 0 or solver.radius == 0:
        return
    noise = Noise(arena.seed)
    noise.begin("noise floor", 0)
    start = "uniform" if solver.start == "zero" else solver.start
    words = {f.name: getattr(solver, f.name) for f in fields(Ascent)}
    ascent = Ascent(**{**words, "particles": 1, "start": start})
    q = opening(ascent, noise, stage.calls, arena.scale)

    def rounding(index: int, call: Call, output: Tensor) -> Tensor:
        like = call.empty()
        size = like.shape[-1] if like.dim() == 3 else like[0].numel()
        eps = torch.finfo(compute_dtype(output)).eps
        length = eps * (arena.calibration.unit or 1.0) / math.sqrt(size)
        return length * noise("uniform", like).sign()

    # A compiled model would have to make a graph for passes without gradients.
    quiet = passes.frozen() if isinstance(arena.site, CompiledSite) else no_grad()
    with quiet, passes.autocast(solver):
        change = _distance(passes.run(passes.at(q.detach())), zero)
        floor = _distance(passes.run(rounding), zero)
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
    first, second = ((r.loss if r.predictions is None else r.predictions).detach() for r in (a, b))
    return float((first.double() - second.double()).square().mean().sqrt())
