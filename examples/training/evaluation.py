"""Metrics of a model on the splits of a task, as it reads them and under attack."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

import mixadv
from mixadv.equilibrium import best_response
from training.data import Task, lengths
from training.model import Encoder
from training.results import Run

ROWS = 32  # evaluated at a time
STEPS = 5  # of the attack

Predict = Callable[[dict[str, torch.Tensor]], torch.Tensor]


class Evaluator:
    """Evaluates a model that is being trained, with the weights that the run asks for."""

    def __init__(self, run: Run, task: Task, model: Any, encode: Encoder, accelerator: Any) -> None:
        self.run = run
        self.task = task
        self.model = accelerator.unwrap_model(model)
        self.encode = encode
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.unit = mean_token_norm(self.model, encode(task.train[:64])) if run.radii else 0.0

    def __call__(
        self, splits: dict[str, Dataset], names: Iterable[str], game: mixadv.Game | None
    ) -> dict[str, dict[str, float]]:
        """Return the metrics of the splits named."""
        training = self.model.training
        self.model.eval()
        predict: Predict = lambda batch: self.model(**batch).logits  # noqa: E731
        weights: Any = nullcontext()
        if self.run.evaluate == "mean":
            weights = game.averaged()
        elif self.run.evaluate == "mixture":
            predict = lambda batch: game.mixture(lambda: self.model(**batch))  # noqa: E731
        with weights:
            result = {name: self.measure(splits[name], predict) for name in names}
        self.model.train(training)
        return result

    def attacked(self, rows: Dataset, game: mixadv.Game | None) -> dict[str, dict[str, float]]:
        """Return the metrics at the end of PGD, by the name of its radius."""
        rows = rows.select(range(min(len(rows), self.run.attack_rows or len(rows))))
        self.model.eval()
        with game.averaged() if self.run.evaluate == "mean" else nullcontext():
            return {
                f"PGD {radius:g}": self.measure(rows, self.attack(radius * self.unit))
                for radius in self.run.radii
            }

    def attack(self, radius: float) -> Predict:
        """Return predictions at the end of PGD in an L2 ball of embeddings around each row."""
        if radius == 0:
            return lambda batch: self.model(**batch).logits
        attack = mixadv.PGD(
            steps=STEPS, radius=radius, step_size=2.5 * radius / STEPS, unit="absolute"
        )
        attacker = mixadv.Game(self.model, attack)
        return lambda batch: best_response(attacker, lambda: self.model(**batch)).predictions

    def measure(self, rows: Dataset, predict: Predict) -> dict[str, float]:
        """Return the task's metrics of predictions; each process predicts a part of the rows."""
        characters = lengths(rows)
        order = sorted(range(len(rows)), key=characters.__getitem__)[self.rank :: self.processes]
        found: list[tuple[int, float]] = []
        for start in range(0, len(order), ROWS):
            chunk = order[start : start + ROWS]
            with torch.no_grad():
                logits = predict(self.encode(rows[chunk]))
            answers = logits.squeeze(-1) if self.task.labels is None else logits.argmax(-1)
            found += zip(chunk, answers.tolist(), strict=True)
        predictions = np.array([answer for _, answer in sorted(gather_object(found))])
        return self.task.measure(predictions, rows)


def mean_token_norm(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the mean L2 norm of a real token's embedding: the unit in which radii are given."""
    unit = mixadv.Game(model, mixadv.PGD()).explain(lambda: model(**batch)).unit
    assert unit is not None
    return unit
