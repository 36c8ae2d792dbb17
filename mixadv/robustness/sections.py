"""What is measured of rows, as sections of a report: records of each row, and their sums."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mixadv.equilibrium import exploitability
from mixadv.exploited import Exploitability
from mixadv.game import Game
from mixadv.mixtures import Mean, Mixture
from mixadv.reports.kept import Kept, digest
from mixadv.reports.shown import number
from mixadv.robustness.ascents import token_norm
from mixadv.robustness.data import Rows
from mixadv.robustness.mixture_accuracy import MixtureAccuracy, MixtureAttacks
from mixadv.robustness.predictions import Batch, predict, text_batches
from mixadv.robustness.statistics import Estimate, bootstrap, bootstrap_difference
from mixadv.robustness.vicinity import LossIncrease, accuracy_at_radii, loss_increase
from mixadv.tokens import Attack, WordSubstitution, attack_summary

STEP = 32  # rows attacked between two writes
INCREASE = ("clean_loss", "correct", "from_zero", "from_random")
MIXTURE = ("right", "settled", "worst")
PAYOFFS = ("played", "reached")
Record = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Reads rows, each set once, with a model that is in evaluation mode."""

    model: nn.Module
    tokenizer: Any
    kept: Kept
    batch_size: int
    max_length: int | None

    def predictions(
        self, name: str, rows: Rows, game: Game | None = None, learner: Any = None
    ) -> Record:
        """Return how rows are predicted, by the model or by the mixture of a game's samples.

        What is kept depends on the learner too, if that is not the model as it was given.
        """

        def compute() -> Record:
            batches = self.batches(rows, range(len(rows)))
            hidden = None if self.kept.progress else True
            bar = tqdm(batches, desc=name, unit="batch", disable=hidden)
            found = predict(self.model, bar, mixture=game)
            confidence = found.probabilities.max(-1)
            return {
                "rows": len(rows),
                "accuracy": found.accuracy._asdict(),
                "loss": found.loss._asdict(),
                "ece": found.ece,
                "per row": {
                    "correct": found.correct,
                    "confidence": confidence,
                    "loss": found.losses,
                },
            }

        key = {"rows": [rows.texts, rows.labels], "learner": learner}
        return self.kept.once(name, key, compute)

    def shifted(self, clean: Record, sets: Mapping[str, Rows]) -> dict[str, Record]:
        """Return how shifted sets are predicted, and the drop against the clean rows."""
        right = np.array(clean["per row"]["correct"])
        found = {name: self.predictions(name, rows) for name, rows in sets.items()}
        for name, section in found.items():
            drop = bootstrap_difference(right, np.array(section["per row"]["correct"]))
            section["drop"] = drop._asdict()
            section["texts"] = digest([sets[name].texts, sets[name].labels])
        return found

    def learners(self, game: Game, sets: Mapping[str, Rows], last: Mapping[str, Record]) -> Record:
        """Return what the last weights, their mean and the mixture of their samples predict."""
        found, learner = {"last": last}, game.learner

        def predicted(who: str, *how: Any) -> dict[str, Record]:
            return {name: self.predictions(f"{name}, {who}", r, *how) for name, r in sets.items()}

        if learner is not None and learner.average_decay is not None:
            with game.averaged():
                found["mean"] = predicted("mean", None, self.model)
        if learner is not None and learner.samples:
            found["mixture"] = predicted("mixture", game, game.learner_samples)
        sums = ("rows", "accuracy", "loss", "ece")
        return {
            who: {name: {key: values[key] for key in sums} for name, values in own.items()}
            for who, own in found.items()
        }

    def batches(self, rows: Rows, places: Sequence[int]) -> list[Batch]:
        """Return the batches of rows, with their places in the data set."""
        size = {"batch_size": self.batch_size, "max_length": self.max_length}
        found = text_batches(self.model, self.tokenizer, rows, **size)
        return [batch._replace(rows=[places[i] for i in batch.rows]) for batch in found]


@dataclass(frozen=True)
class Attacked:
    """Attacks some of the clean rows, each way once."""

    by: Measured
    rows: Rows
    places: Sequence[int]  # of those that are attacked, in the order of their records
    seed: int  # of random starts

    @property
    def key(self) -> Record:
        """What all that is kept of these rows depends on."""
        attacked = self.rows.take(self.places)
        return {"rows": [attacked.texts, attacked.labels, self.places], "seed": self.seed}

    def of(self, mixture: Mixture) -> Attacked:
        """Return the same attacks of a mixture."""
        return dataclasses.replace(self, by=dataclasses.replace(self.by, model=mixture))

    def unit(self) -> float:
        """Return the mean L2 norm of a token's embedding in the rows that are attacked."""

        def measure() -> float:
            model = self.by.model
            if not isinstance(model, Mean):
                return token_norm(model, self._batches(slice(None)))
            with model.mixture.member(0) as first:
                return token_norm(first, self.of(model.mixture)._batches(slice(None)))

        return self.by.kept.once("unit", self.key, measure)

    def radii(self, clean: Record, radii: Sequence[float], steps: int, unit: float) -> Record:
        """Return the accuracy at the end of PGD at radius 0 and at each of the others."""
        right, how = clean["per row"]["correct"], {"steps": steps, "unit": unit}
        columns = [[right[place] for place in self.places]]
        radii = sorted(set(radii) - {0})
        for radius in radii:

            def compute(part: slice, radius: float = radius) -> list[bool]:
                batches = self._batches(part)
                [correct] = accuracy_at_radii(
                    self.by.model, batches, [radius], **how, seed=self.seed
                )
                return correct.tolist()

            columns.append(self._kept(f"radius {radius:g}", {"radius": radius, **how}, compute))
        accuracy = [bootstrap(np.array(column))._asdict() for column in columns]
        return {"radii": [0, *radii], "accuracy": accuracy, "per row": {"correct": columns}}

    def loss_increase(self, radius: float, steps: int, restarts: int, unit: float) -> Record:
        """Return by how much the loss of rows classified correctly can be raised in a ball."""
        how = {"radius": radius, "steps": steps, "restarts": restarts, "unit": unit}

        def compute(part: slice) -> Iterable[tuple[Any, ...]]:
            found = loss_increase(self.by.model, self._batches(part), **how, seed=self.seed)
            return zip(*(getattr(found, name).tolist() for name in INCREASE), strict=True)

        each = _columns(INCREASE, self._kept(f"loss increase, {radius:g}", how, compute))
        found = {"radius": radius, "length": radius * unit, "restarts": restarts, "per row": each}
        measured = increase_of(found)
        sums = measured.summary(measured.correct) if measured.correct.any() else {"n": 0}
        return {**sums, **found}

    def mixture(self, mixture: Mixture, radii: Sequence[float], **how: Any) -> Record:
        """Return the accuracy of a mixture under attacks that are made for it, at each radius."""
        under = self.of(mixture)
        radii, found = sorted(set(radii) - {0}), []
        for radius in radii:
            attacks = MixtureAttacks(radius=radius, seed=self.seed, **how)

            def compute(part: slice, attacks: MixtureAttacks = attacks) -> Iterable[Any]:
                measured = attacks.measure(mixture, under._batches(part))
                columns = (getattr(measured, name).tolist() for name in MIXTURE)
                return zip(*columns, strict=True)

            key = {"mixture": made_of(mixture), "attacks": attacks}
            rows = under._kept(f"mixture, {radius:g}", key, compute)
            found.append(_columns(MIXTURE, rows))
        return _mixture(mixture.probabilities, radii, found)

    def attack(self, name: str, attack: WordSubstitution) -> Record:
        """Return what word substitution makes of the rows."""
        if attack.max_length is None:
            attack = dataclasses.replace(attack, max_length=self.by.max_length)

        def compute(part: slice) -> list[Record]:
            rows = self.rows.take(self.places[part])
            found = attack.attack(self.by.model, self.by.tokenizer, rows.texts, rows.labels)
            return [dataclasses.asdict(attack) for attack in found]

        each = self._kept(name, {"attack": dataclasses.replace(attack, batch_size=1)}, compute)
        return {**attack_summary(Attack(**record) for record in each), "per row": each}

    def exploitability(self, game: Game, steps: int, restarts: int) -> Record:
        """Return a lower bound of what the adversary gains by leaving the game's strategy."""
        how: Record = {"steps": steps, "restarts": restarts}

        def compute(part: slice) -> Iterable[tuple[Any, ...]]:
            batches = self._batches(part)
            found = exploitability(game, (batch.closure for batch in batches), **how)
            order = np.argsort([place for batch in batches for place in batch.rows])
            payoffs = (getattr(found, name)[order].tolist() for name in PAYOFFS)
            return ((*row, found.response) for row in zip(*payoffs, strict=True))

        key = {"game": [game.solver, game.state_dict()], **how}
        each = _columns([*PAYOFFS, "response"], self._kept("exploitability", key, compute))
        response = each.pop("response")[0]
        played, reached = (torch.tensor(_floats(each[name])) for name in PAYOFFS)
        found = Exploitability(played, reached, response, level=0.95)
        low, high = found.interval or (torch.nan, torch.nan)
        return {
            "solver": type(game.solver).__name__,
            "payoff": game.solver.gain,
            **{name: float(np.mean(_floats(each[name]))) for name in PAYOFFS},
            "gain": Estimate(float(found.gain), float(low), float(high))._asdict(),
            "response": response,
            "per row": each,
        }

    def _kept(self, name: str, key: Record, compute: Callable[[slice], Iterable[Any]]) -> list[Any]:
        return self.by.kept.rows(name, {**self.key, **key}, len(self.places), compute, STEP)

    def _batches(self, part: slice) -> list[Batch]:
        places = self.places[part]
        return self.by.batches(self.rows.take(places), places)


def drawn(rows: Rows, count: int | None, seed: int) -> list[int]:
    """Return the places of the rows that are attacked: in parts of like length, longest first.

    What does not fit in memory breaks at once; in a part they are in the order of the data.
    """
    lengths, every = rows.lengths, range(len(rows))
    drawn = random.Random(seed).sample(every, min(count or len(rows), len(rows)))
    order = sorted(drawn, key=lambda place: (-lengths[place], place))
    parts = [sorted(order[start : start + STEP]) for start in range(0, len(order), STEP)]
    return [place for part in parts for place in part]


def made_of(mixture: Mixture) -> list[Any]:
    """Return what a mixture predicts by, for a key of what is kept."""
    return [mixture.model, mixture.members, mixture.probabilities]


def increase_of(section: Mapping[str, Any]) -> LossIncrease:
    """Return the loss increase that a section of a report holds."""
    each = section["per row"]
    columns = {name: np.array(_floats(each[name])) for name in INCREASE if name != "correct"}
    return LossIncrease(
        **columns, correct=np.array(each["correct"], bool), radius=section["length"]
    )


def unit(about: Mapping[str, Any]) -> str:
    """Return what radii are multiples of."""
    return ("token norms of" if about["measured"] else "units of") + f" {number(about['unit'])}"


def mixtures_of(section: Mapping[str, Any]) -> list[MixtureAccuracy]:
    """Return what a section of a report holds of a mixture, at each radius."""
    columns = ([np.array(own[name]) for name in MIXTURE] for own in section["per row"])
    return [MixtureAccuracy(np.array(section["probabilities"]), *own) for own in columns]


def _mixture(probabilities: Tensor, radii: Sequence[float], found: Sequence[Record]) -> Record:
    """Return the accuracies that the rows of a mixture sum up to, at each radius."""
    section = {"probabilities": probabilities.numpy(), "radii": radii, "per row": found}
    measured = mixtures_of(section)
    return {
        **section,
        "accuracy": [{n: _estimates(x) for n, x in own.under().items()} for own in measured],
        "alone": [[_estimates(x) for x in own.alone().swapaxes(0, 1)] for own in measured],
        "best": [own.best + 1 for own in measured],
    }


def _estimates(rows: NDArray[np.float64]) -> list[Record]:
    """Return the accuracy of each column, with Wilson's interval where all rows are alike."""
    settled = ((column, np.isin(column, (0, 1)).all()) for column in rows.T)
    return [bootstrap(x.astype(bool) if whole else x)._asdict() for x, whole in settled]


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _floats(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
