"""mixadv, nashpy, open_spiel and HiGHS behind one interface: what solves zero-sum games.

A solver takes payoffs, of which the row player pays, and yields pairs of strategies: a second
attempt where the first misses the gap that is aimed at. Libraries are imported where they are used,
so that each may be missing.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import linprog

from mixadv.games import MatrixGame, solve

Array = np.ndarray
Attempts = Iterator[tuple[Array, Array]]


def relative_gap(payoff: Array, x: Array, y: Array) -> float:
    """Return the largest duality gap of a game or a batch, in units of the range of its payoffs."""
    x, y = (np.clip(w, 0, None) / np.clip(w, 0, None).sum(-1, keepdims=True) for w in (x, y))
    gains = np.einsum("...mn,...m->...n", payoff, x)
    losses = np.einsum("...mn,...n->...m", payoff, y)
    gap = gains.max(-1) - losses.min(-1)
    return float((gap / np.ptp(payoff, axis=(-2, -1))).max())


def ours(method: str, aim: float, payoff: Array) -> Attempts:
    """Solve by mixadv, a batch at once, in at most the steps that the method's bound asks for."""
    rows, columns = payoff.shape[-2:]
    size = math.log(rows) + math.log(columns)
    roots = math.sqrt(math.log(rows) / 2) + math.sqrt(math.log(columns) / 2)
    needed = {"hedge": (roots / aim) ** 2, "optimistic_hedge": size / aim}
    needed |= {"mirror_prox": size / (2 * aim), "restarted": 200_000}
    game = MatrixGame(torch.from_numpy(payoff))
    solution = solve(game, method, math.ceil(needed[method]), tolerance=aim, progress=False)
    yield solution.learner.numpy(), solution.adversary.numpy()


def highs(method: str, payoff: Array) -> Attempts:
    """Solve the learner's linear program; the adversary's strategy are its multipliers."""
    rows, columns = payoff.shape
    found = linprog(
        c=[0.0] * rows + [1.0],
        A_ub=np.hstack([payoff.T, -np.ones((columns, 1))]),
        b_ub=np.zeros(columns),
        A_eq=[[1.0] * rows + [0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * rows + [(None, None)],
        method=method,
    )
    yield found.x[:-1], -found.ineqlin.marginals


def nashpy(method: str, payoff: Array) -> Attempts:
    """Solve by nashpy; the first equilibrium counts where it lists several."""
    from nashpy import Game

    game = Game(-payoff, payoff)
    if method == "linear_program":
        yield game.linear_program()
    elif method == "lemke_howson":
        yield game.lemke_howson(initial_dropped_label=0)
    else:
        yield from itertools.islice(getattr(game, method)(), 1)


def fictitious_play(aim: float, payoff: Array) -> Attempts:
    """Play by nashpy, and look at the gap every hundred steps."""
    from nashpy import Game

    np.random.seed(0)
    counts = Game(-payoff, payoff).fictitious_play(iterations=sys.maxsize)
    for x, y in itertools.islice(counts, 100, None, 100):
        if relative_gap(payoff, x, y) <= aim:
            yield x, y
            return


def regret_matching(payoff: Array) -> Attempts:
    """Play by open_spiel, whose number of steps is fixed: twice as many in each attempt."""
    from open_spiel.python.algorithms.regret_matching import regret_matching

    for power in itertools.count():
        x, y = regret_matching([-payoff, payoff], iterations=1000 * 2**power)
        yield x, y


def open_spiel(payoff: Array) -> Attempts:
    """Solve by the linear programs of open_spiel, one for each player."""
    import pyspiel
    from open_spiel.python.algorithms.lp_solver import solve_zero_sum_matrix_game

    game = pyspiel.create_matrix_game((-payoff).tolist(), payoff.tolist())
    x, y, _, _ = solve_zero_sum_matrix_game(game)
    yield x, y


@dataclass(frozen=True)
class Contender:
    """A solver and the gap, in units of the range, at which it may stop; None if it cannot."""

    name: str
    solve: Callable[[Array], Attempts]
    aim: float | None = None
    needs: tuple[str, ...] = ()
    batches: bool = False


def _contenders() -> Iterator[Contender]:
    aims = [("hedge", 1e-2), ("optimistic_hedge", 1e-3), ("mirror_prox", 1e-2)]
    aims += [("mirror_prox", 1e-3), ("restarted", 1e-3), ("restarted", 1e-8)]
    for method, aim in aims:
        yield Contender(f"mixadv {method}", partial(ours, method, aim), aim, batches=True)
    yield Contender("HiGHS simplex", partial(highs, "highs-ds"))
    yield Contender("HiGHS interior point", partial(highs, "highs-ipm"))
    for method in ("linear_program", "lemke_howson", "vertex_enumeration", "support_enumeration"):
        yield Contender(f"nashpy {method}", partial(nashpy, method), needs=("nashpy",))
    playing = partial(fictitious_play, 1e-2)
    yield Contender("nashpy fictitious_play", playing, 1e-2, needs=("nashpy",))
    yield Contender("open_spiel lp_solver", open_spiel, needs=("pyspiel", "cvxpy", "ecos"))
    yield Contender("open_spiel regret_matching", regret_matching, 1e-2, needs=("pyspiel",))


CONTENDERS = list(_contenders())
