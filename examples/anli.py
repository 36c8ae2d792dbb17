r"""Fine-tune an encoder on natural language inference and evaluate it on ANLI, round by round.

Trains on any mix of sets and reports the accuracy on the dev and test rows of the rounds r1, r2 and
r3 and on all of them. Rows without a gold label are left out, and counted in the results.

    python examples/anli.py --train snli mnli anli_r1 anli_r2 anli_r3 --solver plain mat
    python examples/anli.py --train snli mnli --limit 20000 --epochs 1 --model roberta-base \
        --lr 2e-5 --bf16
    python examples/anli.py --train snli --updates 4 --evaluate-rows 300    # a first look
    python examples/anli.py --train snli --data path/to/folders --max-length 64
    python examples/anli.py --report
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from common import command
from common.parameters import known
from common.places import rows_of

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from common.data import Task

    Splits = dict[str, dict[str, Dataset]]  # of data sets, by their names

TEXTS = ("premise", "hypothesis")
LABELS = ("entailment", "neutral", "contradiction")
ROUNDS = ("r1", "r2", "r3")
HUB = {"snli": "stanfordnlp/snli", "mnli": "nyu-mll/multi_nli", "anli": "facebook/anli"}
TRAIN = ("snli", "mnli", *(f"anli_{r}" for r in ROUNDS))


def options(group: Any) -> None:
    """Add the options of this script."""
    text = f"training sets, taken together: {', '.join(TRAIN)}, or folders of --data (default: all)"
    group.add_argument("--train", nargs="+", default=list(TRAIN), metavar="NAME", help=text)
    text = (
        "in place of the hub: a folder with a folder NAME or NAME_subset for each training set and "
        "for anli_r1, anli_r2 and anli_r3; in it train, dev or validation, test as .jsonl or "
        ".jsonl.gz with premise, hypothesis and label: 0 entailment, 1 neutral, 2 contradiction"
    )
    group.add_argument("--data", default="", metavar="FOLDER", help=text)


def settings(options: Namespace) -> dict[str, Any]:
    """Return what a run has of its own."""
    for name in options.train if not options.data else ():
        known("--train", name, TRAIN, ", and with --data its folders")
    for name in folders(options.train) if options.data else ():
        rows_of(options.data, name, itself=False)
    return {"task": "anli", "train": tuple(options.train)}


def load(options: Namespace) -> Task:
    """Return the training sets as one, and the rounds of ANLI."""
    from datasets import concatenate_datasets

    from common import data
    from mixadv.robustness.data import DataError

    names = dict.fromkeys(options.train)
    read = from_folders(options.data, names) if options.data else from_hub(names)
    train, dropped = [], {}
    for name in names:
        if "train" not in read[name]:
            raise DataError(f"{name} has no train rows, it holds {', '.join(read[name])}.")
        train.append(data.check(read[name]["train"], f"{name}, train", TEXTS, LABELS))
        dropped[name] = len(read[name]["train"]) - len(train[-1])
    splits = {split: rounds(read, split) for split in ("dev", "test")}
    return data.Task(
        name="anli",
        train=concatenate_datasets(train),
        splits={split: rows for split, rows in splits.items() if rows is not None},
        labels=LABELS,
        measure=measure,
        dropped={name: rows for name, rows in dropped.items() if rows},
    )


def from_folders(folder: str, train: Iterable[str]) -> Splits:
    """Return the splits of the training sets and of the rounds in a folder."""
    from common import data

    return {n: data.from_folder(data.find(folder, n, itself=False)) for n in folders(train)}


def folders(train: Iterable[str]) -> list[str]:
    """Return the names of the folders that hold the training sets and the rounds."""
    return list(dict.fromkeys([*train, *(f"anli_{r}" for r in ROUNDS)]))


def from_hub(train: Iterable[str]) -> Splits:
    """Return the splits of the training sets and of the rounds from the hub."""
    from common import data

    anli = data.from_hub(HUB["anli"])
    read = {f"anli_{r}": {s: anli[f"{s}_{r}"] for s in ("train", "dev", "test")} for r in ROUNDS}
    return read | {name: data.from_hub(HUB[name]) for name in train if name in HUB}


def rounds(read: Splits, split: str) -> Dataset | None:
    """Return the rows of a split of all rounds, with a column that names the round."""
    from datasets import concatenate_datasets

    from common import data

    found = []
    for r in ROUNDS:
        if split in read[f"anli_{r}"]:
            rows = data.check(read[f"anli_{r}"][split], f"anli_{r}, {split}", TEXTS, LABELS)
            found.append(rows.add_column("round", [r] * len(rows)))
    return concatenate_datasets(found) if found else None


def measure(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Return the accuracy on all rows, and on those of each round."""
    import numpy as np

    from common import metrics

    labels = np.array(rows["label"])
    found = {"all": metrics.accuracy(predictions, labels)}
    if "round" in rows.column_names:
        rounds = np.array(rows["round"])
        for r in dict.fromkeys(rows["round"]):
            found[r] = metrics.accuracy(predictions[rounds == r], labels[rounds == r])
    return found


SCRIPT = command.Script(
    "anli", __doc__, options, settings, load, {"learning_rate": 2e-4, "max_length": 256}
)
arguments, runs, main = SCRIPT.arguments, SCRIPT.runs, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
