"""How robust the model of a finished run is: one line, without the texts it was measured on."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from common import data, model
from common.results import Run
from common.substitution import candidates
from mixadv.robustness import evaluate, text_batches, token_norm
from mixadv.robustness.data import DataError, read_rows
from mixadv.tokens import WordSubstitution
from studying.parts import Measures, Shifted, Subject
from studying.work import load

ROWS = 64  # whose tokens the unit is measured on
DIGITS = 4  # that count, of numbers of single rows


def measure(
    run: Run, key: str, subject: Subject, begun: str, asked: Measures, folder: str, output: Path
) -> dict[str, Any]:
    """Return the line of what was measured of a saved model, on rows that the run's seed draws.

    So the spread over seeds has that of the rows in it, and methods still share those of a seed.

    Args:
        run: that saved it.
        key: of the line.
        subject: the task.
        begun: the study's model, by whose token norms all of its models are attacked.
        asked: what is measured.
        folder: of the data; "" for the hub.
        output: where the run saved its model.
    """
    where = output / run.key / "last"
    classifier, tokenizer = model.load_classifier(str(where))
    split = load(subject.script, run.task, folder, run.train).splits[subject.evaluate[0]]
    rows = split.shuffle(seed=run.seed).select(range(min(asked.clean_rows, len(split))))
    report = evaluate(
        classifier,
        tokenizer,
        rows,
        shifted={name: other(name, at, folder) for name, at in subject.shifted.items()},
        attacks={name: WordSubstitution(candidates(name)) for name in subject.attacks},
        radii=asked.radii,
        increase_radius=asked.increase_radius,
        steps=asked.steps,
        restarts=asked.restarts,
        unit=unit(begun, run.max_length, subject.script, run.task, folder, run.train),
        rows=asked.rows,
        max_length=run.max_length,
        seed=run.seed,
        folder=output / run.key / "measured",
        progress=False,
        name=run.key,
    )
    return {"key": key, "of": run.key, "sections": compact(report.sections)}


def other(name: str, at: Shifted, folder: str) -> Dataset:
    """Return a shifted set: a split of a data set of the hub, or of one in the folder."""
    splits = (
        data.from_folder(data.find(folder, at.folder, itself=False))
        if folder
        else data.from_hub(*at.hub)
    )
    if at.split not in splits:
        raise DataError(f"{name} has no split {at.split}, it has {', '.join(splits)}.")
    return splits[at.split]


@cache
def unit(name: str, length: int, script: str, task: str, folder: str, train: Any) -> float:
    """Return the mean norm of a token of the untrained encoder: one ball for all of a task."""
    subject = load(script, task, folder, train)
    network, tokenizer = model.load(Run(task=task, model=name, max_length=length), subject)
    split = next(iter(subject.splits.values()))
    rows = read_rows(split.select(range(min(ROWS, len(split)))), network)
    return token_norm(network, text_batches(network, tokenizer, rows, max_length=length))


def compact(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections without what they hold of single rows, but for the loss increase.

    That one is compared on the rows that all models get right, which are known in the end alone.
    """
    increase = sections.get("loss increase")
    found = _without(sections)
    if increase is not None:
        each = {k: [_rounded(v) for v in values] for k, values in increase["per row"].items()}
        found["loss increase"]["per row"] = each
    return found


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        hidden = ("per row", "attacked")
        return {k: _without(v) for k, v in value.items() if k not in hidden}
    return value


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
