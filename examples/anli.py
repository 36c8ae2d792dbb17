"""Fine-tune on natural language inference and evaluate on ANLI, round by round."""

import sys
from argparse import Namespace
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from mixadv.errors import nearest
from training import command, data, metrics
from training.data import DataError, Task

TEXTS = ("premise", "hypothesis")
LABELS = ("entailment", "neutral", "contradiction")
ROUNDS = ("r1", "r2", "r3")
TRAIN = {"snli": ("stanfordnlp/snli", "train"), "mnli": ("nyu-mll/multi_nli", "train")}
TRAIN |= {f"anli_{r}": ("facebook/anli", f"train_{r}") for r in ROUNDS}


def options(parser: Any) -> None:
    """Add the options of this script."""
    parser.add_argument(
        "--train", nargs="+", default=["snli", "mnli", "anli_r1", "anli_r2", "anli_r3"]
    )


def settings(options: Namespace) -> dict[str, Any]:
    """Return what a run has of its own."""
    for name in options.train:
        if not options.data and name not in TRAIN:
            raise ValueError(
                f"--train {name}: there is none of this name.{nearest(name, TRAIN)} "
                f"There are {', '.join(TRAIN)}, and the folders of --data."
            )
    return {"task": "anli", "train": tuple(options.train)}


def load(options: Namespace) -> Task:
    """Return the training sets as one, and the rounds of ANLI."""
    if options.data:
        read = {
            name: data.from_folder(data.find(options.data, name, itself=False))
            for name in dict.fromkeys([*options.train, *(f"anli_{r}" for r in ROUNDS)])
        }
    else:
        anli = data.from_hub("facebook/anli")
        read = {
            f"anli_{r}": {s: anli[f"{s}_{r}"] for s in ("train", "dev", "test")} for r in ROUNDS
        }
        read |= {n: data.from_hub(TRAIN[n][0]) for n in options.train if n not in read}
    train, dropped = [], {}
    for name in options.train:
        if "train" not in read[name]:
            raise DataError(f"{name} has no train rows, it holds {', '.join(read[name])}.")
        rows = read[name]["train"]
        train.append(data.check(rows, f"{name}, train", TEXTS, LABELS))
        if len(rows) > len(train[-1]):
            dropped[name] = len(rows) - len(train[-1])
    splits = {}
    for split in ("dev", "test"):
        rounds = [
            data.check(read[f"anli_{r}"][split], f"anli_{r}, {split}", TEXTS, LABELS)
            for r in ROUNDS
            if split in read[f"anli_{r}"]
        ]
        named = [
            rows.add_column("round", [r] * len(rows))
            for r, rows in zip(ROUNDS, rounds, strict=True)
        ]
        splits[split] = concatenate_datasets(named)
    return Task("anli", concatenate_datasets(train), splits, LABELS, measure, dropped=dropped)


def measure(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
    """Return the accuracy on all rows, and on those of each round."""
    labels = np.array(rows["label"])
    found = {"all": metrics.accuracy(predictions, labels)}
    if "round" in rows.column_names:
        rounds = np.array(rows["round"])
        for r in ROUNDS:
            found[r] = metrics.accuracy(predictions[rounds == r], labels[rounds == r])
    return found


SCRIPT = command.Script("anli", __doc__, options, settings, load, {"max_length": 256})
arguments, runs, main = SCRIPT.arguments, SCRIPT.runs, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
