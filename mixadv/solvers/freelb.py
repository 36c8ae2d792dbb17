"""FreeLB: the gradient averaged along the ascent. Zhu et al. 2020, arXiv:1909.11764, Alg. 1.

    g ← (1/K) Σ_{t=1..K} ∇θ ℓ(f(X + δ_{t−1}), y),     δ_t = Π( δ_{t−1} + α·∇δℓ/‖∇δℓ‖₂ )

Both gradients come from one backward per step, so K steps cost K plain ones. Every step sees the
same dropout mask. `steps` counts passes, as in the paper; the released fairseq code makes one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mixadv.ascent import check_integer
from mixadv.solvers.base import Solver
from mixadv.stage import Step

if TYPE_CHECKING:
    from mixadv.solvers.base import Play
    from mixadv.stage import Stage


@dataclass(frozen=True, kw_only=True)
class FreeLB(Solver):
    """The loss averaged over the points δ_0 … δ_{K−1} of an ascent.

    Passes: K forwards, K backwards.
    """

    name: ClassVar[str] = "freelb"
    paper: ClassVar[str] = "Zhu et al. 2020, arXiv:1909.11764"
    summary: ClassVar[str] = "the loss averaged along the ascent, δ's gradient for free"

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("FreeLB", "steps (the number of passes)", self.steps, 1)

    def play(self, stage: Stage) -> Play:
        """Play `(1/K) Σ ∇θ ℓ(X + δ_t)`."""
        delta = stage.start(self)
        for _ in range(self.steps - 1):
            yield stage.loss(delta) / self.steps
            delta = stage.move(delta, self)
        yield Step(stage.loss(delta.detach()) / self.steps)
