"""Pictures of a study."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixadv.robustness.statistics import Estimate, t_interval
from studying.findings import Findings, differences, lengths
from studying.plan import PLAIN


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Save the pictures that there are numbers for; return their paths."""
    kinds = {"convergence": convergence, "gains": gains, "costs": costs, "attacked": attacked}
    found = [draw(findings, folder / f"{name}.png") for name, draw in kinds.items()]
    return [path for path in found if path is not None]


def convergence(findings: Findings, path: Path) -> Path | None:
    """Draw plain training against its length, with intervals, a panel for each task."""
    study = findings.study
    plain = {m: way.times for m, way in study.methods.items() if lengths(study, m)}
    figure, panels = _panels(study.tasks, height=3.2)
    drawn = False
    for task, axes in panels.items():
        values = {of: findings.official(task, m) for m, of in plain.items()}
        found = {of: t_interval(list(v.values())) for of, v in sorted(values.items()) if v}
        if len(found) > 1:
            drawn = True
            epochs = [study.tasks[task].epochs * of for of in found]
            axes.errorbar(epochs, *_bars(found.values()), fmt="o-", capsize=3)
        axes.set(title=task, xlabel="epochs of plain training", ylabel=findings.metric(task))
        axes.grid(alpha=0.3)
    return _save(figure, panels, path) if drawn else _forget(figure)


def gains(findings: Findings, path: Path) -> Path | None:
    """Draw differences to the references with their intervals, a panel for each task."""
    study, found = findings.study, differences(findings)
    methods = list(dict.fromkeys(pair.method for pair in found))
    if not methods:
        return None
    figure, panels = _panels(study.tasks, height=1.2 + 0.45 * len(methods))
    for task, axes in panels.items():
        for number, reference in enumerate(study.references):
            known = {
                p.method: c.difference for p, c in found.items() if p[::2] == (task, reference)
            }
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
    figure, panels = _panels(study.tasks, height=3.6)
    drawn = False
    for task, axes in panels.items():
        plain = findings.official(task, PLAIN)
        for method in study.trained(task):
            values, cost = findings.official(task, method), study.methods[method].cost
            gains = [values[seed] - plain[seed] for seed in values.keys() & plain.keys()]
            if method == PLAIN or cost is None or not gains:
                continue
            drawn = True
            [gain], [margin] = _bars([t_interval(gains)])
            color = "0.4" if lengths(study, method) else "tab:blue"
            axes.errorbar(cost, gain, margin, fmt="o", capsize=3, color=color, alpha=0.7)
            axes.annotate(method, (cost, gain), (5, 2), textcoords="offset points", fontsize=8)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set(title=task, xlabel="passes, in those of plain training")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    next(iter(panels.values())).set_ylabel("gain over plain training, points")
    return _save(figure, panels, path) if drawn else _forget(figure)


def attacked(findings: Findings, path: Path) -> Path | None:
    """Draw accuracy against the radius of PGD, the mean over seeds, a panel for each task."""
    study = findings.study
    figure, panels = _panels(study.tasks, height=3.6)
    drawn = False
    for task, axes in panels.items():
        for method, marker in _marked(study.trained(task)):
            curves = []
            for seed in study.seeds:
                if sections := findings.measured(task, method, seed):
                    radii = sections["radii"]["radii"]
                    curves.append([100 * one["value"] for one in sections["radii"]["accuracy"]])
            if curves:
                drawn = True
                mean = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
                line = ":" if findings.answers_alike(task, method) else "-"
                axes.plot(radii, mean, line, marker=marker, label=method)
        axes.set(title=task, xlabel="radius, token norms")
        axes.grid(alpha=0.3)
    next(iter(panels.values())).set_ylabel("accuracy under PGD, %")
    return _save(figure, panels, path) if drawn else _forget(figure)


def _marked(methods: list[str]) -> Iterable[tuple[str, str]]:
    """Return methods, each with a marker."""
    return zip(methods, "osD^vP*Xdh<>" * len(methods), strict=False)


def _bars(found: Iterable[Estimate]) -> tuple[list[float], list[float]]:
    """Return values and half widths of intervals; 0 where there is none."""
    found = list(found)
    margins = [0.0 if one.high != one.high else one.high - one.value for one in found]
    return [one.value for one in found], margins


def _panels(names: Iterable[str], height: float) -> tuple[Any, dict[str, Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(names)
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(max(6.5, 4 * len(names)), height),
        layout="constrained",
        squeeze=False,
    )
    return figure, dict(zip(names, axes[0], strict=True))


def _save(figure: Any, panels: dict[str, Any], path: Path) -> Path:
    shown: dict[str, Any] = {}
    for axes in panels.values():
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True)) | shown
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)
    _forget(figure)
    return path


def _forget(figure: Any) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)
