"""ALUM: adversarial training of large language models with virtual labels.
Liu et al. 2020, arXiv:2004.08994, eq. 4, Alg. 1.

    min_θ  ℓ(f(X;θ), y) + α·max_{δ} ℓ_s(f(X+δ;θ), f(X;θ))
    δ ← Π( δ + η·∇δ ℓ_s(f(X+δ), f(X)) )

the same in pre-training, where f are the predictions at masked positions, and in fine-tuning. By
default the step is the steepest of an L2 ball, scaled like every other solver's; the paper's, raw
gradients in an L∞ ball, is `normalize="none", norm="linf"`. The released code detaches the
embedding in the adversarial branch, rescales δ to norm 1 whatever ε, and as shipped leaves the
adversarial term off. It holds the target of each KL constant: `divergence="fixed_symmetric_kl"` has
its gradient, about half of ours at the same α. Its term is a mean over the tokens of the batch that
are predicted, `mean_over="tokens"`; ours is a mean over rows of each row's mean, in which a row
counts as much as any other, however many of its tokens are masked.
"""

from dataclasses import dataclass
from typing import ClassVar

from mixadv.players.ascent import Start
from mixadv.solvers.base import DivergenceSolver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class ALUM(DivergenceSolver):
    """Minimise the task loss plus the divergence that the worst δ causes: SMART without a teacher.

    Use it for smooth predictions where no optimizer is wrapped (`game.backward` in a loop of your
    own), in pre-training, and on rows without labels. Passes: 2 + K forwards, K backwards for δ,
    1 backward.
    """

    name: ClassVar[str] = "alum"
    paper: ClassVar[str] = "Liu et al. 2020, arXiv:2004.08994"
    summary: ClassVar[str] = "task loss plus worst-case divergence, in pre-training too"

    step_size: float = 0.2
    start: Start = "normal"
    start_size: float | None = 0.05

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ ℓ(X) + α·ℓ_s(X+δ, X) ]`."""
        delta = stage.ascend(self.divergence, self)
        yield Step(stage.loss() + self.smoothness(stage, delta))
