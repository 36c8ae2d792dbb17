"""Texts as a model reads them: encoded, cut and padded, in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

Text = str | tuple[str, str]
"""What a classifier reads: one text, or two."""


def longest(model: nn.Module, tokenizer: Any) -> int | None:
    """Return how many tokens a model reads at most, as far as it and its tokenizer say."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    known = isinstance(positions, int) and positions > 0  # XLNet's are -1
    limits = [tokenizer.model_max_length, positions if known else math.inf]
    for name, part in model.named_modules():
        padding = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(part.num_embeddings - padding - 1)  # RoBERTa counts on from the padding's
    least = min(limits)
    return int(least) if least < 1e9 else None  # tokenizers that know no limit name a huge one


def padding_side(model: nn.Module, tokenizer: Any) -> str:
    """Return on which side a model's rows are padded.

    Where positions are counted from the start of a row (GPT-2), padding there would shift them, and
    what a text means to the model would depend on the longest of its batch.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return "right" if names & _COUNTED else tokenizer.padding_side


_COUNTED = {"wpe", "position_embeddings", "positions_embed", "embed_positions"}


def tokens(
    model: nn.Module, tokenizer: Any, texts: Sequence[Text], max_length: int | None, **more: Any
) -> Any:
    """Return the tokenizer's encoding of texts or pairs as tensors, padded, and cut if need be."""
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = None if isinstance(texts[0], str) else [text[1] for text in texts]
    cut = {"truncation": max_length is not None, "max_length": max_length}
    cut |= {"padding_side": padding_side(model, tokenizer)}
    return tokenizer(first, second, padding=True, return_tensors="pt", **cut, **more)
