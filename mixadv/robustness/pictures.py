"""Pictures of what evaluations found, of one model or of several. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.robustness.sections import increase_of

if TYPE_CHECKING:
    from mixadv.robustness.report import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Of Okabe and Ito, which colour-blind readers tell apart."""
BINS = 15  # of the calibration error
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def save(reports: Mapping[str, Report], folder: Path) -> list[Path]:
    """Draw what the reports hold; return the paths of the pictures."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = Figure(figsize=(4.6, 3.6), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            if draw(axes, reports):
                path = folder / f"{name}.png"
                figure.savefig(path)
                written.append(path)
    return written


def accuracy_at_radii(axes: Any, reports: Mapping[str, Report]) -> bool:
    """Draw accuracy against radius, with intervals as bands; return whether there is any."""
    held = {n: r.sections["radii"] for n, r in reports.items() if "radii" in r.sections}
    for (name, found), colour in zip(held.items(), _colours(held), strict=True):
        values, low, high = (
            [100 * one[key] for one in found["accuracy"]] for key in ("value", "low", "high")
        )
        axes.plot(found["radii"], values, "o-", color=colour, label=name, markersize=4)
        axes.fill_between(found["radii"], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=f"radius, in {_units(reports)}", ylabel="accuracy under PGD, %", ylim=(0, 100))
    axes.set_xlim(left=0)
    axes.legend()
    return bool(held)


def reliability(axes: Any, reports: Mapping[str, Report]) -> bool:
    """Draw accuracy against confidence in the bins of the calibration error.

    The area of a dot is in proportion to its share of the rows.
    """
    sets = {
        " ".join([name] * (len(reports) > 1) + [which]): one
        for name, report in reports.items()
        for which, one in {
            "clean": report.sections["clean"],
            **report.sections.get("shifted", {}),
        }.items()
    }
    axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
    for (name, one), colour in zip(sets.items(), _colours(sets), strict=True):
        confidence = np.array(one["per row"]["confidence"])
        which = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
        counts = np.bincount(which, minlength=BINS)
        filled = counts > 0
        x, y = (
            100 * np.bincount(which, values, minlength=BINS)[filled] / counts[filled]
            for values in (confidence, one["per row"]["correct"])
        )
        label = f"{name}, ECE {100 * one['ece']:.1f}"
        axes.plot(x, y, color=colour, linewidth=1, label=label)
        axes.scatter(x, y, 8 + 300 * counts[filled] / len(confidence), color=colour, alpha=0.6)
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 102), ylim=(-2, 102))
    axes.legend(loc="upper left")
    return True


def loss_increase(axes: Any, reports: Mapping[str, Report]) -> bool:
    """Draw the distribution of the loss increase over rows that are classified correctly by all."""
    held = {
        name: report.sections["loss increase"]
        for name, report in reports.items()
        if "loss increase" in report.sections
    }
    found = {name: increase_of(section) for name, section in held.items()}
    if not found:
        return False
    rows = np.logical_and.reduce([of.correct for of in found.values()])
    if not rows.any():
        return False
    kinds = {"increase": "-", "from_random": ":"}
    for (name, of), colour in zip(found.items(), _colours(found), strict=True):
        for kind, line in kinds.items():
            values = np.sort(getattr(of, kind)[rows])
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            label = name if kind == "increase" else f"{name}, random starts"
            axes.step(
                np.maximum(values, FLOOR), share, line, where="post", color=colour, label=label
            )
    radius = next(iter(held.values()))["radius"]
    axes.set(xscale="log", ylim=(0, 101), ylabel="rows, %")
    axes.set_xlabel(f"loss increase within {radius:g} {_units(reports)}, nats")
    for quartile in (25, 50, 75):
        axes.axhline(quartile, color="#999999", linewidth=0.5, zorder=0)
    axes.legend()
    return True


FLOOR = 1e-8  # of the increases drawn, nats
PICTURES: dict[str, Callable[[Any, Mapping[str, Report]], bool]] = {
    "accuracy_at_radii": accuracy_at_radii,
    "reliability": reliability,
    "loss_increase": loss_increase,
}


def _colours(names: Mapping[str, Any]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _units(reports: Mapping[str, Report]) -> str:
    about = [report.sections["about"] for report in reports.values()]
    lengths = {one["unit"] for one in about}
    if len(lengths) > 1:
        return "token norms of each model"
    return f"token norms ({lengths.pop():.3g})"
