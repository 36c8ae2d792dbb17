"""Batches of rows, as closures that can be called again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.robustness.data import DataError, Rows
from mixadv.tokens.reading.encoding import longest, tokens


class Batch(NamedTuple):
    """Some rows, as a closure that can be called again and again.

    Attributes:
        closure: runs the model and returns one loss per sample `[B]` and logits `[B, C]`.
        labels: `[B]`, on the device of the logits.
        rows: their places in the data set, `B` different ones.
    """

    closure: Callable[[], tuple[Tensor, Tensor]]
    labels: Tensor
    rows: list[int]


def text_batches(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> list[Batch]:
    """Return the batches of rows, on the model's device, the longest texts first.

    Rows of similar length are together, so that little is padded; what does not fit in memory
    breaks at once. The loss is cross-entropy in fp64 (fp32 where there is none): in the format of
    the logits that of a sure prediction is 0, and no perturbation would be seen to raise it.

    Args:
        model: returns logits `[B, C]`, by themselves or as `.logits`.
        tokenizer: of the model.
        rows: as `read_rows` returns them.
        batch_size: rows that the model reads at a time.
        max_length: tokens; the rest of a text is cut. None asks model and tokenizer.

    Raises:
        DataError: for a text without tokens, which no model can read.
    """
    check_integer("text_batches", "batch_size", batch_size, 1)
    device = next(model.parameters()).device
    most = max_length or longest(model, tokenizer)
    order = sorted(range(len(rows)), key=rows.lengths.__getitem__, reverse=True)
    made = []
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        part = rows.take(places)
        encoding = {k: v.to(device) for k, v in tokens(model, tokenizer, part.texts, most).items()}
        _check_tokens(encoding, rows, places)
        labels = torch.tensor(part.labels, device=device)
        made.append(Batch(_closure(model, encoding, labels), labels, places))
    return made


def _check_tokens(encoding: Mapping[str, Tensor], rows: Rows, places: Sequence[int]) -> None:
    """Raise DataError for a row that the tokenizer makes nothing of."""
    counts = encoding.get("attention_mask", torch.ones_like(encoding["input_ids"])).sum(1).tolist()
    for count, place in zip(counts, places, strict=True):
        if not count:
            raise DataError(
                f"{rows.name}, row {place + 1}: the tokenizer finds no token in "
                f"{rows.texts[place]!r:.60}, and a model cannot read nothing: leave the row out."
            )


def _closure(
    model: nn.Module, encoding: Mapping[str, Tensor], labels: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    wide = torch.float32 if labels.device.type == "mps" else torch.float64

    def closure() -> tuple[Tensor, Tensor]:
        output = model(**encoding)
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits.to(wide), labels, reduction="none"), logits

    return closure


def check_reading(batch: Batch, losses: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless a closure returned what its batch promises."""
    count = len(batch.rows)
    if losses.shape != (count,) or logits.shape[:1] != (count,) or logits.dim() != 2:
        raise ValueError(
            f"The closure of a batch of {count} rows must return one loss per sample [{count}] "
            f"(reduction='none') and logits [{count}, C], got {list(losses.shape)} and "
            f"{list(logits.shape)}."
        )
    if batch.labels.shape != (count,):
        raise ValueError(f"{count} rows have labels of shape {list(batch.labels.shape)}.")
    if bool(((batch.labels < 0) | (batch.labels >= logits.shape[1])).any()):
        raise ValueError(
            f"labels must be numbers from 0 to {logits.shape[1] - 1}, the model's classes; got "
            f"{int(batch.labels.min())} to {int(batch.labels.max())}."
        )


def in_order(
    rows: Sequence[Sequence[int]], columns: Sequence[Sequence[Tensor]]
) -> list[NDArray[Any]]:
    """Return columns of all batches as arrays, their rows as in the data set."""
    places = [place for batch in rows for place in batch]
    if not places:
        raise ValueError("There are no rows to measure on: the batches are empty.")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"Row {twice} is in the batches twice.")
    order = np.argsort(places)
    return [torch.cat(list(parts)).numpy()[order] for parts in zip(*columns, strict=True)]
