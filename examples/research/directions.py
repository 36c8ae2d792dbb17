"""What a divergence's adversary reaches, by direction, sign and steps, on a fine-tuned encoder.

Trains plainly on a task, then lets every ascent play on rows held out of it, at the same radius:
along the gradient from a random start, or first along the Gauss–Newton direction of the clean pass
and then along the gradient; on the side where that lies, or towards the decision boundary. Prints
the symmetric KL reached over that of one gradient step, the part of the rows whose likeliest label
got less likely, the rows whose label changes, and the time over one gradient step's, interleaved.

    python examples/research/directions.py --task intents
    python examples/research/directions.py --task cola --data FOLDER --updates 250 --lr 1e-4
    python examples/research/directions.py --report --output examples/results/directions
"""

import argparse
import sys

import _above  # noqa: F401
from ascents_asked import asked, task_asked
from common.command import entry, refuse_mistakes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise ValueError for a task that is not there."""
    return asked(argv, __doc__.splitlines()[0], "runs/directions")


if __name__ == "__main__":
    refuse_mistakes("directions", arguments)  # before the imports below, which take seconds

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mixadv
from common import data
from common.loop import Keeping, Training
from common.results import Run
from common.tables import markdown
from mixadv.maths.divergence import symmetric_kl
from mixadv.robustness.data import DataError

RADII = (0.05, 0.1, 0.2, 0.4)
ROWS = 16
ASCENTS: dict[str, dict[str, Any]] = {
    f"{name}, {sign}": {**words, "sign": sign}
    for sign in ("any", "boundary")
    for name, words in {
        "gradient, K=1": {"steps": 1},
        "gradient, K=3": {"steps": 3},
        "gradient, K=3, bf16": {"steps": 3, "ascent_dtype": torch.bfloat16},
        "gradient, K=10": {"steps": 10},
        "Gauss–Newton, K=1": {"steps": 1, "direction": "gauss_newton"},
        "Gauss–Newton, K=2": {"steps": 2, "direction": "gauss_newton"},
        "Gauss–Newton, K=3": {"steps": 3, "direction": "gauss_newton"},
    }.items()
}
BASELINE = next(iter(ASCENTS))


def trained(options: argparse.Namespace) -> tuple[Training, list[dict[str, torch.Tensor]]]:
    """Return a trained model, and batches of rows that it has not seen."""
    script, given = task_asked(options)
    task = script.load(given)
    same = ("task", "data", "updates", "limit", "shots", "seed")
    words: dict[str, Any] = {name: getattr(options, name) for name in same}
    run = Run(**words, epochs=0.0, hold_out=options.rows, learning_rate=options.lr)
    options.output.mkdir(parents=True, exist_ok=True)
    training = Training(run, task, Keeping(options.output))
    training.complete()
    rows = training.splits["held-out"]
    order = sorted(range(len(rows)), key=data.lengths(rows).__getitem__)
    starts = range(0, len(order), ROWS)
    return training, [training.encode(rows[order[i : i + ROWS]]) for i in starts]


def reached(
    model: torch.nn.Module, game: mixadv.Game, batch: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the divergence at the end of an ascent, and what became of the likeliest labels."""
    started = time.process_time()
    with game.rounds.rehearse(lambda: model(**batch)) as stage:
        q = stage.ascend("symmetric_kl", game.solver)
        seconds = time.process_time() - started
        with torch.no_grad():
            clean = stage.clean().predictions.log_softmax(-1)
            moved = stage.passes.run(stage.passes.at(q)).predictions.log_softmax(-1)
    label = clean.argmax(-1, keepdim=True)
    values = symmetric_kl(moved, clean)
    towards = moved.gather(-1, label) < clean.gather(-1, label)
    return {
        "divergence": values.tolist(),
        "towards": towards[:, 0].tolist(),
        "changed": (moved.argmax(-1, keepdim=True) != label)[:, 0].tolist(),
        "seconds": seconds,
    }


def measure(
    training: Training, batches: list[dict[str, torch.Tensor]], radius: float
) -> Iterator[dict[str, Any]]:
    """Yield a row per ascent; batch by batch, in orders that are reversed."""
    model = training.model.eval()
    games = {}
    for name, words in ASCENTS.items():
        solver = mixadv.ALUM(radius=radius, step_size=radius, start_size=0.05 * radius, **words)
        games[name] = mixadv.Game(model, solver)
        reached(model, games[name], batches[0])  # the first round is checked
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in games}
    for number, batch in enumerate(tqdm(batches, desc=f"radius {radius:g}")):
        for name in list(games)[:: 1 if number % 2 else -1]:
            found[name].append(reached(model, games[name], batch))
    for name, parts in found.items():
        keys = ("divergence", "towards", "changed")
        means = {k: statistics.fmean(x for part in parts for x in part[k]) for k in keys}
        ratios = [p["seconds"] / b["seconds"] for p, b in zip(parts, found[BASELINE], strict=True)]
        yield {"ascent": name, "radius": radius, **means, "time": statistics.median(ratios)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: a line per ascent, the divergence over the baseline's."""
    radii = list(dict.fromkeys(row["radius"] for row in rows))
    found = {(row["ascent"], row["radius"]): row for row in rows}
    lines = []
    for name in ASCENTS:
        mine = [found[name, radius] for radius in radii]
        over = [m["divergence"] / found[BASELINE, m["radius"]]["divergence"] for m in mine]
        last = [f"{100 * mine[-1]['towards']:.0f} %", f"{100 * mine[-1]['changed']:.0f} %"]
        cost = statistics.median(m["time"] for m in mine)
        lines.append([name, *(f"{x:.2f}" for x in over), *last, f"{cost:.2f}"])
    head = ["ascent, sign", *(f"{radius:g}" for radius in radii), "towards", "label changed"]
    return markdown([*head, "time"], lines) + "\n"


def store(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Keep the results of a task."""
    path = options.output / f"{options.task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def kept(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the kept results, by task."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder} holds no results: run without --report first.")
    return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def summary(tasks: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results of several tasks as one table, at two radii."""
    found = {(t, r["ascent"], r["radius"]): r for t, rows in tasks.items() for r in rows}
    columns = [(task, radius) for task in tasks for radius in RADII[1:3]]
    lines = []
    for name in ASCENTS:
        cells = [
            found[t, name, r]["divergence"] / found[t, BASELINE, r]["divergence"]
            for t, r in columns
        ]
        cells.append(statistics.median(found[t, name, r]["time"] for t, r in columns))
        lines.append([name, *(f"{x:.2f}" for x in cells)])
    head = ["ascent, sign", *(f"{task}, {radius:g}" for task, radius in columns), "time"]
    return markdown(head, lines) + "\n"


def work(options: argparse.Namespace) -> str:
    """Train, measure, keep and return the table."""
    if options.report:
        return summary(kept(options.output))
    torch.set_num_threads(1)
    training, batches = trained(options)
    rows = [row for radius in RADII for row in measure(training, batches, radius)]
    store(options, rows)
    return table(rows)


main = entry("directions", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
