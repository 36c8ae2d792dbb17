"""What every neuron of an encoder does on the words of tagged sentences."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixadv.model.modules import unwrap
from mixadv.model.replay import evaluating
from mixadv.tokens.reading.encoding import longest, padding_side

Sentences = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Activations:
    """Activations of words, one row per word; neuron `i` is unit `i % hidden` of a layer.

    Attributes:
        values: [words, layers × hidden], fp32, the embedding layer first.
        tags: numbers in `names`, [words].
        names: of the tags.
        words: as they were written.
        layers: the embedding layer and those above it.
        hidden: neurons of a layer.
    """

    values: np.ndarray
    tags: np.ndarray
    names: tuple[str, ...]
    words: tuple[str, ...]
    layers: int
    hidden: int

    def __post_init__(self) -> None:
        shape = (len(self.words), self.layers * self.hidden)
        if self.values.shape != shape or self.tags.shape != shape[:1]:
            raise ValueError(
                f"{shape[0]} words and {self.layers} × {self.hidden} neurons need values {shape} "
                f"and tags {shape[:1]}, got {self.values.shape} and {self.tags.shape}."
            )
        if not np.isfinite(self.values).all():
            raise ValueError(
                f"{int((~np.isfinite(self.values)).sum())} activations are not finite: the model "
                "has diverged, or its number format overflows."
            )

    def __len__(self) -> int:
        return len(self.words)

    def with_tags(self, names: Sequence[str]) -> Activations:
        """Return the words that have one of these tags, with tags numbered as in `names`.

        Example:
            >>> tags = np.array([0, 1, 2])
            >>> found = Activations(np.eye(3), tags, ("a", "b", "c"), ("x", "y", "z"), 1, 3)
            >>> found = found.with_tags(["c", "a"])
            >>> found.words, found.tags.tolist()
            (('x', 'z'), [1, 0])
        """
        number = {name: i for i, name in enumerate(names)}
        tags = np.array([number.get(name, -1) for name in self.names], int)[self.tags]
        kept = np.flatnonzero(tags >= 0)
        words = tuple(self.words[i] for i in kept)
        found = {"values": self.values[kept], "tags": tags[kept], "words": words}
        return replace(self, **found, names=tuple(names))


def activations(
    model: nn.Module,
    tokenizer: Any,
    sentences: Sentences,
    tags: Sentences,
    *,
    max_tokens: int = 20_000,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int | None = None,
) -> Activations:
    """Return what the neurons of a model do on the words of sentences.

    The model reads the words of a sentence joined by spaces, in evaluation mode and without
    gradients; modes and the random state are restored. The activation of a word is the mean over
    its tokens. Words that are cut, in whole or in part, and words without tokens are left out.

    Args:
        model: an encoder or decoder of transformers, with a head or without; of an
            encoder–decoder, the encoder.
        tokenizer: of the model, a fast one.
        sentences: words of each sentence.
        tags: of each word.
        max_tokens: words; sentences are taken whole until the next one does not fit.
        batch_size: sentences that the model reads at a time.
        max_length: tokens of a sentence; `None` asks the model.
        seed: draws the sentences; `None` takes the first ones.

    Raises:
        TypeError: for a slow tokenizer, or a model that does not return its hidden states.
        ValueError: for sentences without as many tags as words, or nothing to read.
    """
    _check(tokenizer, sentences, tags)
    taken = _taken(sentences, max_tokens, seed)
    found = _read_all(model, tokenizer, sentences, taken, batch_size, max_length)
    places = [(i, at) for i in taken for at in sorted(found[i])]
    if not places:
        raise ValueError("The tokenizer finds no token in any word: nothing to analyse.")
    names = sorted({tags[i][at] for i, at in places})
    values = np.stack([found[i][at] for i, at in places])  # [words, layers, hidden]
    return Activations(
        values=values.reshape(len(values), -1),
        tags=np.array([names.index(tags[i][at]) for i, at in places]),
        names=tuple(names),
        words=tuple(sentences[i][at] for i, at in places),
        layers=values.shape[1],
        hidden=values.shape[2],
    )


def _check(tokenizer: Any, sentences: Sentences, tags: Sentences) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for: use "
            "the fast tokenizer of the model (AutoTokenizer gives it by default)."
        )
    if not sentences:
        raise ValueError("There are no sentences to read.")
    if len(sentences) != len(tags):
        raise ValueError(f"{len(sentences)} sentences need as many lists of tags, not {len(tags)}.")
    for i, (words, own) in enumerate(zip(sentences, tags, strict=True)):
        if isinstance(words, str) or isinstance(own, str):
            raise TypeError(
                f"Sentence {i} and its tags must be lists of strings, got {words!r:.60}."
            )
        if len(words) != len(own):
            raise ValueError(
                f"Sentence {i} has {len(words)} words and {len(own)} tags; it begins "
                f"{' '.join(words[:5])!r}."
            )


def _taken(sentences: Sentences, max_tokens: int, seed: int | None) -> list[int]:
    """Return the numbers of the sentences to read."""
    order = list(range(len(sentences)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    words = [*itertools.accumulate(len(sentences[i]) for i in order)]
    taken = [i for i, count in zip(order, words, strict=True) if count <= max_tokens]
    if not taken or not words[-1]:
        raise ValueError(
            f"max_tokens is {max_tokens}, and the first sentence has {words[0]} words: raise it."
        )
    return taken


def _read_all(
    model: nn.Module,
    tokenizer: Any,
    sentences: Sentences,
    taken: Sequence[int],
    batch_size: int,
    max_length: int | None,
) -> dict[int, dict[int, np.ndarray]]:
    """Return the activations of the words of some sentences, by number and place."""
    bare: Any = unwrap(model)
    encoder = getattr(bare, "base_model", bare)  # without a head
    if getattr(getattr(encoder, "config", None), "is_encoder_decoder", False):
        encoder = encoder.get_encoder()
    most = max_length or longest(encoder, tokenizer)
    by_length = sorted(taken, key=lambda i: sum(map(len, sentences[i])))
    found: dict[int, dict[int, np.ndarray]] = {}
    with evaluating(encoder), torch.no_grad():
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            read = [sentences[i] for i in batch]
            found |= zip(batch, _read(encoder, tokenizer, read, most), strict=True)
    return found


def _read(
    encoder: Any, tokenizer: Any, sentences: Sentences, max_length: int | None
) -> list[dict[int, np.ndarray]]:
    """Return the activations [layers, hidden] of each sentence's words, by the word's place."""
    encoding = tokenizer(
        [" ".join(words) for words in sentences],
        return_tensors="pt",
        padding=True,
        padding_side=padding_side(encoder, tokenizer),
        truncation=max_length is not None,
        max_length=max_length,
        return_overflowing_tokens=True,  # what is cut, in rows of its own
        return_offsets_mapping=True,
    )
    owners = encoding.pop("overflow_to_sample_mapping").tolist()
    offsets = encoding.pop("offset_mapping").tolist()
    rows = [owners.index(i) for i in range(len(sentences))]
    if not encoding["input_ids"].shape[1]:  # which models cannot read
        return [{} for _ in sentences]
    device = next(encoder.parameters()).device
    inputs = {name: tensor[rows].to(device) for name, tensor in encoding.items()}
    states = _states(encoder, inputs)
    found = []
    for i, (row, words) in enumerate(zip(rows, sentences, strict=True)):
        own = _tokens_of_words(words, offsets[row])
        more = [r for r, owner in enumerate(owners) if owner == i and r != row]
        lost = {at for r in more for at in _tokens_of_words(words, offsets[r])}
        found.append(
            {at: states[:, i, t].mean(1).cpu().numpy() for at, t in own.items() if at not in lost}
        )
    return found


def _states(encoder: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the hidden states of a batch, [layers, sentences, tokens, hidden], fp32."""
    states = getattr(encoder(**inputs, output_hidden_states=True), "hidden_states", None)
    if not states or any(state.shape != states[0].shape for state in states):
        raise TypeError(
            f"{type(encoder).__name__} does not return hidden states of one shape: an encoder or "
            "decoder of transformers is needed, all of whose layers are of one size."
        )
    return torch.stack(states).float()


def _tokens_of_words(words: Sequence[str], offsets: list[list[int]]) -> dict[int, list[int]]:
    """Return the tokens that stand for each word, where the words are joined by spaces."""
    owner = [at for i, word in enumerate(words) for at in (*[i] * len(word), -1)]
    found: dict[int, list[int]] = {}
    for token, (begin, end) in enumerate(offsets):
        for at in set(owner[begin:end]) - {-1}:
            found.setdefault(at, []).append(token)
    return found
