"""The main job on real data: fine-tune the embedded encoder plainly, with FreeLB and with MAT.

MAT steps the optimizer twice per batch, so plain training is shown with twice the updates too.
Prints one table (accuracy on test, on the adversarial twins, under PGD in embedding space; passes
and seconds per step) and saves a picture of accuracy against radius. About six minutes on two
cores; a second call prints what the first one measured.

    python examples/demo.py [--updates 80] [--output runs/demo]
"""

import argparse
import sys
from pathlib import Path


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--attack-rows", type=int, default=144)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

from dataclasses import replace
from typing import Any

import intent
from common import command, loop, results
from common.loop import Keeping
from common.results import Run

RADII = (0.0, 0.05, 0.1, 0.2)
METHODS = (("plain", 1), ("plain", 2), ("freelb", 1), ("mat", 1))  # and how many times the updates


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """Save accuracy against the radius of the attack, one line per method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for result, marker in zip(found, "osD^v", strict=False):
        names = [f"PGD {radius:g}" for radius in RADII]
        accuracies = [100 * result["last"][name]["accuracy"] for name in names]
        label = f"{result['solver']}, {result['updates']} updates"
        axes.plot(RADII, accuracies, marker=marker, label=label)
    axes.set(xlabel="radius of the attack (token norms, L2 per sentence)", ylabel="accuracy, %")
    axes.set_title("PGD in embedding space")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def work(options: argparse.Namespace) -> str:
    """Train, evaluate and draw; return what to print."""
    runs = [
        Run(
            task="intents",
            solver=name,
            epochs=0.0,
            updates=factor * options.updates,
            max_length=64,
            radii=RADII,
            attack_rows=options.attack_rows,
        )
        for name, factor in METHODS
    ]
    task = intent.load(intent.arguments([]))
    task = replace(task, splits={name: task.splits[name] for name in ("test", "adversarial")})
    found = loop.run_all(runs, task, Keeping(options.output))
    path = options.output / "accuracy_against_radius.png"
    picture(found, path)
    return f"{results.table(found)}\n\npicture: {path}"


main = command.entry("demo", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
