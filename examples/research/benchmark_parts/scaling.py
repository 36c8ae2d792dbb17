"""How the cost of a round grows with the model, the batch, the length, the steps, the particles.

Each series is fitted by `seconds ∝ x^exponent`, least squares on logarithms: below 1 something that
does not grow still weighs, above 1 something grows faster than the amount.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

import mixadv
from benchmark_parts.contenders import mat, ours, smart
from benchmark_parts.measure import timed
from benchmark_parts.work import Part, Setting, Work, encoder
from common.tables import markdown

BATCH, LENGTH, WIDTH, LAYERS = 8, 32, 256, 4
WORDS, HEAD_WIDTH = 1000, 32
VALUES = {
    "parameters": (64, 128, 256, 512),
    "batch": (2, 4, 8, 16),
    "length": (16, 32, 64, 128),
    "steps": (1, 2, 4, 8),
    "particles": (1, 2, 4, 8),
}
ROUTES = ("loop", "vmap", "stack")


class Series(NamedTuple):
    """Seconds of a round along an axis.

    Attributes:
        what: is played.
        axis: what grows.
        values: of it.
        seconds: medians over rounds.
    """

    what: str
    axis: str
    values: list[float]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """The slope of the logarithms."""
        return fitted(self.values, self.seconds)[0]


def fitted(values: Iterable[float], seconds: Iterable[float]) -> tuple[float, float]:
    """Return exponent and factor of `seconds = factor · values^exponent`, least squares on logs.

    Example:
        >>> exponent, factor = fitted([1, 2, 4], [3, 12, 48])
        >>> round(exponent, 6), round(factor, 6)
        (2.0, 3.0)
    """
    slope, intercept = np.polyfit(np.log(list(values)), np.log(list(seconds)), 1)
    return float(slope), float(np.exp(intercept))


def played(axis: str) -> dict[str, Callable[[int], mixadv.Solver | None]]:
    """Return what is measured along an axis, by the value on it; None is an ordinary step."""
    if axis == "steps":
        return {"pgd": lambda k: mixadv.PGD(steps=k), "smart, no teacher": lambda k: smart(k)}
    if axis == "particles":
        return {
            f"mat, {r}": lambda m, r=r: mat(steps=1, particles=m, particle_batching=r)
            for r in ROUTES
        }
    return {
        "ordinary step": lambda value: None,
        "smart, no teacher": lambda value: smart(1),
        "mat, 3 and 2": lambda value: mat(),
    }


def work(axis: str, value: int, device: str, threads: int) -> Work:
    """Return the work at a value of an axis."""
    changed = {"parameters": WIDTH, "batch": BATCH, "length": LENGTH, axis: value}
    setting = Setting("", changed["batch"], changed["length"], 0.0, device, threads)
    width = changed["parameters"]
    return Work(setting, encoder(LAYERS, width, width // HEAD_WIDTH, WORDS))


def measure(
    device: str, threads: int, rounds: int, note: Callable[[str], object]
) -> Iterator[Series]:
    """Measure each axis, all its values in turn, and yield its series."""
    for axis, values in VALUES.items():
        works = {value: work(axis, value, device, threads) for value in values}
        amounts = [_amount(axis, value, works[value]) for value in values]
        plays: dict[str, Part] = {}
        for name, solver in played(axis).items():
            for value, piece in works.items():
                plays[f"{name}, {axis} {value}"] = _part(piece, solver(value))
        *_, taken = timed(device, {}, plays, rounds, note)
        for name in played(axis):
            seconds = [statistics.median(taken[f"{name}, {axis} {value}"]) for value in values]
            yield Series(name, axis, amounts, seconds)


def plays() -> int:
    """Return how many plays a round has."""
    return sum(len(values) * len(played(axis)) for axis, values in VALUES.items())


def table(series: Iterable[Series]) -> str:
    """Return a Markdown table."""
    rows = []
    for s in series:
        seconds = " ".join(f"{t:.3g}" for t in s.seconds)
        ends = [f"{s.values[0]:,.0f}", f"{s.values[-1]:,.0f}"]
        rows.append([s.axis, s.what, *ends, seconds, f"{s.exponent:.2f}"])
    return markdown(["grows", "played", "from", "to", "seconds", "exponent"], rows)


def _part(piece: Work, solver: Any) -> Part:
    if solver is None:
        return piece.parts()["S"]
    player = ours(piece, solver)
    player.play(None)
    return Part(piece.reset, lambda: player.play(None))


def _amount(axis: str, value: int, piece: Work) -> float:
    return sum(p.numel() for p in piece.parameters) if axis == "parameters" else value
