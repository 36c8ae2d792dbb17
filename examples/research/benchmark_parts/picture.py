"""The picture of `benchmark.py`: what a round costs against what its δ reaches.

Colours (of Okabe and Ito) tell this library from other code; the line joins the rows that nothing
beats at once in cost and in what is reached. Triangles reach less than they are drawn at.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from benchmark_parts.contenders import CONTENDERS, ours
from benchmark_parts.results import Result, grouped, ratio

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

TEXT, OURS, PEER, FRONT = "#404040", "#0072B2", "#D55E00", "#B0B0B0"
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
COLUMNS = 2
DEPTH = 2.5
"""How far below the highest points are drawn at their height."""
ORDERS = 40
OFFSETS = [  # of a label's centre from its point, in pixels: near ones first
    (1.8 * far * math.cos(math.radians(turn)), far * math.sin(math.radians(turn)))
    for far in range(14, 200, 6)
    for turn in range(90, 450, 20)
]


class Point(NamedTuple):
    """A row of the picture."""

    name: str
    cost: float
    reached: float

    @property
    def colour(self) -> str:
        """That of this library, or of others."""
        contender = CONTENDERS.get(self.name)
        return OURS if contender is None or contender.enter is ours else PEER


def points(group: Iterable[Result]) -> list[Point]:
    """Return the usual rows that reach anything, by cost in units of an ordinary step."""
    usual = [r for r in group if r["row"] not in CONTENDERS or not CONTENDERS[r["row"]].extra]
    costs = [(r, ratio(r["seconds"], r["units"]["S"]).median) for r in usual]
    rows = [Point(r["row"], cost, r["payoff"]) for r, cost in costs if r["payoff"] > 0]
    return sorted(rows, key=lambda p: p.cost)


def front(rows: Iterable[Point]) -> list[Point]:
    """Return the rows that no row beats at once in cost and in what is reached, by cost."""
    best: list[Point] = []
    for row in sorted(rows, key=lambda p: (p.cost, -p.reached)):
        if not best or row.reached > best[-1].reached:
            best.append(row)
    return best


def draw(results: Iterable[Result], path: Path) -> None:
    """Save the picture, a panel for each setting but those of few rows."""
    groups = {where: points(group) for where, group in grouped(results).items()}
    most = max(map(len, groups.values()), default=0)
    groups = {where: rows for where, rows in groups.items() if rows and 2 * len(rows) > most}
    columns = min(COLUMNS, len(groups))
    lines = math.ceil(len(groups) / max(columns, 1))
    if not groups:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines, columns, figsize=(6.2 * columns, 5 * lines), squeeze=False, dpi=150
        )
        for place in axes.flat[len(groups) :]:
            place.set_axis_off()
        for place, (where, rows) in zip(axes.flat, groups.items(), strict=False):
            panel(place, str(where), rows)
        figure.tight_layout(pad=1.5)
        for place, rows in zip(axes.flat, groups.values(), strict=False):
            label(place, rows)
        figure.canvas.draw()
        pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        pixels.quantize(128).save(path, optimize=True)  # a third of the bytes
        plt.close(figure)


def panel(axes: Any, title: str, rows: list[Point]) -> None:
    """Draw the points of a setting and the line of those that nothing beats."""
    lowest = bottom(rows)
    best = front(rows)
    axes.plot(
        [p.cost for p in best],
        [max(p.reached, lowest) for p in best],
        color=FRONT,
        drawstyle="steps-post",
        linewidth=1,
        zorder=1,
    )
    for p in rows:
        marker = "o" if p.reached >= lowest else "v"
        axes.scatter(p.cost, max(p.reached, lowest), s=16, color=p.colour, marker=marker)
    highest = max(p.reached for p in rows)
    axes.set_ylim(lowest - 0.1 * highest, 1.15 * highest)  # room for names
    axes.set_xlim(0, 1.12 * max(p.cost for p in rows))
    axes.set_title(title, loc="left", fontsize=9, weight="bold")
    axes.set(xlabel="cost of a round, in plain steps", ylabel="symmetric KL reached, nats")


def bottom(rows: list[Point]) -> float:
    """Return what the lowest points drawn reach; those that reach less are drawn as triangles."""
    return max(p.reached for p in rows) / DEPTH


# Labels ------------------------------------------------------------------------------------------


Pair = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def label(axes: Any, rows: list[Point]) -> None:
    """Write each name where it covers no point and no other name, with a line to its point."""
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer).padded(-2).extents
    heights = [max(p.reached, bottom(rows)) for p in rows]
    costs = [p.cost for p in rows]
    dots = [tuple(axes.transData.transform(pair)) for pair in zip(costs, heights, strict=True)]
    texts = [
        axes.text(0, 0, p.name, color=p.colour, fontsize=7, ha="center", va="center") for p in rows
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = [(e.width + 4, e.height + 4) for e in extents]
    to_data = axes.transData.inverted().transform
    for text, dot, box in zip(texts, dots, arranged(dots, sizes, inside), strict=True):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.3})
        text.set_position(to_data(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
        line = to_data([dot, nearest(dot, box)])
        axes.plot(*line.T, color=text.get_color(), linewidth=0.5, alpha=0.6, zorder=1)


def arranged(dots: list[Pair], sizes: list[Pair], inside: Box) -> list[Box]:
    """Return the boxes of labels: of several orders of placing them, that with the nearest."""
    orders = np.random.default_rng(0)
    best, least = [], math.inf
    for _ in range(ORDERS):
        boxes: dict[int, Box] = {}
        for number in orders.permutation(len(dots)):
            taken = np.array([*[square(dot) for dot in dots], *boxes.values()])
            boxes[number] = placed(number, dots, sizes[number], inside, taken)
        far = sum(math.dist(dots[n], nearest(dots[n], box)) ** 2 for n, box in boxes.items())
        if far < least:
            best, least = [boxes[n] for n in range(len(dots))], far
    return best


def placed(number: int, dots: list[Pair], size: Pair, inside: Box, taken: np.ndarray) -> Box:
    """Return the first box near a point that covers nothing, nor does the line to it, if it can.

    Args:
        number: of the point.
        dots: all points, in pixels.
        size: of the label.
        inside: where it may lie.
        taken: boxes, `[n, 4]`, first those of the points.
    """
    (x, y), (width, height) = dots[number], size
    own = square(dots[number])
    others = taken[[not covers(own, each[None]) for each in taken]]
    found = own
    for right, up in OFFSETS:
        left, low = x + right - width / 2, y + up - height / 2
        box = (left, low, left + width, low + height)
        within = inside[0] < left and inside[1] < low
        if not within or box[2] > inside[2] or box[3] > inside[3] or covers(box, taken):
            continue
        line = np.linspace(dots[number], nearest(dots[number], box), 12)
        if not any(covers((*point, *point), others) for point in line):
            return box
        found = box if found is own else found
    return found


def nearest(dot: Pair, box: Box) -> Pair:
    """Return the point of a box that is nearest to a point."""
    return min(max(dot[0], box[0]), box[2]), min(max(dot[1], box[1]), box[3])


def covers(box: Box, taken: np.ndarray) -> bool:
    """Return whether a box and any of the others, `[n, 4]`, overlap."""
    apart = (box[2] < taken[:, 0]) | (box[0] > taken[:, 2])
    return not (apart | (box[3] < taken[:, 1]) | (box[1] > taken[:, 3])).all()


def square(dot: Pair) -> Box:
    """Return the box of a point."""
    return dot[0] - 5, dot[1] - 5, dot[0] + 5, dot[1] + 5
