"""Augmented data: rows as an attack left them, and texts with similar words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mixadv.checks import check_number
from mixadv.tokens.reading.encoding import Text
from mixadv.tokens.reading.neighbours import Neighbours
from mixadv.tokens.reading.words import Words, cased_like
from mixadv.tokens.substitution.constraints import portion
from mixadv.tokens.substitution.greedy import WordSubstitution


def adversarial_rows(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    labels: Sequence[int],
    attack: WordSubstitution,
    fraction: float,
    generator: torch.Generator,
    part: slice = slice(None),
) -> tuple[list[int], list[Text]]:
    """Return a fraction of the rows as the attack leaves them, to train on beside all rows.

    A2T (Yoo and Qi, 2021) trains one epoch on the clean rows; before each later epoch it attacks
    rows in a random order and adds perturbed copies of a fraction of them (20 %). Its code keeps
    the copies that change the prediction, and goes on until it has enough of them; here each row
    drawn gives one copy, the worst for the model that the attack found, so that an epoch's length
    does not depend on the model. A misclassified row is not attacked, and counts twice.

    Args:
        model: in training; see `WordSubstitution.attack`.
        tokenizer: of the model.
        texts: of all rows.
        labels: of all rows.
        attack: to perturb them with.
        fraction: of the rows that are drawn, rounded up.
        generator: of the draw, on the CPU.
        part: of the rows drawn, where several processes share them: `slice(rank, None, processes)`.

    Returns:
        The numbers of the rows, in the order drawn, and their perturbed texts.

    Raises:
        ValueError: for a fraction outside [0, 1].
    """
    check_number("adversarial_rows", "fraction", fraction, most=1.0)
    order: list[int] = torch.randperm(len(texts), generator=generator).tolist()
    drawn: list[int] = order[: portion(len(texts), fraction)][part]
    attacks = attack.attack(model, tokenizer, [texts[i] for i in drawn], [labels[i] for i in drawn])
    return drawn, [found.perturbed for found in attacks]


def substitute_words(
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
        >>> substitute_words(["Film, not theatre.", ""], table, fraction=1.0)
        ['Movie, not theatre.', '']
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of texts, got the text {texts!r:.40}.")
    check_number("substitute_words", "fraction", fraction, most=1.0)
    replaced = []
    for words in map(Words, texts):
        draws = torch.rand(len(words), 2, generator=generator, dtype=torch.float64).tolist()
        swaps = {
            i: cased_like(near[int(which * len(near))], words[i])
            for i, (chance, which) in enumerate(draws)
            if chance < fraction and (near := neighbours.of(words[i]))
        }
        replaced.append(words.replaced(swaps))
    return replaced
