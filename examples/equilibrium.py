"""Three games with known answers, solved by every method that plays them.

Prints one table (value and duality gap against the proved bound and the exact value) and saves a
picture of what the methods do. Half a minute on one core.

    python examples/equilibrium.py [--quick] [--output runs/equilibrium]
"""

import argparse
from pathlib import Path


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="30 steps instead of 1000")
    parser.add_argument("--output", type=Path, default=Path("runs/equilibrium"), metavar="FOLDER")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import equilibrium_picture
from common.tables import markdown
from mixadv.games import (
    METHODS,
    PARTICLE_METHODS,
    Box,
    ContinuousGame,
    MatrixGame,
    Solution,
    Torus,
    solve,
)
from theory import bounds

PARTICLES = 64

Bound = Callable[[Any], Any]
"""From steps to a bound on the gap after them."""


class Known(NamedTuple):
    """A game, where play starts, and what the game is worth.

    Attributes:
        game: finite or continuous.
        value: of the game, exactly.
        finite: the game itself, or that of a continuous game on a grid.
        start: both players' weights in it.
        grid: nodes of the grid.
        points: where particles start, `[PARTICLES, 1]` each; None draws them uniformly.
    """

    game: MatrixGame | ContinuousGame
    value: float
    finite: MatrixGame
    start: tuple[Tensor, Tensor]
    grid: int | None = None
    points: tuple[Tensor, Tensor] | None = None


class Solved(NamedTuple):
    """A row of the table; `bound` is None where nothing is proved."""

    name: str
    method: str
    known: Known
    solution: Solution
    bound: Bound | None
    seconds: float


def rock_paper_scissors() -> Known:
    """Return the game, played from a start that is not its equilibrium (1/3, 1/3, 1/3)."""
    game = MatrixGame([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return Known(game, 0.0, game, (start, start.roll(1)))


def parrilo() -> Known:
    """Return a polynomial game (Parrilo 2006), whose x maximises and is our adversary.

    At equilibrium it plays 0.2, and y is 1 with probability 0.78, else −1.
    """

    def payoff(y: Tensor, x: Tensor) -> Tensor:
        return 5 * x * y - 2 * x**2 - 2 * x * y**2 - y

    game = ContinuousGame(payoff, Box(-1, 1), Box(-1, 1))
    xs, ys = game.grid(101)
    start = (xs.weights, ys.weights)
    return Known(game, -0.48, MatrixGame(game.payoffs(xs.points, ys.points)), start, 101)


def circle() -> Known:
    """Return the game of two points on a circle, of which one flees and one follows.

    Both play uniformly at equilibrium, so they start elsewhere: around 0 and around 1/4.
    """
    turn = 2 * math.pi
    game = ContinuousGame(lambda x, y: torch.cos(turn * (x - y)), Torus(1), Torus(1))
    xs, ys = game.grid(64)
    start = tuple(
        (2 * torch.cos(turn * (nodes.points[:, 0] - centre))).softmax(0)
        for nodes, centre in ((xs, 0.0), (ys, 0.25))
    )
    arc = torch.linspace(-0.125, 0.125, PARTICLES, dtype=torch.float64)[:, None]
    finite = MatrixGame(game.payoffs(xs.points, ys.points))
    return Known(game, 0.0, finite, start, 64, (arc, arc + 0.25))  # pyright: ignore


GAMES = {
    "rock–paper–scissors": rock_paper_scissors,
    "Parrilo's polynomial": parrilo,
    "circle, cos 2π(x−y)": circle,
}


def proved(known: Known, steps: int) -> dict[str, tuple[dict[str, Any], Bound]]:
    """Return the parameters that are best for a bound, and the bound, of methods that have one.

    The bounds are for uniform starts, where an equilibrium has a KL of at most the logarithm of the
    number of actions. From others it is at most −log of the least weight, as if there were 1/that
    many actions.
    """
    r = known.finite.spread.item()
    m, n = (1 / weights.min().item() for weights in known.start)
    pair, first = bounds.hedge_steps(r, m, n, steps), bounds.hedge_steps(r, m, n, 1)
    tau = float(bounds.magnetic_temperature(r, m, n, steps))
    eta = bounds.magnetic_step(r, tau)
    return {
        "hedge": ({"step_size": pair}, lambda t: bounds.hedge(r, m, n, t, pair)),
        "anytime_hedge": ({"step_size": first}, lambda t: bounds.anytime_hedge(r, m, n, t)),
        "optimistic_hedge": ({}, lambda t: bounds.optimistic_hedge(r, m, n, t, 1 / r)),
        "mirror_prox": ({}, lambda t: bounds.mirror_prox(m, n, t, 2 / r)),
        "magnetic": ({"temperature": tau}, lambda t: bounds.magnetic(r, m, n, t, tau, eta)),
    }


def solved(name: str, steps: int) -> Iterator[Solved]:
    """Solve a game by each method in turn."""
    known = GAMES[name]()
    with_bound = proved(known, steps)
    solve(known.game, steps=1, grid=known.grid, progress=False)  # what torch loads is not timed
    on_line = [] if isinstance(known.game, MatrixGame) else list(PARTICLE_METHODS)
    for method in [*METHODS, *on_line]:
        parameters, bound = with_bound.get(method, ({}, None))
        start, grid = known.start, known.grid
        if method in PARTICLE_METHODS:
            many = 1 if method == "gradient_descent_ascent" else PARTICLES
            start = known.points and tuple(points[:many] for points in known.points)
            parameters, grid = {"particles": many}, 201
        begun = time.perf_counter()
        solution = solve(
            known.game, method, steps, start=start, grid=grid, progress=False, **parameters
        )
        yield Solved(name, method, known, solution, bound, time.perf_counter() - begun)


def table(rows: list[Solved]) -> str:
    """Return a Markdown table."""
    head = ["game", "method", "value", "exact value", "gap", "bound", "seconds"]
    lines = []
    for row in rows:
        gap = row.solution.gap
        error = f" + {gap.error:.1g}" if gap.error else ""
        bound = f"{row.bound(row.solution.steps[-1]):.2g}" if row.bound else "–"
        value = f"{row.solution.value.item():.3f}".replace("-0.000", "0.000")
        found = f"{gap.value.item():.2g}{error} ({gap.kind})"
        seconds = f"{row.seconds:.1f}"
        lines.append([row.name, row.method, value, f"{row.known.value:g}", found, bound, seconds])
    return markdown(head, lines)


def main(argv: list[str] | None = None) -> list[Solved]:
    """Run the command line; return the rows of the table."""
    options = arguments(argv)
    rows = []
    total = len(GAMES) * len(METHODS) + (len(GAMES) - 1) * len(PARTICLE_METHODS)
    with tqdm(total=total, disable=None, leave=False) as bar:
        for name in GAMES:
            for row in solved(name, 30 if options.quick else 1000):
                rows.append(row)
                bar.set_description(f"{row.name}, {row.method}")
                bar.update()
    print(table(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "equilibrium.md").write_text(table(rows) + "\n")
    picture = options.output / "equilibrium.png"
    equilibrium_picture.draw(rows, picture)
    print(f"\npicture: {picture}")
    return rows


if __name__ == "__main__":
    main()
