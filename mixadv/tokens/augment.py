"""Texts with some of their words replaced by similar ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mixadv.tokens.neighbours import Neighbours
from mixadv.tokens.words import Words, cased_like


def substituted(
    texts: Iterable[str],
    neighbours: Neighbours,
    fraction: float = 0.15,
    *,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Return the texts, each word that has neighbours replaced with a probability.

    The new word is uniform over the neighbours, in the case of the old one. Words are replaced
    independently of each other; all between them stays as it is.

    Args:
        texts: any number of them.
        neighbours: the table of similar words.
        fraction: the probability that a word which has neighbours is replaced.
        generator: where the random numbers come from; None is torch's default one.

    Raises:
        TypeError: for a single text.
        ValueError: for a fraction that is no probability.

    Example:
        >>> table = Neighbours({"film": ["movie"]})
        >>> substituted(["Film, not theatre.", ""], table, fraction=1.0)
        ['Movie, not theatre.', '']
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts, got the text {texts!r:.40}.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    return [_substituted(Words(text), neighbours, fraction, generator) for text in texts]


def _substituted(
    words: Words, neighbours: Neighbours, fraction: float, generator: torch.Generator | None
) -> str:
    draws = torch.rand(len(words), 2, generator=generator, dtype=torch.float64).tolist()
    swaps = {}
    for i, (chance, which) in enumerate(draws):
        near = neighbours.of(words[i])
        if near and chance < fraction:
            swaps[i] = cased_like(near[int(which * len(near))], words[i])
    return words.replaced(swaps)
