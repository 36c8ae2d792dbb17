"""MAT: mixed-strategy adversarial training. Zhong et al. 2023, arXiv:2306.15826, Alg. 1–2; the
entropic mirror descent of Hsieh, Liu, Cevher 2019, arXiv:1811.02002.

    min_p max_q  E_{θ~p} E_{δ~q} [ ℓ(f(X;θ), y) + λ·ℓ_s(f(X+δ;θ), f(X;θ)) ]

Adversary, K_δ steps on M particles δ_m with weights w on the simplex:
    w_m ∝ w_m·exp(η_w·ℓ_s(δ_m))                                    entropic mirror descent
    δ_m ← Π( δ_m + γ_δ·∇ℓ_s(δ_m) + √(2·γ_δ·τ_δ)·ξ )                projected Langevin
    δ̄_m ← β·δ̄_m + (1−β)·δ_m,   δ̄_m = δ_m at the start              damping
Learner, K_θ samples of the wrapped optimizer's step on ℓ + λ·ℓ_s, each with noise √(2·lr·τ_θ)·ξ:
    θ̄ ← β·θ̄ + (1−β)·θ,   then   θ_{t+1} = β'·θ_t + (1−β')·θ̄

The strategy is played as its damped mean Σ_m w_m δ̄_m (the paper, one pass), or as the ensemble
Σ_m w_m ℓ_s(X + δ_m) (M passes). By default ∇ℓ_s is taken as a direction, of length 1 per sample, as
the released code does; `normalize="none"` is the raw drift of Langevin dynamics. θ follows the
Gibbs law for plain SGD only: adaptive optimizers precondition the drift and not the noise.
Differences of the released code: its copy of θ_t is an alias of the live weights, its noise comes
after the projection and is scaled by γ (a temperature of 4e-8 for δ, 4e-12 for θ), its log(softmax)
overflows.

Published: github.com/Charles-Zhong/MAT, BEST_LOGs ("cola-run" is its run.sh). Steps of δ, of 1e-3,
end far outside the L∞ ball of 1e-5 and are rescaled to it: here that is `projection="sphere"`. The
noise added after it is there about as large as δ; ours, added before, is a hundredth of δ. Dropout
is drawn anew in each pass, and moves the predictions far more than δ does. Trained with AdamW
(weight decay 0.01) and linear decay, K_θ steps per batch; warm-up is a part of the run:

    model              task        lr   batch   epochs  warm-up
    bert-base-uncased  qnli      1e-5       8        3      0.1
    bert-base-uncased  qqp       1e-5      32        3      0.1
    bert-base-uncased  sst2      1e-5      32        5      0.1
    bert-base-uncased  cola      1e-5      64       20      0.1
    bert-base-uncased  cola-run  1e-5      64       10      0.1
    roberta-large      qqp       1e-5       8        3      0.1
    roberta-large      sst2      1e-5      32        5      0.1
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mixadv.checks import check_integer, check_number
from mixadv.maths import mirror
from mixadv.players.ascent import Start
from mixadv.players.learner import Damping, Learner, check_damping
from mixadv.players.strategy import Strategy
from mixadv.solvers.base import DivergenceSolver, Presets, row
from mixadv.solvers.play import Moves, Play, Step


def _logged(
    learner_steps: int, steps: int, ratio: float, smoothness: float, damping: float
) -> dict[str, Any]:
    """Return a row of the logs, whose noise √(2γ)·γ·ratio is that of temperature (γ·ratio)²."""
    return row(
        1e-3,
        steps,
        1e-5,
        1e-5,
        norm="linf",
        normalize="norm",
        projection="sphere",
        temperature=(1e-3 * ratio) ** 2,
        fresh_dropout=True,
        smoothness_weight=smoothness,
        learner_steps=learner_steps,
        learner_temperature=(1e-5 * ratio) ** 2,
        damping=damping,
        round_damping=damping,
        average=None,
    )


@dataclass(frozen=True, kw_only=True)
class MAT(DivergenceSolver):
    """Both players randomise: Langevin particles against Langevin samples of the weights.

    Passes of a round: M·K_δ + 2·K_θ forwards where the mean is played, M·K_δ + (M + 1)·K_θ for the
    ensemble; M·K_δ backwards for δ, K_θ backwards and optimizer steps. Damping and averaging keep
    three copies of the trainable weights: at the round's start, the damped mean, the average.

    Attributes:
        mirror_step: η_w of the log-weights, in 1/payoff; no effect for one particle.
        damping: β of both players within a round: 0 keeps the last, `"uniform"` the plain mean.
        play_as: `"mean"` or `"ensemble"`.
        learner_steps: K_θ.
        learner_temperature: τ_θ; 1 destroys an encoder, up to 1e-4 costs MiniLM nothing (README).
        round_damping: β' of the learner between rounds.
        average: of θ over closed rounds, for `game.averaged()`: `"uniform"`, a decay, or None.
        samples: R, learner samples kept for `game.mixture`.
    """

    name: ClassVar[str] = "mat"
    paper: ClassVar[str] = "Zhong et al. 2023, arXiv:2306.15826"
    summary: ClassVar[str] = "mixed strategies for both players by mirror descent and Langevin"
    presets: ClassVar[Presets] = {  # K_θ, K_δ, noise ratio, λ, β = β'
        "bert-base-uncased": {
            "qnli": _logged(10, 5, 0.2, 1.0, 0.3),
            "qqp": _logged(10, 5, 0.1, 1.0, 0.3),
            "sst2": _logged(10, 5, 0.1, 3.0, 0.3),
            "cola": _logged(10, 5, 0.2, 3.0, 0.3),
            "cola-run": _logged(10, 10, 0.2, 3.0, 0.3),
        },
        "roberta-large": {
            "qqp": _logged(5, 5, 0.1, 1.0, 0.3),
            "sst2": _logged(5, 5, 0.2, 1.0, 0.5),
        },
    }

    particles: int = 1
    steps: int = 2
    start: Start = "normal"
    start_size: float | None = 0.05
    mirror_step: float = 1.0
    damping: Damping = 0.3
    play_as: Literal["mean", "ensemble"] = "mean"
    learner_steps: int = 2
    learner_temperature: float = 1e-5
    round_damping: float = 0.3
    average: Damping | None = "uniform"
    samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("MAT", "mirror_step", self.mirror_step)
        check_number("MAT", "learner_temperature", self.learner_temperature)
        check_integer("MAT", "learner_steps", self.learner_steps, 1)
        check_integer("MAT", "samples", self.samples, 0)
        check_damping("MAT", "damping", self.damping)
        if self.average is not None:
            check_damping("MAT", "average", self.average)
        check_number("MAT", "round_damping", self.round_damping, 0.0, 1.0)
        if self.play_as not in ("mean", "ensemble"):
            raise ValueError(f"MAT: play_as={self.play_as!r} is not 'mean' or 'ensemble'.")

    def learner(self) -> Learner | None:
        """Return the learner's sampling; None where it is a plain optimizer step."""
        plain = self.learner_steps == 1 and not (
            self.learner_temperature or self.damping or self.round_damping or self.samples
        )
        if plain and self.average is None:
            return None
        return Learner(
            steps=self.learner_steps,
            temperature=self.learner_temperature,
            damping=self.damping,
            round_damping=self.round_damping,
            average_decay=self.average,
            most_samples=self.samples,
        )

    def play(self, stage: Moves) -> Play:
        """Play K_θ optimizer steps against one strategy."""
        q = self.adversary(stage)
        for _ in range(self.learner_steps):
            yield Step(stage.loss() + self.smoothness_weight * stage.divergence(q, self.divergence))

    def adversary(self, stage: Moves) -> Strategy:
        """Return the strategy of this round, pure where the mean is played."""
        if not self.leaps:
            stage.clean()
        q = stage.leap(self.divergence, self) if self.leaps else stage.start(self)
        damped: Strategy | None = None
        for k in range(self.leaps, self.steps):
            q, payoffs, gradients = stage.payoffs(q, self.divergence, self)
            damped = damped or q
            q = q.reweight(mirror.step(q.log_weights, payoffs, self.mirror_step))
            q = stage.move(q, self, gradients)
            keep = k / (k + 1) if self.damping == "uniform" else self.damping
            damped = damped.lerp(q, 1 - keep)
        damped = damped or q
        return damped.mean() if self.play_as == "mean" else q.detach()
