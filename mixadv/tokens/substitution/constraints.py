"""What a perturbed text must keep: how many words may change, which never, and the meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.checks import check_number
from mixadv.model.replay import evaluating
from mixadv.tokens.reading.encoding import batches, longest

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every both either neither no not nor none
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
    who whom whose which what where when why how
    am is are was were be been being do does did doing have has had having
    can could may might must shall should will would ca wo
    and or but if then else so because although though while until unless since as than whether
    of in on at by for from to into onto with without within about above below over under between
    among through during before after against off out up down again further
    too very just only also there here more most much many still yet even ever
    don't doesn't didn't isn't aren't wasn't weren't won't wouldn't can't couldn't shouldn't
    s t d m re ve ll
    hasn't haven't hadn't n't it's i'm i've you're he's she's we're they're that's what's
    """.split()  # noqa: SIM905 (a list of them has a line for each)
)
"""English words that carry grammar, or turn a meaning round; lower-case."""


def budget(words: int, max_share: float, min_words: int) -> int:
    """Return how many words of a text may change: a share, rounded up, or `min_words` if more.

    Example:
        >>> budget(30, 0.1, 1), budget(31, 0.1, 1), budget(30, 0.1, 4), budget(2, 0.1, 4)
        (3, 4, 4, 2)
    """
    return min(words, max(portion(words, max_share), min_words))


def portion(count: int, share: float) -> int:
    """Return a share of a number, rounded up.

    Example:
        >>> portion(100, 0.07), portion(101, 0.07)
        (7, 8)
    """
    return math.ceil(round(share * count, 9))  # 0.07 × 100 is more than 7 in floats


@dataclass(frozen=True)
class Similarity:
    """A bound on how far a text may move away in meaning, as a sentence encoder sees it.

    Texts are compared by the cosine of the mean of their tokens' last hidden states.

    Attributes:
        encoder: returns `last_hidden_state` [texts, tokens, dim]; one trained for sentence
            similarity.
        tokenizer: of the encoder.
        min_cosine: that is kept; 0.9 in A2T.
        batch_size: texts that the encoder reads at a time.
    """

    encoder: nn.Module
    tokenizer: Any
    min_cosine: float = 0.9
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_number("Similarity", "min_cosine", self.min_cosine, least=-1.0, most=1.0)

    def __call__(self, originals: Sequence[str], changed: Sequence[str]) -> Tensor:
        """Return the cosine of each text with its original, [texts], fp32 on the CPU."""
        if not changed:
            return torch.empty(0)
        texts = list(dict.fromkeys([*originals, *changed]))  # many share an original
        vectors = self._vectors(texts)
        first = torch.stack([vectors[text] for text in originals])
        return F.cosine_similarity(first, torch.stack([vectors[text] for text in changed]))

    def keeps(self, originals: Sequence[str], changed: Sequence[str]) -> list[bool]:
        """Return of each text whether it is similar enough to its original."""
        return [cosine >= self.min_cosine for cosine in self(originals, changed).tolist()]

    def _vectors(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the mean state [dim] of each text."""
        found: dict[str, Tensor] = {}
        limit = longest(self.encoder, self.tokenizer)
        read = batches(self.encoder, self.tokenizer, texts, limit, self.batch_size)
        with evaluating(self.encoder), torch.no_grad():
            for rows, inputs in read:
                states = getattr(self.encoder(**inputs), "last_hidden_state", None)
                if states is None:
                    raise TypeError(
                        f"{type(self.encoder).__name__} returns no last_hidden_state: load the "
                        "encoder with AutoModel, without a head."
                    )
                mask = inputs["attention_mask"].unsqueeze(-1).to(states)
                means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                found.update(zip((texts[i] for i in rows), means.float().cpu(), strict=True))
        return found
