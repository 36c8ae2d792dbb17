"""One δ for several calls at the site: it lies on positions, which each call has in another place.

Row b of a call has the i-th position at which δ may act wherever its mask is 1 for the i-th time:
the same prompt before other continuations, padded left or right. A call of k·B rows has the B rows
k times over, as chosen answers followed by rejected ones do.
"""

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.visits import Call


def placed(delta: Tensor, mask: Tensor | None, call: Call, copies: int = 1) -> Tensor:
    """Return δ of the call it was made for, at the same positions of another call.

    Differentiable, and nothing is read from the device. A position that only the other call has
    gets 0.

    Args:
        delta: `[copies · B, ...]`.
        mask: 1 where δ may act in the call it was made for, broadcastable to `[B, ...]`.
        call: the other call, of `copies · k · B` rows.
        copies: in which the batch is stacked.

    Example:
        >>> delta = torch.tensor([[[1.0], [2.0], [0.0]]])
        >>> ones = torch.tensor([[[1.0], [1.0], [0.0]]])
        >>> like = Call(torch.Size([1, 4, 1]), torch.float32, delta.device, None)
        >>> placed(delta, ones, like._replace(mask=torch.tensor([[[0], [0], [1], [1]]]))).flatten()
        tensor([0., 0., 1., 2.])
    """
    rows = rows_in(len(delta), call.shape[0], copies, delta.device)
    if not tokenwise(mask, call.mask, delta.shape, call.shape):
        return delta if rows is None else delta[rows]
    home = marks(mask, torch.Size([len(delta), *delta.shape[1:]]), delta.device)
    there = marks(call.mask, call.shape, delta.device)
    order = home.int().sort(dim=1, descending=True, stable=True).indices
    rank = (there.cumsum(1) - 1).clamp(0, home.shape[1] - 1)
    there = there & (there.cumsum(1) <= (home if rows is None else home[rows]).sum(1, keepdim=True))
    if rows is not None:
        delta, order = delta[rows], order[rows]
    source = order.gather(1, rank)[..., None].expand(*rank.shape, delta.shape[-1])
    moved = delta.gather(1, source)
    return torch.where(there[..., None], moved, torch.zeros_like(moved))


def rows_in(own: int, rows: int, copies: int, device: torch.device) -> Tensor | None:
    """Return which of δ's rows each row of a call plays; None where they are the same.

    Raises:
        GameError: where the call has not the rows of δ, nor some times as many.
    """
    if own == rows:
        return None
    if rows % own:
        raise GameError(
            f"One δ of {own // copies} rows is to act on {rows // copies} rows at the site: calls "
            "that share it have as many rows as the first one, or some times as many (chosen "
            "answers followed by rejected ones). Call the model with the fewest rows first."
        )
    each, one = rows // copies, own // copies
    row = torch.arange(rows, device=device)
    return row // each * one + row % one


def tokenwise(
    mask: Tensor | None, other: Tensor | None, shape: torch.Size, there: torch.Size
) -> bool:
    """Return whether a position of two calls is a token `[B, n]`, all of whose coordinates play."""
    if len(shape) != 3 or len(there) != 3 or (mask is None and other is None):
        return len(shape) == len(there) == 3 and shape[1] != there[1]
    return all(m is None or m.shape[2] == 1 for m in (mask, other))


def marks(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Return `[B, n]`, True at the tokens where δ may act; all are where there is no mask."""
    if mask is None:
        return torch.ones(shape[:2], dtype=torch.bool, device=device)
    times = shape[0] // mask.shape[0]
    return (mask[..., 0] > 0).expand(-1, shape[1]).repeat(times, 1)
