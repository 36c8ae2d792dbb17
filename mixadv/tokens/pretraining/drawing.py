"""Random positions and random tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_positions(candidates: Tensor, rate: float) -> Tensor:
    """Draw a rounded part of each row's candidates, at least one; all sets of a size are alike.

    Candidates and what is returned are bool, `[B, n]`.

    Example:
        >>> draw_positions(torch.tensor([[True] * 20, [True, False] * 10]), 0.15).sum(1)
        tensor([3, 2])
    """
    scores = torch.rand(candidates.shape, device=candidates.device).masked_fill(~candidates, 2.0)
    ranks = scores.argsort(1).argsort(1)
    counts = (rate * candidates.sum(1, keepdim=True)).round().clamp(min=1)
    return (ranks < counts) & candidates


def sample(logits: Tensor) -> Tensor:
    """Draw `[N]` from softmax(logits `[N, C]`) by the Gumbel-max trick, in fp32, no gradient.

    Example:
        >>> sample(torch.tensor([[0.0, 100.0], [100.0, 0.0]]))
        tensor([1, 0])
    """
    waiting = torch.empty_like(logits, dtype=torch.float32).exponential_()
    return (logits.detach().float() - waiting.log()).argmax(-1)
