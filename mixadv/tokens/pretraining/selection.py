"""Which words of a row are corrupted: n-grams of whole words."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor


def whole_words(word_ids: Sequence[int | None]) -> list[range]:
    """Return the tokens of each word: runs of one number; −1 and None belong to no word.

    Example:
        >>> whole_words([None, 0, 0, 1, -1, 2, None])
        [range(1, 3), range(3, 4), range(5, 6)]
    """
    words, begin = [], 0
    for number, run in groupby(word_ids):
        end = begin + len(list(run))
        if number is not None and number >= 0:
            words.append(range(begin, end))
        begin = end
    return words


@dataclass(frozen=True)
class WordSelection:
    """Chooses n-grams of whole words that hold a fraction of the tokens (Cui et al., 2020).

    With n tokens in words, the budget is fraction·n. N-grams are chosen one after another until it
    is spent: the length is drawn from `lengths`, the place uniformly among those where so many
    words lie next to each other, none of them chosen yet; where there is no such place, the n-gram
    is a word shorter. Tokens that belong to no word, as punctuation and special tokens, part words.

    The word that would overspend the budget, having t tokens where r < t are left, is chosen with
    probability r/t and is the last. So the expected number of chosen tokens is fraction·n exactly,
    and the number itself exceeds the budget by less than that word. The one exception: a row of
    which nothing would be chosen has one word chosen, uniformly; its expectation is higher, where
    its budget is less than its longest word.

    Words at the ends of a run of words are in fewer n-grams, so they are chosen less often; on rows
    of few words, whose budget cuts most n-grams, the last words are.

    An n-gram is as long as drawn unless it spends the budget or finds no place: with L the longest
    n-gram, the first k of a row follow `lengths` exactly if k·L words cost no more than the budget.

    Attributes:
        fraction: of the tokens that belong to words, in (0, 1].
        lengths: probabilities of n-grams of 1, 2, … words.

    Raises:
        ValueError: for a fraction or probabilities that are none.

    Example:
        >>> words = whole_words([-1, *range(100), -1])
        >>> ngrams = WordSelection()(words, torch.Generator().manual_seed(0))
        >>> sum(map(len, ngrams))
        15
    """

    fraction: float = 0.15
    lengths: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}.")
        check_distribution("lengths", self.lengths)

    def __call__(self, words: Sequence[range], generator: torch.Generator) -> list[list[range]]:
        """Return the n-grams in the order of their choice; an n-gram is its words' tokens.

        Args:
            words: the tokens of each word of a row, from left to right.
            generator: where the random numbers come from.
        """
        budget = self.fraction * sum(map(len, words))
        room = _room(words, len(self.lengths))
        draws = torch.rand(len(words), 3, generator=generator, dtype=torch.float64).tolist()
        ngrams = []
        for length, place, _ in draws:
            if budget <= 0:
                break
            start, end = self._place(room, length, place)
            chosen = []
            for word, (*_, chance) in zip(words[start:end], draws[start:end], strict=True):
                if chance * len(word) >= budget:
                    budget = 0
                    break
                budget -= len(word)
                chosen.append(word)
            ngrams += [chosen] if chosen else []
            _take(room, start, end, len(self.lengths))
        if words and not ngrams:
            ngrams = [[words[int(torch.randint(len(words), (), generator=generator))]]]
        return ngrams

    def _place(self, room: Tensor, length: float, place: float) -> tuple[int, int]:
        """Return where an n-gram begins and ends, for two uniform numbers."""
        cumulative = list(accumulate(self.lengths))
        drawn = bisect(cumulative, length * cumulative[-1]) + 1
        words = min(drawn, int(room.max()))
        starts = (room >= words).nonzero().flatten()
        start = int(starts[int(place * len(starts))])
        return start, start + words


def check_distribution(what: str, probabilities: Sequence[float]) -> None:
    """Raise ValueError unless the numbers are probabilities that sum to one."""
    total = math.fsum(probabilities)
    if not probabilities or min(probabilities) < 0 or abs(total - 1) > 1e-6:
        raise ValueError(
            f"{what} must be probabilities that sum to 1, got {probabilities}, which sum to "
            f"{total:g}."
        )


def _room(words: Sequence[range], most: int) -> Tensor:
    """Return how many words, up to `most`, lie next to each other from each one on, [words]."""
    room = [1] * len(words)
    for i, (word, after) in reversed(list(enumerate(pairwise(words)))):
        if word.stop == after.start:
            room[i] = min(room[i + 1] + 1, most)
    return torch.tensor(room)


def _take(room: Tensor, start: int, end: int, most: int) -> None:
    """Take words out: there is none left at them, and those before have less room."""
    before = room[max(0, start - most) : start]
    before.clamp_(max=torch.arange(len(before), 0, -1))
    room[start:end] = 0
