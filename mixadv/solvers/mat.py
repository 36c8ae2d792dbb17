"""MAT: mixed-strategy adversarial training. Zhong et al. 2023, arXiv:2306.15826, Alg. 1–2; the
entropic mirror descent of Hsieh, Liu, Cevher 2019, arXiv:1811.02002.

    min_p max_q  E_{θ~p} E_{δ~q} [ ℓ(f(X;θ), y) + λ·ℓ_s(f(X+δ;θ), f(X;θ)) ]

Adversary, K_δ steps on M particles δ_m with weights w on the simplex:
    w_m ∝ w_m·exp(η_w·ℓ_s(δ_m)/s)                                  entropic mirror descent
    δ_m ← Π( δ_m + γ_δ·∇ℓ_s(δ_m) + √(2·γ_δ·τ_δ)·ξ )                projected Langevin
    d_m ← β·d_m + (1−β)·δ_m,   d_m = δ_m at the start              damping
Learner, K_θ samples of the wrapped optimizer's step on ℓ + λ·ℓ_s, each with noise √(2·lr·τ_θ)·ξ:
    a ← β·a + (1−β)·θ,   then   θ_{t+1} = β'·θ_t + (1−β')·a

Here s is the spread of a sample's payoffs over its particles, so one η_w suits payoffs of any size.
With `mirror_unit="absolute"` s is 1, as in the paper and most of the theory. The relative unit
prefers the better particle even if payoffs hardly differ. With the absolute one both players can
come to rest where payoffs are equal.

The strategy is played in one of three ways: as its damped mean Σ_m w_m d_m (the paper, one pass);
as the ensemble Σ_m w_m ℓ_s(X + δ_m) (M passes); or by drawing a particle for each sample in every
learner step, which is the ensemble in expectation, for one pass. β damps the mean only. An ensemble
or a draw plays the particles themselves, because points between them may have a lower payoff (M2 in
theory/statements.md).

The particles are the ends of the M chains (`points="last"`), or all K_δ + 1 points of each
(`"path"`), weighted in one mirror step by the payoffs that the ascent has computed. The last points
take the weights of the points before them, so no pass is needed. Each round starts with equal
weights, because its particles start anew. Weights that are carried over add up instead: to 1.1
effective particles of 2, on the mean of 400 rounds, with an exploitability of 0.91 in place of 0.81
in the matching pennies of tests/test_mixed_defaults.py.

Noise has a length of √(2·γ_δ·τ_δ) in every coordinate. The default τ_δ parts the particles of a
text, which has thousands. With two or three coordinates they end at one point, a pure strategy in
effect, unless τ_δ is about 0.1, as in the matching pennies above.

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
    """Play mixed strategies for both players: particles of δ against samples of the weights.

    Use it to train a mixture of models (`mixadv.mixtures.mixture_of`), or an average of weights
    (`game.averaged()`), against an adversary that is not one point. It takes `learner_steps`
    optimizer steps per batch: compare it with as many plain ones, and try a higher learning rate.

    Passes of a round: M·K_δ + 2·K_θ forwards with `play_as="sample"` or `"mean"`,
    M·K_δ + (P + 1)·K_θ with `"ensemble"` of P points, M·K_δ backwards for δ, K_θ backwards and
    optimizer steps. Damping and averaging keep three copies of the trainable weights.

    Attributes:
        mirror_step: η_w, the step of the log-weights; 0 leaves all weights equal.
        mirror_unit: the unit of `mirror_step`: `"relative"`, one over the spread of a sample's
            payoffs, or `"absolute"`, 1/payoff.
        points: `"last"` plays where the chains of the M particles end, `"path"` all their points.
        damping: β within a round, from 0 (the last sample) below 1, or `"uniform"` (the plain
            mean). It damps the learner's samples, and the adversary's points with `"mean"`.
        play_as: `"sample"` draws a particle for each row, `"ensemble"` plays all of them, `"mean"`
            their damped mean, which is a pure strategy.
        learner_steps: K_θ, optimizer steps per batch: 2 to 10.
        learner_temperature: τ_θ of the noise on the weights: 0 to 1e-4. At 1 an encoder is at
            chance.
        round_damping: β' of the learner between rounds.
        average: which average of θ over rounds `game.averaged()` has: `"uniform"`, a decay in
            (0, 1), or None.
        samples: R, how many of the last samples of θ are kept for `game.mixture`, each a copy of
            the weights. They are almost equal once the learning rate has fallen to 0.
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
