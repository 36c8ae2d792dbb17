"""The parts of an evaluation: records of each row, and what they come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from mixadv.certificate import Exploitability
from mixadv.equilibrium import exploitability
from mixadv.game import Game
from mixadv.robustness.ascents import token_norm
from mixadv.robustness.batches import Batch, text_batches
from mixadv.robustness.data import Rows
from mixadv.robustness.kept import Kept, digest
from mixadv.robustness.predictions import predict
from mixadv.robustness.statistics import Estimate, bootstrap, bootstrap_difference
from mixadv.robustness.vicinity import LossIncrease, accuracy_at_radii, loss_increase
from mixadv.tokens import Attack, WordSubstitution, summary

STEP = 32  # rows attacked between two writes
Record = dict[str, Any]


@dataclass
class Sections:
    """Computes sections as a report holds them, each once.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the model.
        rows: the clean ones.
        places: of those that are attacked, in the order of their records.
        kept: what was found before.
        batch_size: rows that the model reads at a time.
        max_length: tokens of a row.
        seed: of random starts.
    """

    model: nn.Module
    tokenizer: Any
    rows: Rows
    places: Sequence[int]
    kept: Kept
    batch_size: int
    max_length: int | None
    seed: int
    attacked: Rows = field(init=False)
    key: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.attacked = taken(self.rows, self.places)
        self.key = {
            "rows": digest([self.attacked.texts, self.attacked.labels, self.places]),
            "seed": self.seed,
        }

    # Predictions -------------------------------------------------------------------------------

    def predictions(
        self, name: str, rows: Rows, game: Game | None = None, what: str = ""
    ) -> Record:
        """Return how rows are predicted.

        Args:
            name: of the rows.
            rows: to read.
            game: the mixture of whose samples predicts, in place of the model.
            what: the learner that predicts, as its weights are digested; empty for those there are.
        """

        def compute() -> Record:
            batches = self._batches(rows, range(len(rows)))
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

        key = {"rows": digest([rows.texts, rows.labels]), "learner": what}
        return self.kept.once(name, key, compute)

    def shifted(self, clean: Record, sets: Mapping[str, Rows]) -> dict[str, Record]:
        """Return how shifted sets are predicted, and the drop against the clean rows."""
        right = np.array(clean["per row"]["correct"])
        found = {name: self.predictions(name, rows) for name, rows in sets.items()}
        for one in found.values():
            drop = bootstrap_difference(right, np.array(one["per row"]["correct"]))
            one["drop"] = estimate(drop)
        return found

    def learners(self, game: Game, sets: Mapping[str, Rows], last: Mapping[str, Record]) -> Record:
        """Return what the last weights, their mean and the mixture of their samples predict."""
        found = {"last": dict(last)}
        learner = game.learner
        if learner is not None and learner.average_decay is not None:
            with game.averaged():
                weights = digest(self.model)
                found["mean"] = {
                    name: self.predictions(f"{name}, mean", rows, what=weights)
                    for name, rows in sets.items()
                }
        if learner is not None and learner.samples:
            weights = digest(game.learner_samples)
            found["mixture"] = {
                name: self.predictions(f"{name}, mixture", rows, game, weights)
                for name, rows in sets.items()
            }
        sums = ("rows", "accuracy", "loss", "ece")
        return {
            who: {name: {key: one[key] for key in sums} for name, one in of.items()}
            for who, of in found.items()
        }

    # In balls around the embeddings ------------------------------------------------------------

    def unit(self) -> float:
        """Return the mean L2 norm of a token's embedding."""

        def measure() -> float:
            return token_norm(self.model, self._batches(self.attacked, self.places))

        return self.kept.once("unit", self.key, measure)

    def radii(self, clean: Record, radii: Sequence[float], steps: int, unit: float) -> Record:
        """Return the accuracy at the end of PGD at radius 0 and at each of the others."""
        right = clean["per row"]["correct"]
        columns = [[right[place] for place in self.places]]
        radii = sorted(set(radii) - {0})
        for radius in radii:

            def compute(part: slice, radius: float = radius) -> list[bool]:
                [correct] = accuracy_at_radii(
                    self.model, self._part(part), [radius], steps=steps, unit=unit, seed=self.seed
                )
                return correct.tolist()

            key = {"radius": radius, "steps": steps, "unit": unit}
            columns.append(self._records(f"radius {radius:g}", key, compute))
        accuracy = [estimate(bootstrap(np.array(column))) for column in columns]
        return {"radii": [0, *radii], "accuracy": accuracy, "per row": {"correct": columns}}

    def loss_increase(self, radius: float, steps: int, restarts: int, unit: float) -> Record:
        """Return by how much the loss of rows classified correctly can be raised in a ball."""

        def compute(part: slice) -> list[Record]:
            found = loss_increase(
                self.model,
                self._part(part),
                radius=radius,
                steps=steps,
                restarts=restarts,
                unit=unit,
                seed=self.seed,
            )
            columns = {name: getattr(found, name).tolist() for name in INCREASE}
            return _rows(columns)

        key = {"radius": radius, "steps": steps, "restarts": restarts, "unit": unit}
        each = _columns(self._records(f"loss increase, {radius:g}", key, compute), INCREASE)
        found = {"radius": radius, "length": radius * unit, "restarts": restarts, "per row": each}
        measured = increase_of(found)
        sums = measured.summary(measured.correct) if measured.correct.any() else {"n": 0}
        return {**sums, **found}

    # Attacks and the game ----------------------------------------------------------------------

    def attack(self, name: str, attack: WordSubstitution) -> Record:
        """Return what word substitution makes of the rows."""
        if attack.max_length is None:
            attack = dataclasses.replace(attack, max_length=self.max_length)
        key = {"attack": digest(dataclasses.replace(attack, batch_size=1))}

        def compute(part: slice) -> list[Record]:
            texts, labels = self.attacked.texts[part], self.attacked.labels[part]
            found = attack.attack(self.model, self.tokenizer, texts, labels)
            return [dataclasses.asdict(one) for one in found]

        each = self._records(name, key, compute)
        return {**summary(Attack(**record) for record in each), "per row": each}

    def exploitability(self, game: Game, steps: int, restarts: int) -> Record:
        """Return a lower bound of what the adversary gains by leaving the game's strategy."""

        def compute(part: slice) -> list[Record]:
            batches = self._part(part)
            closures = (batch.closure for batch in batches)
            found = exploitability(game, closures, steps=steps, restarts=restarts)
            order = np.argsort([place for batch in batches for place in batch.rows])
            columns = {name: getattr(found, name)[order].tolist() for name in PAYOFFS}
            return [{**row, "response": found.response} for row in _rows(columns)]

        key = {"game": digest([game.solver, game.state_dict()]), "steps": steps}
        records = self._records("exploitability", {**key, "restarts": restarts}, compute)
        each = _columns(records, PAYOFFS)
        payoffs = [torch.tensor(_floats(each[name])) for name in PAYOFFS]
        found = Exploitability(*payoffs, records[0]["response"], level=0.95)
        low, high = found.interval or (torch.nan, torch.nan)
        return {
            "solver": type(game.solver).__name__,
            "payoff": game.solver.gain,
            **{name: float(np.mean(_floats(each[name]))) for name in PAYOFFS},
            "gain": estimate(Estimate(float(found.gain), float(low), float(high))),
            "response": found.response,
            "per row": each,
        }

    # Rows --------------------------------------------------------------------------------------

    def _records(self, name: str, key: Record, compute: Any) -> list[Any]:
        return self.kept.rows(name, {**self.key, **key}, len(self.attacked), compute, STEP)

    def _part(self, part: slice) -> list[Batch]:
        places = self.places[part]
        return self._batches(taken(self.rows, places), places)

    def _batches(self, rows: Rows, places: Sequence[int]) -> list[Batch]:
        """Return the batches of rows, with their places in the data set."""
        found = text_batches(
            self.model,
            self.tokenizer,
            rows,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        return [batch._replace(rows=[places[i] for i in batch.rows]) for batch in found]


INCREASE = ("clean_loss", "correct", "from_zero", "from_random")
PAYOFFS = ("played", "reached")


def taken(rows: Rows, places: Iterable[int]) -> Rows:
    """Return some of the rows."""
    places = list(places)
    texts: Any = [rows.texts[i] for i in places]
    return Rows(texts, [rows.labels[i] for i in places], rows.name)


def increase_of(section: Mapping[str, Any]) -> LossIncrease:
    """Return the loss increase that a section of a report holds."""
    each = section["per row"]
    columns = {name: np.array(_floats(each[name])) for name in INCREASE if name != "correct"}
    return LossIncrease(
        **columns, correct=np.array(each["correct"], bool), radius=section["length"]
    )


def estimate(found: Estimate) -> dict[str, float]:
    """Return an estimate by the names of its parts."""
    return found._asdict()


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[Record]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(rows: Sequence[Record], names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in names}


def _floats(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
