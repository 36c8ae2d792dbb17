"""A text as its words: where they lie, and the text with some of them replaced."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

JOINERS = "'’-"
"""Characters that belong to a word where they stand between two letters of it."""


@dataclass(frozen=True)
class Words:
    """A text and its words: runs of letters, marks and digits; an ideograph is a word by itself.

    Attributes:
        text: any string.

    Example:
        >>> words = Words("Don't panic: it's 42!")
        >>> list(words)
        ["Don't", 'panic', "it's", '42']
        >>> words.replaced({1: "worry", 3: "43"})
        "Don't worry: it's 43!"
    """

    text: str

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where each word begins and where it ends, in characters."""
        spans: list[tuple[int, int]] = []
        begin = None
        for i, character in enumerate(self.text):
            alone = _is_ideograph(character)
            inside = not alone and (_belongs(character) or self._joins(i, begin))
            if begin is not None and not inside:
                spans.append((begin, i))
                begin = None
            if alone:
                spans.append((i, i + 1))
            elif inside and begin is None:
                begin = i
        return (*spans, *([] if begin is None else [(begin, len(self.text))]))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> str:
        begin, end = self.spans[index]
        return self.text[begin:end]

    def replaced(self, swaps: Mapping[int, str]) -> str:
        """Return the text with words replaced; all else stays as it is, character by character.

        Args:
            swaps: new words by the index of the old ones.

        Raises:
            IndexError: for the index of no word.
        """
        pieces, end = [], 0
        for index in sorted(swaps):
            if not 0 <= index < len(self):
                raise IndexError(f"There is no word {index}: the text has {len(self)} words.")
            begin, after = self.spans[index]
            pieces += [self.text[end:begin], swaps[index]]
            end = after
        return "".join([*pieces, self.text[end:]])

    def _joins(self, i: int, begin: int | None) -> bool:
        """Return whether an apostrophe or hyphen stands between two letters of a word."""
        after = self.text[i + 1 : i + 2]
        between = begin is not None and after != "" and _belongs(after) and not _is_ideograph(after)
        return between and self.text[i] in JOINERS and self.text[i - 1] not in JOINERS


def cased_like(word: str, model: str) -> str:
    """Return the word in the case of another one: lower, Title or UPPER; else as it is.

    Example:
        >>> cased_like("film", "Movie"), cased_like("film", "MOVIE"), cased_like("film", "movie")
        ('Film', 'FILM', 'film')
    """
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def _belongs(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def _is_ideograph(character: str) -> bool:
    return unicodedata.category(character) == "Lo" and "CJK" in unicodedata.name(character, "")
