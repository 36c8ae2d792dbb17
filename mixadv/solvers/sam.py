"""SAM and ASAM: the gradient at the worst weights of a ball around those there are.
Foret et al. 2021, arXiv:2010.01412; adaptive: Kwon et al. 2021, arXiv:2102.11600.

    SAM    v = ρ·g / ‖g‖,                 g = ∇θ J(θ)
    ASAM   v = ρ·T²g / ‖T g‖,             T = |θ| + η
    θ ← θ − γ·∇θ J(θ + v)

One norm over all weights. J is the round's objective, of plain training or of an inner solver: it
is ascended with the strategy of the inner adversary held fixed. As in the papers, the derivative of
v is left out.

ASAM's ball is the same for weights that are rescaled without a change of the function (a layer by
c and the next by 1/c), and its radius is about ten times that of SAM. η keeps weights near 0
moving.

When: where the loss is to be flat in the weights: label noise, small data, vision models trained
from scratch. What it costs: two plain steps, and one copy of the weights.

m-SAM: a displacement for each micro-batch, found by one call of `game.backward` or `game.loss` for
each, generalises better than one for a large batch, the paper found. For one of the whole update
give all its micro-batches at once: `optimizer.step([partial(loss, b) for b in batches])`. Every
n-th update alone: `mixadv.Schedule(every=n)`.

Published: github.com/google-research/sam (JAX; one displacement for each device unless
`sync_perturbations` is set: `shared=False` here); github.com/SamsungLabs/ASAM, whose T scales the
parameters with "weight" in their name and is 1 for the others: here it scales all of them. Its
ρ = 0.5, for CIFAR-10, and η = 0.01 are the defaults. η = 0 is the rule of github.com/davda54/sam.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mixadv.checks import check_number
from mixadv.solvers.base import WORDS
from mixadv.solvers.weights import WeightsSolver, over_norm, scaled, square_of


@dataclass(frozen=True, kw_only=True)
class SAM(WeightsSolver):
    """The gradient at the end of one step of the weights up the objective, of length ρ.

    Use it where the minimum is to be flat: noisy labels, few rows, vision models trained from
    scratch. Passes: 2 forwards and 2 backwards around the plain loss, else twice the learner's
    passes of the inner solver, and its ascent.
    """

    name: ClassVar[str] = "sam"
    paper: ClassVar[str] = "Foret et al. 2021, arXiv:2010.01412"
    summary: ClassVar[str] = "the gradient at the worst weights within a ball"
    ball: ClassVar[str] = "in L2, all weights together"
    words: ClassVar[dict[str, str]] = {**WORDS, "adaptive": "mixadv.ASAM"}

    def displacements(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Yield `ρ·g / ‖g‖`."""
        assert self.radius is not None
        factor = over_norm(self.radius, square_of(gradients))
        for gradient in gradients:
            yield scaled(gradient, factor)


@dataclass(frozen=True, kw_only=True)
class ASAM(WeightsSolver):
    """SAM whose ball is as wide in each coordinate as the weight there is large.

    Use it as SAM, where layers differ in scale. Passes: those of SAM.

    Attributes:
        stabilizer: η, added to the size of each weight.
    """

    name: ClassVar[str] = "asam"
    paper: ClassVar[str] = "Kwon et al. 2021, arXiv:2102.11600"
    summary: ClassVar[str] = "SAM in a ball that is scaled by the size of each weight"
    ball: ClassVar[str] = "in L2 of v over the size of each weight, all together"

    radius: float | None = 0.5
    stabilizer: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ASAM", "stabilizer", self.stabilizer)

    def displacements(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Yield `ρ·T²g / ‖T g‖`."""
        assert self.radius is not None
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient.mul_(weight.abs() + self.stabilizer)
        factor = over_norm(self.radius, square_of(gradients))
        for weight, gradient in zip(weights, gradients, strict=True):
            yield scaled(gradient, factor) * (weight.abs() + self.stabilizer)
