"""An adversary that weighs the rows of a batch, or groups of them: what it needs and came to."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.solvers.base import Solver

_LINE = "torch.nn.functional.cross_entropy(logits, labels, reduction='none')"


class Weighed(NamedTuple):
    """Weights that were played; what they say is read from the device by nobody but the user.

    Attributes:
        weights: of the rows of a batch `[B]`, or of groups `[G]`.
        sizes: how many rows each group had in the batch `[G]`, None where rows were weighed.
    """

    weights: Tensor
    sizes: Tensor | None

    @property
    def effective_rows(self) -> Tensor:
        """Exp of the entropy of the weights of rows: B where all count alike."""
        sizes = torch.ones_like(self.weights) if self.sizes is None else self.sizes
        present = torch.where(sizes > 0, self.weights, 0.0)
        shares = present / present.sum()
        return (torch.special.entr(shares) + shares * sizes.clamp(min=1).log()).sum().exp()

    @property
    def worst_group(self) -> Tensor | None:
        """The number of the group that weighs most."""
        return None if self.sizes is None else self.weights.argmax()

    @property
    def worst_group_weight(self) -> Tensor | None:
        """Its weight."""
        return None if self.sizes is None else self.weights.max()


def one_per_sample(losses: Tensor) -> Tensor:
    """Return the losses `[B]` in at least fp32; refuse a scalar, from which no row can be told."""
    if losses.dim() == 0:
        raise GameError(
            "This solver weighs the rows of a batch by their losses, and the closure returned one "
            f"loss for all: return one loss per sample, such as {_LINE}, alone or as "
            "(losses, logits). In a Trainer: compute_loss_func=lambda outputs, labels, "
            f"num_items_in_batch: {_LINE.replace('logits', 'outputs.logits')}."
        )
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def group_means(losses: Tensor, groups: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean loss of each group over the batches of all processes, and its rows there.

    Of a group without rows the mean is 0. Each process's gradient is such that the mean over the
    processes is that of the value, which all have alike.

    Args:
        losses: `[B]`.
        groups: `[B]`, numbers from 0 to `count` − 1. None, where there is one group, or where a
            rehearsal asks for δ alone, is the first for all: plain training, and nobody waits.
        count: of groups, G.
    """
    if groups is None:
        absent = losses.new_zeros(count - 1)
        own, rows = losses.mean()[None], losses.new_full((1,), len(losses))
        return torch.cat([own, absent]), torch.cat([rows, absent])
    _check_shape(groups, losses)
    numbers = torch.arange(count, device=losses.device)[:, None]
    member = groups.to(losses.device) == numbers
    own = torch.where(member, losses, 0.0).sum(1)
    found = torch.stack([own.detach(), member.sum(1).to(losses.dtype)])
    parallel.add_up(found)
    total, sizes = found
    arriving = parallel.world_size() * (own - own.detach())
    return (total + arriving) / sizes.clamp(min=1), sizes


def _check_shape(groups: Tensor, losses: Tensor) -> None:
    if groups.shape != losses.shape:
        raise GameError(
            f"groups= has the shape {[*groups.shape]} and the closure returned {len(losses)} "
            "losses: give the group of each, in their order."
        )


def check_groups(groups: Any, solver: Solver) -> None:
    """Check that groups are given where a solver weighs some, and numbered."""
    who, count = type(solver).__name__, solver.grouped
    if groups is None:
        if count > 1:
            raise GameError(
                f"{who} weighs {count} groups, and which row belongs to which was not said: give "
                "groups= of step, backward or loss, a LongTensor [B] of numbers from 0 to "
                f"{count - 1}; in a Trainer groups= is the name of a column."
            )
        return
    if not count:
        raise GameError(
            f"{who} weighs no groups: leave groups= out, or play mixadv.GroupDRO(groups=…)."
        )
    whole = isinstance(groups, Tensor) and not groups.is_floating_point()
    if not whole or groups.dtype == torch.bool or groups.dim() != 1:
        found = f"a {groups.dtype} tensor {[*groups.shape]}" if isinstance(groups, Tensor) else ""
        raise GameError(
            f"groups= must be a LongTensor [B], the group of each row, got "
            f"{found or repr(groups)[:60]}."
        )


def check_rows(losses: Tensor, groups: Tensor | None, solver: Solver) -> None:
    """Check what a first round gave of rows that are weighed; groups are read from the device."""
    if not solver.weighs:
        return
    one_per_sample(losses)
    if groups is None:
        return
    _check_shape(groups, losses)
    least, most, count = int(groups.min()), int(groups.max()), solver.grouped
    if least < 0 or most >= count:
        raise GameError(
            f"groups= holds numbers from {least} to {most}, and {type(solver).__name__} weighs "
            f"{count} groups, 0 to {count - 1}: build it with groups={max(most + 1, 1)}, or number "
            "them so."
        )
