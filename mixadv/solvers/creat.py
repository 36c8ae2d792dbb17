"""CreAT: adversarial training on the contextualized representation.
Wu et al. 2023, arXiv:2305.04557.

    max_{δ}  ℓ(f(X + δ), y) + τ·( 1 − cos(h(X + δ), h(X)) )
    min_θ    ½·ℓ(f(X), y) + ½·ℓ(f(X + δ), y)

with h the encoder's representation of the sample: an attack on the loss alone may fool the head and
leave the encoder as it is. By default h is the first token of the last hidden state.

Differences of the released code, github.com/gingasan/CreAT: h is the last hidden state of every
token; `adv_steps` counts passes, so that its default of 2 is `steps=1`; δ starts normal with a
scale of 1e-5 in each coordinate, at padding too; and each δ is added to the input that the ones
before it have moved, so that the learner meets their sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mixadv.checks import check_number
from mixadv.model.representation import Source, check_source, first_token
from mixadv.players.ascent import Start
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class CreAT(Solver):
    """Minimise half the clean loss and half the loss where δ moves loss and representation most.

    Use it where the representation itself should be robust, and not the head alone. Passes: 2 + K
    forwards, K backwards for δ, 1 backward.

    Attributes:
        deviation_weight: τ, the weight of the cosine distance in the adversary's payoff. 0 attacks
            the loss alone.
        source: name of the submodule whose output is read; None for the model's `base_model`.
        representation: called with that output, returns `[B, d]`; None is `first_token`.
    """

    name: ClassVar[str] = "creat"
    paper: ClassVar[str] = "Wu et al. 2023, arXiv:2305.04557"
    summary: ClassVar[str] = "half the loss where loss and encoder are driven away, half the clean"
    own_payoff: ClassVar[str] = (
        "its payoff is the loss and a distance from the clean representation of the same pass"
    )

    step_size: float = 0.1
    radius: float | None = 0.1
    start: Start = "normal"
    start_size: float | None = 0.05
    deviation_weight: float = 1.0
    source: str | None = None
    representation: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("CreAT", "deviation_weight", self.deviation_weight)
        check_source(self)

    @property
    def reads(self) -> Source | None:
        """Where the representation is read."""
        return Source(self.source, self.representation or first_token)

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ½·[ ℓ(X) + ℓ(X + δ) ]`."""
        delta = stage.ascend("loss", self, self.deviation_weight)
        yield Step((stage.loss() + stage.loss(delta)) / 2)
