"""The best weights of rows: what an adversary plays that chooses a distribution over losses.

    max_w Σ_i w_i·ℓ_i     over the w ≥ 0 with Σ w_i = 1 in a set around the uniform weights 1/B

    CVaR, level α:     w_i ≤ 1/(α·B)                        (Rockafellar & Uryasev 2000)
    χ² ball, radius ρ: 1/(2B)·Σ_i (B·w_i − 1)² ≤ ρ          (Duchi & Namkoong 2019)

Both maxima are found exactly, by one sort. Rows of equal loss get equal weights, so the weights do
not depend on the order of the rows. Nothing is read from the device.
"""

import math

import torch
from torch import Tensor


def cvar(losses: Tensor, level: float) -> Tensor:
    """Return the weights that pay most of those up to 1/(α·B): the mean of the worst share α.

    Args:
        losses: `[B]`, floating.
        level: α, above 0 and at most 1; up to 1/B the worst row has all the weight.

    Example:
        >>> cvar(torch.tensor([1.0, 4.0, 2.0, 3.0]), 0.375)
        tensor([0.0000, 0.6667, 0.0000, 0.3333])
    """
    worst = level * len(losses)  # so many rows, the last of them in part
    threshold = losses.sort(descending=True).values[min(math.ceil(worst), len(losses)) - 1]
    above, at = (losses > threshold).to(losses.dtype), (losses == threshold).to(losses.dtype)
    most = 1 / max(worst, 1.0)
    rest = (1 - most * above.sum()).clamp(min=0)
    return most * above + rest * at / at.sum().clamp(min=1)


def chi_square(losses: Tensor, radius: float) -> Tensor:
    """Return the weights that pay most in the χ² ball: w_i ∝ max(ℓ_i − η, 0).

    η is what makes the ball tight. A ball that holds the uniform weights of the worst rows alone
    leaves them these.

    Args:
        losses: `[B]`, floating.
        radius: ρ of the ball; from (B − 1)/2 on it holds all distributions.

    Example:
        >>> chi_square(torch.tensor([1.0, 4.0, 2.0, 3.0]), 0.1)
        tensor([0.1000, 0.4000, 0.2000, 0.3000])
    """
    spread = losses.max() - losses.min()
    scaled = (losses - losses.min()) / torch.where(spread > 0, spread, 1.0)
    ordered, order = scaled.sort(descending=True)
    place = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    # Sums over i of the excess x_i − x_j over each row j, and of its square: no term is negative.
    gap = ordered[:-1] - ordered[1:]
    total = (place[:-1] * gap).cumsum(0)
    before = torch.cat([torch.zeros_like(total[:1]), total[:-1]])
    squares = (2 * gap * before + place[:-1] * gap.square()).cumsum(0)
    # Row j takes part if the ball is not filled yet where η is its loss.
    tight = (1 + 2 * radius) / len(losses)  # Σ w_i² on the sphere
    inside = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), squares > tight * total**2])
    inside = inside | (ordered == ordered[0])
    count = inside.to(losses.dtype).sum()
    mean = torch.where(inside, ordered, 0.0).sum() / count
    away = torch.where(inside, ordered - mean, 0.0)
    length = away.square().sum()
    slope = ((tight - 1 / count).clamp(min=0) / torch.where(length > 0, length, 1.0)).sqrt()
    weights = torch.where(inside, 1 / count + slope * away, 0.0).clamp(min=0)
    return torch.zeros_like(weights).scatter(0, order, weights / weights.sum())
