"""One call that measures how robust a fine-tuned classifier of texts is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from mixadv.checks import check_integer, check_number
from mixadv.game import Game
from mixadv.model.modules import unwrap
from mixadv.model.replay import evaluating
from mixadv.reports.kept import Kept, as_json, digest
from mixadv.robustness.attacked import Attacked, drawn
from mixadv.robustness.data import DataError, Rows, read_rows
from mixadv.robustness.measured import Measured
from mixadv.robustness.report import Report
from mixadv.round.validate import check_seed
from mixadv.tokens import WordSubstitution
from mixadv.tokens.reading.encoding import longest
from mixadv.tokens.substitution.reader import Reader

EMPTY: Mapping[str, Any] = MappingProxyType({})
CLEAN = "clean"


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    *,
    text: str | tuple[str, str] | None = None,
    label: str = "label",
    shifted: Mapping[str, Any] = EMPTY,
    attacks: Mapping[str, WordSubstitution] = EMPTY,
    radii: Sequence[float] = (0.05, 0.1, 0.2),
    increase_radius: float | None = 0.1,
    steps: int = 10,
    restarts: int = 3,
    unit: float | None = None,
    rows: int | None = None,
    game: Game | None = None,
    folder: str | Path | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
    name: str = "",
) -> Report:
    """Measure a classifier on clean rows, on shifted ones, and under attack.

    1. Accuracy, loss and calibration on the data; what is lost of the accuracy on each shifted set.
    2. Accuracy at the end of PGD in embedding space, at each radius.
    3. The largest increase of the loss found in a ball (Zhu et al. 2020, table 5).
    4. Word substitution, by each of the attacks.
    5. With the game that trained the model: a lower bound of its strategy's exploitability, if its
       solver has a radius; and what the mean of the weights and the mixture of their samples
       predict, where it keeps them.

    Attacks, in embedding space too, are on the same rows. The model is in evaluation mode
    meanwhile; it and the random state are left as they were, after an exception too. Of several
    processes one alone may call this, unless the model is sharded or in fp16, or the game has not
    played yet: they wait for each other then.

    Args:
        model: a sequence classifier of transformers.
        tokenizer: of the model, a fast one.
        data: a file of JSON lines, a `datasets.Dataset`, a list of dicts or a dict of columns, as
            for `mixadv.robustness.read_rows`; or `Rows`.
        text: the column of the texts, or the two of pairs; None finds the usual ones.
        label: the column of labels, numbers of the model's or their names.
        shifted: other sets of rows by name, like `data`.
        attacks: by name.
        radii: of PGD, in units; 0 is always among them. None at all leaves it out.
        increase_radius: of the loss increase, in units; None leaves it out.
        steps: of each ascent.
        restarts: how many ascents of the loss increase start at random; of the best response, how
            many besides that from the strategy in play.
        unit: the length of which radii are multiples; None takes the `token_norm` of this model on
            the rows that are attacked. To compare models in one ball, give each the unit of one.
        rows: how many are attacked, drawn by the seed alone; None takes all.
        game: that trained the model, such as `optimizer.game`.
        folder: keeps each part when it is finished, and an attack every 32 rows, under weights,
            data and settings: a killed call goes on when it is made again, a finished one is read.
        batch_size: rows that the model reads at a time.
        max_length: tokens; the rest of a text is cut. None asks the model.
        seed: of the rows drawn and of random starts.
        progress: whether to show bars, in a terminal.
        name: of the model, in tables.

    Raises:
        ValueError: before any pass, for data or arguments that nothing can be measured with; for a
            file in the folder that no evaluation wrote.
        TypeError: for an attack or a game that is none, or a slow tokenizer.
        OSError: for a folder that is a file or cannot be made.

    Example:
        >>> from mixadv.robustness import evaluate
        >>> report = evaluate(model, tokenizer, "test.jsonl", rows=300)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    for what, value in {"steps": steps, "restarts": restarts, "batch_size": batch_size}.items():
        check_integer("evaluate", what, value, 1)
    for what, value in {"rows": rows, "max_length": max_length}.items():
        if value is not None:
            check_integer("evaluate", what, value, 1)
    check_seed(seed)
    for radius in (*radii, *([] if increase_radius is None else [increase_radius])):
        check_number("evaluate", "a radius", radius)
    if unit is not None:
        check_number("evaluate", "unit", unit)
    _check_players(model, attacks, game)
    clean, *others = (
        source
        if isinstance(source, Rows)
        else read_rows(source, model, text=text, label=label, name=of)
        for of, source in {"": data, **shifted}.items()
    )
    sets = dict(zip(shifted, others, strict=True))
    for of, rows_of in sets.items():
        one, other = (isinstance(found.texts[0], str) for found in (rows_of, clean))
        if one != other:
            kinds = {True: "one text", False: "two texts"}
            raise DataError(
                f"{of} has {kinds[one]} in a row, and the data have {kinds[other]}: name the "
                "columns by text=."
            )
    if CLEAN in sets:
        raise ValueError(f"A shifted set is named {CLEAN!r}, as the data are: name it otherwise.")
    reader = Reader(model, tokenizer, max_length, batch_size, 0)  # refuses slow tokenizers
    most = longest(model, tokenizer)
    if max_length and most and max_length > most:
        raise ValueError(f"max_length is {max_length}, and the model reads {most} tokens.")

    key = {"model": model, "tokenizer": tokenizer, "tokens": reader.max_length}
    kept = Kept(None if folder is None else Path(folder), key, progress)
    places = drawn(clean, rows, seed)
    made = Measured(model, tokenizer, kept, batch_size, max_length)
    under = Attacked(made, clean, places, seed)
    with evaluating(model):
        own = under.unit() if unit is None else unit
        about = {
            "model": name or _name(model),
            "data": clean.name,
            "rows": len(clean),
            "attacked": places,
            "texts": digest([clean.texts, clean.labels]),
            "unit": own,
            "measured": unit is None,
            "steps": steps,
            "restarts": restarts,
            "seed": seed,
        }
        found: dict[str, Any] = {"about": about, CLEAN: made.predictions(CLEAN, clean)}
        if sets:
            found["shifted"] = made.shifted(found[CLEAN], sets)
        if len(radii):
            found["radii"] = under.radii(found[CLEAN], radii, steps, own)
        if increase_radius is not None:
            found["loss increase"] = under.loss_increase(increase_radius, steps, restarts, own)
        if attacks:
            found["attacks"] = {of: under.attack(of, attack) for of, attack in attacks.items()}
        if game is not None and game.solver.radius is not None:
            found["exploitability"] = under.exploitability(game, steps, restarts + 1)
        if game is not None:
            last = {CLEAN: found[CLEAN], **found.get("shifted", {})}
            found["learners"] = made.learners(game, {CLEAN: clean, **sets}, last)
    return Report(as_json(found))


def _check_players(
    model: nn.Module, attacks: Mapping[str, WordSubstitution], game: Game | None
) -> None:
    for name, attack in attacks.items():
        if not isinstance(attack, WordSubstitution):
            raise TypeError(
                f"The attack {name!r} is {attack!r:.80}: attacks are WordSubstitution of "
                "mixadv.tokens, by name."
            )
    if game is None:
        return
    if not isinstance(game, Game):
        raise TypeError(f"game must be a mixadv.Game, such as optimizer.game, got {game!r:.80}.")
    if unwrap(game.model) is not unwrap(model):
        raise ValueError(
            "The game is played on another model than the one evaluated: pass the game that "
            "trained this model, or leave game out."
        )


def _name(model: nn.Module) -> str:
    return Path(getattr(model.config, "name_or_path", "")).name or type(model).__name__
