"""CVaR: the mean loss of the worst rows, a share α of the batch.
Rockafellar & Uryasev 2000; as robust optimisation in batches Levy et al. 2020, arXiv:2010.05893.

    min_θ max_w Σ_i w_i·ℓ_i,     0 ≤ w_i ≤ 1/(α·B),  Σ w_i = 1

When to use it: hard rows matter, and nobody says which they are. Where some labels are wrong it
learns these first. What it costs: a plain step, and a sort of B losses. The batch's CVaR is at most
that of the data on average, and nears it as α·B grows; so α·B should be several rows, and the value
depends on the batch: micro-batches and processes weigh their own rows each.

Published: github.com/daniellevy/fast-dro, robust_losses.py, geometry "cvar" without regularisation.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mixadv.checks import check_number
from mixadv.maths import row_weights
from mixadv.solvers.play import Moves
from mixadv.solvers.rows import RowSolver


@dataclass(frozen=True, kw_only=True)
class CVaR(RowSolver):
    """The mean loss of the worst rows of a batch.

    Needs one loss per sample. Passes: K + 1 forwards, K backwards for δ, 1 backward; K is 0, and δ
    sits out, unless `steps` says otherwise.

    Example:
        >>> import torch, mixadv
        >>> model = torch.nn.Linear(2, 2)
        >>> x, labels = torch.eye(2).repeat(4, 1), torch.arange(8) % 2
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), labels, reduction="none")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = mixadv.wrap(optimizer, model, mixadv.CVaR(level=0.25))
        >>> optimizer.step(closure).shape
        torch.Size([])

    Attributes:
        level: α, the share of the batch that counts: 1 is the plain mean, up to 1/B the worst row.
    """

    name: ClassVar[str] = "cvar"
    paper: ClassVar[str] = "Levy et al. 2020, arXiv:2010.05893"
    summary: ClassVar[str] = "the mean loss of the worst rows of a batch"

    level: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("CVaR", "level", self.level, 0.0, 1.0)
        if self.level == 0:
            raise ValueError("CVaR: level must be above 0: 1e-9 plays the worst row alone.")

    def weigh(self, stage: Moves, losses: Tensor) -> Tensor:
        """Return the mean over the worst share of the rows."""
        return stage.weighed(losses, row_weights.cvar(losses.detach(), self.level))
