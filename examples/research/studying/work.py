"""One job of a study: a run from its training to its line of results."""

import importlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import intent
from common import data
from common.data import Task
from common.evaluation import Evaluator
from common.loop import Keeping, Training
from common.results import Run
from mixadv.equilibrium import exploitability
from mixadv.model.closure import Closure

STEPS, RESTARTS = 5, 2  # of the response that exploitability is measured by
COUNT, ROWS = 64, 16  # rows, of which in a batch


@cache
def load(script: str, name: str, folder: str, train: tuple[str, ...] = ()) -> Task:
    """Return a task, from the hub or, where one is given, from a folder."""
    module = importlib.import_module(script)
    argv = ["--train", *train] if train else ["--task", name]
    if folder and name != intent.EMBEDDED:
        argv += ["--data", folder]
    return module.load(module.arguments(argv))


def train(run: Run, script: str, folder: str, evaluate: tuple[str, ...], output: Path) -> Any:
    """Train a run to its end; return its line of results. Its checkpoint stays until that is kept.

    A run with held-out rows is evaluated on these alone; others save their model. Where the solver
    keeps a mean or samples of the weights, `learners` holds the metrics of these. Weights that
    `diverged` are evaluated, as what the method leads to, and not measured further.
    """
    task = load(script, run.task, folder, run.train)
    reported = not run.hold_out
    splits = {name: task.splits[name] for name in evaluate} if reported else {}
    keeping = Keeping(output, save=reported, silent=True)
    training = Training(run, replace(task, splits=splits), keeping)
    result = training.complete()
    result["classifies"] = task.labels is not None
    result["answers"] = dict(training.evaluator.different)
    result["sizes"] = sizes(task)
    result["diverged"] = not all(p.isfinite().all() for p in training.model.parameters())
    if reported and training.game is not None and not result["diverged"]:
        result["learners"] = learners(training)
        result["exploitability"] = exploited(training, task.splits[evaluate[0]])
    return result


def sizes(task: Task) -> dict[str, int]:
    """Return how many rows a task has in training and in each split."""
    return {"train": len(task.train), **{name: len(rows) for name, rows in task.splits.items()}}


def learners(training: Training) -> dict[str, Any]:
    """Return the metrics of the mean and of the mixture of the weights, where they are kept."""
    learner = training.game.learner if training.game else None
    kept = []
    if learner is not None and learner.average_decay is not None:
        kept.append("mean")
    if learner is not None and learner.keeps_samples and training.task.labels is not None:
        kept.append("mixture")
    found = {}
    for name in kept:
        run = replace(training.run, evaluate=name)
        last = training.evaluator
        other = Evaluator(run, training.task, last.model, last.encode, training.game, last.part)
        found[name] = other.metrics(training.splits, training.splits)
    return found


def exploited(training: Training, rows: data.Dataset) -> Any:
    """Return the lower bound of what the adversary gains by leaving the solver's strategy."""
    game = training.game
    if game is None or not game.solver.radius or training.task.labels is None:
        return None
    starts = range(0, min(COUNT, len(rows)), ROWS)
    closures = (losses(training.model, training.encode(rows[i : i + ROWS])) for i in starts)
    with training.evaluator.weights():
        found = exploitability(game, closures, steps=STEPS, restarts=RESTARTS)
    low, high = found.interval or (found.gain, found.gain)
    return {"gain": float(found.gain), "low": float(low), "high": float(high)}


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Closure:
    """Return a closure with one loss per sample."""

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(**batch).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"), logits

    return forward
