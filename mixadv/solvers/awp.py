"""AWP: adversarial weight perturbation. Wu et al. 2020, arXiv:2004.05884.

    g = ∇θ J(θ; δ),     v_i = γ·‖θ_i‖·g_i / ‖g_i‖   for each matrix θ_i
    θ ← θ − η·∇θ J(θ + v; δ)

δ is found first, at θ, by the inner solver; J is its objective: AWP around PGD is AT-AWP, around
TRADES it is TRADES-AWP. Norms are of each parameter by itself, and vectors (biases, gains of norms)
stay. γ is `radius`, in units of the norm of each matrix.

When: where adversarial training overfits, its robust accuracy falling while it trains on. What it
costs: the learner's passes of the inner solver twice, its ascent once, and one copy of the weights.

Published: github.com/csdongxian/AWP, of one step too, on a second model. It moves what is of two
dimensions or more and has "weight" in its name; γ = 0.01 around PGD, and 0.005 around TRADES from
epoch 10 on, as `radius` here. It steps at θ + v and takes v off after the step, so that weight
decay acts on θ + v, and statistics of BatchNorm are those of θ + v; here both are those of θ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mixadv.players.ascent import Unit
from mixadv.solvers.base import Solver
from mixadv.solvers.pgd import PGD
from mixadv.solvers.weights import WeightsSolver, over_norm, scaled, square_of

_FINDS = PGD()


@dataclass(frozen=True, kw_only=True)
class AWP(WeightsSolver):
    """The gradient where inputs and weights are both perturbed, the weights matrix by matrix.

    Use it around PGD or TRADES where robust accuracy falls while training goes on. Passes around
    PGD: K + 2 forwards, K backwards for δ, 2 backwards.

    Attributes:
        solver: finds δ; None is the plain loss.
        radius: γ, in units of the norm of each matrix; 0 leaves them. 0.005 with TRADES.
        which: of those that are trained; None is those of at least two dimensions.
    """

    name: ClassVar[str] = "awp"
    paper: ClassVar[str] = "Wu et al. 2020, arXiv:2004.05884"
    summary: ClassVar[str] = "weights perturbed matrix by matrix, after the inputs"
    ball: ClassVar[str] = "of the L2 norm of each matrix"

    solver: Solver | None = _FINDS
    radius: float | None = 0.01
    unit: Unit = field(default="relative", init=False)

    def moves(self, name: str, parameter: Tensor) -> bool:
        """Return whether a parameter is a matrix, or what `which` says."""
        return parameter.dim() > 1 if self.which is None else self.which(name, parameter)

    def displacements(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Yield `γ·‖θ_i‖·g_i / ‖g_i‖`."""
        assert self.radius is not None
        for weight, gradient in zip(weights, gradients, strict=True):
            size = self.radius * square_of([weight.to(gradient.dtype)]).sqrt()
            yield scaled(gradient, over_norm(size, square_of([gradient])))
