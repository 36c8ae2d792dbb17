r"""Fine-tune an encoder on the intents of what people type, or on any classification of texts.

Reports accuracy; where there is a label "oos" (out of scope), as in clinc150, also the accuracy on
the rows in scope and the recall of those out of scope. Without arguments it trains on the embedded
intents, whose test sentences have adversarial twins.

    python examples/intent.py --solver plain noise freelb --seeds 0 1 2
    python examples/intent.py --task banking77 --shots 10 --updates 300 --hold-out 770 --solver mat
    python examples/intent.py --task clinc150 --data path/to/folders --solver smart
    python examples/intent.py --data rotten_tomatoes --model roberta-base --lr 2e-5
    python examples/intent.py --report
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command
from common.options import positive
from common.parameters import known
from common.places import is_here, rows_of

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from common.data import Task

EMBEDDED = "intents"
HUB = {"banking77": ("PolyAI/banking77",), "clinc150": ("clinc/clinc_oos", "plus")}
TEXT = ("text", "sentence")
LABEL = ("label_name", "label", "intent")


def options(group: Any) -> None:
    """Add the options of this script."""
    text = f"intents (the embedded set), {', '.join(HUB)}, or a set in --data (default: intents)"
    group.add_argument("--task", metavar="NAME", help=text)
    text = (
        "a folder with train, dev or validation, test, ... as .jsonl or .jsonl.gz, or with a "
        "folder NAME or NAME_subset of them; or the name of a hub data set. Rows have a text "
        "(text or sentence) and a label (label_name, label or intent)"
    )
    group.add_argument("--data", default="", metavar="SOURCE", help=text)
    text = "train on N rows of each label, drawn by the seed"
    group.add_argument("--shots", type=positive, default=0, metavar="N", help=text)


def settings(options: Namespace) -> dict[str, Any]:
    """Return what a run has of its own."""
    name = options.task or (Path(options.data).absolute().name if options.data else EMBEDDED)
    if not options.data:
        known("--task", name, [EMBEDDED, *HUB], ", and those of --data")
    elif is_here(options.data):
        rows_of(options.data, name)
    return {"task": name}


def load(options: Namespace) -> Task:
    """Return the task with its rows."""
    from common import data

    name, source = settings(options)["task"], options.data
    if name == EMBEDDED and not source:
        splits = data.from_folder(Path(__file__).parent / "data" / EMBEDDED)
    elif not source:
        splits = data.from_hub(*HUB[name])
    elif is_here(source):
        splits = data.from_folder(data.find(source, name))
    else:
        splits = data.from_hub(source)
    return classification(name, splits)


def classification(name: str, splits: Mapping[str, Dataset]) -> Task:
    """Return the task of texts with labels of any names, numbered in their order."""
    import numpy as np
    from datasets import Dataset

    from common import data, metrics

    texts = {split: _values(rows, TEXT, f"{name}, {split}") for split, rows in splits.items()}
    labels = {split: _values(rows, LABEL, f"{name}, {split}") for split, rows in splits.items()}
    order = _numbering(name, labels)
    numbered = {
        split: Dataset.from_dict(
            {"text": texts[split], "label": [order[label] for label in labels[split]]}
        )
        for split in splits
    }
    outside = order.get("oos")

    def measure(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
        gold = np.array(rows["label"])
        found = {"accuracy": metrics.accuracy(predictions, gold)}
        out = gold == outside
        if outside is not None and out.any():
            found["in scope"] = metrics.accuracy(predictions[~out], gold[~out])
            found["out-of-scope recall"] = metrics.accuracy(predictions[out], gold[out])
        return found

    return data.task(name, numbered, ("text",), [str(label) for label in order], measure)


def _numbering(name: str, labels: Mapping[str, list[Any]]) -> dict[Any, int]:
    """Return the numbers of the labels of the training rows; other splits may hold no others."""
    from mixadv.robustness.data import DataError

    for split, column in labels.items():
        for i, label in enumerate(column, 1):
            if not isinstance(label, (str, int)):
                kinds = "a string or a whole number"
                raise DataError(f"{name}, {split}, row {i}: label is {label!r}, not {kinds}.")
    trained = set(labels.get("train", []))
    if not trained:
        raise DataError(f"{name} has no train rows, it holds {', '.join(labels)}.")
    if len(trained) == 1:
        raise DataError(f"{name}, train has one label alone, {trained}: there is nothing to learn.")
    if len({type(label) for label in trained}) > 1:
        raise DataError(f"{name}, train mixes strings and numbers as labels.")
    for split, column in labels.items():
        unknown = sorted(set(column) - trained, key=str)[:5]
        if unknown:
            raise DataError(f"{name}, {split} has labels that train lacks: {unknown}.")
    return {label: i for i, label in enumerate(sorted(trained))}


def _values(rows: Dataset, names: tuple[str, ...], where: str) -> list[Any]:
    """Return the first of these columns that the rows have; labels by name if they have one."""
    from datasets import ClassLabel

    from mixadv.robustness.data import DataError

    for name in names:
        if name in rows.column_names:
            feature, values = rows.features[name], rows[name][:]
            return feature.int2str(values) if isinstance(feature, ClassLabel) else values
    held = ", ".join(rows.column_names)
    raise DataError(f"{where} has no column {' or '.join(map(repr, names))}, it has {held}.")


SCRIPT = command.Script("intent", __doc__, options, settings, load, {"max_length": 64})
arguments, runs, main = SCRIPT.arguments, SCRIPT.runs, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
