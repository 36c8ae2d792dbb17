"""Fine-tune on the intents of what people type, or on any text classification."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from mixadv.errors import nearest
from training import command, data, metrics
from training.data import DataError, Task

EMBEDDED = Path(__file__).parent / "data"
HUB = {"banking77": ("PolyAI/banking77",), "clinc150": ("clinc/clinc_oos", "plus")}
OUT_OF_SCOPE = "oos"


def options(parser: Any) -> None:
    """Add the options of this script."""
    parser.add_argument("--task", metavar="NAME")
    parser.add_argument("--shots", type=int, default=0)


def name(options: Namespace) -> str:
    """Return the name of the data set: --task, or the last part of --data."""
    if options.task or options.data:
        return options.task or Path(options.data).expanduser().resolve().name
    return "intents"


def settings(options: Namespace) -> dict[str, Any]:
    """Return what a run has of its own."""
    known = ["intents", *HUB]
    if not options.data and name(options) not in known:
        raise ValueError(
            f"--task {options.task}: there is none of this name.{nearest(options.task, known)} "
            f"There are {', '.join(known)}, and those of --data."
        )
    return {"task": name(options)}


def load(options: Namespace) -> Task:
    """Return the task with its rows."""
    task = name(options)
    if options.data and (Path(options.data).expanduser().is_dir() or options.data[0] in "./~"):
        splits = data.from_folder(data.find(options.data, task))
    elif options.data:
        splits = data.from_hub(options.data)
    elif task in HUB:
        splits = data.from_hub(*HUB[task])
    else:
        splits = data.from_folder(data.find(str(EMBEDDED), task))
    return classification(task, splits, options.data or task)


def classification(name: str, splits: dict[str, Dataset], where: str) -> Task:
    """Return the task of sentences with labels of any names, which are numbered in order."""
    labels = {
        split: _labels(rows, f"{where}, {split}") for split, rows in splits.items() if len(rows)
    }
    known = set(labels.get("train", []))
    for split, column in labels.items():
        unknown = sorted(set(column) - known, key=str)[:5]
        if unknown and known:
            raise DataError(f"{where}, {split} has labels that train lacks: {unknown}.")
    if known and len({type(label) for label in known}) > 1:
        raise DataError(f"{where} mixes strings and numbers as labels.")
    if len(known) == 1:
        raise DataError(f"{where}, train has one label alone, {known}: nothing to classify.")
    order = sorted(known)
    number = {label: i for i, label in enumerate(order)}
    numbered = {
        split: Dataset.from_dict(
            {
                "text": rows[_text(rows, f"{where}, {split}")][:],
                "label": [number[label] for label in labels[split]],
            }
        )
        for split, rows in splits.items()
    }
    names = [str(label) for label in order]
    outside = names.index(OUT_OF_SCOPE) if OUT_OF_SCOPE in names else None

    def measure(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
        gold = np.array(rows["label"])
        found = {"accuracy": metrics.accuracy(predictions, gold)}
        if outside is not None:
            out = gold == outside
            found["in scope"] = metrics.accuracy(predictions[~out], gold[~out])
            found["out-of-scope recall"] = metrics.accuracy(predictions[out], gold[out])
        return found

    return data.task(name, numbered, where, ("text",), names, measure)


def _text(rows: Dataset, where: str) -> str:
    for column in ("text", "sentence"):
        if column in rows.column_names:
            return column
    raise DataError(
        f"{where} has no column 'text' or 'sentence', it has {', '.join(rows.column_names)}."
    )


def _labels(rows: Dataset, where: str) -> list[Any]:
    """Return the labels of rows, by name where they have one."""
    for column in ("label_name", "label", "intent"):
        if column in rows.column_names:
            break
    else:
        raise DataError(f"{where} has no column 'label', it has {', '.join(rows.column_names)}.")
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, ClassLabel):
        return feature.int2str(values)
    for i, value in enumerate(values):
        if not isinstance(value, (str, int)):
            raise DataError(
                f"{where}, row {i + 1}: {column} is {value!r}, not a string or a whole number."
            )
    return values


SCRIPT = command.Script("intent", __doc__, options, settings, load, {"max_length": 64})
arguments, runs, main = SCRIPT.arguments, SCRIPT.runs, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
