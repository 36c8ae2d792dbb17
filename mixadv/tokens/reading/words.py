"""A text as its words: where they lie, and the text with some of them replaced."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

Span = tuple[int, int]

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
    def spans(self) -> tuple[Span, ...]:
        """Where each word begins and where it ends, in characters."""
        kinds = "".join(map(_kind, self.text))
        return tuple(word.span() for word in _WORD.finditer(kinds))

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


def overlapping(spans: Sequence[Span], begin: int, end: int) -> range:
    """Return the numbers of the spans, from left to right, that have a character in a stretch."""
    first = bisect_right(spans, begin, key=itemgetter(1))
    return range(first, bisect_left(spans, end, key=itemgetter(0)))


def cased_like(word: str, model: str) -> str:
    """Return the word in the case of another one: lower, Title or UPPER; else as it is.

    Example:
        >>> cased_like("film", "Movie"), cased_like("film", "MOVIE"), cased_like("film", "movie")
        ('Film', 'FILM', 'film')
    """
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


_WORD = re.compile("i|l+(?:jl+)*")


def _kind(character: str) -> str:
    """Return i for an ideograph, l for letters, marks and digits, j for a joiner, else a space."""
    category = unicodedata.category(character)
    if category == "Lo" and "CJK" in unicodedata.name(character, ""):
        return "i"
    if category[0] in "LMN":
        return "l"
    return "j" if character in JOINERS else " "
