"""How far a strategy is from the best one: what was found, and how sure it is."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Exploitability(NamedTuple):
    """A lower bound of what the adversary gains by leaving the strategy in play.

    `str()` of it is one line.

    Attributes:
        played: payoff of the strategy in play, `[N]` over the samples of all batches; where the
            closure returns a scalar loss and that is the payoff, over the batches.
        reached: payoff of the best response found, `[N]`.
        response: what was found by, in words.
        level: probability with which the interval covers the mean gain of this response over the
            data that the samples were drawn from.
    """

    played: Tensor
    reached: Tensor
    response: str
    level: float

    @property
    def gains(self) -> Tensor:
        """The lower bound of each sample, `[N]`, at least 0; 0 where a payoff is not finite."""
        return (self.reached - self.played).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)

    @property
    def gain(self) -> Tensor:
        """The lower bound, 0-d: the mean of the gains."""
        return self.gains.mean()

    @property
    def interval(self) -> tuple[Tensor, Tensor] | None:
        """Student's confidence interval of the mean gain, cut at 0; None for a single gain."""
        count = len(self.played)
        if count < 2:
            return None
        margin = _student(self.level, count - 1) * self.gains.std() / math.sqrt(count)
        return (self.gain - margin).clamp(min=0), self.gain + margin

    def __str__(self) -> str:
        sure = ""
        if self.interval is not None:
            low, high = self.interval
            sure = f", {100 * self.level:.4g}% interval {float(low):.4g} to {float(high):.4g}"
        return f"exploitability: lower bound {float(self.gain):.4g}{sure}, by {self.response}"


@functools.cache
def _student(level: float, freedom: int) -> float:
    """Return t with P(|T| ≤ t) = level, for Student's T with some degrees of freedom ν.

    The density of θ = arctan(T/√ν) is cos^(ν−1) θ, up to a constant.
    """
    most = min(math.pi / 2, 40 / math.sqrt(freedom))  # beyond lies no mass that counts
    angles = torch.linspace(0, most, 100_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angles.cos() ** (freedom - 1), angles)
    mass = torch.cat([mass.new_zeros(1), mass]) / mass[-1]
    i = int(torch.searchsorted(mass, level).clamp(1, len(mass) - 1))
    share = float((level - mass[i - 1]) / (mass[i] - mass[i - 1]))
    return math.sqrt(freedom) * math.tan(float(torch.lerp(angles[i - 1], angles[i], share)))
