"""What attacks make of rows, as sections of a report: records of each row, and their sums."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mixadv.equilibrium import exploitability
from mixadv.exploited import Exploitability
from mixadv.game import Game
from mixadv.robustness.ascents import token_norm
from mixadv.robustness.batches import Batch
from mixadv.robustness.data import Rows
from mixadv.robustness.measured import Measured, Record, estimate
from mixadv.robustness.statistics import Estimate, bootstrap
from mixadv.robustness.vicinity import LossIncrease, accuracy_at_radii, loss_increase
from mixadv.tokens import Attack, WordSubstitution, attack_summary

STEP = 32  # rows attacked between two writes


@dataclass
class Attacked:
    """Attacks rows, each way once.

    Attributes:
        by: reads the rows.
        rows: the clean ones.
        places: of those that are attacked, in the order of their records.
        seed: of random starts.
    """

    by: Measured
    rows: Rows
    places: Sequence[int]
    seed: int
    attacked: Rows = field(init=False)
    key: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.attacked = taken(self.rows, self.places)
        rows = [self.attacked.texts, self.attacked.labels, self.places]
        self.key = {"rows": rows, "seed": self.seed}

    # In balls around the embeddings ------------------------------------------------------------

    def unit(self) -> float:
        """Return the mean L2 norm of a token's embedding in the rows that are attacked."""

        def measure() -> float:
            return token_norm(self.by.model, self.by.batches(self.attacked, self.places))

        return self.by.kept.once("unit", self.key, measure)

    def radii(self, clean: Record, radii: Sequence[float], steps: int, unit: float) -> Record:
        """Return the accuracy at the end of PGD at radius 0 and at each of the others."""
        right = clean["per row"]["correct"]
        columns = [[right[place] for place in self.places]]
        radii = sorted(set(radii) - {0})
        for radius in radii:

            def compute(part: slice, radius: float = radius) -> list[bool]:
                [correct] = accuracy_at_radii(
                    self.by.model,
                    self._part(part),
                    [radius],
                    steps=steps,
                    unit=unit,
                    seed=self.seed,
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
                self.by.model,
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
            attack = dataclasses.replace(attack, max_length=self.by.max_length)
        key = {"attack": dataclasses.replace(attack, batch_size=1)}

        def compute(part: slice) -> list[Record]:
            texts, labels = self.attacked.texts[part], self.attacked.labels[part]
            found = attack.attack(self.by.model, self.by.tokenizer, texts, labels)
            return [dataclasses.asdict(attack) for attack in found]

        each = self._records(name, key, compute)
        return {**attack_summary(Attack(**record) for record in each), "per row": each}

    def exploitability(self, game: Game, steps: int, restarts: int) -> Record:
        """Return a lower bound of what the adversary gains by leaving the game's strategy."""

        def compute(part: slice) -> list[Record]:
            batches = self._part(part)
            closures = (batch.closure for batch in batches)
            found = exploitability(game, closures, steps=steps, restarts=restarts)
            order = np.argsort([place for batch in batches for place in batch.rows])
            columns = {name: getattr(found, name)[order].tolist() for name in PAYOFFS}
            return [{**row, "response": found.response} for row in _rows(columns)]

        key = {"game": [game.solver, game.state_dict()], "steps": steps}
        records = self._records("exploitability", {**key, "restarts": restarts}, compute)
        each = _columns(records, PAYOFFS)
        played, reached = (torch.tensor(_floats(each[name])) for name in PAYOFFS)
        found = Exploitability(played, reached, records[0]["response"], level=0.95)
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
        return self.by.kept.rows(name, {**self.key, **key}, len(self.attacked), compute, STEP)

    def _part(self, part: slice) -> list[Batch]:
        places = self.places[part]
        return self.by.batches(taken(self.rows, places), places)


INCREASE = ("clean_loss", "correct", "from_zero", "from_random")
PAYOFFS = ("played", "reached")


def drawn(rows: Rows, count: int | None, seed: int) -> list[int]:
    """Return the places of the rows that are attacked: in parts of like length, longest first.

    What does not fit in memory breaks at once; in a part they are in the order of the data.
    """
    lengths = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in rows.texts]
    every = range(len(rows))
    drawn = random.Random(seed).sample(every, min(count or len(rows), len(rows)))
    order = sorted(drawn, key=lambda place: (-lengths[place], place))
    parts = [sorted(order[start : start + STEP]) for start in range(0, len(order), STEP)]
    return [place for part in parts for place in part]


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


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[Record]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(rows: Sequence[Record], names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in names}


def _floats(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
