"""Rows of tokens that know their words, and pairs of segments whose order is to be predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixadv.tokens.reading.encoding import check_fast
from mixadv.tokens.reading.words import Span, Words, overlapping

NO_WORD = -1


def _spans(text: str) -> Sequence[Span]:
    return Words(text).spans


@dataclass
class WordTokenizer:
    """Turns texts into rows of tokens with `word_ids`: the number of the word of every token.

    Tokens that belong to no word, as punctuation and special tokens, have −1; so have the tokens of
    a word that was cut off. "don't" is one word whatever the tokenizer makes of it, and words that
    share a token count as one. In a pair, numbers go on from the first text to the second.

    Attributes:
        tokenizer: a fast tokenizer of transformers, which tells where in the text its tokens lie.
        max_length: longer rows are cut; None cuts nothing.
        spans: where the words of a text begin and end, in characters, from left to right; by
            default those of `Words`, where each ideograph is a word: give a segmenter's instead.

    Raises:
        TypeError: for a tokenizer that is not fast.
    """

    tokenizer: Any
    max_length: int | None = None
    spans: Callable[[str], Sequence[Span]] = _spans

    def __post_init__(self) -> None:
        check_fast(self.tokenizer)

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> dict[str, list[Any]]:
        """Return columns of rows: `input_ids`, `word_ids` and what else the tokenizer returns.

        Args:
            texts: one per row.
            pairs: the second segment of every row, or None.

        Raises:
            TypeError: for a single text.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got the text {texts!r:.40}.")
        if not texts:
            return {"input_ids": [], "word_ids": []}
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=self.max_length is not None,
            max_length=self.max_length,
        )
        segments = [texts] if pairs is None else [texts, pairs]
        rows = zip(encoded.encodings, *segments, strict=True)
        return {**encoded, "word_ids": [self._word_ids(*row) for row in rows]}

    def _word_ids(self, encoding: Any, *segments: str) -> list[int]:
        offsets = encoding.offsets
        numbers, first = [NO_WORD] * len(offsets), 0
        for which, text in enumerate(segments):
            at = [i for i, segment in enumerate(encoding.sequence_ids) if segment == which]
            spans = self.spans(text)
            found = _numbers([offsets[i] for i in at], spans)
            lost = {NO_WORD}
            if encoding.overflowing and at:
                begin, end = offsets[at[0]][0], offsets[at[-1]][1]
                lost |= {number for number, (b, e) in enumerate(spans) if b < begin or e > end}
            for i, number in zip(at, found, strict=True):
                numbers[i] = NO_WORD if number in lost else first + number
            first += len(spans)
        return numbers


def _numbers(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return the number of the word that each token lies in, the first of those it shares."""
    leader: dict[int, int] = {}
    numbers = []
    for begin, end in offsets:
        words = overlapping(spans, begin, end)
        lead = leader.get(words.start, words.start) if words else NO_WORD
        leader.update(dict.fromkeys(words, lead))
        numbers.append(lead)
    return numbers


def sentence_order(
    segments: Sequence[str],
    *,
    label: str = "sentence_order_label",
    generator: torch.Generator | None = None,
) -> dict[str, list[Any]]:
    """Return pairs of successive segments, each swapped with probability 1/2, and whether it was.

    Predicting the order takes the place of predicting the next sentence (Lan et al., 2020). The
    label is 0 for the order of the text and 1 for the other, as models of transformers have it:
    AlbertForPreTraining reads "sentence_order_label", BertForPreTraining "next_sentence_label".

    Args:
        segments: sentences, or longer pieces, of one text in their order; a last one without a
            partner is left out.
        label: the name of the column of labels.
        generator: where the random numbers come from; None is torch's default one.

    Returns:
        Columns "text", "pair" and the labels.

    Example:
        >>> rows = sentence_order(["One.", "Two.", "Three.", "Four.", "Five."])
        >>> len(rows["text"]), sorted(rows["text"] + rows["pair"])
        (2, ['Four.', 'One.', 'Three.', 'Two.'])
    """
    pairs = list(zip(segments[::2], segments[1::2], strict=False))
    swapped = torch.randint(2, (len(pairs),), generator=generator).tolist()
    return {
        "text": [pair[swap] for pair, swap in zip(pairs, swapped, strict=True)],
        "pair": [pair[1 - swap] for pair, swap in zip(pairs, swapped, strict=True)],
        label: swapped,
    }
