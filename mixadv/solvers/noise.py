"""Uniform noise on embeddings: the random adversary. Jain et al. 2024 (NEFTune), arXiv:2310.05914.

    min_θ  E_δ ℓ(f(X + δ), y),     δ = α/√(n·D) · U(−1, 1)^{n×D}

the baseline that every claim about an adversary must beat: same set, no gradient. n counts the real
tokens of a sample; the Hugging Face argument `neftune_noise_alpha` counts padding too and perturbs
it. `UniformNoise(radius=5.0, unit="absolute")` is NEFTune with α = 5.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Solver):
    """Minimise the loss at a random point of size `radius`.

    Use it as a control: an adversary has to beat it. Passes: 1 forward, 1 backward.
    """

    name: ClassVar[str] = "noise"
    paper: ClassVar[str] = "Jain et al. 2024, arXiv:2310.05914"
    summary: ClassVar[str] = "the loss at uniform noise: the random adversary"

    steps: int = field(default=0, init=False)
    radius: float | None = 1.0

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ℓ(X + δ)` with δ at its random start."""
        yield Step(stage.loss(stage.start(self).detach()))
