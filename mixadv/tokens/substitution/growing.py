"""Word substitution as a game whose texts are found while it is played.

The columns of a `SubstitutionGame` are listed before. Here they are the texts that pay against the
learners' mixture of the moment, of all those that the words allowed make together: too many to be
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixadv.games import Grown, double_oracle
from mixadv.tokens.reading.encoding import Text, segment, with_segment
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.constraints import budget
from mixadv.tokens.substitution.game import Classifier, replacements, substitution_game
from mixadv.tokens.substitution.greedy import WordSubstitution

Swaps = Mapping[int, str]


def grown_game(
    learners: Sequence[Classifier],
    tokenizer: Any,
    text: Text,
    label: int,
    allowed: WordSubstitution,
    *,
    tolerance: float = 1e-4,
    rounds: int = 100,
) -> Grown[int, Text]:
    """Return mixtures of learners and of texts, which double oracle adds where they win something.

    The adversary answers the learners' mixture from the best text known: by the change of one word
    that raises the error most, until none does. Where one word may change this is a best response,
    and both mixtures are those of the game of all texts. Where more may, another text could still
    win more: `upper` and the gap are lower bounds then. `lower` is what the texts guarantee, for
    all learners are known.

    Args:
        learners: the rows, as for `substitution_game`.
        tokenizer: of them all.
        text: a string, or a pair of them.
        label: the right one.
        allowed: says which words may change, how many at once, and into what; candidates are those
            of a word in the text as it is given.
        tolerance: of the gap, at which to stop.
        rounds: at most.

    Returns:
        The game found; `rows` are numbers of learners, the first of the `columns` is the text.

    Raises:
        ValueError: without learners, or for a label that a learner does not know.

    Example:
        >>> words = WordSubstitution(Typos(), max_share=0.2)  # doctest: +SKIP
        >>> found = grown_game(checkpoints, tokenizer, text, 1, words)  # doctest: +SKIP
        >>> found.columns, found.adversary, found.lower  # doctest: +SKIP
    """
    texts = _Texts(learners, tokenizer, text, label, allowed)
    return double_oracle(
        lambda row, column: texts.errors[column][row],
        lambda columns, y: int((texts.payoff(columns) @ y).argmin()),
        lambda rows, x: texts.worst(x),
        range(len(learners)),
        [text],
        tolerance=tolerance,
        rounds=rounds,
    )


@dataclass
class _Texts:
    """The texts that are allowed, and how often the learners err about those read so far."""

    learners: Sequence[Classifier]
    tokenizer: Any
    text: Text
    label: int
    allowed: WordSubstitution
    swaps: dict[Text, Swaps] = field(default_factory=dict)  # of all texts that were looked at
    errors: dict[Text, Tensor] = field(default_factory=dict)  # `[m]`, of those that may be played

    def __post_init__(self) -> None:
        how = self.allowed
        self.words = Words(segment(self.text, how.column))
        self.options = replacements(self.words, how.candidates, how.protected)
        self.most = budget(len(self.words), how.max_share, how.min_words)
        self.swaps[self.text] = {}
        self._read([self.text])

    def payoff(self, columns: Sequence[Text]) -> Tensor:
        """Return the errors at texts, `[m, n]`."""
        return torch.stack([self.errors[column] for column in columns], 1)

    def worst(self, x: Tensor) -> Text:
        """Return the text where changes of one word end that raise a mixture's error most."""

        def error(text: Text) -> float:
            return float(x @ self.errors[text])

        best = max(self.errors, key=error)
        while True:
            near = self._near(best)
            top = max(near, key=error, default=best)
            if error(top) <= error(best):
                return best
            best = top

    def _near(self, text: Text) -> list[Text]:
        """Return the texts that may be played one word away, all read."""
        column, found = self.allowed.column, {}
        for swaps in self._changes(self.swaps[text]):
            found[with_segment(self.text, column, self.words.replaced(swaps))] = swaps
        new = {t: swaps for t, swaps in found.items() if t not in self.swaps}
        self.swaps |= new
        kept = list(new)
        if self.allowed.similarity is not None:
            changed = [segment(t, column) for t in kept]
            keeps = self.allowed.similarity.keeps([self.words.text] * len(kept), changed)
            kept = [t for t, keep in zip(kept, keeps, strict=True) if keep]
        self._read(kept)
        return [t for t in found if t in self.errors]

    def _changes(self, swaps: Swaps) -> Iterator[Swaps]:
        """Yield what swaps become where one word is replaced otherwise, or stands again."""
        for at, words in self.options.items():
            others = {place: word for place, word in swaps.items() if place != at}
            if at in swaps:
                yield others
            if len(others) < self.most:
                yield from ({**others, at: word} for word in words if word != swaps.get(at))

    def _read(self, texts: Sequence[Text]) -> None:
        if texts:
            how = {"max_length": self.allowed.max_length, "batch_size": self.allowed.batch_size}
            game = substitution_game(self.learners, self.tokenizer, texts, self.label, **how)
            self.errors |= zip(texts, game.payoff.T, strict=True)
