"""What the players of a continuous game could win by deviating: on a grid, or found by climbing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixadv.checks import check_integer
from mixadv.games.certificate import Gap
from mixadv.games.matrix import gap
from mixadv.games.spaces import REACH
from mixadv.maths.geometry import unit

if TYPE_CHECKING:
    from mixadv.games.continuous import ContinuousGame, Particles

NODES = {1: 1001, 2: 65}
"""Nodes per dimension of the grid a gap is judged on, where none is given."""


def grid_size(game: ContinuousGame, grid: int | None) -> int | None:
    """Return the nodes per dimension to judge a gap on; None where there is no grid."""
    return NODES.get(max(game.learner.dim, game.adversary.dim)) if grid is None else grid


def on_grid(game: ContinuousGame, mu: Particles, nu: Particles, size: int) -> Gap:
    """Return the gap over all points of a grid.

    Its error is what the slopes at the nodes leave room for between them: a grid that is too coarse
    to show the payoff's oscillations does not show its slopes either, so there give `lipschitz`.
    """
    xs, ys = (side.points for side in game.grid(size))
    losses, gains = game.losses(xs, nu), game.gains(ys, mu)
    for who, nodes, payoffs in (("x", xs, losses), ("y", ys, gains)):
        bad = (~payoffs.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"payoff must be finite on the sets: its mean at {who}={nodes[i].tolist()} is "
                f"{payoffs[i].item()}. Without a bound there is no value."
            )
    value = gap(losses, gains)
    how = f"a grid of {len(xs)} and {len(ys)} points"
    if not (game.learner.bounded and game.adversary.bounded):
        how += f" within {REACH:g} standard deviations"
        return Gap(value, "lower bound", math.nan, how)
    error = _slope(game, xs, nu, 0) * game.learner.covering(size)
    error += _slope(game, ys, mu, 1) * game.adversary.covering(size)
    return Gap(value, "grid", error, how)


def by_climbing(
    game: ContinuousGame, mu: Particles, nu: Particles, restarts: int, steps: int, seed: int
) -> Gap:
    """Return the gap over the deviations that projected gradient climbs find, a lower bound."""
    check_integer("duality_gap", "restarts", restarts, 1)
    check_integer("duality_gap", "steps", steps, 0)
    check_integer("duality_gap", "seed", seed, 0)
    draw = game.generator(seed)
    earned = _best(game, mu, 1, restarts, steps, draw)
    paid = -_best(game, nu, 0, restarts, steps, draw)
    how = f"projected gradient, {restarts} restarts × {steps} steps"
    return Gap((earned - paid).clamp(min=0), "lower bound", math.nan, how)


def _slope(game: ContinuousGame, nodes: Tensor, other: Particles, side: int) -> float:
    if game.lipschitz is not None:
        return game.lipschitz
    return game.climb(other, side)(nodes)[0].norm(dim=1).max().item()


def _best(
    game: ContinuousGame,
    other: Particles,
    side: int,
    restarts: int,
    steps: int,
    draw: torch.Generator,
) -> Tensor:
    """Return the most (learner: minus the least) that climbs from random starts reach."""
    space, sign = (game.adversary, 1) if side else (game.learner, -1)
    climb = game.climb(other, side)
    x, found = space.sample(restarts, draw, game.dtype), []
    for step in range(steps + 1):
        uphill, reached = climb(x)
        found.append((sign * reached).max())
        length = space.diameter / 2 * (1 - step / (steps + 1))
        x = space.project(x + sign * length * unit(uphill))
    return torch.stack(found).max()
