"""χ²: the worst mean loss over all distributions in a χ² ball around the batch's own.
Duchi & Namkoong 2019, arXiv:1610.02581; in batches Levy et al. 2020, arXiv:2010.05893.

    min_θ max_w Σ_i w_i·ℓ_i,     1/(2B)·Σ_i (B·w_i − 1)² ≤ ρ,  w ≥ 0,  Σ w_i = 1

While no weight comes to 0 the maximum is mean(ℓ) + √(2ρ)·sd(ℓ): the mean, and a penalty on the
spread. When to use it: as CVaR, with weights that grow with the loss rather than in one step. What
it costs: a plain step, and a sort of B losses. Micro-batches and processes weigh their own rows.

Published: github.com/daniellevy/fast-dro, robust_losses.py, geometry "chi-square" without
regularisation: η by bisection, here exact, and above a relative spread of the losses of 1e-5 alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mixadv.checks import check_number
from mixadv.maths import row_weights
from mixadv.solvers.play import Moves
from mixadv.solvers.rows import RowSolver


@dataclass(frozen=True, kw_only=True)
class ChiSquare(RowSolver):
    """The worst mean loss over the distributions of rows in a χ² ball.

    Needs one loss per sample. Passes: K + 1 forwards, K backwards for δ, 1 backward; K is 0, and δ
    sits out, unless `steps` says otherwise.

    Example:
        >>> import torch, mixadv
        >>> model = torch.nn.Linear(2, 2)
        >>> x, labels = torch.eye(2).repeat(4, 1), torch.arange(8) % 2
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), labels, reduction="none")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = mixadv.wrap(optimizer, model, mixadv.ChiSquare(ball=0.5))
        >>> optimizer.step(closure).shape
        torch.Size([])

    Attributes:
        ball: ρ, the χ² radius: 0 is the plain mean, from (B − 1)/2 on the worst row. `radius` is
            that of δ.
    """

    name: ClassVar[str] = "chi_square"
    paper: ClassVar[str] = "Duchi & Namkoong 2019, arXiv:1610.02581"
    summary: ClassVar[str] = "the worst mean loss over distributions of rows in a χ² ball"

    ball: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ChiSquare", "ball", self.ball)

    def weigh(self, stage: Moves, losses: Tensor) -> Tensor:
        """Return the mean under the best weights in the ball."""
        return stage.weighed(losses, row_weights.chi_square(losses.detach(), self.ball))
