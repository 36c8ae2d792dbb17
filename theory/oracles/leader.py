"""A quadratic game of a learner that leads and an adversary with a payoff of its own."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LeaderFollower:
    """u = −½‖δ − Aθ‖² for the adversary; ½‖θ − b‖² + ⟨δ, Cθ⟩ + ½ρ‖θ − a‖² for the learner.

    The adversary takes `ascent_steps` gradient steps of size η from δ = 0, the learner one of size
    γ at that δ.
    """

    answer: Array  # A, [m, n]
    coupling: Array  # C, [m, n]
    centre: Array  # b, [n]
    anchor: Array  # a, [n], of what is retained
    weight: float  # ρ
    ascent_step: float  # η
    ascent_steps: int  # K

    @property
    def share(self) -> float:
        """How much of the best response K steps reach: 1 − (1 − η)^K."""
        return 1 - (1 - self.ascent_step) ** self.ascent_steps

    @property
    def matrix(self) -> Array:
        """M, by which the learner's gradient at the adversary's answer is Mθ − (b + ρa)."""
        own = (1 + self.weight) * np.eye(len(self.centre))
        return own + self.share * self.coupling.T @ self.answer

    @property
    def target(self) -> Array:
        """B + ρa."""
        return self.centre + self.weight * self.anchor

    def rest(self) -> Array:
        """Return θ at which rounds come to rest; as K grows, that of the Nash equilibrium."""
        return np.linalg.solve(self.matrix, self.target).astype(np.float64)

    def leader(self) -> Array:
        """Return the best θ for a learner that foresees the adversary's best response."""
        crossed = self.coupling.T @ self.answer
        own = (1 + self.weight) * np.eye(len(self.centre))
        return np.linalg.solve(own + crossed + crossed.T, self.target).astype(np.float64)

    def rate(self, step: float) -> float:
        """Return q, by which a round with the learner's step γ brings θ nearer to its rest."""
        both = np.linalg.eigvalsh(self.matrix + self.matrix.T)[0]
        return float(np.sqrt(1 - step * both + step**2 * np.linalg.norm(self.matrix, 2) ** 2))

    def regret(self, theta: Array) -> float:
        """Return how much more than at δ_K the adversary could have been paid."""
        return float(0.5 * (1 - self.share) ** 2 * ((self.answer @ theta) ** 2).sum())
