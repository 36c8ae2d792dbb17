"""Pictures of a study."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studying.findings import Findings, differences
from studying.plan import BUDGETS, COMPARED, Budget


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Save the pictures that there are numbers for; return their paths."""
    found = [gains(findings, folder / "gains.png"), attacked(findings, folder / "attacked.png")]
    return [path for path in found if path is not None]


def gains(findings: Findings, path: Path) -> Path | None:
    """Draw differences to plain training with their intervals, a panel for each task."""
    found = {b: differences(findings, b) for b in COMPARED}
    if not any(found.values()):
        return None
    methods = list(dict.fromkeys(m for of in found.values() for _, m in of))
    figure, panels = _panels(findings.study.tasks, height=1.2 + 0.45 * len(methods))
    for task, axes in panels.items():
        for budget, marker, shift in (("epochs", "o", -0.14), ("compute", "s", 0.14)):
            of = [found[budget].get((task, m)) for m in methods]
            known = [(at, one.difference) for at, one in enumerate(of) if one is not None]
            values = [one.value for _, one in known]
            margins = [0 if one.high != one.high else one.high - one.value for _, one in known]
            places = [at + shift for at, _ in known]
            axes.errorbar(
                values, places, xerr=margins, fmt=marker, capsize=3, label=BUDGETS[budget]
            )
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set(
            title=task, xlabel=f"difference to plain training, points\n({findings.metric(task)})"
        )
        axes.grid(axis="x", alpha=0.3)
    return _save(figure, panels, path)


def attacked(findings: Findings, path: Path, budget: Budget = "epochs") -> Path | None:
    """Draw accuracy against the radius of PGD, the mean over seeds, a panel for each task."""
    study = findings.study
    figure, panels = _panels(study.tasks, height=3.6)
    drawn = False
    for task, axes in panels.items():
        for method, marker in zip(study.methods, "osD^vP*Xdh<>" * len(study.methods), strict=False):
            curves = []
            for seed in study.seeds:
                if sections := findings.measured(task, method, budget, seed):
                    radii = sections["radii"]["radii"]
                    curves.append([100 * one["value"] for one in sections["radii"]["accuracy"]])
            if curves:
                drawn = True
                mean = [sum(column) / len(curves) for column in zip(*curves, strict=True)]
                line = ":" if findings.answers_alike(task, method, budget) else "-"
                axes.plot(radii, mean, line, marker=marker, label=method)
        axes.set(title=task, xlabel="radius, token norms")
        axes.grid(alpha=0.3)
    next(iter(panels.values())).set_ylabel("accuracy under PGD, %")
    return _save(figure, panels, path) if drawn else _forget(figure)


def _panels(names: Iterable[str], height: float) -> tuple[Any, dict[str, Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(names)
    figure, axes = plt.subplots(
        1, len(names), figsize=(4 * len(names), height), layout="constrained", squeeze=False
    )
    return figure, dict(zip(names, axes[0], strict=True))


def _save(figure: Any, panels: dict[str, Any], path: Path) -> Path:
    shown: dict[str, Any] = {}
    for axes in panels.values():
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True)) | shown
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=120)
    _forget(figure)
    return path


def _forget(figure: Any) -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)
