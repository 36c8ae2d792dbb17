"""How sets of rows are predicted, as sections of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from mixadv.game import Game
from mixadv.reports.kept import Kept, digest
from mixadv.robustness.batches import Batch, text_batches
from mixadv.robustness.data import Rows
from mixadv.robustness.predictions import predict
from mixadv.robustness.statistics import Estimate, bootstrap_difference

Record = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Reads rows, each set once.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the model.
        kept: what was found before.
        batch_size: rows that the model reads at a time.
        max_length: tokens of a row.
    """

    model: nn.Module
    tokenizer: Any
    kept: Kept
    batch_size: int
    max_length: int | None

    def predictions(
        self, name: str, rows: Rows, game: Game | None = None, what: Any = None
    ) -> Record:
        """Return how rows are predicted.

        Args:
            name: of the rows.
            rows: to read.
            game: the mixture of whose samples predicts, in place of the model.
            what: the learner that predicts; None for the model as it was given.
        """

        def compute() -> Record:
            batches = self.batches(rows, range(len(rows)))
            hidden = None if self.kept.progress else True
            bar = tqdm(batches, desc=name, unit="batch", disable=hidden)
            found = predict(self.model, bar, mixture=game)
            each = {
                "correct": found.correct,
                "confidence": found.probabilities.max(-1),
                "loss": found.losses,
            }
            sums = {"accuracy": estimate(found.accuracy), "loss": estimate(found.loss)}
            return {"rows": len(rows), **sums, "ece": found.ece, "per row": each}

        key = {"rows": [rows.texts, rows.labels], "learner": what}
        return self.kept.once(name, key, compute)

    def shifted(self, clean: Record, sets: Mapping[str, Rows]) -> dict[str, Record]:
        """Return how shifted sets are predicted, and the drop against the clean rows."""
        right = np.array(clean["per row"]["correct"])
        found = {name: self.predictions(name, rows) for name, rows in sets.items()}
        for name, section in found.items():
            drop = bootstrap_difference(right, np.array(section["per row"]["correct"]))
            section["drop"] = estimate(drop)
            section["texts"] = digest([sets[name].texts, sets[name].labels])
        return found

    def learners(self, game: Game, sets: Mapping[str, Rows], last: Mapping[str, Record]) -> Record:
        """Return what the last weights, their mean and the mixture of their samples predict."""
        found = {"last": dict(last)}
        learner = game.learner
        if learner is not None and learner.average_decay is not None:
            with game.averaged():
                found["mean"] = {
                    name: self.predictions(f"{name}, mean", rows, what=self.model)
                    for name, rows in sets.items()
                }
        if learner is not None and learner.samples:
            found["mixture"] = {
                name: self.predictions(f"{name}, mixture", rows, game, game.learner_samples)
                for name, rows in sets.items()
            }
        sums = ("rows", "accuracy", "loss", "ece")
        return {
            who: {name: {key: values[key] for key in sums} for name, values in own.items()}
            for who, own in found.items()
        }

    def batches(self, rows: Rows, places: Sequence[int]) -> list[Batch]:
        """Return the batches of rows, with their places in the data set."""
        found = text_batches(
            self.model,
            self.tokenizer,
            rows,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        return [batch._replace(rows=[places[i] for i in batch.rows]) for batch in found]


def estimate(found: Estimate) -> dict[str, float]:
    """Return an estimate by the names of its parts."""
    return found._asdict()
