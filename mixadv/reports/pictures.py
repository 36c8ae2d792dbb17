"""What all pictures share. Figures are made without pyplot, so nothing global changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Of Okabe and Ito, which colour-blind readers tell apart."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
}


@contextmanager
def figure(width: float, height: float, font: float = 10) -> Iterator[Any]:
    """Yield an empty figure, to be drawn and saved in the style of all. Needs matplotlib.

    Args:
        width: inches.
        height: inches.
        font: size of text, points.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "font.size": font}):
        yield Figure(figsize=(width, height), layout="constrained")
