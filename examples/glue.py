"""Fine-tune on a GLUE task, plainly or against an adversary."""

import sys
from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from mixadv.errors import nearest
from training import command, data, metrics
from training.data import DataError, Task


class Glue(NamedTuple):
    """A task of the benchmark: the columns of its texts, its labels, its metrics."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: dict[str, metrics.Metric]


ACCURACY = {"accuracy": metrics.accuracy}
F1 = {"F1": metrics.f1, "accuracy": metrics.accuracy}
TWO_SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), {"Matthews": metrics.matthews}),
    "sst2": Glue(("sentence",), ("negative", "positive"), ACCURACY),
    "mrpc": Glue(TWO_SENTENCES, ("not_equivalent", "equivalent"), F1),
    "stsb": Glue(TWO_SENTENCES, None, {"Pearson": metrics.pearson, "Spearman": metrics.spearman}),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), F1),
    "mnli": Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ACCURACY),
    "qnli": Glue(("question", "sentence"), ENTAILMENT, ACCURACY),
    "rte": Glue(TWO_SENTENCES, ENTAILMENT, ACCURACY),
    "wnli": Glue(TWO_SENTENCES, ("not_entailment", "entailment"), ACCURACY),
}


def options(parser: Any) -> None:
    """Add the options of this script."""
    parser.add_argument("--task", default="cola", metavar="TASK", help=", ".join(TASKS))


def settings(options: Namespace) -> dict[str, Any]:
    """Return what a run on the task has of its own."""
    if options.task not in TASKS:
        raise ValueError(
            f"--task {options.task}: there is none of this name.{nearest(options.task, TASKS)} "
            f"There are {', '.join(TASKS)}."
        )
    return {}


def load(options: Namespace) -> Task:
    """Return the task with its rows."""
    name, glue = options.task, TASKS[options.task]
    where = options.data or "nyu-mll/glue"
    if options.data:
        splits = data.from_folder(data.find(options.data, name))
    else:
        splits = data.from_hub("nyu-mll/glue", name)

    def measure(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
        labels = np.array(rows["label"])
        return {name: metric(predictions, labels) for name, metric in glue.metrics.items()}

    return data.task(name, splits, where, glue.texts, glue.labels, measure)


SCRIPT = command.Script("glue", __doc__, options, settings, load, {})
arguments, runs, main = SCRIPT.arguments, SCRIPT.runs, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
