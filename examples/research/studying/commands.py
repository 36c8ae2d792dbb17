"""The command that trains one run of a study by itself."""

import json
import shlex
from dataclasses import fields

from common.results import Run
from studying.findings import Findings

_FLAGS = {"learning_rate": "--lr", "seed": "--seeds"}  # others are named as the setting is
_TOLD = ("task", "train", "data", "parameters")  # in words of their own
_ALWAYS = ("epochs", "batch_size", "learning_rate", "warmup", "weight_decay", "max_length", "seed")


def command(script: str, run: Run) -> str:
    """Return the command line of a script that trains and evaluates a run.

    Example:
        >>> command("glue", Run(task="cola", epochs=2.0, bf16=True))  # doctest: +ELLIPSIS
        'python examples/glue.py --task cola ... --epochs 2.0 ... --bf16'
    """
    words = ["python", f"examples/{script}.py"]
    words += ["--train", *run.train] if script == "anli" else ["--task", run.task]
    for of in fields(Run):
        value = getattr(run, of.name)
        if of.name in _TOLD or (of.name not in _ALWAYS and value == of.default):
            continue
        words.append(_FLAGS.get(of.name, "--" + of.name.replace("_", "-")))
        words += [] if value is True else map(str, value if isinstance(value, tuple) else [value])
    if run.parameters:
        words += ["--set", *(f"{name}={json.dumps(v)}" for name, v in run.parameters.items())]
    return shlex.join(words)


def commands(findings: Findings, task: str) -> str:
    """Return the commands of the first seed of every method of a task that a run is finished of."""
    study = findings.study
    runs = [
        study.reported(task, method, study.seeds[0], findings.results)
        for method in findings.finished(task)
    ]
    return "\n".join(command(study.tasks[task].script, run) for run in runs if run is not None)
