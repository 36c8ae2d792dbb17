"""Metrics of a model on the splits of a task, as it reads them and under attack."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

import mixadv
from common.data import Measure, Task, lengths
from common.model import Encoder
from common.results import Run
from mixadv.equilibrium import best_response

ROWS = 32  # evaluated at a time
STEPS = 5  # of the attack

Metrics = dict[str, dict[str, float]]
"""Metrics by the name of the split."""
Predict = Callable[[dict[str, torch.Tensor]], torch.Tensor]


class Evaluator:
    """Evaluates a model that is being trained, with the weights that the run asks for."""

    def __init__(
        self,
        run: Run,
        task: Task,
        model: torch.nn.Module,
        encode: Encoder,
        game: mixadv.Game | None,
        part: slice,
        shown: bool = False,
    ) -> None:
        self.run = run
        self.regression = task.labels is None
        self.task_measure: Measure = task.measure
        self.model = model
        self.encode = encode
        self.game = game
        self.part = part  # of the rows that this process predicts
        self.shown = shown  # whether a terminal gets a bar
        self.different: dict[str, int] = {}  # answers, by the split that they were given to last
        self.unit = mean_token_norm(model, encode(task.train[:64])) if run.radii else 0.0

    @contextmanager
    def weights(self) -> Iterator[torch.nn.Module]:
        """Put the model in evaluation mode, with the weights that are evaluated."""
        training = self.model.training
        self.model.eval()
        averaged = self.run.evaluate == "mean" and self.game is not None
        with self.game.averaged() if averaged else nullcontext():
            yield self.model
        self.model.train(training)

    def metrics(self, splits: Mapping[str, Dataset], names: Iterable[str]) -> Metrics:
        """Return the metrics of the splits named; note how many answers differ in each."""
        found = {}
        with self.weights():
            for name in names:
                answers = self.answers(splits[name], self.predict, name)
                self.different[name] = len(np.unique(answers))
                found[name] = self.task_measure(answers, splits[name])
        return found

    def attacked(self, rows: Dataset) -> Metrics:
        """Return the metrics at the end of PGD at each radius, by the name of the radius."""
        rows = rows.select(range(min(len(rows), self.run.attack_rows or len(rows))))
        with self.weights():
            return {
                name: self.measure(rows, self.attack(radius * self.unit), name)
                for name, radius in ((f"PGD {radius:g}", radius) for radius in self.run.radii)
            }

    def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return logits, of the mixture if the run asks for it."""
        with torch.no_grad():
            if self.run.evaluate == "mixture" and self.game is not None:
                return self.game.mixture(lambda: self.model(**batch))
            return self.model(**batch).logits

    def attack(self, radius: float) -> Predict:
        """Return a function to the logits at the end of PGD in an L2 ball around each row."""
        if radius == 0:
            return self.predict
        attack = mixadv.PGD(
            steps=STEPS, radius=radius, step_size=2.5 * radius / STEPS, unit="absolute"
        )
        attacker = mixadv.Game(self.model, attack)
        return lambda batch: best_response(attacker, lambda: self.model(**batch)).predictions

    def measure(self, rows: Dataset, predict: Predict, name: str = "") -> dict[str, float]:
        """Return the task's metrics of predictions."""
        return self.task_measure(self.answers(rows, predict, name), rows)

    def answers(self, rows: Dataset, predict: Predict, name: str = "") -> np.ndarray:
        """Return a label or number for each row; each process predicts its part of the rows."""
        characters = lengths(rows)
        order = sorted(range(len(rows)), key=characters.__getitem__)[self.part]
        found: list[tuple[int, float]] = []
        starts = range(0, len(order), ROWS)
        bar = tqdm(starts, f"evaluation, {name}", leave=False, disable=None if self.shown else True)
        for start in bar:
            chunk = order[start : start + ROWS]
            logits = predict(self.encode(rows[chunk]))
            answers = logits.squeeze(-1) if self.regression else logits.argmax(-1)
            found += zip(chunk, answers.tolist(), strict=True)
        return np.array([answer for _, answer in sorted(gather_object(found))])


def mean_token_norm(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Return the mean L2 norm of a real token's embedding: the unit in which radii are given."""
    unit = mixadv.Game(model, mixadv.PGD()).explain(lambda: model(**batch)).unit
    assert unit is not None
    return unit
