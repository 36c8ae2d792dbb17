"""Pictures of what evaluations found, of one model or of several. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np

from mixadv.reports.shown import COLOURS, figure
from mixadv.robustness.predictions import BINS
from mixadv.robustness.sections import increase_of, unit

Reports = Mapping[str, Mapping[str, Any]]
"""The sections of reports, by the name of the model."""

MARKERS = "os^Dv*P"
STYLES = [*product(MARKERS, COLOURS)]  # seven colours, which come again with another marker


def save(reports: Reports, folder: Path) -> list[Path]:
    """Draw what the sections of the reports hold; return the paths of the pictures."""
    written = []
    for name, draw in PICTURES.items():
        with figure(4.6, 3.3, font=9) as drawn:
            axes = drawn.subplots()
            if draw(axes, reports):
                labels = axes.get_legend_handles_labels()[1]
                columns = 2 if max(map(len, labels)) < 25 else 1
                # The legend is under the axes, and has room made for it there.
                drawn.set_figheight(drawn.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
                drawn.legend(loc="outside lower center", ncols=columns)
                path = folder / f"{name}.png"
                drawn.savefig(path)
                written.append(path)
    return written


def accuracy_at_radii(axes: Any, reports: Reports) -> bool:
    """Draw accuracy against radius, with intervals as bands; return whether there is any."""
    held = {name: found["radii"] for name, found in reports.items() if "radii" in found}
    for (name, found), (marker, colour) in zip(held.items(), cycle(STYLES), strict=False):
        values, low, high = (
            [100 * accuracy[key] for accuracy in found["accuracy"]]
            for key in ("value", "low", "high")
        )
        style = {"marker": marker, "markersize": 4, "color": colour, "clip_on": False}
        axes.plot(found["radii"], values, label=_label(name), **style)
        axes.fill_between(found["radii"], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=f"radius, in {_units(reports)}", ylabel="accuracy under PGD, %", ylim=(0, 100))
    axes.set_xlim(left=0)
    return bool(held)


def reliability(axes: Any, reports: Reports) -> bool:
    """Draw accuracy against confidence in the bins of the calibration error.

    Of one model for all sets, of several on the clean one. The area of a dot is its share of rows.
    """
    sets = {name: found["clean"] for name, found in reports.items()}
    if len(reports) == 1:
        [found] = reports.values()
        sets = {"clean": found["clean"], **found.get("shifted", {})}
    axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
    for (name, section), (marker, colour) in zip(sets.items(), cycle(STYLES), strict=False):
        confidence = np.array(section["per row"]["confidence"], np.float64)
        which = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
        counts = np.bincount(which, minlength=BINS)
        filled = counts > 0
        x, y = (
            100 * np.bincount(which, values, minlength=BINS)[filled] / counts[filled]
            for values in (confidence, section["per row"]["correct"])
        )
        label = _label(f"{name} (ECE {section['ece']:.3f})")
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
        sizes = 4 + 300 * counts[filled] / len(confidence)
        style = {"color": colour, "marker": marker, "alpha": 0.7, "linewidth": 0, "clip_on": False}
        axes.scatter(x, y, sizes, **style)
        axes.scatter([], [], 25, label=label, **style)  # in the legend all dots have one size
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))
    return True


def loss_increase(axes: Any, reports: Reports) -> bool:
    """Draw the distribution of the loss increase over rows that are classified correctly by all.

    Increases that are not positive lie at the left edge.
    """
    held = {name: found[INCREASE] for name, found in reports.items() if INCREASE in found}
    found = {name: increase_of(section) for name, section in held.items()}
    if not found:
        return False
    rows = np.logical_and.reduce([measured.correct for measured in found.values()])
    everything = np.concatenate([measured.increase[rows] for measured in found.values()])
    if not (everything > 0).any():
        return False
    least = float(everything[everything > 0].min())
    for (name, measured), (marker, colour) in zip(found.items(), cycle(STYLES), strict=False):
        style = {"color": colour}
        if marker != MARKERS[0]:  # the first seven have colours enough
            style |= {"marker": marker, "markersize": 4, "markevery": 0.25}
        for what, line in {"increase": "-", "from_random": ":"}.items():
            values = np.sort(np.maximum(getattr(measured, what)[rows], least))
            share = np.linspace(0, 100, len(values) + 1)
            label = _label(name if what == "increase" else f"{name}, random starts")
            axes.step([values[0], *values], share, line, where="post", label=label, **style)
    ends = math.floor(math.log10(least)), math.ceil(math.log10(everything.max() * 1.001))
    axes.set(xscale="log", xlim=[10.0**end for end in ends], ylim=(0, 101))
    radius = next(iter(held.values()))["radius"]
    axes.set(ylabel=f"share of {rows.sum()} rows, %")
    axes.set(xlabel=f"loss increase within {radius:g} {_units(reports)}, nats")
    for quartile in (25, 50, 75):
        axes.axhline(quartile, color="#CCCCCC", linewidth=0.5, zorder=0)
    return True


INCREASE = "loss increase"
PICTURES: dict[str, Callable[[Any, Reports], bool]] = {
    "accuracy_at_radii": accuracy_at_radii,
    "reliability": reliability,
    "loss_increase": loss_increase,
}


def _label(name: str) -> str:
    """Return a name as it is to be read: no mathematics, and none that the legend leaves out."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _units(reports: Reports) -> str:
    about = [found["about"] for found in reports.values()]
    if len({section["unit"] for section in about}) > 1:
        return "token norms of each model"
    return unit(about[0])
