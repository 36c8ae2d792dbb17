"""Entropic mirror descent on log-weights of a mixed strategy.

    log w ← log w + η·payoff − log Σ exp(...)          i.e.  w ∝ w·exp(η·payoff)

the exponential-weights (Hedge) step of the player who maximises; the minimiser uses −payoff.
Hsieh, Liu, Cevher 2019, eq. 6 for measures, Freund & Schapire 1999 for finite games. Everything
stays in the log domain, so payoffs of any size neither overflow nor lose the small weights. The
same functions move the weights of MAT's particles and solve the games of `mixadv.games`.
"""

import math

import torch
from torch import Tensor


def uniform(
    size: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Return the log-weights of the uniform strategy on `size` points, shape `[size]`."""
    return torch.full((size,), -math.log(size), dtype=dtype, device=device)


def step(log_weights: Tensor, payoffs: Tensor, step_size: float | Tensor, dim: int = 0) -> Tensor:
    """Return the log-weights after one mirror ascent step, normalised along `dim`.

    Args:
        log_weights: `[M]` or `[M, B]`: one strategy, or one per sample.
        payoffs: gain of each point, broadcastable to the weights; negate for the minimiser.
        step_size: η, in 1/payoff; the number 0 leaves the weights as they are.
        dim: the dimension of the points.

    Example:
        >>> step(uniform(2), torch.tensor([0.0, math.log(3.0)]), 1.0).exp()
        tensor([0.2500, 0.7500])
    """
    if isinstance(step_size, (int, float)) and step_size == 0:
        return log_weights
    return (log_weights + step_size * payoffs).log_softmax(dim)


def standardised(payoffs: Tensor, dim: int = 0) -> Tensor:
    """Return the payoffs in units of their spread: mean 0 and mean square 1 along `dim`.

    Zero where they are equal up to rounding, so that noise of the number format is never taken for
    a difference. Nothing is squared before it is divided by the largest: small payoffs do not
    vanish, large ones do not overflow.

    Example:
        >>> standardised(torch.tensor([[0.03, 5.0], [0.01, 5.0]])).round(decimals=3)
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """
    centred = payoffs - payoffs.mean(dim, keepdim=True)
    peak = centred.abs().amax(dim, keepdim=True)
    rounding = 8 * torch.finfo(payoffs.dtype).eps * payoffs.abs().amax(dim, keepdim=True)
    differ = peak > rounding
    scaled = torch.where(differ, centred / torch.where(differ, peak, 1.0), 0.0)
    spread = scaled.square().mean(dim, keepdim=True).sqrt()
    return scaled / torch.where(differ, spread, 1.0)


def relative_step(
    log_weights: Tensor, payoffs: Tensor, step_size: float | Tensor, dim: int = 0
) -> Tensor:
    """Return the log-weights after one mirror ascent step in units of the payoffs' spread.

        w ∝ w·exp( η·(payoff − mean)/s ),   mean and spread s of the points, all alike

    This is `step` with the step η/s, for each strategy by itself: one η for payoffs of any size.
    Two points that differ at all move 2η apart in log-weight, however little they differ. What is
    proved of it, and what is lost, is H7 in theory/statements.md.

    Args:
        log_weights: as in `step`.
        payoffs: as in `step`; where they are equal the weights stay as they are.
        step_size: η, a number without unit.
        dim: the dimension of the points.

    Example:
        >>> for scale in (0.03, 3.0):
        ...     print(relative_step(uniform(2), scale * torch.tensor([0.0, 1.0]), 0.5).exp())
        tensor([0.2689, 0.7311])
        tensor([0.2689, 0.7311])
    """
    return step(log_weights, standardised(payoffs, dim), step_size, dim)


def magnetic_step(
    log_weights: Tensor,
    payoffs: Tensor,
    step_size: float | Tensor,
    temperature: float | Tensor,
    magnet: Tensor,
    dim: int = 0,
) -> Tensor:
    """Return the log-weights after one step drawn towards a magnet: entropy of temperature τ.

        w ∝ ( w · magnet^(ητ) · exp(η·payoff) )^(1/(1+ητ))

    ascends the payoff minus τ·KL(w‖magnet). Sokota et al. 2023, arXiv:2206.05825, eq. 9; at τ = 0
    it is `step`.

    Args:
        log_weights: as in `step`.
        payoffs: as in `step`.
        step_size: η, in 1/payoff.
        temperature: τ, in units of the payoff.
        magnet: log-weights the strategy is drawn to, of the strategy's shape.
        dim: the dimension of the points.

    Example:
        >>> magnet = uniform(2)
        >>> far = torch.tensor([0.9, 0.1]).log()
        >>> magnetic_step(far, torch.zeros(2), 1.0, 1.0, magnet).exp()
        tensor([0.7500, 0.2500])
    """
    pull = torch.as_tensor(step_size * temperature, dtype=magnet.dtype, device=magnet.device)
    # A magnet without mass somewhere has log-weight −∞ there, and 0·(−∞) is none.
    pulled = torch.where(pull > 0, pull * magnet, torch.zeros_like(magnet))
    return ((log_weights + step_size * payoffs + pulled) / (1 + pull)).log_softmax(dim)
