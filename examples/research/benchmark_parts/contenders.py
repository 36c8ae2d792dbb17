"""Who is measured: every solver, and other code that does the same work.

All play in one L2 ball per sample, of `RADIUS` token norms, so that what they reach compares.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss
from torch import Tensor

import mixadv
from benchmark_parts import straightforward_mat
from benchmark_parts.work import LABELS, Work
from mixadv.maths.divergence import symmetric_kl

RADIUS = 0.2
WARM = 2
"""Rows of the batch in a first, unmeasured round."""


class Player(NamedTuple):
    """Someone who plays rounds on a piece of work.

    Attributes:
        play: plays one, on the first rows of the batch or on all of it.
        strategy: returns what was played last, `[M, B, n, D]`, and its weights `[M, B or 1]`.
        kept: returns what is kept from round to round, in bytes.
    """

    play: Callable[[int | None], object]
    strategy: Callable[[], tuple[Tensor, Tensor]]
    kept: Callable[[], int]


def ours(work: Work, solver: mixadv.Solver) -> Player:
    """Return the solver as this library plays it; its first, checked round is over."""
    optimizer = mixadv.wrap(work.adamw(), work.model, solver)
    game = optimizer.game
    game.rounds.arena.calibrate(unit=work.unit)
    step(work, optimizer, WARM)

    def strategy() -> tuple[Tensor, Tensor]:
        if game.strategy is None:  # nobody moves the inputs
            return torch.zeros_like(work.embed())[None], torch.ones(
                1, 1, device=work.initial[0].device
            )
        return game.strategy.unit * game.strategy.points[0], game.strategy.weights

    def kept() -> int:
        copies = ("backup", "mean", "average", "teacher")
        weights = [getattr(game.learner, name, {}) for name in copies]
        arena = game.rounds.arena
        return sum(map(_bytes, [*weights, arena.away.copies, game.rounds.memory]))

    return Player(lambda rows: step(work, optimizer, rows), strategy, kept)


def step(work: Work, optimizer: mixadv.GameOptimizer, rows: int | None = None) -> Tensor:
    """Play a round on the first rows of the batch, whose groups are the labels."""
    solver = optimizer.game.solver
    if not solver.weighs:
        return optimizer.step(work.closure(rows))
    groups = work.rows(rows)["labels"] if solver.grouped else None
    return optimizer.step(work.losses(rows), groups=groups)


def noise_by_hand(work: Work, solver: Any) -> Player:
    """Return noise in the ball as a training loop would add it, without a check of anything."""
    optimizer, played = work.adamw(), []

    def play(rows: int | None) -> None:
        ids = work.rows(rows)["input_ids"]  # no token is padding
        noise = 2 * torch.rand(*ids.shape, work.embedding.embedding_dim, device=ids.device) - 1
        share = torch.rand(len(ids), 1, 1, device=ids.device)
        played[:] = [solver.radius * work.unit * share * noise / _lengths(noise)]
        optimizer.zero_grad()
        hook = work.embedding.register_forward_hook(lambda module, ids, out: out + played[0])
        work.closure(rows)().loss.backward()
        hook.remove()
        optimizer.step()

    def strategy() -> tuple[Tensor, Tensor]:
        return played[0][None], torch.ones(1, 1, device=played[0].device)

    return Player(play, strategy, lambda: 0)


def smart_pytorch(work: Work, solver: Any) -> Player:
    """Return the `smart-pytorch` package with its own losses, on the ball that all play in.

    Its step is so long that the normalisation leaves the direction of the gradient.
    """
    optimizer, played = work.adamw(), []

    def logits(embed: Tensor) -> Tensor:
        played[:] = [embed]
        return work.model(inputs_embeds=embed).logits  # no token is padding

    regulariser = SMARTLoss(
        logits,
        loss_fn=kl_loss,
        loss_last_fn=lambda *pair: sym_kl_loss(*pair, reduction="batchmean"),
        norm_fn=lambda x: _lengths(x) / (solver.radius * work.unit),
        num_steps=solver.steps,
        step_size=1e12,
        epsilon=0.0,
        noise_var=solver.initial_size * work.unit / work.coordinates**0.5,
    )

    def play(rows: int | None) -> None:
        optimizer.zero_grad()
        output = work.closure(rows)()
        smoothness = regulariser(work.embed()[:rows], output.logits)
        (output.loss + solver.smoothness_weight * smoothness).backward()
        optimizer.step()
        optimizer.zero_grad()
        played[:] = [played[0].detach()]

    def strategy() -> tuple[Tensor, Tensor]:
        delta = played[0] - work.embed().detach()  # at the weights of the round's start
        return delta[None], torch.ones(1, 1, device=delta.device)

    return Player(play, strategy, lambda: 0)


def straightforward(work: Work, solver: Any) -> Player:
    """Return MAT as `straightforward_mat` plays it."""
    optimizer, played = work.adamw(), []

    def play(rows: int | None) -> None:
        batch = work.rows(rows)
        played[:] = [straightforward_mat.play(work.model, optimizer, batch, solver, work.unit)]

    def strategy() -> tuple[Tensor, Tensor]:
        return work.unit * played[0][None], torch.ones(1, 1, device=played[0].device)

    return Player(play, strategy, lambda: 0)


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        solver: what is played, by the number of coordinates of a sample; peers are told by it.
        enter: makes the player.
        rivals: the rows that this one is compared with.
        extra: measured only where it is asked for.
    """

    solver: Callable[[int], mixadv.Solver]
    enter: Callable[[Work, Any], Player] = ours
    rivals: tuple[str, ...] = ()
    extra: bool = False


def row(solver: mixadv.Solver, **more: Any) -> Contender:
    """Return the row of a solver."""
    return Contender(lambda coordinates: solver, **more)


def smart(steps: int, **changes: Any) -> mixadv.Solver:
    """Return SMART without its teacher."""
    words = {"proximal_weight": 0.0, "step_size": RADIUS, "radius": RADIUS}
    return mixadv.SMART(steps=steps, **{**words, **changes})


def mat(**changes: Any) -> mixadv.Solver:
    """Return MAT of the released code's kind: K_δ = 3, K_θ = 2."""
    words = {"steps": 3, "learner_steps": 2, "step_size": RADIUS, "radius": RADIUS}
    pure = {"particles": 1, "play_as": "mean", "temperature": 1e-8}
    return mixadv.MAT(**{**words, **pure, **changes})


_BALL: dict[str, Any] = {"radius": RADIUS}
_LEAP: dict[str, Any] = {"direction": "gauss_newton"}
_BF16: dict[str, Any] = {"ascent_dtype": torch.bfloat16, "start_size": RADIUS}  # above its rounding
_K1, _K3, _MAT = ("smart-pytorch",), ("smart-pytorch, K=3",), ("straightforward mat",)
_M8 = ("mat, M=8",)
_ENSEMBLE = mat(steps=1, learner_steps=1, particles=4, play_as="ensemble")
_HALF: dict[str, Any] = {"radius": RADIUS, "step_size": RADIUS / 2}

CONTENDERS: dict[str, Contender] = {
    "noise": row(mixadv.UniformNoise(**_BALL), rivals=("noise by hand",)),
    "noise by hand": row(mixadv.UniformNoise(**_BALL), enter=noise_by_hand),
    "r3f": row(mixadv.R3F(**_BALL)),
    "fgm": row(mixadv.FGM(**_BALL)),
    "cat": Contender(lambda n: mixadv.CAT(radius=RADIUS / n**0.5)),
    "pgd, K=3": row(mixadv.PGD(**_HALF)),
    "freelb, K=3": row(mixadv.FreeLB(**_HALF)),
    "freeat, m=3": row(mixadv.FreeAT(**_HALF)),
    "textat, K=3": row(mixadv.TextAT(**_HALF)),
    "creat": row(mixadv.CreAT(step_size=RADIUS, **_BALL)),
    "vat": row(mixadv.VAT(**_BALL)),
    "alum": row(mixadv.ALUM(step_size=RADIUS, **_BALL)),
    "trades": row(mixadv.TRADES(steps=1, step_size=RADIUS, **_BALL)),
    "mart, K=3": row(mixadv.MART(**_HALF)),
    "group DRO": row(mixadv.GroupDRO(groups=LABELS)),
    "CVaR": row(mixadv.CVaR()),
    "chi-square": row(mixadv.ChiSquare()),
    "smart": row(mixadv.SMART(step_size=RADIUS, **_BALL)),
    "smart, no teacher": row(smart(1), rivals=_K1),
    "smart, recomputed": row(smart(1, recompute=True), rivals=_K1),
    "smart, Gauss–Newton": row(smart(1, **_LEAP), rivals=_K1 + _K3),
    "smart-pytorch": row(smart(1), enter=smart_pytorch),
    "smart, no teacher, K=3": row(smart(3), rivals=_K3),
    "smart, Gauss–Newton, K=2": row(smart(2, **_LEAP), rivals=_K3),
    "smart, bf16 ascent, K=3": row(smart(3, **_BF16), rivals=_K3),
    "smart-pytorch, K=3": row(smart(3), enter=smart_pytorch),
    "sam": row(mixadv.SAM()),
    "awp, K=3": row(mixadv.AWP(solver=mixadv.PGD(**_HALF))),
    "mat, 3 and 2": row(mat(), rivals=_MAT),
    "mat, recomputed": row(mat(recompute=True), rivals=_MAT),
    "mat, Gauss–Newton": row(mat(**_LEAP), rivals=_MAT),
    "mat, bf16 ascent": row(mat(**_BF16), rivals=_MAT),
    "mat, Gauss–Newton, bf16": row(mat(**_LEAP, **_BF16), rivals=_MAT),
    "straightforward mat": row(mat(), enter=straightforward),
    "mat, defaults": row(mixadv.MAT(**_BALL)),
    "mat, path": row(mat(points="path", play_as="sample")),
    "mat, ensemble of 4": row(_ENSEMBLE, extra=True),
    "mat, ensemble of 4, recomputed": row(
        replace(_ENSEMBLE, recompute=True), rivals=("mat, ensemble of 4",), extra=True
    ),
    "mat, M=8": row(mat(particles=8), extra=True),
    "mat, M=8, vmap": row(mat(particles=8, particle_batching="vmap"), rivals=_M8, extra=True),
    "mat, M=8, stack": row(mat(particles=8, particle_batching="stack"), rivals=_M8, extra=True),
}


@torch.no_grad()
def reached(work: Work, player: Player) -> float:
    """Return the symmetric KL at what was played last, without dropout, averaged over samples."""
    work.reset()
    points, weights = player.strategy()
    work.model.eval()
    clean = work.model(**work.batch).logits
    divergences = [symmetric_kl(work.perturbed(x).logits, clean) for x in points]
    work.model.train()
    return (weights * torch.stack(divergences)).mean(1).sum().item()


def _lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1)


def _bytes(held: Any) -> int:
    """Return the bytes of the tensors in dicts and lists."""
    if isinstance(held, Tensor):
        return held.nbytes
    values: Iterable[Any] = held.values() if isinstance(held, dict) else held
    return sum(map(_bytes, values)) if isinstance(held, (dict, list, tuple)) else 0
