"""Solving a game: a method plays, the game answers, and the strategies played are kept."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mixadv.checks import check_flag, check_integer, check_number
from mixadv.errors import build
from mixadv.games.certificate import check_weights, duality_gap
from mixadv.games.continuous import ContinuousGame, Particles
from mixadv.games.matrix import MatrixGame
from mixadv.games.means import Means
from mixadv.games.method import Method, Scene
from mixadv.games.particles import ParticleMethod
from mixadv.games.registry import METHODS, PARTICLE_METHODS
from mixadv.games.snapshots import Snapshots
from mixadv.games.solution import Pair, Solution
from mixadv.games.spaces import check_points
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
        method: a name, or a method with its parameters. For finite games, and on a grid for
            continuous ones: hedge, anytime_hedge, optimistic_hedge, mirror_prox, magnetic,
            restarted, and the pure best_response. For continuous games: langevin,
            wasserstein_fisher_rao, and the pure gradient_descent_ascent.
        steps: T, at least 1.
        start: what both players start from: weights `[..., m]` and `[..., n]`, for particle methods
            points `[N, d]`. None is the uniform strategy, or draws from the reference measure.
        tolerance: stop at the first recorded gap (all those of a batch) up to this one.
        grid: points per dimension where a continuous game is played or judged on a grid.
        seed: of the particles' start and noise.
        progress: show a bar, on a terminal and after two seconds, where tqdm is installed.
        parameters: of the method, if it is named: `step_size`, `temperature`, ...

    Raises:
        ValueError: if the method does not exist or does not play this game, or a start is no
            strategy.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> from mixadv.games import MatrixGame
        >>> solution = solve(MatrixGame([[3, -1], [-2, 1]]), "optimistic_hedge", steps=1000)
        >>> round(solution.value.item(), 2), float(solution.gap) < 0.02
        (0.14, True)
    """
    if not isinstance(game, (MatrixGame, ContinuousGame)):
        raise TypeError(
            f"game must be a MatrixGame or a ContinuousGame, got {type(game).__name__}: wrap a "
            "matrix of payoffs as MatrixGame(payoff)."
        )
    if start is not None and not (isinstance(start, (tuple, list)) and len(start) == 2):
        raise TypeError(
            f"start must be a pair (learner's, adversary's), got {reprlib.repr(start)}."
        )
    check_integer("solve", "steps", steps, 1)
    check_integer("solve", "seed", seed, 0)
    check_number("solve", "tolerance", tolerance)
    check_flag("solve", "progress", progress)
    chosen = _method(method, parameters)
    with _bar(steps, chosen.name, progress) as advance:
        if isinstance(chosen, ParticleMethod):
            return _with_particles(game, chosen, steps, start, tolerance, grid, seed, advance)
        if isinstance(game, ContinuousGame):
            return _on_grid(game, chosen, steps, start, tolerance, grid, advance)
        if grid is not None:
            raise ValueError(f"grid={grid!r} is for continuous games; this is a MatrixGame.")
        return _finite(game, chosen, steps, start, tolerance, advance)


Advance = Callable[[], object]


def _drive(
    players: Generator[Any, Any, None],
    answer: Callable[[Any], Any],
    ledger: Any,
    steps: int,
    every: int,
    tolerance: float,
    advance: Advance,
) -> tuple[list[int], list[Tensor]]:
    """Play the steps; return the recorded ones and the gaps there."""
    recorded, gaps = [], []
    play = next(players)
    for step in range(1, steps + 1):
        while not play.counts:
            play = players.send(answer(play))
        answered = answer(play)
        ledger.add(play, answered)
        if step % every == 0 or step == steps:
            recorded.append(step)
            gaps.append(ledger.gap())
            if tolerance and (gaps[-1] <= tolerance).all():
                break
        if step < steps:
            play = players.send(answered)
        advance()
    return recorded, gaps


def _finite(
    game: MatrixGame,
    method: Method,
    steps: int,
    start: tuple[Any, Any] | None,
    tolerance: float,
    advance: Advance,
) -> Solution:
    x, y = (_start(game, side, start) for side in (0, 1))

    ledger = Means(game, method)
    players = method.play(x, y, Scene(game.spread[..., None], steps))
    every = math.ceil(steps / RECORDS)
    recorded, gaps = _drive(players, ledger.answer, ledger, steps, every, tolerance, advance)
    outputs = {"average": ledger.average, "last": ledger.last}
    played = ledger.best if method.output == "best" else outputs[method.output]
    if not all(weights.isfinite().all() for weights in played):
        raise FloatingPointError(
            f"{method.name}: step size × payoffs overflow in {game.payoff.dtype}: give a smaller "
            "step_size, or payoffs divided by a constant."
        )
    return Solution(
        game=game,
        method=method,
        learner=played.learner,
        adversary=played.adversary,
        **outputs,
        value=game.value(*played),
        gap=duality_gap(game, *played),
        gaps=torch.stack(gaps),
        steps=recorded,
    )


def _on_grid(
    game: ContinuousGame,
    method: Method,
    steps: int,
    start: tuple[Any, Any] | None,
    tolerance: float,
    grid: int | None,
    advance: Advance,
) -> Solution:
    coarse = {1: 201, 2: 21}.get(max(game.learner.dim, game.adversary.dim))
    size = coarse if grid is None else grid
    if size is None:
        raise ValueError(
            f"{method.name} plays a continuous game on a grid, which in {game.learner.dim} and "
            f"{game.adversary.dim} dimensions has to be asked for: grid=nodes per dimension, or "
            f"a method that moves particles: {', '.join(PARTICLE_METHODS)}."
        )
    mu, nu = game.grid(size)
    solved = _finite(
        MatrixGame(game.payoffs(mu.points, nu.points)),
        method,
        steps,
        start or (mu.weights, nu.weights),
        tolerance,
        advance,
    )

    def on_nodes(pair: Pair) -> Pair:
        return Pair(Particles(mu.points, pair[0].log()), Particles(nu.points, pair[1].log()))

    played = on_nodes(Pair(solved.learner, solved.adversary))
    return replace(
        solved,
        game=game,
        learner=played.learner,
        adversary=played.adversary,
        average=on_nodes(solved.average),
        last=on_nodes(solved.last),
        gap=game.duality_gap(*played, grid=size),
    )


def _with_particles(
    game: MatrixGame | ContinuousGame,
    method: ParticleMethod,
    steps: int,
    start: tuple[Any, Any] | None,
    tolerance: float,
    grid: int | None,
    seed: int,
    advance: Advance,
) -> Solution:
    if isinstance(game, MatrixGame):
        raise ValueError(
            f"{method.name} moves points, and the rows and columns of a MatrixGame have none: use "
            f"one of {', '.join(METHODS)}."
        )
    draw = game.generator(seed)
    spaces = (game.learner, game.adversary)
    begun = start or [s.sample(method.particles, draw, game.dtype) for s in spaces]
    x, y = (_cloud(game, i, begun[i], method.particles) for i in (0, 1))
    ledger = Snapshots(game, method, steps, grid)
    players = method.play(x, y, game, steps, draw)

    def answer(play: Any) -> Any:
        return game.slopes(play.x, play.y)

    recorded, gaps = _drive(players, answer, ledger, steps, ledger.record_every, tolerance, advance)
    average, last = Pair(*ledger.average), Pair(ledger.last.x, ledger.last.y)
    played = average if method.output == "average" else last
    return Solution(
        game=game,
        method=method,
        learner=played.learner,
        adversary=played.adversary,
        average=average,
        last=last,
        value=game.value(*played),
        gap=game.duality_gap(*played, grid=grid),
        gaps=torch.stack(gaps),
        steps=recorded,
    )


def _method(method: Any, parameters: dict[str, Any]) -> Method | ParticleMethod:
    if isinstance(method, (Method, ParticleMethod)):
        if parameters:
            raise TypeError(
                f"{', '.join(parameters)} belong to the method: give them to "
                f"{type(method).__name__}(...), or give the method by name."
            )
        return method
    if isinstance(method, type):
        raise TypeError(f"method must be a name or an object, such as {method.__name__}().")
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or an object, such as Hedge(), got {method!r}.")
    return build("method", {**METHODS, **PARTICLE_METHODS}, method, parameters)


def _start(game: MatrixGame, side: int, start: tuple[Any, Any] | None) -> Tensor:
    """Return the log-weights a player starts from, `[..., size]`."""
    shape = (*game.payoff.shape[:-2], game.shape[side])
    if start is None:
        even = mirror.uniform(shape[-1], dtype=game.payoff.dtype, device=game.payoff.device)
        return even.expand(shape)
    weights = check_weights(f"start[{side}]", start[side], game, side)
    if tuple(weights.shape) not in (shape, shape[-1:]):
        raise ValueError(
            f"start[{side}] must be weights of shape {list(shape)}, or {list(shape[-1:])} for all "
            f"games, got {list(weights.shape)}."
        )
    return weights.expand(shape).log()


def _cloud(game: ContinuousGame, side: int, points: Any, particles: int) -> Particles:
    cloud, space = game.particles(points), (game.learner, game.adversary)[side]
    if len(cloud.points) != particles:
        raise ValueError(
            f"start[{side}] must be points [{particles}, {space.dim}], one row per particle, got "
            f"{list(cloud.points.shape)}."
        )
    check_points(f"start[{side}]", cloud.points, space)
    return cloud._replace(points=space.project(cloud.points))


@contextmanager
def _bar(steps: int, name: str, wanted: bool) -> Iterator[Advance]:
    """Yield what advances a progress bar; nothing is shown off a terminal or without tqdm."""
    if not wanted or find_spec("tqdm") is None:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, delay=2, disable=None, leave=False) as bar:
        yield bar.update
