"""Solving a game: a method plays, the game answers, and the strategies played are kept."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mixadv.checks import check_flag, check_integer, check_number
from mixadv.errors import build
from mixadv.games.continuous import ContinuousGame
from mixadv.games.matrix import MatrixGame
from mixadv.games.method import Method, Profile, Scene, Strategy
from mixadv.games.methods import METHODS
from mixadv.games.particles import PARTICLE_METHODS, ParticleMethod
from mixadv.games.solution import Ledger, Means, Reply, Snapshots, Solution, duality_gap
from mixadv.games.strategies import Pair, Particles
from mixadv.maths import mirror

RECORDS = 1000
"""Gaps kept of a long solve, evenly spaced."""


def solve(
    game: MatrixGame | ContinuousGame,
    method: str | Method | ParticleMethod = "mirror_prox",
    steps: int = 1000,
    *,
    start: tuple[Any, Any] | None = None,
    tolerance: float = 0.0,
    grid: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **parameters: Any,
) -> Solution:
    """Play a zero-sum game and return both strategies, with the gap that certifies them.

    Args:
        game: finite (a batch is solved at once) or continuous.
        method: a method with its parameters, or a name: of `METHODS` for finite games, and on a
            grid for continuous ones, or of `PARTICLE_METHODS` for continuous games.
        steps: T, at least 1.
        start: what both players start from: weights `[..., m]` and `[..., n]`, for particle methods
            points `[N, d]`. None is the uniform strategy, or draws from the reference measure.
        tolerance: stop at the first recorded gap (all those of a batch) up to this one.
        grid: points per dimension where a continuous game is played or judged on a grid.
        seed: of the particles' start and noise.
        progress: show a bar, on a terminal and after two seconds, where tqdm is installed.
        parameters: of the method, if it is named: `step_size`, `temperature`, ...

    Raises:
        ValueError: if the method does not exist or play this game, or a start is no strategy.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> solution = solve(MatrixGame([[3, -1], [-2, 1]]), "optimistic_hedge", steps=1000)
        >>> round(solution.value.item(), 2), float(solution.gap) < 0.02
        (0.14, True)
    """
    run = _Run(steps, start, tolerance, grid, seed, progress)
    return _solve(game, _method(method, parameters), run)


@dataclass(frozen=True)
class _Run:
    """What `solve` is asked for besides the game and the method; see there."""

    steps: int
    start: tuple[Any, Any] | None
    tolerance: float
    grid: int | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        pair = isinstance(self.start, (tuple, list)) and len(self.start) == 2
        if self.start is not None and not pair:
            raise TypeError(
                f"start must be a pair (learner's, adversary's), got {reprlib.repr(self.start)}."
            )
        check_integer("solve", "steps", self.steps, 1)
        check_integer("solve", "seed", self.seed, 0)
        check_number("solve", "tolerance", self.tolerance)
        check_flag("solve", "progress", self.progress)


def mixtures(payoff: Tensor, steps: int = 20_000, tolerance: float = 1e-7) -> tuple[Tensor, Tensor]:
    """Return both players' mixtures in matrix games, `[..., m]` and `[..., n]`.

    By restarted mirror prox, which stops where the gap of every game is within the tolerance.

    Args:
        payoff: of the adversary, `[..., m, n]`.
        steps: at most.
        tolerance: of the duality gap.

    Example:
        >>> x, y = mixtures(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
        >>> x.tolist(), y.tolist()
        ([0.5, 0.5], [0.5, 0.5])
    """
    found = solve(MatrixGame(payoff), "restarted", steps, tolerance=tolerance, progress=False)
    assert isinstance(found.learner, Tensor)
    assert isinstance(found.adversary, Tensor)
    return found.learner, found.adversary


def pure_where_no_worse(payoff: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mixtures of a matrix game, or best pure strategies where they guarantee as much.

    Where a gap is left, the mixture found may be worse than a pure strategy.

    Args:
        payoff: of the adversary, `[m, n]`.
        x: of the learner, `[m]`.
        y: of the adversary, `[n]`.
    """
    pays, earns = payoff.amax(1), payoff.amin(0)
    if (x @ payoff).amax() >= pays.amin():
        x = torch.eye(len(pays), dtype=payoff.dtype)[pays.argmin()]
    if (payoff @ y).amin() <= earns.amax():
        y = torch.eye(len(earns), dtype=payoff.dtype)[earns.argmax()]
    return x, y


def _solve(game: Any, method: Method | ParticleMethod, run: _Run) -> Solution:
    if not isinstance(game, (MatrixGame, ContinuousGame)):
        raise TypeError(
            f"game must be a MatrixGame or a ContinuousGame, got {type(game).__name__}: wrap a "
            "matrix of payoffs as MatrixGame(payoff)."
        )
    if isinstance(method, ParticleMethod):
        return _with_particles(game, method, run)
    if isinstance(game, ContinuousGame):
        return _on_grid(game, method, run)
    if run.grid is not None:
        raise ValueError(f"grid={run.grid!r} is for continuous games; this is a MatrixGame.")
    return _finite(game, method, run)


def _finite(game: MatrixGame, method: Method, run: _Run) -> Solution:
    x, y = (_start(game, side, run) for side in (0, 1))
    ledger = Means(game, method)
    players = method.play(x, y, Scene(game.spread[..., None], run.steps))
    recorded, gaps = _play(players, ledger, run, math.ceil(run.steps / RECORDS))
    if not all(weights.isfinite().all() for weights in ledger.output):
        raise FloatingPointError(
            f"{method.name}: step size × payoffs overflow in {game.payoff.dtype}: give a smaller "
            "step_size, or payoffs divided by a constant."
        )
    return _solution(ledger, recorded, gaps)


def _on_grid(game: ContinuousGame, method: Method, run: _Run) -> Solution:
    coarse = {1: 201, 2: 21}.get(max(game.learner.dim, game.adversary.dim))
    size = coarse if run.grid is None else run.grid
    if size is None:
        raise ValueError(
            f"{method.name} plays a continuous game on a grid, which in {game.learner.dim} and "
            f"{game.adversary.dim} dimensions has to be asked for: grid=nodes per dimension, or "
            f"a method that moves particles: {', '.join(PARTICLE_METHODS)}."
        )
    mu, nu = game.grid(size)
    between = MatrixGame(game.payoffs(mu.points, nu.points))
    solved = _finite(between, method, replace(run, start=run.start or (mu.weights, nu.weights)))

    def on_nodes(x: Any, y: Any) -> Pair:
        return Pair(Particles(mu.points, x.log()), Particles(nu.points, y.log()))

    output = on_nodes(solved.learner, solved.adversary)
    return replace(
        solved,
        game=game,
        **output._asdict(),
        average=on_nodes(*solved.average),
        last=on_nodes(*solved.last),
        gap=game.duality_gap(*output, grid=size),
    )


def _with_particles(
    game: MatrixGame | ContinuousGame, method: ParticleMethod, run: _Run
) -> Solution:
    if isinstance(game, MatrixGame):
        raise ValueError(
            f"{method.name} moves points, and the rows and columns of a MatrixGame have none: use "
            f"one of {', '.join(METHODS)}."
        )
    draw = game.generator(run.seed)
    start = run.start or [s.sample(method.particles, draw, game.dtype) for s in game.spaces]
    x, y = (_cloud(game, side, start[side], method.particles) for side in (0, 1))
    ledger = Snapshots(game, method, run.steps, run.grid)
    players = method.play(x, y, game, run.steps, draw)
    recorded, gaps = _play(players, ledger, run, ledger.record_every)
    return _solution(ledger, recorded, gaps, grid=run.grid)


def _solution(
    ledger: Means | Snapshots, recorded: list[int], gaps: list[Tensor], **how: Any
) -> Solution:
    game, output = ledger.game, ledger.output
    return Solution(
        game=game,
        method=ledger.method,
        **output._asdict(),
        average=ledger.average,
        last=ledger.last,
        value=game.value(*output),
        gap=duality_gap(game, *output, **how),
        gaps=torch.stack(gaps),
        steps=recorded,
    )


def _play(
    players: Generator[Profile[Strategy], Reply, None],
    ledger: Ledger[Strategy, Reply],
    run: _Run,
    every: int,
) -> tuple[list[int], list[Tensor]]:
    """Play the steps; return those recorded, each `every` and the last, and the gaps there."""
    recorded, gaps = [], []
    profile = next(players)
    with _bar(range(1, run.steps + 1), ledger.method.name, run.progress) as steps:
        for step in steps:
            while not profile.counts:
                profile = players.send(ledger.answer(profile))
            reply = ledger.answer(profile)
            if step % every == 0 or step == run.steps:
                recorded.append(step)
                gaps.append(ledger.gap())
                if run.tolerance and (gaps[-1] <= run.tolerance).all():
                    break
            if step < run.steps:
                profile = players.send(reply)
    return recorded, gaps


def _bar(steps: range, name: str, wanted: bool) -> AbstractContextManager[Iterable[int]]:
    """Return steps under a progress bar; nothing is shown off a terminal or without tqdm."""
    if not wanted or find_spec("tqdm") is None:
        return nullcontext(steps)
    from tqdm import tqdm

    return tqdm(steps, desc=name, delay=2, disable=None, leave=False)


def _method(method: Any, parameters: dict[str, Any]) -> Method | ParticleMethod:
    if isinstance(method, (Method, ParticleMethod)):
        if parameters:
            raise TypeError(
                f"{', '.join(parameters)} belong to the method: give them to "
                f"{type(method).__name__}(...), or give the method by name."
            )
        return method
    if not isinstance(method, str):
        kind = method.__name__ if isinstance(method, type) else "Hedge"
        raise TypeError(f"method must be a name or an object, such as {kind}(), got {method!r}.")
    return build("method", {**METHODS, **PARTICLE_METHODS}, method, parameters)


def _start(game: MatrixGame, side: int, run: _Run) -> Tensor:
    """Return the log-weights a player starts from, `[..., size]`."""
    shape = (*game.payoff.shape[:-2], game.shape[side])
    if run.start is None:
        even = mirror.uniform(shape[-1], dtype=game.payoff.dtype, device=game.payoff.device)
        return even.expand(shape)
    weights = game.weights(f"start[{side}]", run.start[side], side)
    if tuple(weights.shape) not in (shape, shape[-1:]):
        raise ValueError(
            f"start[{side}] must be weights of shape {list(shape)}, or {list(shape[-1:])} for all "
            f"games, got {list(weights.shape)}."
        )
    return weights.expand(shape).log()


def _cloud(game: ContinuousGame, side: int, points: Any, particles: int) -> Particles:
    cloud, space = game.cloud(f"start[{side}]", points, side), game.spaces[side]
    if len(cloud.points) != particles:
        raise ValueError(
            f"start[{side}] must be points [{particles}, {space.dim}], one row per particle, got "
            f"{list(cloud.points.shape)}."
        )
    return cloud._replace(points=space.project(cloud.points))
