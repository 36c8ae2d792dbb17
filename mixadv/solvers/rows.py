"""Solvers whose adversary weighs the rows of a batch: two adversaries, of which δ may sit out.

    min_θ max_w Σ_i w_i·ℓ_i(δ),     δ at the end of K steps of projected gradient ascent

w is a distribution over rows, or over groups of them, in a set that the solver names. With K = 0,
as by default, δ is 0 and rows alone are played. With K > 0 δ is found first, for each row by
itself, and rows are weighed by their losses there: any w ≥ 0 has the same best δ, so that this is
the best answer of both adversaries at once, as far as K steps find δ.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mixadv.players.ascent import Start
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class RowSolver(Solver):
    """A solver that weighs rows, by one loss per sample.

    Passes: K + 1 forwards, K backwards for δ, 1 backward. Without δ that is a plain step.
    """

    own_payoff: ClassVar[str] = "it weighs rows by the learner's own losses"

    steps: int = 0
    step_size: float = 0.05
    radius: float | None = 0.1
    start: Start = "zero"

    def play(self, stage: Moves) -> Play:
        """Play `∇θ Σ w_i·ℓ_i(δ_K)`."""
        losses = stage.losses(stage.ascend("loss", self))
        yield Step(self.weigh(stage, losses))

    @abstractmethod
    def weigh(self, stage: Moves, losses: Tensor) -> Tensor:
        """Return what the rows' losses `[B]` pay the adversary, 0-d."""

    @property
    def weighs(self) -> str:
        """What there is a distribution over."""
        return "the rows of a batch"
