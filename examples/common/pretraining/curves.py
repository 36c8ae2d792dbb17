"""The picture of a run: its loss in training, its metrics on held-out text."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

from common.pretraining.objectives import Numbers

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw(
    log: list[dict[str, Any]],
    chance: Numbers,
    title: str,
    path: Path,
    minimised: str = "training loss",
) -> None:
    """Draw a panel for the training loss and one for each held-out metric.

    Args:
        log: what Trainer logged.
        chance: the metrics without learning; a dashed line.
        title: of the picture.
        path: of the file.
        minimised: what the training loss is.
    """
    held = [entry for entry in log if "eval_loss" in entry]
    panels = {minimised: [(e["step"], e["loss"]) for e in log if "loss" in e]}
    for name in metrics(held[0]) if held else []:
        panels[f"held-out {name}"] = [(e["step"], e[f"eval_{name}"]) for e in held]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3), squeeze=False, layout="constrained"
    )
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        known = chance.get(name.removeprefix("held-out "))
        if known is not None and name != minimised:
            axis.axhline(known, linestyle="--", color="0.5", label="chance")
            axis.legend(frameon=False)
        axis.set(title=name, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def metrics(entry: dict[str, Any]) -> list[str]:
    """Return the names of the metrics in an entry of Trainer's log, loss first."""
    timing = ("runtime", "samples_per_second", "steps_per_second")
    names = [name.removeprefix("eval_") for name in entry if name.startswith("eval_")]
    return sorted((n for n in names if n not in timing), key=lambda n: (n != "loss", n))
