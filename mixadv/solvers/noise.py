"""Uniform noise on embeddings: the random adversary. Jain et al. 2024 (NEFTune), arXiv:2310.05914.

    min_θ  E_δ ℓ(f(X + δ), y),     δ = α/√(n·D) · U(−1, 1)^{n×D}

the baseline that every claim about an adversary must beat: same set, no gradient. n counts the real
tokens of a sample; the Hugging Face argument `neftune_noise_alpha` counts padding too and perturbs
it. `UniformNoise(radius=5.0, unit="absolute")` is NEFTune with α = 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Solver):
    """The loss at a random point of size `radius`.

    Passes: 1 forward, 1 backward.
    """

    name: ClassVar[str] = "noise"
    paper: ClassVar[str] = "Jain et al. 2024, arXiv:2310.05914"
    summary: ClassVar[str] = "the loss at uniform noise: the random adversary"

    steps: int = 0
    radius: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != 0:
            raise ValueError(
                f"UniformNoise takes no steps, got steps={self.steps}: with steps it is PGD."
            )

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ℓ(X + δ)` with δ at its random start."""
        yield Step(stage.loss(stage.start(self).detach()))
