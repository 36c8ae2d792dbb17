"""Tables and pictures of reports, and numbers as their cells have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

DASH = "–"  # where there is no number
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Of Okabe and Ito, which colour-blind readers tell apart."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
}


class Table(NamedTuple):
    """A title, a head, and rows of cells under it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return it with a bold title, to be pasted."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return f"**{_cell(self.title)}**\n\n" * bool(self.title) + "\n".join(
            "| " + " | ".join(map(_cell, line)) + " |" for line in lines
        )

    def text(self) -> str:
        """Return it with columns aligned, to be read in a terminal."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in aligned)])


def share(value: Mapping[str, Any] | float | None) -> str:
    """Return a share or its estimate in per cent.

    Example:
        >>> share(0.5), share({"value": 0.5, "low": 0.4, "high": 0.625})
        ('50.0', '50.0 (40.0 to 62.5)')
    """
    return _estimate(value, lambda x: f"{100 * x:.1f}")


def number(value: Mapping[str, Any] | float | None) -> str:
    """Return a number or its estimate to three digits."""
    return _estimate(value, lambda x: f"{x:.3g}")


def quartiles(found: Mapping[str, Any]) -> str:
    """Return a median with the quartiles around it."""
    return number({"value": found["median"], "low": found["lower"], "high": found["upper"]})


@contextmanager
def figure(width: float, height: float, font: float = 10) -> Iterator[Any]:
    """Yield an empty figure of some inches, to be drawn and saved in the style of all.

    Needs matplotlib, without pyplot: nothing global changes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "font.size": font}):
        yield Figure(figsize=(width, height), layout="constrained")


def _estimate(value: Any, write: Callable[[float], str]) -> str:
    if not isinstance(value, Mapping):
        return DASH if value is None else write(value)
    if value["value"] is None or value["low"] is None:
        return _estimate(value["value"], write)
    return f"{write(value['value'])} ({write(value['low'])} to {write(value['high'])})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
