"""What a tokenizer can write: the tokens of words, and the ordinary tokens of its vocabulary."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import torch

MARKS = ("##", "Ġ", "▁")
"""How a token's name tells that it continues a word (WordPiece), or begins one (the others)."""


class Vocabulary:
    """The vocabulary of a tokenizer of transformers, as what words are written with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text, without those that mark its ends."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pieces(self, word: str, before: str = "") -> tuple[int, ...]:
        """Return the tokens of a word after a space, a sign or nothing; none if not to be told.

        Many tokenizers write a word differently at the start of a text, after a space and after
        another character.
        """
        ids, lead = self.ids(before + word), self.ids(before.strip())
        return ids[len(lead) :] if ids[: len(lead)] == lead else ()

    def writes(self, word: str) -> bool:
        """Return whether the word can be written: it has tokens, and none of them is special."""
        ids = self.ids(word)
        return bool(ids) and self.special.isdisjoint(ids)

    def random_like(self, ids: tuple[int, ...], generator: torch.Generator) -> list[int]:
        """Return as many tokens at random, ordinary ones.

        Each is uniform over the tokens that begin or continue a word as the one that it replaces.
        """
        pools = [self.ordinary.get(self._mark(i), self._all) for i in ids]
        draws = torch.rand(len(ids), generator=generator, dtype=torch.float64).tolist()
        return [p[int(u * len(p))] for p, u in zip(pools, draws, strict=True)]

    @cached_property
    def ordinary(self) -> dict[str, list[int]]:
        """Tokens of letters, marks and digits alone, none special, by how they are marked."""
        pools: dict[str, list[int]] = {}
        for i in range(len(self.tokenizer)):
            if i not in self.special and _is_lettered(self.text(i)):
                pools.setdefault(self._mark(i), []).append(i)
        if not pools:
            raise ValueError(
                f"None of the tokenizer's {len(self.tokenizer)} tokens is made of letters or "
                "digits, so that there is no random word to draw: was it trained?"
            )
        return pools

    def words(self) -> Iterator[tuple[str, int]]:
        """Yield the words that are one token, with it: letters alone, which read back as it."""
        texts = {i: self.text(i) for i in sorted(self._all)}
        texts = {i: text for i, text in texts.items() if text.isalpha()}
        plain, spaced = (
            self.tokenizer([before + text for text in texts.values()], add_special_tokens=False)
            for before in ("", " ")
        )
        ways = zip(plain["input_ids"], spaced["input_ids"], strict=True)
        for (i, text), written in zip(texts.items(), ways, strict=True):
            if [i] in written:
                yield text, i

    @cached_property
    def _all(self) -> list[int]:
        return [*chain(*self.ordinary.values())]

    def _name(self, token: int) -> str:
        # a model's table may have more rows than names
        return self.tokenizer.convert_ids_to_tokens(token) or ""

    def _mark(self, token: int) -> str:
        return next((mark for mark in MARKS if self._name(token).startswith(mark)), "")

    def text(self, token: int) -> str:
        """Return what a token stands for, without spaces around it."""
        name = self._name(token).removeprefix("##")
        return self.tokenizer.convert_tokens_to_string([name]).strip()


def _is_lettered(text: str) -> bool:
    return text != "" and all(unicodedata.category(c)[0] in "LMN" for c in text)
