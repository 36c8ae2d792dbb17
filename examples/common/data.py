"""Rows to train and evaluate on: from the hub or a folder of JSON lines, checked before use."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from common.places import rows_of
from mixadv.robustness.data import UNLABELLED, DataError

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what cannot be read is said once, here

Measure = Callable[[np.ndarray, Dataset], dict[str, float]]
"""Takes the predictions of rows and the rows; returns the metrics, the one to choose by first."""

NAMES = {"validation": "dev", "validation_matched": "dev", "dev_matched": "dev"}
NAMES |= {"validation_mismatched": "mismatched", "dev_mismatched": "mismatched"}


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
            found = datasets.load_dataset(*name)
        except RuntimeError:  # published as a script; the hub keeps a converted copy
            found = datasets.load_dataset(*name, revision="refs/convert/parquet")
        return {NAMES.get(split, split): rows for split, rows in found.items()}
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The hub does not give {' '.join(name)}: {error}") from error


def from_folder(folder: Path) -> dict[str, Dataset]:
    """Return the splits of a folder of JSON lines: `train`, `dev` or `validation`, `test`, ..."""
    splits: dict[str, Dataset] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        name = path.name.split(".")[0]
        split = NAMES.get(name, name)
        if split in splits:
            raise DataError(f"{folder} holds two files for {split}: remove {path.name}.")
        splits[split] = from_file(path)
    return splits


def from_file(path: Path) -> Dataset:
    """Return the rows of a file of JSON lines."""
    try:
        return datasets.load_dataset("json", data_files=str(path), split="train")
    except StopIteration:
        raise DataError(f"{path} holds no rows.") from None
    except Exception as error:  # of many kinds, by where in the file it breaks
        raise DataError(f"{path} cannot be read: {error.__cause__ or error}.") from error


def find(folder: str, name: str, itself: bool = True) -> Path:
    """Return the folder of a data set in a folder: NAME, NAME_subset, or the folder `itself`."""
    try:
        return rows_of(folder, name, itself)
    except ValueError as error:
        raise DataError(str(error)) from None


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
            raise DataError(
                f"{where} has no column {column!r}, it has {', '.join(rows.column_names)}."
            )
    columns = {}
    for name, column in zip(("text", "pair"), texts, strict=False):
        columns[name] = rows[column][:]
        for i, text in enumerate(columns[name], 1):
            if not isinstance(text, str):
                raise DataError(f"{where}, row {i}: {column} is {text!r}, not a string.")
    columns["label"] = rows["label"][:]
    kind, most = ((int, float), 5) if labels is None else (int, len(labels) - 1)
    for i, label in enumerate(columns["label"], 1):
        known = isinstance(label, kind) and (label == UNLABELLED or 0 <= label <= most)
        if not known:
            what = "a number" if labels is None else "a whole number"
            raise DataError(
                f"{where}, row {i}: label is {label!r}, not {what} from 0 to {most}"
                f" (or {UNLABELLED} for none)."
            )
    gold = [i for i, label in enumerate(columns["label"]) if label != UNLABELLED]
    return Dataset.from_dict(columns).select(gold)


def task(
    name: str,
    splits: Mapping[str, Dataset],
    texts: Sequence[str],
    labels: Sequence[str] | None,
    measure: Measure,
) -> Task:
    """Return the task of a data set.

    A split without gold labels, such as the test rows of a public contest, is left out.
    """
    checked = {
        split: check(rows, f"{name}, {split}", texts, labels) for split, rows in splits.items()
    }
    dropped = {split: len(rows) - len(checked[split]) for split, rows in splits.items()}
    held = {split: checked[split] for split in sorted(checked, key=_rank) if len(checked[split])}
    train = held.pop("train", None)
    if train is None:
        raise DataError(f"{name} has no labelled train rows, it holds {', '.join(held) or 'none'}.")
    if not held:
        raise DataError(f"{name} has nothing to evaluate on: add dev.jsonl or test.jsonl.")
    return Task(
        name=name,
        train=train,
        splits=held,
        labels=labels,
        measure=measure,
        dropped={split: rows for split, rows in dropped.items() if rows},
    )


def _rank(split: str) -> tuple[int, str]:
    return ("dev", "mismatched", "test", split).index(split), split  # others last


# Choosing --------------------------------------------------------------------------------------


def choose(
    task: Task, seed: int, *, hold_out: int = 0, shots: int = 0, limit: int = 0
) -> tuple[Dataset, dict[str, Dataset]]:
    """Return the rows to train on and the splits to evaluate on, drawn by the seed.

    Args:
        task: with all its rows.
        seed: of the draw.
        hold_out: training rows that become the split `held-out`; none is on both sides.
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
        read = texts(task.train)
        held = {read[i] for i in order[:hold_out]}
        order = [i for i in order[hold_out:] if read[i] not in held]
    if shots:
        order = _few(order, task.train["label"][:], shots)
    if limit:
        order = order[:limit]
    if not order:
        raise DataError(f"{task.name} has no rows left to train on.")
    return task.train.select(sorted(order)), splits


def at_most(rows: Dataset, most: int) -> Dataset:
    """Return so many of the rows, always the same ones, in their order; all where `most` is 0."""
    if not 0 < most < len(rows):
        return rows
    return rows.select(sorted(random.Random(0).sample(range(len(rows)), most)))


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


def texts(rows: Dataset) -> list[tuple[str, ...]]:
    """Return the one or two texts of each row."""
    columns = [rows[name][:] for name in ("text", "pair") if name in rows.column_names]
    return list(zip(*columns, strict=True))


def lengths(rows: Dataset) -> list[int]:
    """Return how many characters each row has."""
    return [sum(map(len, pair)) for pair in texts(rows)]


def batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row numbers without end, each epoch in another order."""
    for number in itertools.count():
        yield from epoch(lengths, size, seed, number)


def epoch(lengths: Sequence[int], size: int, seed: int, number: int) -> list[list[int]]:
    """Return the batches of row numbers of an epoch.

    Rows of similar length are together, so that little is padded; an epoch that does not fill its
    last batch fills it with rows drawn again.
    """
    rows, draw = range(len(lengths)), random.Random(f"{seed}/{number}")
    order = draw.sample(rows, len(rows))
    order += draw.choices(rows, k=-len(rows) % size)
    made = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size], key=lengths.__getitem__)
        made += [pool[i : i + size] for i in range(0, len(pool), size)]
    draw.shuffle(made)
    return made
