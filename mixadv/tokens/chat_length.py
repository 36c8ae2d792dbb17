"""Chats that are too long are cut at the end of their answers."""

from __future__ import annotations

from torch import Tensor

from mixadv.checks import check_integer
from mixadv.tokens.chat import IGNORED, ChatBatch


def shortened(batch: ChatBatch, max_length: int) -> tuple[ChatBatch, Tensor]:
    """Cut chats to a number of tokens; return them, and which rows were cut, `[B]`.

    Tokens are removed from the end of the answer. Prompts stay whole, so δ acts on the same tokens,
    and the batches of chosen and rejected answers still agree there.

    Args:
        batch: padded on the right.
        max_length: in tokens, including those of the template.

    Raises:
        ValueError: for a row whose prompt leaves no room for its answer; for padding on the left.

    Example:
        >>> import torch
        >>> ids, ones = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4)
        >>> where = torch.tensor([[True, False, False, False]])
        >>> batch = ChatBatch(ids, ones, torch.tensor([[-100, -100, 7, 8]]), where)
        >>> found, cut = shortened(batch, 3)
        >>> found.labels.tolist(), cut.tolist()
        ([[-100, -100, 7]], [True])
    """
    check_integer("shortened", "max_length", max_length, 1)
    if not bool(batch.attention_mask[:, 0].all()):
        raise ValueError("Rows are cut at their right end: have them padded there, 'right'.")
    found = ChatBatch(*(tensor[:, :max_length] for tensor in batch))
    told, left = ((part.labels != IGNORED).any(1) for part in (batch, found))
    # A row without an answer is a prompt alone, of which nothing may be cut.
    empty = (told & ~left) | (~told & batch.attention_mask[:, max_length:].any(1))
    if bool(empty.any()):
        row = int(empty.int().argmax())
        labels = batch.labels[row] != IGNORED
        prompt = int(labels.int().argmax() if labels.any() else batch.attention_mask[row].sum())
        raise ValueError(
            f"Row {row} of the batch has a prompt of {prompt} tokens, and max_length={max_length} "
            f"leaves nothing of an answer to it: set max_length to more than {prompt}, or leave "
            "the row out."
        )
    return found, batch.attention_mask[:, max_length:].any(1)
