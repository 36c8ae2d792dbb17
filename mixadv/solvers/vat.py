"""VAT: virtual adversarial training. Miyato et al. 2018, arXiv:1704.03976, eq. 5–8, Alg. 1.

    min_θ  ℓ(f(X;θ), y) + α·KL( p ‖ f(X + r) ),     p = f(X) held fixed
    d ← g/‖g‖,   g = ∇_r KL( p ‖ f(X + r) ) at r = ξ·d,   K times;     r = ε·d

The divergence is flat at r = 0, so its gradient there is zero: at r = ξ·d it is ξ·H·d, a power
iteration on the Hessian by finite differences, which needs no second derivative of the model. ξ is
`start_size`; the paper's 1e-6 lies below the noise floor of an encoder in fp32.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from mixadv.checks import check_integer
from mixadv.maths.divergence import Divergence
from mixadv.players.ascent import Projection, Start
from mixadv.solvers.base import DivergenceSolver, refuse_memory
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class VAT(DivergenceSolver):
    """Minimise the task loss plus the divergence along the direction that changes predictions most.

    Use it on rows without labels too: the adversary needs none. δ has the length `radius`, whatever
    `step_size` is, unless `projection="ball"`. Passes: 2 + K forwards, K backwards for δ,
    1 backward.
    """

    name: ClassVar[str] = "vat"
    paper: ClassVar[str] = "Miyato et al. 2018, arXiv:1704.03976"
    summary: ClassVar[str] = "task loss plus divergence along the Hessian's top eigenvector"
    own_payoff: ClassVar[str] = (
        "its power iteration is on the curvature of a divergence at δ = 0, "
        "where other payoffs have a slope"
    )

    radius: float | None = 0.2
    projection: Projection = "sphere"
    start: Start = "normal"
    start_size: float | None = 0.05
    divergence: str | Divergence = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_memory(self)
        if self.leaps and self.steps > 1 and self.initial_size == 0:
            raise ValueError(
                "VAT: after its first step a Gauss–Newton ascent is evaluated at start_size, got "
                f"start_size={self.start_size}, where the gradient of a divergence is zero."
            )
        check_integer("VAT", "steps (of the power iteration)", self.steps, 1)
        if self.step_size == 0:
            raise ValueError("VAT: step_size=0 never leaves δ = 0; its size is the radius.")

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ ℓ(X) + α·KL(p ‖ X + r) ]`."""
        if not self.leaps:
            stage.clean()
        zero, d = stage.origin(self), stage.start(self)
        size = self.initial_size
        probe = replace(self, radius=size if self.radius is None else min(size, self.radius))
        for k in range(self.steps):
            if self.leaps and k == 0:
                zero, gradients = stage.second_order(self.divergence, self)
            else:
                _, _, gradients = stage.payoffs(d, self.divergence, self)
            d = stage.move(zero, probe if k < self.steps - 1 else self, gradients)
        yield Step(stage.loss() + self.smoothness(stage, d, fixed=True))
