"""FGM: one step of the fast gradient method. Miyato, Dai, Goodfellow 2017, arXiv:1605.07725, eq. 4.

    min_θ  ℓ(f(X), y) + ℓ(f(X + δ), y),     δ = ε·g/‖g‖₂,   g = ∇_X ℓ(f(X), y)

One backward of the clean pass gives both its gradient to θ and g. The paper perturbs embeddings
normalised to mean 0 and variance 1, so its ε = 5 does not carry over to other encoders.
`norm="linf"` is FGSM.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from mixadv.players.ascent import Projection, Start
from mixadv.solvers.base import Solver, refuse_memory
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class FGM(Solver):
    """Minimise the clean loss plus the loss at one gradient step of length `radius`.

    Use it as the cheapest adversary: it costs two plain steps. `step_size` has no effect. Passes:
    2 forwards, 2 backwards.
    """

    name: ClassVar[str] = "fgm"
    paper: ClassVar[str] = "Miyato et al. 2017, arXiv:1605.07725"
    summary: ClassVar[str] = "clean loss plus the loss at one gradient step"

    steps: int = field(default=1, init=False)
    radius: float | None = 0.1
    start: Start = "zero"
    projection: Projection = "sphere"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_memory(self)
        if self.step_size == 0:
            raise ValueError("FGM: step_size=0 never leaves δ = 0; its size is the radius.")

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ℓ(X) + ∇θ ℓ(X + δ)`."""
        delta = stage.start(self)
        yield stage.loss(delta, last=False, clean=True)
        delta = stage.move(delta, self)
        yield Step(stage.loss(delta.detach()))
