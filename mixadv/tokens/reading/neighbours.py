"""A table of similar words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixadv.checks import check_integer
from mixadv.tokens.reading.vocabulary import Vocabulary

AT_ONCE = 2**24
"""Similarities held in memory at once: 64 MiB of them."""


class Neighbours(Mapping[str, tuple[str, ...]]):
    """Words and the words that may stand for them, the nearest first; looked up in any case.

    Words are kept in lower case and their neighbours as they are, each once. A word is no neighbour
    of its own, and one that has none is left out. The table is the user's: mixadv brings none.

    Args:
        table: neighbours by word.

    Raises:
        ValueError: for neighbours that are no list of strings, and for a table without any.

    Example:
        >>> neighbours = Neighbours({"film": ["movie", "picture", "Film"], "the": []})
        >>> neighbours["Film"], neighbours.of("cinema"), len(neighbours)
        (('movie', 'picture'), (), 1)
    """

    def __init__(self, table: Mapping[str, Iterable[str]]) -> None:
        rows: dict[str, dict[str, str]] = {}
        for word, neighbours in table.items():
            row = rows.setdefault(_checked(word).lower(), {})
            for neighbour in listed(word, neighbours):
                row.setdefault(neighbour.lower(), neighbour)
        self._table = {
            word: tuple(neighbour for key, neighbour in row.items() if key != word)
            for word, row in rows.items()
            if row.keys() - {word}
        }
        if not self._table:
            raise ValueError(f"No word has a neighbour: the table names {len(rows)} words.")

    def __getitem__(self, word: str) -> tuple[str, ...]:
        return self._table[word.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def of(self, word: str) -> tuple[str, ...]:
        """Return the word's neighbours, none for an unknown word."""
        return self._table.get(word.lower(), ())

    def check(self, tokenizer: Any) -> None:
        """Raise ValueError if the tokenizer can write no neighbour without its unknown token."""
        vocabulary = Vocabulary(tokenizer)
        neighbours = dict.fromkeys(n for row in self.values() for n in row)
        if not any(map(vocabulary.writes, neighbours)):
            shown = ", ".join(map(repr, list(neighbours)[:3]))
            raise ValueError(
                f"The tokenizer can write none of the table's {len(neighbours)} neighbours, such "
                f"as {shown}: they come out as unknown. Use a table in the tokenizer's language."
            )

    @classmethod
    def read(cls, path: str | Path) -> Neighbours:
        """Return the table that a file holds; one whose name ends in ".gz" is unpacked.

        A file named `.jsonl` has rows `{"word": …, "neighbors": [ … ]}`, or pairs of words
        `{"word1": …, "word2": …, "relation": "synonym"}`, which are neighbours of each other; pairs
        in other relations are left out. Any other file has a word and its neighbours on each line,
        between tabs, or between spaces where there is no tab.

        Args:
            path: of a file in UTF-8.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: for a line that cannot be read, with its number, and for an empty table.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path} to read neighbours from.")
        read = _from_json if path.name.removesuffix(".gz").endswith(".jsonl") else _from_text
        table: dict[str, list[str]] = {}
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = line.decode("utf-8")
                    for word, neighbours in read(text) if text.strip() else ():
                        table.setdefault(_checked(word), []).extend(listed(word, neighbours))
                except ValueError as error:
                    shown = repr(line.decode("utf-8", "replace"))
                    raise ValueError(f"{path}, line {number}, {shown:.80}: {error}") from error
        return cls(table)

    @classmethod
    def from_embeddings(
        cls,
        words: Sequence[str],
        vectors: Tensor,
        *,
        max_neighbours: int = 8,
        min_cosine: float = 0.5,
    ) -> Neighbours:
        """Return each word's nearest by the cosine of their vectors.

        Args:
            words: V of them.
            vectors: of the words, [V, d], on any device.
            max_neighbours: of a word.
            min_cosine: of a neighbour.

        Raises:
            ValueError: for other shapes, vectors that are not finite, and if no cosine reaches
                `min_cosine`.

        Example:
            >>> vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
            >>> dict(Neighbours.from_embeddings(["film", "movie", "tree"], vectors))
            {'film': ('movie',), 'movie': ('film',)}
        """
        if vectors.ndim != 2 or len(vectors) != len(words):
            raise ValueError(f"{len(words)} words need vectors [{len(words)}, d], got those of "
                             f"shape {list(vectors.shape)}.")  # fmt: skip
        if not vectors.isfinite().all():
            raise ValueError("Some vectors are not finite, so that they have no nearest.")
        check_integer("Neighbours", "max_neighbours", max_neighbours, 1)
        unit = F.normalize(vectors.detach().float(), dim=-1)
        table: dict[str, list[str]] = {}
        for rows in torch.arange(len(words)).split(max(1, AT_ONCE // max(1, len(words)))):
            cosines = unit[rows] @ unit.T  # [rows, V]
            cosines[torch.arange(len(rows)), rows] = -torch.inf  # a word is not its own neighbour
            near, which = cosines.topk(min(max_neighbours, len(words)))
            for i, cosine, js in zip(rows.tolist(), near.tolist(), which.tolist(), strict=True):
                found = [words[int(j)] for j, c in zip(js, cosine, strict=True) if c >= min_cosine]
                table.setdefault(words[int(i)], []).extend(found)
        return cls(table)

    @classmethod
    def from_encoder(cls, model: Any, tokenizer: Any, **limits: Any) -> Neighbours:
        """Return the nearest words by an encoder's own input embeddings.

        The words are those that are one token of its vocabulary and letters alone.

        Args:
            model: of transformers, or any with `get_input_embeddings()`.
            tokenizer: the model's.
            limits: `max_neighbours` and `min_cosine`, as of `from_embeddings`.

        Raises:
            ValueError: as `from_embeddings`.
        """
        words, ids = zip(*Vocabulary(tokenizer).words(), strict=True)
        vectors = model.get_input_embeddings().weight[list(ids)]
        return cls.from_embeddings(words, vectors, **limits)


def _from_text(line: str) -> Iterator[tuple[Any, Any]]:
    parts = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
    yield parts[0], parts[1:]


def _from_json(line: str) -> Iterator[tuple[Any, Any]]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("a row must be an object.")
    if {"word1", "word2"} <= row.keys():
        if row.get("relation", "synonym") == "synonym":
            yield row["word1"], [row["word2"]]
            yield row["word2"], [row["word1"]]
    elif "word" in row and row.keys() & {"neighbors", "neighbours"}:
        yield row["word"], row["neighbors" if "neighbors" in row else "neighbours"]
    else:
        raise ValueError(f"a row has word and neighbors, or word1 and word2; got {list(row)}.")


def _checked(word: Any) -> str:
    if not isinstance(word, str) or not word.strip():
        raise ValueError(f"a word must be a string that is not empty, got {word!r:.40}.")
    return word


def listed(word: Any, neighbours: Any) -> list[str]:
    """Return the neighbours of a word; raise ValueError unless they are a list of strings."""
    if isinstance(neighbours, str) or not isinstance(neighbours, Iterable):
        raise ValueError(
            f"the neighbours of {word!r} must be a list of strings, [] for none, got "
            f"{neighbours!r:.40}; a string by itself would be read letter by letter."
        )
    return [_checked(neighbour) for neighbour in neighbours]
