r"""Fine-tune an encoder on a task of GLUE, plainly or against an adversary.

Reports the official metrics: Matthews' correlation for cola; F1 and accuracy for mrpc and qqp;
Pearson's and Spearman's correlation for stsb, which is a regression; accuracy for the others, for
mnli on the matched rows (dev) and on the mismatched ones. All are times 100 in the table.

    python examples/glue.py --task cola --solver plain freelb mat --seeds 0 1 2
    python examples/glue.py --task rte --model roberta-base --lr 2e-5 --epochs 10 --bf16 \
        --hold-out 200 --evaluate-every 50 --save --solver smart --set smoothness_weight=3
    python examples/glue.py --task mrpc --data path/to/glue --limit 1000 --config solvers.toml
    python examples/glue.py --report
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any, NamedTuple

from common import command
from common.parameters import known
from common.places import rows_of

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from common.data import Task


class Glue(NamedTuple):
    """A task of the benchmark: the columns of its texts, its labels, the names of its metrics."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]


ACCURACY = ("accuracy",)
F1 = ("F1", "accuracy")
TWO_SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), ("Matthews",)),
    "sst2": Glue(("sentence",), ("negative", "positive"), ACCURACY),
    "mrpc": Glue(TWO_SENTENCES, ("not_equivalent", "equivalent"), F1),
    "stsb": Glue(TWO_SENTENCES, None, ("Pearson", "Spearman")),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), F1),
    "mnli": Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ACCURACY),
    "qnli": Glue(("question", "sentence"), ENTAILMENT, ACCURACY),
    "rte": Glue(TWO_SENTENCES, ENTAILMENT, ACCURACY),
    "wnli": Glue(TWO_SENTENCES, ("not_entailment", "entailment"), ACCURACY),
}


def options(group: Any) -> None:
    """Add the options of this script."""
    text = f"{', '.join(TASKS)} (default: %(default)s)"
    group.add_argument("--task", default="cola", metavar="TASK", help=text)
    text = (
        "in place of the hub (nyu-mll/glue): a folder with train, dev or validation, test, ... as "
        ".jsonl or .jsonl.gz with the hub's columns, or with a folder TASK or TASK_subset of them"
    )
    group.add_argument("--data", default="", metavar="FOLDER", help=text)


def settings(options: Namespace) -> dict[str, Any]:
    """Return what a run on the task has of its own."""
    known("--task", options.task, TASKS)
    if options.data:
        rows_of(options.data, options.task)
    return {}


def load(options: Namespace) -> Task:
    """Return the task with its rows."""
    import numpy as np

    from common import data
    from common.metrics import METRICS

    settings(options)  # raises for what is no task: a study calls this at once
    name, glue = options.task, TASKS[options.task]
    if options.data:
        splits = data.from_folder(data.find(options.data, name))
    else:
        splits = data.from_hub("nyu-mll/glue", name)

    def measure(predictions: np.ndarray, rows: Dataset) -> dict[str, float]:
        labels = np.array(rows["label"])
        return {metric: METRICS[metric](predictions, labels) for metric in glue.metrics}

    return data.task(name, splits, glue.texts, glue.labels, measure)


SCRIPT = command.Script("glue", __doc__, options, settings, load, {"learning_rate": 2e-4})
arguments, runs, main = SCRIPT.arguments, SCRIPT.runs, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
