"""SMART: smoothness-inducing regularisation and Bregman proximal steps.
Jiang et al. 2020, arXiv:1911.03437, eq. 1–3, Alg. 1.

    min_θ  ℓ(f(X;θ), y) + λ·max_{δ} ℓ_s(f(X+δ;θ), f(X;θ)) + μ·ℓ_s(f(X;θ), f(X;ϑ))
    δ ← Π( δ + η·∇δ ℓ_s ),          ϑ ← (1−m)·θ + m·ϑ   every S steps

with ℓ_s the symmetric KL, or the squared error for regression. m = 0 is the proximal point at the
last iterate θ_t (vanishing for S = 1, where θ = θ_t), m > 0 its momentum version. By default the
step is the steepest of an L2 ball, scaled like every other solver's; the paper's, raw gradients in
an L∞ ball, is `normalize="none", norm="linf"`. The released
mt-dnn code perturbs an already embedded input, rescales δ to norm 1 whatever ε, and has no proximal
term; its rescaling is `projection="sphere", norm="linf", per="token", normalize="none"`. It holds
the target of each KL constant, so that its weight of the term is not our `smoothness_weight`:
`divergence="fixed_symmetric_kl"` has its gradient, about half of ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from mixadv.checks import check_integer, check_number
from mixadv.players.ascent import Start
from mixadv.players.learner import Learner
from mixadv.solvers.base import DivergenceSolver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class SMART(DivergenceSolver):
    """Minimise the task loss, the divergence that the worst δ causes, and that from a teacher.

    Use it to fine-tune a classifier on few rows. `direction="gauss_newton"` is cheaper. Compare
    with R3F, and with plain training of three times as many steps. Passes: 2 + K forwards (one
    more for the teacher), K backwards for δ, 1 backward.

    Attributes:
        proximal_weight: μ, the weight of the divergence from the teacher. 0 keeps no teacher, and
            needs no wrapped optimizer.
        ema_decay: m, the decay of the teacher's moving average. The paper uses 0.99, and 0.999
            after a tenth of the updates.
        teacher_every: S, the number of optimizer steps between two updates of the teacher.
    """

    name: ClassVar[str] = "smart"
    paper: ClassVar[str] = "Jiang et al. 2020, arXiv:1911.03437"
    summary: ClassVar[str] = "task loss plus worst-case divergence, proximal to an EMA teacher"

    step_size: float = 0.2
    start: Start = "normal"
    start_size: float | None = 0.05
    proximal_weight: float = 1.0
    ema_decay: float = 0.99
    teacher_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("SMART", "proximal_weight", self.proximal_weight)
        check_number("SMART", "ema_decay", self.ema_decay, 0.0, 1.0)
        check_integer("SMART", "teacher_every", self.teacher_every, 1)
        if self.proximal_weight and self.ema_decay == 0 and self.teacher_every == 1:
            raise ValueError(
                "SMART: with ema_decay=0 and teacher_every=1 the teacher is the learner itself, so "
                "the proximal term and its gradient are 0. Set ema_decay (0.99) or teacher_every > "
                "1, or proximal_weight=0."
            )

    def learner(self) -> Learner | None:
        """Return the teacher, where there is a proximal term."""
        if self.proximal_weight == 0:
            return None
        return Learner(ema_decay=self.ema_decay, teacher_every=self.teacher_every)

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ ℓ + λ·ℓ_s(X+δ, X) + μ·ℓ_s(θ, ϑ) ]`."""
        delta = stage.ascend(self.divergence, self)
        objective = stage.loss() + self.smoothness(stage, delta)
        if self.proximal_weight:
            moved = stage.proximal(self.divergence, self.mean_over)
            objective = objective + self.proximal_weight * moved
        yield Step(objective)
