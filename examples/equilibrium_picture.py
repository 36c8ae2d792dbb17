"""The picture of `equilibrium.py`: what pure play does, what mixed play does, how well it does it.

Colours are methods (of Okabe and Ito, which colour-blind readers tell apart), shades are players.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch

from mixadv.games import BestResponseDynamics, Hedge, Method, WassersteinFisherRao
from mixadv.games.method import Answer, Scene
from mixadv.games.particles import Clouds

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection
from PIL import Image

if TYPE_CHECKING:
    from equilibrium import Known, Solved

TEXT, PURE, HEDGE, MOVED = "#404040", "#666666", "#0072B2", "#D55E00"
PALE = {PURE: "#B0B0B0", HEDGE: "#9CCBE8", MOVED: "#F0A878"}
LINES = {
    "best_response_dynamics": PURE,
    "hedge": HEDGE,
    "mirror_prox": "#009E73",
    "restarted": "#AA4488",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7,
    "lines.solid_capstyle": "butt",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
FLOOR = 1e-4  # of the gaps drawn


def draw(rows: list[Solved], path: Path) -> None:
    """Save the picture of rock–paper–scissors and Parrilo's game, the first two of the table."""
    finite, line = ([r for r in rows if r.name == name] for name in _first(rows, 2))
    clouds = particles(line[0].known, line[0].solution.steps[-1])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(9.6, 6))
        figure.subplots_adjust(0.035, 0.075, 0.9, 0.865, wspace=0.58, hspace=0.36)
        pure_corners(axes[0, 0], finite[0].known)
        mixed_weights(axes[0, 1], finite[0].known)
        pure_points(axes[1, 0], line[0].known)
        mixed_points(axes[1, 1], clouds[:301])
        gaps(axes[0, 2], [row for row in finite if row.method in LINES])
        gaps(axes[1, 2], [row for row in line if row.method in list(LINES)[:3]])
        gaps_of_particles(axes[1, 2], line[0].known, clouds)
        titles = ("Pure play cycles", "Mixed play converges", "The gap obeys its bound")
        for place, title in zip(axes[0], titles, strict=True):
            figure.text(place.get_position().x0, 0.955, title, size=12, weight="bold")
        for place, game in zip(
            axes[:, 0],
            ("rock, paper, scissors", "y minimises, x maximises 5xy − 2x² − 2xy² − y on [−1, 1]²"),
            strict=True,
        ):
            box = place.get_position()
            figure.text(box.x0, box.y1 + 0.025, game, style="italic")
        figure.set_dpi(200)
        figure.canvas.draw()
        pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        pixels.quantize(128).save(path, optimize=True)  # a third of the bytes
        plt.close(figure)


def _first(rows: list[Solved], count: int) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))[:count]


# What is played ----------------------------------------------------------------------------------


def played(players: Generator[Any, Any, None], answer: Callable[[Any], Any], steps: int) -> list:
    """Return what both players play before and after each step."""
    plays = [next(players)]
    for _ in range(steps):
        plays.append(players.send(answer(plays[-1])))
    return plays


def weights(known: Known, method: Method, steps: int) -> np.ndarray:
    """Return the weights of both players, `[2, steps + 1, actions]`."""
    game, (x, y) = known.finite, (weights.log() for weights in known.start)
    plays = played(
        method.play(x, y, Scene(game.spread[None], steps)),
        lambda play: Answer(game.losses(play.y.exp()), game.gains(play.x.exp())),
        steps,
    )
    return np.array([[play[side].exp().numpy() for play in plays] for side in (0, 1)])


def particles(known: Known, steps: int, many: int = 48) -> list[Clouds]:
    """Return the particles of both players, evenly spaced at first."""
    game = known.game
    start = game.particles(torch.linspace(-1, 1, many, dtype=torch.float64)[:, None])
    method = WassersteinFisherRao(step_size=0.01, mirror_step=0.05)
    players = method.play(start, start, game, steps, game.generator(0))
    return played(players, lambda play: game.slopes(play.x, play.y), steps)


# Panels ------------------------------------------------------------------------------------------


def triangle(axes: Any) -> None:
    """Draw the simplex of three actions, with the equilibrium as a ring."""
    axes.fill(*CORNERS.T, facecolor="#F6F6F6", edgecolor="#999999", linewidth=0.7)
    axes.text(*CORNERS[0] - (0, 0.05), "rock", ha="center", va="top")
    axes.text(*CORNERS[1] - (0, 0.05), "paper", ha="center", va="top")
    axes.text(*CORNERS[2] + (0, 0.03), "scissors", ha="center")
    axes.plot(*CORNERS.mean(0), "o", ms=10, mfc="none", mec=TEXT, mew=1, zorder=4)
    axes.set(aspect="equal", xlim=(-0.06, 1.06), ylim=(-0.12, 0.95))
    axes.axis("off")


def pure_corners(axes: Any, known: Known) -> None:
    """Draw best responses, from corner to corner."""
    triangle(axes)
    path = weights(known, BestResponseDynamics(), 6)[0] @ CORNERS
    axes.plot(*path[0], "o", color=PURE, ms=4)
    axes.annotate("start", path[0], (5, -3), textcoords="offset points", color=PURE, va="top")
    style = {"arrowstyle": "-|>", "color": PURE, "lw": 1.5, "shrinkA": 4, "shrinkB": 4}
    for begin, end in itertools.pairwise(path):
        if not np.allclose(begin, end):
            arrow = style | {"connectionstyle": "arc3,rad=-0.13"}
            axes.annotate("", end, begin, arrowprops=arrow)


def mixed_weights(axes: Any, known: Known) -> None:
    """Draw what Hedge plays, which leaves the centre, and its average, which goes there."""
    triangle(axes)
    one = known._replace(start=known.start[:1] * 2)  # so that both players' paths are one
    play = weights(one, Hedge(step_size=0.15), 600)[0] @ CORNERS
    mean = play.cumsum(0) / np.arange(1, len(play) + 1)[:, None]
    axes.plot(*play.T, color=PALE[HEDGE], lw=0.9)
    axes.plot(*mean.T, color=HEDGE, lw=1.8)
    line = {"arrowstyle": "-", "color": HEDGE, "lw": 0.6, "shrinkA": 2, "shrinkB": 0}
    style = {"color": HEDGE, "va": "center", "arrowprops": line}
    axes.annotate("play", play[-1], (0.72, 0.75), **style)
    axes.annotate("average", mean[mean[:, 0].argmax()], (0.83, 0.5), **style)


def pure_points(axes: Any, known: Known) -> None:
    """Draw best responses on an interval, step by step."""
    path = weights(known, BestResponseDynamics(), 15)[:, 2:].argmax(-1)
    for side, colour, name in ((1, PALE[PURE], "x"), (0, PURE, "y")):
        points = known.game.grid(known.grid)[side].points[:, 0].numpy()[path[side]]
        axes.step(range(len(points)), points, where="post", color=colour, lw=1.8)
        axes.text(len(points) - 0.5, points[-1], name, color=PURE, va="center")
    axes.set(xlabel="step", ylim=(-1.08, 1.08), yticks=(-1, 0, 1))


def mixed_points(axes: Any, clouds: list[Clouds]) -> None:
    """Draw particles that move and change weight."""
    for side, colour in ((1, PALE[MOVED]), (0, MOVED)):
        points = np.array([cloud[side].points[:, 0].numpy() for cloud in clouds])
        mass = np.array([cloud[side].weights.numpy() for cloud in clouds])
        time = np.broadcast_to(np.arange(len(clouds))[:, None], points.shape)
        corners = np.stack([time, points], -1)
        segments = np.stack([corners[:-1], corners[1:]], 2).reshape(-1, 2, 2)
        thick = (mass.shape[1] * mass[1:]).clip(0, 3).ravel()
        axes.add_collection(LineCollection(segments, linewidths=thick, colors=colour))
    above = 100 * mass[-1][points[-1] > 0].sum()
    middle = clouds[-1].y.mean.item()
    for height, text in (
        (1, f"y = 1\n{above:.0f} %"),
        (middle, f"x = {middle:.1f}"),
        (-1, f"y = −1\n{100 - above:.0f} %"),
    ):
        axes.text(1.02 * len(clouds), height, text, color=MOVED, va="center")
    axes.set(xlabel="step", xlim=(0, len(clouds) - 1), ylim=(-1.08, 1.08), yticks=(-1, 0, 1))


def gaps(axes: Any, rows: list[Solved]) -> None:
    """Draw gaps against steps, and bounds dashed."""
    for row in rows:
        steps, found, colour = row.solution.steps, row.solution.gaps.numpy(), LINES[row.method]
        thick = 1.0 if row.method == "best_response_dynamics" else 1.8  # it jumps up and down
        axes.loglog(steps, found, color=colour, lw=thick)
        label(axes, steps, found, row.method, colour)
        if row.bound:
            axes.loglog(steps, row.bound(np.array(steps)), "--", color=colour, lw=1)
    axes.set(xlabel="step", xlim=(1, rows[0].solution.steps[-1]), ylim=(FLOOR, None))
    axes.set_title("duality gap", loc="left", size=9)
    axes.text(12, 2 * rows[0].bound(12), "bound", color=HEDGE)


def gaps_of_particles(axes: Any, known: Known, clouds: list[Clouds]) -> None:
    """Draw the gaps of the particles at each step."""
    steps = np.unique(np.geomspace(1, len(clouds) - 1, 100).astype(int))
    found = [float(known.game.duality_gap(clouds[s].x, clouds[s].y, grid=201)) for s in steps]
    axes.loglog(steps, found, color=MOVED, lw=1.8)
    label(axes, steps, np.array(found), "particles", MOVED)


def label(axes: Any, steps: Any, found: np.ndarray, name: str, colour: str) -> None:
    """Write a name where a line ends, or where it leaves the picture."""
    end = np.argmax(found < FLOOR) or len(found) - 1
    up = max(found[end], 1.5 * FLOOR)
    axes.text(1.2 * steps[end], up, name.replace("_", "\n"), color=colour, va="center")
