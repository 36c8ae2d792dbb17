"""An adversary in input space: greedy word substitution, guided by one gradient.

Yoo and Qi (2021), "Towards improving adversarial training of NLP models" (A2T), Findings of EMNLP,
arXiv:2109.00544.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from typing import Any, NamedTuple

from torch import nn

from mixadv.checks import check_integer, check_number
from mixadv.model.replay import evaluating
from mixadv.tokens.reading.encoding import Text, segment, with_segment
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.attacks import Attack
from mixadv.tokens.substitution.candidates import Candidates
from mixadv.tokens.substitution.constraints import FUNCTION_WORDS, Similarity, budget
from mixadv.tokens.substitution.reader import Reader, ReadText


@dataclass(frozen=True)
class WordSubstitution:
    """Replaces the words that matter most, one after another, until the prediction changes.

    1. One backward pass gives the gradient of the loss with respect to the embeddings of the words'
       tokens; its L2 norm ranks the words.
    2. The best ranked word is replaced by each of its candidates, and the model reads them all. A
       candidate that changes the prediction goes before one that does not, then the larger loss.
    3. The best one is kept if it changes the prediction or raises the loss; then the next word.

    It ends at a changed prediction, or when the words or the words allowed are used up. Each word
    changes at most once. A2T also asks that part of speech stays, and ranks words by the mean
    gradient of their tokens in L1; here there is no tagger, and a word of more tokens counts more.

    Attributes:
        candidates: where replacements come from.
        max_share: of the words of a text may change, rounded up; 0.1 in A2T.
        min_words: may change in any text; 4 in A2T.
        protected: lower-case words that stay.
        similarity: with the original, or `None` for any.
        column: of a pair, the text that is attacked; the other stays.
        max_length: tokens that the model reads; words after them are not attacked. `None` asks it.
        batch_size: texts that the model reads at a time.
    """

    candidates: Candidates
    max_share: float = 0.1
    min_words: int = 4
    protected: frozenset[str] = FUNCTION_WORDS
    similarity: Similarity | None = None
    column: int = 1
    max_length: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_number("WordSubstitution", "max_share", self.max_share, most=1.0)
        check_integer("WordSubstitution", "min_words", self.min_words, 0)
        check_integer("WordSubstitution", "batch_size", self.batch_size, 1)
        if self.column not in (0, 1):
            raise ValueError(f"column is 0 or 1, the text of a pair, got {self.column!r}.")

    def attack(
        self, model: nn.Module, tokenizer: Any, texts: Sequence[Text], labels: Sequence[int]
    ) -> list[Attack]:
        """Attack a classifier on texts, all in step.

        The model is in evaluation mode meanwhile; its modes, gradients, flags and the random state
        are left as they were, after an exception too.

        Args:
            model: returns logits [texts, labels]; with `get_input_embeddings()`, as all sequence
                classifiers of transformers. `mixadv.mixtures.Mean` is attacked until the mean
                errs; its words are ranked by the gradients of the members' own losses.
            tokenizer: of the model, a fast one.
            texts: strings, or pairs of strings.
            labels: the right ones, as numbers.

        Raises:
            TypeError: for a slow tokenizer, a wrapped model, or texts that are none.
            ValueError: for labels that are not the model's, or not as many as texts.
        """
        _check(texts, labels)
        reader = Reader(model, tokenizer, self.max_length, self.batch_size, self.column)
        with evaluating(model):
            plays = self._begin(reader, texts, labels)
            while active := [play for play in plays if play.goes_on]:
                self._turn(reader, active)
        return [play.result() for play in plays]

    def _begin(self, reader: Reader, texts: Sequence[Text], labels: Sequence[int]) -> list[_Play]:
        """Read the texts once, and rank the words that may be attacked."""
        words = [Words(segment(text, self.column)) for text in texts]
        found = zip(texts, words, labels, reader.read(texts, labels, words), strict=True)
        plays = []
        for text, own, label, read in found:
            weights = read.importances
            ranked = sorted(weights, key=lambda at: (-weights[at], at))
            order = [at for at in ranked if own[at].lower() not in self.protected]
            left = budget(len(own), self.max_share, self.min_words)
            plays.append(_Play(text, self.column, own, own.text, label, order, left, read, read))
        return plays

    def _turn(self, reader: Reader, active: list[_Play]) -> None:
        """Replace the next word of each text by its best candidate, if that is better."""
        positions = [play.order.pop(0) for play in active]
        proposed = self.candidates([Words(play.now) for play in active], positions)
        trials = [
            _Trial(play, at, new, play.words.replaced(play.swaps | {at: new}))
            for play, at, words in zip(active, positions, proposed, strict=True)
            for new in words
        ]
        if self.similarity is not None:
            originals = [trial.play.words.text for trial in trials]
            kept = self.similarity.keeps(originals, [trial.text for trial in trials])
            trials = list(compress(trials, kept))
        texts = [with_segment(t.play.text, self.column, t.text) for t in trials]
        read = zip(trials, reader.read(texts, [t.play.label for t in trials]), strict=True)
        for play, tried in groupby(read, lambda row: row[0].play):
            play.choose(list(tried))


@dataclass(eq=False)
class _Play:
    """An attack on one text, as far as it went."""

    text: Text
    column: int
    words: Words
    now: str
    label: int
    order: list[int]
    left: int
    first: ReadText
    last: ReadText
    queries: int = 1
    swaps: dict[int, str] = field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        return self.last.prediction == self.label and self.left > 0 and len(self.order) > 0

    def choose(self, tried: list[tuple[_Trial, ReadText]]) -> None:
        """Keep the best of the trials, if it is an advance."""
        self.queries += len(tried)
        trial, read = max(tried, key=lambda row: self._worth(row[1]))
        if self._worth(read) > (False, self.last.loss):
            self.swaps[trial.at] = trial.new
            self.now, self.last = trial.text, read
            self.left -= 1

    def _worth(self, read: ReadText) -> tuple[bool, float]:
        return read.prediction != self.label, read.loss

    def result(self) -> Attack:
        swaps = {at: (self.words[at], new) for at, new in sorted(self.swaps.items())}
        texts = self.text, with_segment(self.text, self.column, self.now)
        labels = self.label, self.first.prediction, self.last.prediction
        return Attack(*texts, *labels, swaps, len(self.words), self.queries)


class _Trial(NamedTuple):
    """A candidate in its place, and the attacked text with it."""

    play: _Play
    at: int
    new: str
    text: str


def _check(texts: Sequence[Text], labels: Sequence[int]) -> None:
    """Raise unless there is a label for each text, and they are of one kind."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got one string: put it in a list.")
    if len(texts) != len(labels):
        raise ValueError(f"There are {len(texts)} texts and {len(labels)} labels.")
    for i, text in enumerate(texts):
        pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(t, str) for t in text)
        if not pair and not isinstance(text, str):
            raise TypeError(f"Text {i} is {text!r}: texts must be strings, or pairs of strings.")
        if isinstance(text, str) != isinstance(texts[0], str):
            raise TypeError(f"Text {i} is {text!r}, unlike text 0: strings and pairs are mixed.")
    for i, label in enumerate(labels):
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise TypeError(f"Label {i} is {label!r}: labels must be whole numbers.")
