"""Candidates that a masked language model expects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.model.replay import evaluating
from mixadv.tokens.reading.encoding import check_fast, longest, tokens
from mixadv.tokens.reading.masked import output_layer
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.candidates import usable


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
    _vocabulary: dict[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("MaskedCandidates", "max_candidates", self.max_candidates, 1)
        if getattr(self.tokenizer, "mask_token", None) is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no mask token: use the model and tokenizer "
                "of a masked language model, such as BERT's or RoBERTa's."
            )
        check_fast(self.tokenizer)
        output_layer(self.model)
        object.__setattr__(self, "_vocabulary", _whole_words(self.tokenizer))

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
            likely = [] if at is None else self._likeliest(logits[row, at])  # cut texts have none
            found.append(usable(text, index, likely, self.max_candidates))
        return found

    def _likeliest(self, logits: Tensor) -> Iterable[str]:
        """Yield whole words, the likeliest first."""
        for token in logits.argsort(descending=True).tolist():
            if token in self._vocabulary:
                yield self._vocabulary[token]


def _whole_words(tokenizer: Any) -> dict[int, str]:
    """Return the tokens of a vocabulary that are words by themselves, letters alone."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    # Byte-pair and unigram vocabularies mark the beginnings of words, WordPiece the other pieces.
    mark = next((m for m in "Ġ▁" if any(token.startswith(m) for token in vocabulary)), "")
    whole = {}
    for token, number in vocabulary.items():
        if number not in special and token.startswith(mark):
            word = tokenizer.convert_tokens_to_string([token]).strip() if mark else token
            if word.isalpha():
                whole[number] = word
    if not whole:
        raise ValueError(f"{type(tokenizer).__name__} has no token that is a whole word.")
    return whole
