"""Candidates: the words that may stand in place of a word, and sources of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from mixadv.checks import check_integer
from mixadv.model.replay import evaluating
from mixadv.tokens.reading.encoding import check_fast, longest, tokens
from mixadv.tokens.reading.masked import output_layer
from mixadv.tokens.reading.neighbours import listed
from mixadv.tokens.reading.vocabulary import Vocabulary
from mixadv.tokens.reading.words import Words, cased_like

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST = 4  # letters of a word that is still read with a typo inside


class Candidates(Protocol):
    """The adversary's moves at one word of a text."""

    def __call__(self, words: Sequence[Words], indices: Sequence[int]) -> list[list[str]]:
        """Return the replacements of one word of each text, the best first.

        Args:
            words: of texts.
            indices: of one word in each.

        Returns:
            For each text words in the case of the one they replace, each once, never that word
            itself, and each one word where it stands; an empty list where there are none.
        """
        ...


class _ByWord:
    """A source that looks at the word alone, not at its text."""

    max_candidates: int

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "max_candidates", self.max_candidates, 1)

    def __call__(self, words: Sequence[Words], indices: Sequence[int]) -> list[list[str]]:
        """See `Candidates`."""
        return [
            usable(text, index, self._found(text[index]), self.max_candidates)
            for text, index in zip(words, indices, strict=True)
        ]

    def _found(self, word: str) -> Sequence[str]:
        raise NotImplementedError


@dataclass(frozen=True)
class SimilarWords(_ByWord):
    """Words of a table of similar words, such as counter-fitted neighbours.

    Attributes:
        neighbours: similar words by the lower-case word, the most similar first; or a function
            that returns them.
        max_candidates: of a word.

    Example:
        >>> source = SimilarWords({"film": ["movie", "picture"]})
        >>> source([Words("Film noir")], [0])
        [['Movie', 'Picture']]
    """

    neighbours: Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]]
    max_candidates: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        table = self.neighbours
        if not isinstance(table, Mapping):
            return
        for word, similar in table.items():
            listed(word, similar)
        if not any(table.values()):
            raise ValueError(
                f"neighbours names {len(table)} words and not one that is similar to another: "
                "nothing could be replaced."
            )

    def _found(self, word: str) -> Sequence[str]:
        table, word = self.neighbours, word.lower()
        if isinstance(table, Mapping):
            return table.get(word, ())
        return listed(word, table(word))


@dataclass(frozen=True)
class Typos(_ByWord):
    """Misspell a word by one slip; its first and last letters stay.

    Two letters are swapped, one is left out, or a neighbouring key of a Latin keyboard is hit, in
    its place or after it. Words of fewer than four letters stay as they are.

    Attributes:
        max_candidates: the number of misspellings of a word, drawn from all there are.
        seed: of the draw, which depends on the seed and the word only.

    Example:
        >>> Typos(max_candidates=3)([Words("great film")], [0])
        [['grteat', 'grwat', 'grdat']]
    """

    max_candidates: int = 20
    seed: int = 0

    def _found(self, word: str) -> list[str]:
        slips = list(dict.fromkeys(_slips(word))) if len(word) >= SHORTEST else []
        return random.Random(f"{self.seed}/{word}").sample(slips, len(slips))


@dataclass(frozen=True)
class MaskedCandidates:
    """Words that a masked language model expects in place of a word (BAE, A2T-MLM).

    The word is replaced by the mask token; the tokens that the model finds likeliest there are the
    candidates, if they are whole words. They fit the sentence and need not mean the same: an attack
    with them wants a `Similarity`.

    Garg and Ramakrishnan (2020), "BAE: BERT-based adversarial examples for text classification",
    EMNLP.

    Attributes:
        model: a masked language model.
        tokenizer: of the model, a fast one.
        max_candidates: of a word.
        batch_size: texts that the model reads at a time.

    Raises:
        TypeError: for a slow tokenizer, or a model without a language-model head.
        ValueError: for a tokenizer without a mask token.
    """

    model: nn.Module
    tokenizer: Any
    max_candidates: int = 20
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_integer("MaskedCandidates", "max_candidates", self.max_candidates, 1)
        if getattr(self.tokenizer, "mask_token", None) is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no mask token: use the model and tokenizer "
                "of a masked language model, such as BERT's or RoBERTa's."
            )
        check_fast(self.tokenizer)
        output_layer(self.model)
        _ = self._whole_words  # so that its error comes now

    def __call__(self, words: Sequence[Words], indices: Sequence[int]) -> list[list[str]]:
        """See `Candidates`."""
        found: list[list[str]] = []
        with evaluating(self.model), torch.no_grad():
            for start in range(0, len(words), self.batch_size):
                part = slice(start, start + self.batch_size)
                found += self._batch(words[part], indices[part])
        return found

    def _batch(self, words: Sequence[Words], indices: Sequence[int]) -> list[list[str]]:
        mask = self.tokenizer.mask_token
        texts = [text.replaced({i: mask}) for text, i in zip(words, indices, strict=True)]
        limit = longest(self.model, self.tokenizer)
        encoding = tokens(self.model, self.tokenizer, texts, limit)
        logits = self.model(**encoding.to(next(self.model.parameters()).device)).logits
        found = []
        for row, (text, index) in enumerate(zip(words, indices, strict=True)):
            at = encoding.char_to_token(row, text.spans[index][0])
            # A text that is cut before the word has no place for it.
            ranks = [] if at is None else logits[row, at].argsort(descending=True).tolist()
            likely = (self._whole_words[i] for i in ranks if i in self._whole_words)
            found.append(usable(text, index, likely, self.max_candidates))
        return found

    @cached_property
    def _whole_words(self) -> dict[int, str]:
        """Tokens of the vocabulary that are words by themselves, letters alone."""
        vocabulary = Vocabulary(self.tokenizer)
        # Byte-pair and unigram vocabularies mark the beginnings of words, WordPiece other pieces.
        mark = next((m for m in "Ġ▁" if m in vocabulary.ordinary), "")
        begin = vocabulary.ordinary.get(mark, [])
        whole = {i: word for i in begin if (word := vocabulary.text(i)).isalpha()}
        if not whole:
            raise ValueError(f"{type(self.tokenizer).__name__} has no token that is a whole word.")
        return whole


def usable(words: Words, index: int, found: Iterable[str], most: int) -> list[str]:
    """Return the first `most` of the words found that may replace a word, in its case.

    Example:
        >>> usable(Words("A Movie"), 1, ["film", "movie", "motion picture", "Film"], 20)
        ['Film']
    """
    kept: dict[str, None] = {}
    old = words[index]
    for new in found:
        cased = cased_like(new, old)
        if cased.lower() != old.lower() and _stays_one_word(words, index, cased):
            kept[cased] = None
        if len(kept) == most:
            break
    return list(kept)


def _stays_one_word(words: Words, index: int, new: str) -> bool:
    """Return whether a text has its words where it had them once one is replaced.

    Two characters beside a word decide whether it joins what stands there.
    """
    begin, end = words.spans[index]
    before, after = words.text[max(begin - 2, 0) : begin], words.text[end : end + 2]
    old = Words(before + words[index] + after)
    shift = len(new) - (end - begin)
    moved = [(a + shift * (a > len(before)), b + shift * (b > len(before))) for a, b in old.spans]
    return list(Words(before + new + after).spans) == moved


def _slips(word: str) -> Iterable[str]:
    """Yield the word with one slip; its first and last characters stay."""
    for i in range(1, len(word) - 1):
        before, letter, after = word[:i], word[i], word[i + 1 :]
        if i < len(word) - 2:
            yield before + after[0] + letter + after[1:]
        yield before + after
        for key in _beside(letter):
            yield before + letter + key + after
            yield before + key + after


def _beside(letter: str) -> str:
    """Return the keys beside a letter's, and under it."""
    keys = ""
    for row, letters in enumerate(KEYBOARD):
        at = letters.find(letter.lower())
        if at >= 0:
            keys = letters[max(at - 1, 0) : at] + letters[at + 1 : at + 2]
            keys += KEYBOARD[row + 1][at : at + 1] if row + 1 < len(KEYBOARD) else ""
    return keys.upper() if letter.isupper() else keys
