"""Entropic mirror descent on log-weights of a mixed strategy.

    log w ← log w + η·payoff − log Σ exp(...)          i.e.  w ∝ w·exp(η·payoff)

the exponential-weights (Hedge) step of the player who maximises; the minimiser uses −payoff.
Hsieh, Liu, Cevher 2019, eq. 6 for measures, Freund & Schapire 1999 for finite games. Everything
stays in the log domain, so payoffs of any size neither overflow nor lose the small weights.
"""

import math

import torch
from torch import Tensor


def uniform(
    size: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Return the log-weights of the uniform strategy on `size` points, shape `[size]`."""
    return torch.full((size,), -math.log(size), dtype=dtype, device=device)


def step(log_weights: Tensor, payoffs: Tensor, step_size: float) -> Tensor:
    """Return the log-weights after one mirror ascent step, normalised along dimension 0.

    Args:
        log_weights: `[M]` or `[M, B]`: one strategy, or one per sample.
        payoffs: gain of each point, broadcastable to the weights; negate for the minimiser.
        step_size: η, in 1/payoff; 0 leaves the weights as they are.

    Example:
        >>> step(uniform(2), torch.tensor([0.0, math.log(3.0)]), 1.0).exp()
        tensor([0.2500, 0.7500])
    """
    if step_size == 0:
        return log_weights
    return (log_weights + step_size * payoffs).log_softmax(0)
