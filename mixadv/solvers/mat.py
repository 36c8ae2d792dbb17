"""MAT: mixed-strategy adversarial training. Zhong et al. 2023, arXiv:2306.15826, Alg. 1–2; the
entropic mirror descent of Hsieh, Liu, Cevher 2019, arXiv:1811.02002.

    min_p max_q  E_{θ~p} E_{δ~q} [ ℓ(f(X;θ), y) + λ·ℓ_s(f(X+δ;θ), f(X;θ)) ]

Adversary, K_δ steps on M particles δ_m with weights w on the simplex:
    w_m ∝ w_m·exp(η_w·ℓ_s(δ_m)/s)                                  entropic mirror descent
    δ_m ← Π( δ_m + γ_δ·∇ℓ_s(δ_m) + √(2·γ_δ·τ_δ)·ξ )                projected Langevin
    δ̄_m ← β·δ̄_m + (1−β)·δ_m,   δ̄_m = δ_m at the start              damping
Learner, K_θ samples of the wrapped optimizer's step on ℓ + λ·ℓ_s, each with noise √(2·lr·τ_θ)·ξ:
    θ̄ ← β·θ̄ + (1−β)·θ,   then   θ_{t+1} = β'·θ_t + (1−β')·θ̄

with s the spread of the payoffs of a sample over its particles, so that one η_w serves payoffs of
any size, or s = 1 (`mirror_unit="absolute"`: the paper, and most of the theory). The former prefers
the better particle as much where payoffs hardly differ; by the latter both players can come to rest
where they do not differ at all.

The strategy is played as its damped mean Σ_m w_m δ̄_m (the paper, one pass), as the ensemble
Σ_m w_m ℓ_s(X + δ_m) (M passes), or by a draw for each sample, anew in every learner step: in
expectation the ensemble, for one pass. β damps the mean alone: an ensemble or a draw plays
particles where they stand, since points between them need not earn what they do (M2 in
theory/statements.md).

The particles are where the M chains end (`points="last"`), or all K_δ + 1 points of each
(`"path"`), weighed in one mirror step by what the ascent was paid there; no pass is run for the
last ones, which are weighed as the points that they ascended from. Each round begins with equal
weights: a particle starts anew with each batch, so that a weight carried over stands for no point.
Carried over they add up, to 1.1 effective particles of 2 on the mean of 400 rounds, and play is
easier to exploit, by 0.91 in place of 0.81 in the matching pennies of tests/test_mixed_defaults.py.

By default ∇ℓ_s is taken as a direction, of length 1 per sample, as the released code does;
`normalize="none"` is the raw drift of Langevin dynamics. θ follows the Gibbs law for plain SGD
only: adaptive optimizers precondition the drift and not the noise.

Differences of the released code: its copy of θ_t is an alias of the live weights, its noise comes
after the projection and is scaled by γ (a temperature of 4e-8 for δ, 4e-12 for θ), its log(softmax)
overflows. Its start is normal with a scale of 1e-5 in each coordinate and is not brought into the
ball of 1e-5, ours is. For STS-B it adds the squared errors of a batch up beside a mean of the task
loss: its λ there is ours over the batch size.

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
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.maths import mirror
from mixadv.players.ascent import Start, Unit, check_choices
from mixadv.players.learner import Damping, Learner, check_damping
from mixadv.players.strategy import Strategy
from mixadv.solvers.base import DivergenceSolver, Presets, row
from mixadv.solvers.play import Moves, Play, Step

PlayAs = Literal["mean", "ensemble", "sample"]
Points = Literal["last", "path"]

_CHOICES = {
    "mirror_unit": get_args(Unit),
    "points": get_args(Points),
    "play_as": get_args(PlayAs),
}


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
        particles=1,
        mirror_step=1.0,
        mirror_unit="absolute",
        points="last",
        play_as="mean",
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

    Passes of a round: M·K_δ + 2·K_θ forwards where a draw or the mean is played, and
    M·K_δ + (P + 1)·K_θ for the ensemble of P points; M·K_δ backwards for δ, K_θ backwards and
    optimizer steps. Damping and averaging keep three copies of the trainable weights: at the
    round's start, the damped mean, the average.

    Attributes:
        mirror_step: η_w of the log-weights; 0 leaves them equal.
        mirror_unit: of it: `"relative"`, one over the spread of a sample's payoffs, or
            `"absolute"`, 1/payoff.
        points: `"last"`, where the chains of the M particles end, or `"path"`, all their points.
        damping: β within a round: 0 keeps the last, `"uniform"` the plain mean. Of the learner's
            samples; of the adversary's points only where their mean is played.
        play_as: `"sample"`, `"ensemble"` or `"mean"`.
        learner_steps: K_θ.
        learner_temperature: τ_θ; 1 destroys an encoder, up to 1e-4 costs MiniLM nothing (docs).
        round_damping: β' of the learner between rounds.
        average: of θ over closed rounds, for `game.averaged()`: `"uniform"`, a decay, or None.
        samples: R, learner samples kept for `game.mixture`: the last ones. Where the learning rate
            falls to 0 they are all but one: three of them predicted alike on the embedded intents.
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

    particles: int = 2
    steps: int = 1
    step_size: float = 0.2
    start: Start = "normal"
    start_size: float | None = 0.05
    temperature: float = 1e-6
    mirror_step: float = 0.5
    mirror_unit: Unit = "relative"
    points: Points = "last"
    damping: Damping = 0.3
    play_as: PlayAs = "sample"
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
        check_choices(self, _CHOICES)

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
        q, sampled = self.adversary(stage), self.play_as == "sample"
        for _ in range(self.learner_steps):
            yield Step(stage.loss() + self.smoothness(stage, q, sampled=sampled))

    def adversary(self, stage: Moves) -> Strategy:
        """Return the strategy of this round, pure where the mean is played."""
        if not self.leaps:
            stage.clean()
        q = stage.leap(self.divergence, self) if self.leaps else stage.start(self)
        visited, gained = [q], []
        for _ in range(self.leaps, self.steps):
            q, payoffs, gradients = stage.payoffs(q, self.divergence, self)
            visited[-1] = q  # turned towards the boundary, where the ascent says so
            q = stage.move(q.reweight(self._weigh(q, payoffs)), self, gradients)
            visited, gained = [*visited, q], [*gained, payoffs]
        if self.points == "path" and gained:
            q = Strategy.joined(visited)  # the last is weighed as the one it ascended from
            q = q.reweight(self._weigh(q, torch.cat([*gained, gained[-1]])))
        elif self.play_as == "mean":
            q = self._damped(visited)
        return q.mean() if self.play_as == "mean" else q.detach()

    def _weigh(self, q: Strategy, payoffs: Tensor) -> Tensor:
        """Return the log-weights after a mirror step."""
        step = mirror.relative_step if self.mirror_unit == "relative" else mirror.step
        return step(q.log_weights, payoffs, self.mirror_step)

    def _damped(self, visited: list[Strategy]) -> Strategy:
        """Return the last strategy with its particles damped along their chains."""
        damped = visited[0]
        for k, q in enumerate(visited[1:], self.leaps):
            keep = k / (k + 1) if self.damping == "uniform" else self.damping
            damped = damped.lerp(q, 1 - keep)
        return damped
