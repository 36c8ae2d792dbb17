"""TRADES: trading accuracy for robustness. Zhang et al. 2019, arXiv:1901.08573, eq. 3, Alg. 1.

    min_θ  ℓ(f(X;θ), y) + β·max_{‖δ‖ ≤ ε} KL( f(X;θ) ‖ f(X+δ;θ) )
    δ_0 ~ 0.001·N(0, I),     δ ← Π( δ + η·sign(∇δ KL) )

with β = 1/λ of the paper and f the predicted distribution; both sides of the KL have gradients to
θ. The adversary needs no label. Use it where clean accuracy counts as well: β moves along the
trade-off. `mixadv.ALUM(divergence="kl")` plays the same round: the same idea, in language.

The released code runs the ascent in evaluation mode and the learner's passes in training mode. Here
all passes of a step see the batch statistics and the dropout mask that the learner is judged by,
and buffers end as after one plain forward: the adversary attacks the network that is trained. The
difference is BatchNorm's; without it, and without dropout, the gradients are those of that code.

Published: github.com/yaodongyu/TRADES, train_trades_cifar10.py and train_trades_mnist.py. Its L2
ascent clips to the box and then to the ball; ours projects onto both. Trained by SGD with momentum
0.9: learning rate, batch, epochs, weight decay

    wide-resnet-34-10  cifar10  1e-1  128   76  2e-4  rate / 10 from epoch 75
    small-cnn          mnist    1e-2  128  100  0     rate / 10 from epochs 55, 75 and 90
"""

from dataclasses import dataclass
from typing import ClassVar

from mixadv.maths.divergence import Divergence
from mixadv.players.ascent import Start
from mixadv.solvers.base import DivergenceSolver, Presets, pixels
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class TRADES(DivergenceSolver):
    """Task loss, plus how far the worst δ moves the predicted distribution.

    Passes: 2 + K forwards, K backwards for δ, 1 backward. `TRADES.published("cifar10",
    model="wide-resnet-34-10")` plays on pixels; the defaults are in units of the site, as those of
    every solver.
    """

    name: ClassVar[str] = "trades"
    paper: ClassVar[str] = "Zhang et al. 2019, arXiv:1901.08573"
    summary: ClassVar[str] = "task loss plus the worst-case KL from the clean predictions"
    presets: ClassVar[Presets] = {  # step size, steps, start, radius
        "wide-resnet-34-10": {
            "cifar10": pixels(0.007, 10, 1e-3, 0.031, start="normal", smoothness_weight=6.0)
        },
        "small-cnn": {"mnist": pixels(0.01, 40, 1e-3, 0.3, start="normal", smoothness_weight=1.0)},
    }

    steps: int = 3
    step_size: float = 0.1
    start: Start = "normal"
    start_size: float | None = 0.05
    divergence: str | Divergence = "kl"
    smoothness_weight: float = 6.0

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ ℓ(X) + β·KL(X ‖ X+δ) ]`."""
        delta = stage.ascend(self.divergence, self)
        yield Step(stage.loss() + self.smoothness(stage, delta))
