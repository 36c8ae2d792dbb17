"""Texts as a model reads them: encoded, cut and padded, in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

Text = str | tuple[str, str]
"""What a classifier reads: one text, or two."""


def segment(text: Text, column: int) -> str:
    """Return a text itself, or that text of a pair."""
    return text if isinstance(text, str) else text[column]


def with_segment(text: Text, column: int, new: str) -> Text:
    """Return what is read once a text, or that text of a pair, is a new one."""
    if isinstance(text, str):
        return new
    return (new, text[1]) if column == 0 else (text[0], new)


def check_fast(tokenizer: Any) -> None:
    """Raise TypeError for a tokenizer that does not tell where its tokens lie."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for: use "
            "the fast tokenizer of the model (AutoTokenizer gives it by default)."
        )


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


def tokens(model: nn.Module, tokenizer: Any, texts: Sequence[Text], max_length: int | None) -> Any:
    """Return the tokenizer's encoding of texts or pairs as tensors, padded, and cut if need be."""
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = None if isinstance(texts[0], str) else [text[1] for text in texts]
    cut = {"truncation": max_length is not None, "max_length": max_length}
    filled = {"padding": True, "padding_side": padding_side(model, tokenizer)}
    return tokenizer(first, second, return_tensors="pt", **cut, **filled)


def batches(
    model: nn.Module, tokenizer: Any, texts: Sequence[Text], max_length: int | None, batch_size: int
) -> Iterator[tuple[list[int], Any]]:
    """Yield numbers of texts of similar length, so that little is padded, and their encoding."""
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len("".join(texts[i])))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        read = [texts[i] for i in rows]
        yield rows, tokens(model, tokenizer, read, max_length).to(device)
