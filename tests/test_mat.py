"""MAT: damping, mirror weights, temperature, and the weights that it must leave alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.learner import Learner
from tests.zoo import player

ROUND = {"learner_steps": 1, "damping": 0.0, "round_damping": 0.0, "average": None}


class Quadratic(nn.Module):
    """The loss Σ ½·a·(θ − centre)², or the slope Σ θ where there is no curvature."""

    def __init__(self, size: int, curvature: Tensor | float, centre: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.curvature, self.centre = curvature, centre

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = 0.5 * self.curvature * (self.theta - self.centre).square()
        if self.curvature is None:
            loss = self.theta
        return loss.sum() + x.sum(), x
