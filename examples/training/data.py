"""Rows to train and evaluate on: from the hub or a folder of JSON lines, checked before use."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what cannot be read is said once, here

Measure = Callable[[np.ndarray, Dataset], dict[str, float]]
"""Takes the predictions of rows and the rows; returns the metrics, the one to choose by first."""

NAMES = {"validation": "dev", "validation_matched": "dev", "dev_matched": "dev", "test": "test"}
NAMES |= {"validation_mismatched": "mismatched", "dev_mismatched": "mismatched"}
UNLABELLED = -1  # how public sets mark rows without a gold label


class DataError(ValueError):
    """The data are not what the script can train on."""


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is judged.

    Attributes:
        name: what results are filed under.
        train: rows with `text`, `pair` if a row has two texts, and `label`.
        splits: rows to evaluate on, by name.
        labels: the names of the labels in order; None for a number to be predicted.
        measure: the metrics.
        choose_on: the split that the best checkpoint is chosen on where no rows are held out.
        dropped: rows left out for want of a gold label, by split.
    """

    name: str
    train: Dataset
    splits: Mapping[str, Dataset]
    labels: Sequence[str] | None
    measure: Measure
    choose_on: str = "dev"
    dropped: Mapping[str, int] = field(default_factory=dict)


# Reading ---------------------------------------------------------------------------------------


def from_hub(*name: str) -> dict[str, Dataset]:
    """Return the splits of a hub data set, given as for `datasets.load_dataset`."""
    try:
        try:
            return dict(datasets.load_dataset(*name))
        except RuntimeError:  # published as a script; the hub keeps a converted copy
            return dict(datasets.load_dataset(*name, revision="refs/convert/parquet"))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"The hub does not give {' '.join(name)}: {error}") from error


def from_folder(folder: Path) -> dict[str, Dataset]:
    """Return the splits of a folder of JSON lines: `train`, `dev` or `validation`, `test`, ..."""
    splits: dict[str, Dataset] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        name = path.name.split(".")[0]
        split = NAMES.get(name, name)
        if split in splits:
            raise DataError(f"{folder} holds two files for {split}: remove {path.name}.")
        try:
            splits[split] = datasets.load_dataset("json", data_files=str(path), split="train")
        except StopIteration:
            raise DataError(f"{path} holds no rows.") from None
        except (datasets.exceptions.DatasetsError, ValueError, OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error.__cause__ or error}.") from error
    return splits


def find(folder: str, name: str, itself: bool = True) -> Path:
    """Return the folder of a data set in a folder: NAME, NAME_subset, or the folder `itself`."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"There is no folder {folder}.")
    for candidate in (root / name, root / f"{name}_subset", *([root] if itself else [])):
        if any(candidate.glob("*.jsonl")) or any(candidate.glob("*.jsonl.gz")):
            return candidate
    raise DataError(f"{folder} holds no JSON lines of {name}: no folder {name} or {name}_subset.")


# Checking --------------------------------------------------------------------------------------


def check(rows: Dataset, where: str, texts: Sequence[str], labels: Sequence[str] | None) -> Dataset:
    """Return the rows that have a gold label, with columns `text`, `pair` and `label`.

    Args:
        rows: as read.
        where: they come from, for errors.
        texts: the columns of the one or two texts.
        labels: their names; None for numbers from 0 to 5.
    """
    for column in (*texts, "label"):
        if column not in rows.column_names:
            raise DataError(f"{where} has no column {column!r}, it has {_listed(rows)}.")
    columns = dict(zip(("text", "pair"), (rows[name][:] for name in texts), strict=False))
    columns["label"] = rows["label"][:]
    for name, column in zip(texts, columns.values(), strict=False):
        for i, text in enumerate(column):
            if not isinstance(text, str):
                raise DataError(f"{where}, row {i + 1}: {name} is {text!r}, not a string.")
    most = 5 if labels is None else len(labels) - 1
    for i, value in enumerate(columns["label"]):
        number = isinstance(value, (int, float)) and math.isfinite(value)
        whole = labels is None or value == int(value) if number else False
        if not number or not whole or not (value == UNLABELLED or 0 <= value <= most):
            kind = "a number" if labels is None else "a whole number"
            raise DataError(
                f"{where}, row {i + 1}: label is {value!r}, not {kind} from 0 to {most}"
                f" (or {UNLABELLED} for none)."
            )
    checked = Dataset.from_dict(columns)
    kept = [i for i, value in enumerate(columns["label"]) if value != UNLABELLED]
    return checked if len(kept) == len(checked) else checked.select(kept)


def _listed(rows: Dataset) -> str:
    return ", ".join(rows.column_names) or "none"


def task(
    name: str,
    splits: Mapping[str, Dataset],
    where: str,
    texts: Sequence[str],
    labels: Sequence[str] | None,
    measure: Measure,
) -> Task:
    """Return the task of a data set; a split without gold labels, such as a public test, is left out."""
    checked = {
        split: check(rows, f"{where}, {split}", texts, labels) for split, rows in splits.items()
    }
    dropped = {split: len(rows) - len(checked[split]) for split, rows in splits.items()}
    held = {split: rows for split, rows in checked.items() if len(rows)}
    train = held.pop("train", None)
    if train is None:
        raise DataError(
            f"{where} has no labelled train rows, it holds {', '.join(held) or 'none'}."
        )
    if not held:
        raise DataError(f"{where} has nothing to evaluate on: add dev.jsonl or test.jsonl.")
    return Task(
        name=name,
        train=train,
        splits=held,
        labels=labels,
        measure=measure,
        choose_on="dev" if "dev" in held else "",
        dropped={split: rows for split, rows in dropped.items() if rows},
    )


# Choosing --------------------------------------------------------------------------------------


def choose(
    task: Task, seed: int, *, hold_out: int = 0, shots: int = 0, limit: int = 0
) -> tuple[Dataset, dict[str, Dataset]]:
    """Return the rows to train on and the splits to evaluate on, drawn by the seed.

    Args:
        task: with all its rows.
        seed: of the draw.
        hold_out: training rows that become the split `held-out`; no text is on both sides.
        shots: training rows of each label; 0 takes all.
        limit: training rows; 0 takes all.
    """
    draw = random.Random(seed)
    splits = dict(task.splits)
    order = draw.sample(range(len(task.train)), len(task.train))
    if hold_out:
        if hold_out >= len(order):
            raise DataError(f"{hold_out} held-out rows leave nothing of {len(order)} to train on.")
        splits["held-out"] = task.train.select(order[:hold_out])
        held = set(splits["held-out"]["text"])
        texts = task.train["text"][:]
        order = [i for i in order[hold_out:] if texts[i] not in held]
    if shots:
        labels = task.train["label"][:]
        order = _few(order, labels, shots)
    if limit:
        order = order[:limit]
    if not order:
        raise DataError(f"{task.name} has no rows left to train on.")
    return task.train.select(sorted(order)), splits


def _few(order: list[int], labels: list[Any], shots: int) -> list[int]:
    taken: Counter[Any] = Counter()
    chosen = []
    for i in order:
        taken[labels[i]] += 1
        if taken[labels[i]] <= shots:
            chosen.append(i)
    for label, rows in taken.items():
        if rows < shots:
            raise DataError(f"{shots} shots are more than train has of label {label}: {rows}.")
    return chosen


# Batching --------------------------------------------------------------------------------------


def lengths(rows: Dataset) -> list[int]:
    """Return how many characters each row has."""
    texts = [rows[name][:] for name in ("text", "pair") if name in rows.column_names]
    return [sum(map(len, row)) for row in zip(*texts, strict=True)]


def batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row numbers without end, each epoch in another order.

    Rows of similar length are together, so that little is padded; an epoch that does not fill its
    last batch fills it with rows drawn again.
    """
    rows, epoch = range(len(lengths)), 0
    while True:
        draw = random.Random(f"{seed}/{epoch}")
        order = draw.sample(rows, len(rows))
        order += draw.choices(rows, k=-len(rows) % size)
        made = []
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size], key=lengths.__getitem__)
            made += [pool[i : i + size] for i in range(0, len(pool), size)]
        draw.shuffle(made)
        yield from made
        epoch += 1
