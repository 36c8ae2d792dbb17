"""Group DRO: the learner against a distribution over groups of rows, which it keeps up with.
Sagawa et al. 2020, arXiv:1911.08731, Algorithm 1, and eq. 5 for the adjustment by size.

    q_g ∝ q_g·exp( η·( L_g + C/√n_g ) ),     θ ← θ − γ·∇θ Σ_g q_g·L_g,
    L_g the mean loss of the batch's rows of group g, 0 where it has none

When to use it: groups are known in training, some are small, and the worst of them counts. What was
published as gained came with strong weight decay or early stopping, and with batches in which
groups are alike frequent (`torch.utils.data.WeightedRandomSampler`): a group that a batch lacks
loses weight against those it has. What it costs: a plain step.

q moves in each round, and so once for each micro-batch of an update; k micro-batches with η/k move
it about as far as one batch with η. It is kept from batch to batch, saved with the game, and equal
on all processes, whose rows count as those of one batch. Rounds of plain training leave it. A mean
that is not finite counts as 0 for q, which an overflow in fp16 would otherwise spoil for good.

Published: github.com/kohpangwei/group_DRO, loss.py, whose `normalize_loss` is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.errors import GameError
from mixadv.maths import mirror
from mixadv.solvers.play import Moves
from mixadv.solvers.rows import RowSolver

KEY = "group log-weights"


@dataclass(frozen=True, kw_only=True)
class GroupDRO(RowSolver):
    """The loss under a distribution over groups, which moves towards those of high loss.

    Needs one loss per sample, and `groups=` of `step`, `backward` or `loss`: the group of each row,
    a LongTensor `[B]` (in a Trainer the name of a column). Passes: K + 1 forwards, K backwards for
    δ, 1 backward; K is 0, and δ sits out, unless `steps` says otherwise.

    Example:
        >>> import torch, mixadv
        >>> model = torch.nn.Linear(2, 2)
        >>> x, labels = torch.eye(2).repeat(4, 1), torch.arange(8) % 2
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), labels, reduction="none")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = mixadv.wrap(optimizer, model, mixadv.GroupDRO(groups=2))
        >>> optimizer.step(closure, groups=labels).shape
        torch.Size([])

    Attributes:
        groups: G. One, the default, is plain training, for which no `groups=` is needed.
        mirror_step: η of the log-weights, in 1/loss.
        counts: n_g, how many rows of each group the training set has; for `size_adjustment`.
        size_adjustment: C: smaller groups, which are fitted sooner, count as if their loss were
            higher by C/√n_g.
    """

    name: ClassVar[str] = "group_dro"
    paper: ClassVar[str] = "Sagawa et al. 2020, arXiv:1911.08731"
    summary: ClassVar[str] = "the loss under a distribution over groups, by mirror ascent"

    groups: int = 1
    mirror_step: float = 0.01
    counts: tuple[int, ...] | None = None
    size_adjustment: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("GroupDRO", "groups", self.groups, 1)
        check_number("GroupDRO", "mirror_step", self.mirror_step)
        check_number("GroupDRO", "size_adjustment", self.size_adjustment)
        if self.counts is not None:
            counts = [*self.counts] if isinstance(self.counts, (tuple, list)) else None
            if counts is None or len(counts) != self.groups:
                raise ValueError(
                    f"GroupDRO: counts must be {self.groups} numbers of rows, one for each group, "
                    f"got {self.counts!r}."
                )
            for count in counts:
                check_integer("GroupDRO", "each of counts", count, 1)
            object.__setattr__(self, "counts", tuple(counts))
        elif self.size_adjustment:
            raise ValueError(
                "GroupDRO: size_adjustment= divides by the root of each group's size: give "
                "counts=(…), the rows of each in the training set."
            )

    @property
    def grouped(self) -> int:
        """How many groups rows belong to."""
        return self.groups

    @property
    def weighs(self) -> str:
        """What there is a distribution over."""
        return f"{self.groups} groups of rows"

    def weigh(self, stage: Moves, losses: Tensor) -> Tensor:
        """Move q by the groups' mean losses and return Σ q_g·L_g."""
        means, sizes = stage.group_means(losses, self.groups)
        gains = means.detach()
        gains = torch.where(gains.isfinite(), gains, 0.0) + self._margins(gains)
        q = stage.memory[KEY] = mirror.step(self._weights(stage, gains), gains, self.mirror_step)
        return stage.weighed(means, q.exp(), sizes)

    def _margins(self, like: Tensor) -> Tensor:
        """Return C/√n_g."""
        if self.counts is None:
            return torch.zeros_like(like)
        return self.size_adjustment / like.new_tensor(self.counts).sqrt()

    def _weights(self, stage: Moves, like: Tensor) -> Tensor:
        """Return the log-weights of the last round, equal ones before the first."""
        if KEY not in stage.memory:
            return mirror.uniform(self.groups, dtype=like.dtype, device=like.device)
        known: Tensor = stage.memory[KEY]
        if len(known) != self.groups:
            raise GameError(
                f"The game's state has weights of {len(known)} groups, and GroupDRO weighs "
                f"{self.groups}: build it with groups={len(known)}, or start afresh."
            )
        return known.to(like)
