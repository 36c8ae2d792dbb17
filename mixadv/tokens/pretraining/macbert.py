"""Masked language modelling as correction: words are replaced by similar ones, and corrected.

Cui, Che, Liu, Qin, Wang, Hu. Revisiting Pre-Trained Models for Chinese Natural Language Processing.
Findings of EMNLP 2020, arXiv:2004.13922 (MacBERT).

Nature plays a fixed mixed strategy, and the model answers with the tokens that were there:

    min_θ  E_{x̃ ~ q(· | x)}  −mean_{i chosen} log p_θ(x_i | x̃)

q chooses whole-word n-grams that hold 15 % of the tokens. Of the chosen words 80 % become a similar
word, 10 % a random one, 10 % stay. There is no mask token, which fine-tuning never sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixadv.tokens.pretraining.selection import WordSelection, check_distribution, whole_words
from mixadv.tokens.reading.masked import IGNORED
from mixadv.tokens.reading.neighbours import Neighbours
from mixadv.tokens.reading.vocabulary import Vocabulary
from mixadv.tokens.reading.words import cased_like

CONTEXTS = ("", " ", ".")
"""What a word may stand after for a tokenizer to write it as it does."""

OWN = ("input_ids", "word_ids", "labels", "special_tokens_mask", "offset_mapping")
"""Columns that the model does not get, or gets anew."""


@dataclass
class CorrectionCollator:
    """Makes batches of rows in which words are replaced, with the original tokens as labels.

    A data collator for the Trainer of transformers and for any DataLoader. In a batch `input_ids`
    has the replaced tokens; `labels` has the original ones where a word was chosen, also where it
    stayed, and −100 elsewhere. Other columns, as a sentence-order label, are passed on.

    A similar word is uniform over the neighbours that are written with as many tokens, in the case
    of the word; where there is none, a random word stands in, so that with a small table most words
    are random ones. A random word has as many tokens, each drawn from those of letters and digits.
    Words with an unknown token are never chosen, nor do they replace others.

    Rows come from `WordTokenizer`. Trainer needs `remove_unused_columns=False`, lest it drop their
    word_ids; a run that it resumes repeats the corruptions from the end of an epoch on, not within
    one, where a batch was drawn ahead. A row without words has no labels, and a batch of such rows
    alone has loss NaN.

        tokenize = WordTokenizer(tokenizer, max_length=512)
        rows = data.map(lambda rows: tokenize(rows["text"]), batched=True, remove_columns="text")
        collator = CorrectionCollator(tokenizer, Neighbours.read("synonyms.txt"))
        arguments = TrainingArguments(..., remove_unused_columns=False)
        Trainer(model, arguments, collator, rows)

    Attributes:
        tokenizer: of transformers, with a padding token; it needs no mask token.
        neighbours: the table of similar words.
        selection: which words are chosen.
        shares: probabilities that a chosen word becomes a similar one, a random one, or stays.
        seed: None draws from torch's default generator, so that `torch.manual_seed`, Trainer's
            seed and the seeds of a DataLoader's workers hold; an integer draws the same numbers in
            every call, for evaluation.
        pad_to_multiple_of: as the tokenizer's own.

    Raises:
        ValueError: without a padding token, where the tokenizer can write no neighbour, and where
            none of its tokens is made of letters or digits.
    """

    tokenizer: Any
    neighbours: Neighbours
    selection: WordSelection = field(default_factory=WordSelection)
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_distribution("shares", self.shares)
        if len(self.shares) != 3:
            raise ValueError(f"shares has three probabilities, got {self.shares}.")
        if self.tokenizer.pad_token is None:
            raise ValueError(
                "The tokenizer has no padding token to fill rows up with: set "
                "tokenizer.pad_token, for example to tokenizer.eos_token."
            )
        self.neighbours.check(self.tokenizer)
        self._vocabulary = Vocabulary(self.tokenizer)
        _ = self._vocabulary.ordinary  # once, before workers are started, and errors come now
        self._similar: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a padded batch, [B, n] each, of rows.

        Args:
            features: rows with `input_ids` and `word_ids` of the same length.

        Raises:
            ValueError: for a row without them.
        """
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        rows, labels = [], []
        for feature in map(_listed, features):
            ids, word_ids = feature["input_ids"], feature["word_ids"]
            corrupted, targets = self.corrupt(ids, word_ids, generator)
            kept = {name: value for name, value in feature.items() if name not in OWN}
            rows.append({"input_ids": corrupted, **kept})
            labels.append(targets)
        size = {"return_tensors": "pt", "pad_to_multiple_of": self.pad_to_multiple_of}
        batch = dict(self.tokenizer.pad(rows, **size))
        gaps = [[IGNORED] * (batch["input_ids"].shape[1] - len(row)) for row in labels]
        left, pairs = self.tokenizer.padding_side == "left", zip(gaps, labels, strict=True)
        padded = [gap + row if left else row + gap for gap, row in pairs]
        return {**batch, "labels": torch.tensor(padded)}

    def corrupt(
        self, ids: Sequence[int], word_ids: Sequence[int | None], generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        """Return a row with words replaced, and its labels.

        Args:
            ids: the row's tokens.
            word_ids: the number of each token's word; −1 and None belong to no word.
            generator: where the random numbers come from.
        """
        special = self._vocabulary.special
        words = [w for w in whole_words(word_ids) if special.isdisjoint(ids[w.start : w.stop])]
        corrupted, labels = list(ids), [IGNORED] * len(ids)
        for word in (word for ngram in self.selection(words, generator) for word in ngram):
            old = slice(word.start, word.stop)
            labels[old] = ids[old]
            corrupted[old] = self._replacement(tuple(ids[old]), generator)
        return corrupted, labels

    def similar(self, ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the tokens of a word's neighbours, of those that have as many."""
        if ids not in self._similar:
            word = "".join(self.tokenizer.decode(ids).split())
            near = self.neighbours.of(word)
            if not near:
                return []  # not kept, so that what is kept is bounded by the table
            self._similar[ids] = self._written_alike(ids, word, near)
        return self._similar[ids]

    def _written_alike(
        self, ids: tuple[int, ...], word: str, near: tuple[str, ...]
    ) -> list[tuple[int, ...]]:
        pieces, special = self._vocabulary.pieces, self._vocabulary.special
        # No context writes tokens that hold more than the word, as a sign before it.
        before = [context for context in CONTEXTS if pieces(word, context) == ids][:1]
        found = dict.fromkeys(pieces(cased_like(new, word), c) for c in before for new in near)
        return [
            new for new in found if len(new) == len(ids) and new != ids and special.isdisjoint(new)
        ]

    def _replacement(self, ids: tuple[int, ...], generator: torch.Generator) -> Sequence[int]:
        share, which = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        similar, random, _ = self.shares
        if share >= similar + random:
            return ids
        if share < similar and (near := self.similar(ids)):
            return near[int(which * len(near))]
        return self._vocabulary.random_like(ids, generator)


def _listed(feature: Mapping[str, Any]) -> dict[str, Any]:
    if "word_ids" not in feature or "input_ids" not in feature:
        raise ValueError(
            f"A row needs input_ids and word_ids, and has {', '.join(feature)}: make rows with "
            "mixadv.tokens.WordTokenizer(tokenizer), and have Trainer keep their columns with "
            "remove_unused_columns=False."
        )
    row = {name: c.tolist() if isinstance(c, Tensor) else c for name, c in feature.items()}
    if len(row["input_ids"]) != len(row["word_ids"]):
        raise ValueError(
            f"A row has {len(row['input_ids'])} input_ids and {len(row['word_ids'])} word_ids."
        )
    return row
