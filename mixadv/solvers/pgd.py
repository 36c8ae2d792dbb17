"""PGD: projected gradient ascent, then one step on the worst point found.
Madry et al. 2018, arXiv:1706.06083, eq. 2.1; in embedding space Zhu et al. 2020, eq. 1–2.

    min_θ  ℓ(f(X + δ_K), y),     δ_{t+1} = Π( δ_t + α·g_t/‖g_t‖ ),   g_t = ∇_δ ℓ(f(X + δ_t), y)

θ receives the gradient at the last δ only; the clean example is not used.

Published: the baseline of FreeLB's paper, github.com/zhuchen03/FreeLB,
fairseq-RoBERTa/launch/VanillaPGD/*.sh (that for QNLI ships no row). That code does not project δ_0,
which matters for CoLA alone. Trained as FreeLB is (`help(mixadv.solvers.freelb)`). On pixels, where
it is called PGD-AT: github.com/MadryLab/cifar10_challenge, config.json, in 255ths; trained by SGD
with momentum 0.9: learning rate, batch, steps, weight decay

    wide-resnet-28-10  cifar10  1e-1  128  80000  2e-4  rate / 10 from steps 40000 and 60000
"""

from dataclasses import dataclass
from typing import ClassVar

from mixadv.maths.divergence import Divergence
from mixadv.players.ascent import Direction, Sign
from mixadv.solvers.base import Presets, Solver, check_divergence, pixels, row
from mixadv.solvers.play import Moves, Play, Step


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
    presets: ClassVar[Presets] = {
        "roberta-large": {  # step size, steps, start, radius
            "mnli": row(1e-1, 2, 2e-1, 2e-1),
            "qqp-fp16": row(1.5e-1, 2, 3.2e-1, 6.2e-1),
            "sst2": row(1e-1, 2, 1.0, 6e-1),
            "cola": row(5e-2, 3, 4e-1, 2e-1),
            "mrpc": row(4e-2, 3, 6.4e-1, 4e-1),
            "stsb": row(1e-1, 3, 1.6e-1, 2.8e-1),
        },
        "wide-resnet-28-10": {"cifar10": pixels(2 / 255, 10, 8 / 255, 8 / 255)},
    }

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1
    direction: Direction = "gradient"
    sign: Sign | None = None
    payoff: str | Divergence = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.payoff != "loss":
            check_divergence(self, "payoff")

    @property
    def gain(self) -> str | Divergence:
        """What the adversary maximises."""
        return self.payoff

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ℓ(X + δ_K)`."""
        delta = stage.ascend(self.payoff, self)
        yield Step(stage.loss(delta))
