"""Rows of text to measure on, checked against the model."""

from __future__ import annotations

import gzip
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

UNLABELLED = -1  # how public sets mark rows without a gold label

COLUMNS: tuple[str | tuple[str, str], ...] = (
    ("text", "pair"),
    "text",
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    "sentence",
)
"""Where texts are looked for, in this order."""


class DataError(ValueError):
    """The data are not what the model can be measured on."""


@dataclass(frozen=True)
class Rows:
    """Texts with gold labels.

    Attributes:
        texts: one each, or pairs.
        labels: numbers of the model's labels.
        name: where they come from.
        groups: the name of each row's group, where there are groups.
    """

    texts: list[str] | list[tuple[str, str]]
    labels: list[int]
    name: str = "rows"
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> list[int]:
        """Characters of each text, or of both."""
        return [len(text) if isinstance(text, str) else sum(map(len, text)) for text in self.texts]

    def take(self, places: Sequence[int]) -> Rows:
        """Return some of the rows, in the order of their places."""
        texts: Any = [self.texts[i] for i in places]
        groups = None if self.groups is None else [self.groups[i] for i in places]
        return Rows(texts, [self.labels[i] for i in places], self.name, groups)


def read_rows(
    source: Any,
    model: nn.Module,
    *,
    text: str | tuple[str, str] | None = None,
    label: str = "label",
    groups: str | None = None,
    name: str = "",
) -> Rows:
    """Return rows that a classifier can be measured on, or say at once why it cannot.

    Args:
        source: path of a file of JSON lines (`.gz` too), a `datasets.Dataset`, a list of dicts, or
            a dict of columns.
        model: of transformers; its `config` knows the labels.
        text: the column of the texts, or the two of pairs; None looks for the usual ones.
        label: the column of labels: their numbers, or their names in `config.label2id`, whatever
            their case. The numbers of a `ClassLabel` are read as its names where the model knows
            those, since the order of one need not be that of the other. Rows of −1, without a gold
            label, are left out.
        groups: the column of groups, numbers or names; None has none.
        name: for errors and reports; by default that of the file.

    Raises:
        DataError: for what cannot be read, with source, row (from 1) and value.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(1, 1)
        >>> model.config = SimpleNamespace(num_labels=2, label2id={"bad": 0, "good": 1})
        >>> read_rows([{"text": "A fine film.", "label": "good"}], model)
        Rows(texts=['A fine film.'], labels=[1], name='rows', groups=None)
    """
    known = _labels_of(model)
    name = name or (Path(source).name if isinstance(source, (str, Path)) else "rows")
    columns = _columns(source, name)
    wanted = text or _find(columns, name)
    several = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if len(several) not in (1, 2):
        raise DataError(f"text names one column or two, got {text!r}.")
    for column in (*several, label, *([] if groups is None else [groups])):
        if column not in columns:
            raise DataError(f"{name} has no column {column!r}, it has {', '.join(columns)}.")
    texts = _texts({column: columns[column] for column in several}, name)
    labels = _numbers(_named(source, label, columns[label], known), known, label, name)
    gold = [i for i, number in enumerate(labels) if number != UNLABELLED]
    if not gold:
        raise DataError(f"{name} has no gold labels: {label!r} is {UNLABELLED} in all its rows.")
    named = None if groups is None else _groups(columns[groups], groups, name)
    return Rows(texts, labels, name, named).take(gold)


def _labels_of(model: nn.Module) -> dict[str, int]:
    """Return the numbers of the model's labels by name."""
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_labels", None)
    if not isinstance(count, int):
        raise DataError(
            f"{type(model).__name__} has no config.num_labels: rows are read for classifiers of "
            "transformers. Make the batches of another model yourself, as mixadv.robustness.Batch."
        )
    kind = getattr(config, "problem_type", None)
    many = kind == "multi_label_classification"
    if count == 1 or many or kind == "regression":
        raise DataError(
            f"{type(model).__name__} predicts {'several labels of a text' if many else 'a number'} "
            f"(num_labels={count}, problem_type={kind!r}), and robustness is measured of one class."
        )
    named = getattr(config, "label2id", None) or {}
    return {**{f"LABEL_{i}": i for i in range(count)}, **named} if len(named) < count else named


def _columns(source: Any, name: str) -> dict[str, list[Any]]:
    columns = _all_columns(source, name)
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name} has columns of different lengths: {lengths}.")
    if not any(lengths.values()):
        raise DataError(f"{name} holds no rows.")
    return columns


def _all_columns(source: Any, name: str) -> dict[str, list[Any]]:
    if isinstance(source, (str, Path)):
        source = _lines(Path(source).expanduser(), name)
    names: Any = getattr(source, "column_names", None)
    if isinstance(names, Mapping):
        raise DataError(f"{name} has splits {', '.join(names)}: give one of them.")
    if isinstance(source, Mapping):
        return {str(column): list(values) for column, values in source.items()}
    if isinstance(names, Sequence) and hasattr(source, "__getitem__"):
        return {column: list(source[column]) for column in names}
    if isinstance(source, Sequence):
        return _of_rows(source, name)
    raise DataError(
        f"{name}: rows are read from a file of JSON lines, a datasets.Dataset, a list of dicts "
        f"or a dict of columns, not from {type(source).__name__}."
    )


def _lines(path: Path, name: str) -> list[Any]:
    """Return what the lines of a file hold."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    opened = gzip.open if path.suffix == ".gz" else open
    found = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{name}, line {number} is not JSON: {error}.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return found


def _of_rows(rows: Sequence[Any], name: str) -> dict[str, list[Any]]:
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {i} is {row!r:.60}, not a dict of columns.")
        for column in rows[0]:
            if column not in row:
                raise DataError(f"{name}, row {i} has no {column!r}, it has {', '.join(row)}.")
    return {column: [row[column] for row in rows] for column in rows[0]} if rows else {}


def _find(columns: Mapping[str, Any], name: str) -> str | tuple[str, str]:
    for usual in COLUMNS:
        if all(c in columns for c in ((usual,) if isinstance(usual, str) else usual)):
            return usual
    raise DataError(
        f"{name} has none of the usual columns of text, it has {', '.join(columns)}: name one, or "
        "the two of pairs, with text=."
    )


def _texts(columns: Mapping[str, list[Any]], name: str) -> Any:
    """Return the texts of one column, or the pairs of two."""
    for column, values in columns.items():
        for i, value in enumerate(values, 1):
            if not isinstance(value, str):
                raise DataError(f"{name}, row {i}: {column} is {value!r:.60}, not a string.")
    first, *second = columns.values()
    return list(zip(first, *second, strict=True)) if second else first


def _groups(values: list[Any], column: str, name: str) -> list[str]:
    """Return the names of groups, which are names or numbers."""
    for i, value in enumerate(values, 1):
        if not isinstance(value, (str, int)):
            raise DataError(
                f"{name}, row {i}: {column} is {value!r:.60}, and a group has a name or a number."
            )
    return [str(value) for value in values]


def _named(source: Any, label: str, values: list[Any], known: Mapping[str, int]) -> list[Any]:
    """Return a `ClassLabel`'s names in place of its numbers, where the model knows them all."""
    features = getattr(source, "features", None) or {}
    names = getattr(features.get(label), "names", None) or []
    if not names or any(_number(label_name, known) is None for label_name in names):
        return values
    places = [_place(value) for value in values]
    return [names[i] if 0 <= i < len(names) else v for i, v in zip(places, values, strict=True)]


def _place(value: Any) -> int:
    """Return a whole number of any library as Python's; −1 of what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return -1


def _number(value: Any, known: Mapping[str, int]) -> int | None:
    """Return the number of a label, None for one that the model does not know."""
    if isinstance(value, str):
        folded = {label.casefold(): number for label, number in known.items()}
        return known.get(value, folded.get(value.casefold()))
    try:
        number = operator.index(value)
    except TypeError:
        return None
    fits = not isinstance(value, bool) and (number == UNLABELLED or number in known.values())
    return number if fits else None


def _numbers(values: list[Any], known: Mapping[str, int], label: str, name: str) -> list[int]:
    numbers = []
    first = next((i for i, value in enumerate(values) if value != UNLABELLED), 0)
    for i, value in enumerate(values, 1):
        if isinstance(value, str) != isinstance(values[first], str) and value != UNLABELLED:
            raise DataError(
                f"{name}, row {i}: {label} is {value!r}, and in row {first + 1} it is "
                f"{values[first]!r}: give names of labels, or their numbers."
            )
        number = _number(value, known)
        if number is None:
            labels = ", ".join(f"{i} {n}" for n, i in sorted(known.items(), key=lambda x: x[1]))
            raise DataError(
                f"{name}, row {i}: {label} is {value!r:.60}, which the model does not know; its "
                f"labels are {labels} ({UNLABELLED} for none)."
            )
        numbers.append(number)
    return numbers
