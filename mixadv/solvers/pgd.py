"""PGD: projected gradient ascent, then one step on the worst point found.
Madry et al. 2018, arXiv:1706.06083, eq. 2.1; in embedding space Zhu et al. 2020, eq. 1–2.

    min_θ  ℓ(f(X + δ_K), y),     δ_{t+1} = Π( δ_t + α·g_t/‖g_t‖ ),   g_t = ∇_δ ℓ(f(X + δ_t), y)

θ receives the gradient at the last δ only; the clean example is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mixadv.divergence import Divergence
from mixadv.solvers.base import Solver, check_divergence
from mixadv.stage import Step

if TYPE_CHECKING:
    from mixadv.solvers.base import Play
    from mixadv.stage import Stage


@dataclass(frozen=True, kw_only=True)
class PGD(Solver):
    """The loss at the end of K steps of projected gradient ascent.

    Passes: K + 1 forwards, K backwards for δ, 1 backward.

    Attributes:
        payoff: `"loss"`, or a divergence from the clean predictions (by name, or any callable
            `(perturbed [B, C], clean [B, C]) -> [B]`) that the adversary maximises instead: one
            forward more.
    """

    name: ClassVar[str] = "pgd"
    paper: ClassVar[str] = "Madry et al. 2018, arXiv:1706.06083"
    summary: ClassVar[str] = "the loss at the end of K projected gradient steps"

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1
    payoff: str | Divergence = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.payoff != "loss":
            check_divergence(self, "payoff")

    @property
    def gain(self) -> str | Divergence:
        """What the adversary maximises."""
        return self.payoff

    def play(self, stage: Stage) -> Play:
        """Play `∇θ ℓ(X + δ_K)`."""
        delta = stage.ascend(self.payoff, self)
        yield Step(stage.loss(delta))
