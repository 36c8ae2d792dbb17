"""Pictures of a study."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixadv.robustness.statistics import Estimate, t_interval
from studying.findings import Findings, differences, lengths
from studying.plan import PLAIN

ACROSS = 3
"""Panels beside each other."""


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Save the pictures that there are numbers for; return their paths."""
    kinds = {"convergence": convergence, "gains": gains, "costs": costs, "attacked": attacked}
    found = [draw(findings, folder / f"{name}.png") for name, draw in kinds.items()]
    return [path for path in found if path is not None]


def convergence(findings: Findings, path: Path) -> Path | None:
    """Draw plain training against its length, with intervals, a panel for each task."""
    study = findings.study
    plain = {m: way.times for m, way in study.methods.items() if lengths(study, m)}
    curves: dict[str, dict[float, Estimate]] = {}
    for task in study.tasks:
        values = {of: findings.official(task, m) for m, of in plain.items()}
        found = {of: t_interval(list(v.values())) for of, v in sorted(values.items()) if v}
        if len(found) > 1:
            curves[task] = found
    figure, panels = _panels(curves, height=3.2)
    for task, axes in panels.items():
        epochs = [study.tasks[task].epochs * of for of in curves[task]]
        axes.errorbar(epochs, *_bars(curves[task].values()), fmt="o-", capsize=3)
        axes.set(title=task, xlabel="epochs of plain training", ylabel=findings.metric(task))
        axes.grid(alpha=0.3)
    return _save(figure, panels, path)


def gains(findings: Findings, path: Path) -> Path | None:
    """Draw differences to the references with their intervals, a panel for each task."""
    study, found = findings.study, differences(findings)
    methods = list(dict.fromkeys(pair.method for pair in found))
    tasks = list(dict.fromkeys(pair.task for pair in found))
    figure, panels = _panels(tasks, height=1.6 + 0.35 * len(methods))
    for task, axes in panels.items():
        for number, reference in enumerate(study.references):
            known = {
                p.method: c.difference for p, c in found.items() if p[::2] == (task, reference)
            }
            if not known:
                continue
            shift = 0.2 * (number - (len(study.references) - 1) / 2)
            places = [methods.index(method) + shift for method in known]
            values, margins = _bars(known.values())
            label = f"− {reference}"
            axes.errorbar(values, places, xerr=margins, fmt="osD^v"[number % 5], label=label)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set(title=task, xlabel=f"difference, points\n({findings.metric(task)})")
        axes.grid(axis="x", alpha=0.3)
    return _save(figure, panels, path)


def costs(findings: Findings, path: Path) -> Path | None:
    """Draw the gain over plain training against the passes that it takes."""
    study = findings.study
    points: dict[str, dict[str, tuple[float, Estimate]]] = {}
    for task in study.tasks:
        plain = findings.official(task, PLAIN)
        for method in study.trained(task):
            values, cost = findings.official(task, method), study.methods[method].cost
            gains = [values[seed] - plain[seed] for seed in values.keys() & plain.keys()]
            if method != PLAIN and cost is not None and gains:
                points.setdefault(task, {})[method] = cost, t_interval(gains)
    figure, panels = _panels(points, height=3.6)
    for task, axes in panels.items():
        for method, (cost, found) in points[task].items():
            [gain], [margin] = _bars([found])
            color = "0.4" if lengths(study, method) else "tab:blue"
            axes.errorbar(cost, gain, margin, fmt="o", capsize=3, color=color, alpha=0.7)
            axes.annotate(method, (cost, gain), (5, 2), textcoords="offset points", fontsize=8)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set(title=task, xlabel="passes, in those of plain training")
        axes.set_ylabel("gain over plain training, points")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    return _save(figure, panels, path)


def attacked(findings: Findings, path: Path) -> Path | None:
    """Draw accuracy against the radius of PGD, the mean over seeds, a panel for each task."""
    study = findings.study
    curves: dict[str, dict[str, list[Any]]] = {}
    for task in study.tasks:
        for method in study.trained(task):
            found = [findings.measured(task, method, seed) for seed in study.seeds]
            if radii := [sections["radii"] for sections in found if sections]:
                curves.setdefault(task, {})[method] = radii
    figure, panels = _panels(curves, height=3.6)
    for task, axes in panels.items():
        for method, marker in _marked(list(curves[task])):
            seeds = [[100 * one["value"] for one in of["accuracy"]] for of in curves[task][method]]
            mean = [sum(column) / len(seeds) for column in zip(*seeds, strict=True)]
            line = ":" if findings.answers_alike(task, method) else "-"
            radii = curves[task][method][0]["radii"]
            axes.plot(radii, mean, line, marker=marker, label=method)
        axes.set(title=task, xlabel="radius, token norms", ylabel="accuracy under PGD, %")
        axes.grid(alpha=0.3)
    return _save(figure, panels, path)


def _marked(methods: list[str]) -> Iterable[tuple[str, str]]:
    """Return methods, each with a marker."""
    return zip(methods, "osD^vP*Xdh<>" * len(methods), strict=False)


def _bars(found: Iterable[Estimate]) -> tuple[list[float], list[float]]:
    """Return values and half widths of intervals; 0 where there is none."""
    found = list(found)
    margins = [0.0 if one.high != one.high else one.high - one.value for one in found]
    return [one.value for one in found], margins


def _panels(names: Iterable[str], height: float) -> tuple[Any, dict[str, Any]]:
    """Return a figure with a panel for each name, at most three beside each other."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(names)
    columns = min(ACROSS, len(names)) or 1
    rows = -(-len(names) // columns) or 1
    size = (max(6.5, 4 * columns), height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    return figure, dict(zip(names, grid.flat, strict=False))


def _save(figure: Any, panels: dict[str, Any], path: Path) -> Path | None:
    """Save a figure with one legend for all panels; return no path, and no file, without one."""
    import matplotlib.pyplot as plt

    shown: dict[str, Any] = {}
    for axes in panels.values():
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True)) | shown
    if shown:
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=5, frameon=False)
    if panels:
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return path if panels else None
