"""One call that measures how robust a fine-tuned classifier of texts is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixadv.checks import check_integer, check_number
from mixadv.game import Game
from mixadv.mixtures import Mean, Mixture
from mixadv.model.modules import unwrap
from mixadv.model.replay import evaluating
from mixadv.reports.kept import Kept, as_json, digest
from mixadv.robustness.ascents import check_unit
from mixadv.robustness.data import DataError, Rows, read_rows
from mixadv.robustness.groups import with_groups
from mixadv.robustness.report import Report
from mixadv.robustness.sections import Attacked, Measured, Record, drawn, made_of
from mixadv.round.validate import check_seed
from mixadv.tokens import WordSubstitution
from mixadv.tokens.reading.encoding import longest
from mixadv.tokens.substitution.reader import Reader

CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured of a classifier, and how: the same for all that are to be compared.

    Attributes:
        text: the column of the texts, or the two of pairs; None finds the usual ones.
        label: the column of labels, numbers of the model's or their names.
        groups: the column of groups, by whose names accuracy is measured too, clean and under each
            attack; None has none.
        shifted: other sets of rows by name, like the data.
        attacks: by name.
        radii: of PGD, in units; 0 is always among them. None at all leaves it out.
        increase_radius: of the loss increase, in units; None leaves it out.
        steps: of each ascent.
        restarts: how many ascents of the loss increase start at random; of the best response, how
            many besides that from the strategy in play.
        unit: the length of which radii are multiples; None takes the `token_norm` of this model on
            the rows that are attacked. To compare models in one ball, give each the unit of one.
        rows: how many are attacked, drawn by the seed alone; None takes all.
        folder: keeps each part when it is finished, and an attack every 32 rows, under weights,
            data and settings: a killed call goes on when it is made again, a finished one is read.
        batch_size: rows that the model reads at a time.
        max_length: tokens; the rest of a text is cut. None asks the model.
        seed: of the rows drawn and of random starts.
        progress: whether to show bars, in a terminal.
        name: of the model, in tables.

    Raises:
        ValueError: for a number that nothing can be measured with, or a name taken by the data.
        TypeError: for an attack that is none.
    """

    text: str | tuple[str, str] | None = None
    label: str = "label"
    groups: str | None = None
    shifted: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, WordSubstitution] = field(default_factory=dict)
    radii: Sequence[float] = (0.05, 0.1, 0.2)
    increase_radius: float | None = 0.1
    steps: int = 10
    restarts: int = 3
    unit: float | None = None
    rows: int | None = None
    folder: str | Path | None = None
    batch_size: int = 32
    max_length: int | None = None
    seed: int = 0
    progress: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        for what in ("steps", "restarts", "batch_size", "rows", "max_length"):
            value = getattr(self, what)
            if value is not None or what not in ("rows", "max_length"):
                check_integer("evaluate", what, value, 1)
        check_seed(self.seed)
        for radius in (*self.radii, 0.0 if self.increase_radius is None else self.increase_radius):
            check_number("evaluate", "a radius", radius)
        if self.unit is not None:
            check_unit("evaluate", self.unit)
        for name, attack in self.attacks.items():
            if not isinstance(attack, WordSubstitution):
                raise TypeError(
                    f"The attack {name!r} is {attack!r:.80}: attacks are WordSubstitution of "
                    "mixadv.tokens, by name."
                )
        if CLEAN in self.shifted:
            raise ValueError(
                f"A shifted set is named {CLEAN!r}, as the data are: name it otherwise."
            )

    def measure(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: Any,
        game: Game | None = None,
        mixture: Mixture | None = None,
    ) -> Report:
        """Return what `evaluate` does of one model, or of one mixture."""
        if isinstance(model, Mixture):
            model, mixture = self._mean(model, game, mixture), model
        _check_players(model, game, mixture)
        sets = self._read(model, data)
        reads = model.mixture.model if isinstance(model, Mean) else model
        reader = Reader(reads, tokenizer, self.max_length, self.batch_size, 0)  # refuses slow ones
        most = longest(model, tokenizer)
        if self.max_length and most and self.max_length > most:
            raise ValueError(f"max_length is {self.max_length}, and the model reads {most} tokens.")
        what = made_of(model.mixture) if isinstance(model, Mean) else model
        key = {"model": what, "tokenizer": tokenizer, "tokens": reader.max_length}
        kept = Kept(None if self.folder is None else Path(self.folder), key, self.progress)
        by = Measured(model, tokenizer, kept, self.batch_size, self.max_length)
        places = drawn(sets[CLEAN], self.rows, self.seed)
        under = Attacked(by, sets[CLEAN], places, self.seed)
        with torch.inference_mode(False), evaluating(model):
            about = self._about(under)
            found = {"about": about, CLEAN: by.predictions(CLEAN, sets[CLEAN])}
            if self.shifted:
                found["shifted"] = by.shifted(found[CLEAN], {n: sets[n] for n in self.shifted})
            if not isinstance(model, Mean):
                found |= self._shifted(under, found[CLEAN], about["unit"])
            if self.attacks:
                found["attacks"] = {n: under.attack(n, a) for n, a in self.attacks.items()}
            if mixture is not None:
                how = {"unit": about["unit"], "steps": self.steps, "restarts": self.restarts}
                found["mixture"] = under.mixture(mixture, self.radii, **how)
                if len(mixture) > 1 and not isinstance(model, Mean):
                    found["beside"] = under.mixture(Mixture([model]), self.radii, **how)
            if game is not None and game.solver.radius is not None:
                found["exploitability"] = under.exploitability(game, self.steps, self.restarts + 1)
            if game is not None:
                last = {CLEAN: found[CLEAN], **found.get("shifted", {})}
                found["learners"] = by.learners(game, sets, last)
        return Report(as_json(with_groups(found, sets)))

    def _mean(self, mixture: Mixture, game: Game | None, other: Mixture | None) -> Mean:
        """Return what predicts where a mixture is evaluated; refuse what is of one model alone."""
        if game is not None or other is not None:
            raise ValueError(
                "A mixture is evaluated by itself, without game= and mixture=: these belong to one "
                "model."
            )
        return Mean(mixture)

    def _read(self, model: nn.Module, data: Any) -> dict[str, Rows]:
        """Return the data and the shifted sets by name."""
        sets: dict[str, Rows] = {}
        columns = {"text": self.text, "label": self.label, "groups": self.groups}
        for name, rows in {CLEAN: data, **self.shifted}.items():
            if not isinstance(rows, Rows):
                rows = read_rows(rows, model, **columns, name="" if name == CLEAN else name)
            sets[name] = rows
            own, clean = (
                "one text" if isinstance(part.texts[0], str) else "two texts"
                for part in (rows, sets[CLEAN])
            )
            if own != clean:
                raise DataError(
                    f"{name} has {own} in a row, and the data have {clean}: name the columns by "
                    "text=."
                )
        return sets

    def _about(self, under: Attacked) -> Record:
        rows, model = under.rows, under.by.model
        saved = Path(getattr(model.config, "name_or_path", "")).name
        return {
            "model": self.name or saved or type(model).__name__,
            "data": rows.name,
            "rows": len(rows),
            "attacked": under.places,
            "texts": digest([rows.texts, rows.labels]),
            "unit": under.unit() if self.unit is None else self.unit,
            "measured": self.unit is None,
            "steps": self.steps,
            "restarts": self.restarts,
            "seed": self.seed,
        }

    def _shifted(self, under: Attacked, clean: Record, unit: float) -> Record:
        found = {}
        if len(self.radii):
            found["radii"] = under.radii(clean, self.radii, self.steps, unit)
        if self.increase_radius is not None:
            found["loss increase"] = under.loss_increase(
                self.increase_radius, self.steps, self.restarts, unit
            )
        return found


def _check_players(model: nn.Module, game: Any, mixture: Any) -> None:
    """Refuse a game or a mixture that is none, and a game of another model."""
    if game is not None and not isinstance(game, Game):
        raise TypeError(f"game must be a mixadv.Game, such as optimizer.game, got {game!r:.80}.")
    if game is not None and unwrap(game.model) is not unwrap(model):
        raise ValueError(
            "The game is played on another model than the one evaluated: pass the game that "
            "trained this model, or leave game out."
        )
    if mixture is not None and not isinstance(mixture, Mixture):
        raise TypeError(f"mixture must be a mixadv.mixtures.Mixture, got {mixture!r:.80}.")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    *,
    game: Game | None = None,
    mixture: Mixture | None = None,
    **settings: Any,
) -> Report:
    """Measure a classifier on clean rows, on shifted ones, and under attack.

    1. Accuracy, of each group too, loss and calibration; what is lost of it on each shifted set.
    2. Accuracy at the end of PGD in embedding space, at each radius.
    3. The largest increase of the loss found in a ball (Zhu et al. 2020, table 5).
    4. Word substitution, by each of the attacks.
    5. With the game that trained the model: a lower bound of its strategy's exploitability, if its
       solver has a radius; and what the mean of the weights and the mixture of their samples
       predict, where it keeps them.
    6. With a mixture: its accuracy under attacks that are made for mixtures (`mixture_accuracy`),
       at each radius, beside the mean of its members, their vote, and each member alone; and that
       of the model under the same attacks, made for it, as the mixture of itself.

    Of a mixture in the model's place these are 1. and 4., by the mean of its probabilities, and 6.

    Attacks, in embedding space too, are on the same rows. The model is in evaluation mode
    meanwhile; it and the random state are left as they were, after an exception too. Of several
    processes one alone may call this, unless the model is sharded or in fp16, or the game has not
    played yet: they wait for each other then.

    Args:
        model: a sequence classifier of transformers, or a mixture of such.
        tokenizer: of the model, a fast one.
        data: a file of JSON lines, a `datasets.Dataset`, a list of dicts or a dict of columns, as
            for `mixadv.robustness.read_rows`; or `Rows`.
        game: that trained the model, such as `optimizer.game`.
        mixture: that is attacked in the same balls, to be compared with the model; of it too.
        settings: those of `Evaluation`, which has their defaults.

    Raises:
        ValueError: before any pass, for data or arguments that nothing can be measured with; for a
            file in the folder that no evaluation wrote.
        TypeError: for an attack or a game that is none, an unknown setting, or a slow tokenizer.
        OSError: for a folder that is a file or cannot be made.

    Example:
        >>> from mixadv.robustness import evaluate
        >>> report = evaluate(model, tokenizer, "test.jsonl", rows=300)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    return Evaluation(**settings).measure(model, tokenizer, data, game, mixture)
