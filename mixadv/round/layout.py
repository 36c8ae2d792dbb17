"""Which dimension of what the site returns is the batch, and whether a row is one sample."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.closure import Reading
from mixadv.model.masks import beginnings, ends, owners
from mixadv.model.visits import Call, Visit
from mixadv.round.stage import Stage
from mixadv.round.unit import measuring

_ENDS = (0, -1)  # the first sample, and the last


def find_batch(stage: Stage) -> bool:
    """Find the batch among the dimensions of what the site returns.

    The gradient of a sample's own predictions lies at that sample alone: of the first and of the
    last sample, in the dimension that is the batch. Where samples see each other their number
    tells. Where there is a loss alone, a sample that is moved changes no other's gradient.

    Returns:
        Whether it was found in the second dimension, so that what was measured is to be anew.
    """
    unsure = stage.arena.site.unsure
    visits = [visit for visit in stage.passes.kept[-1].visits if visit.module in unsure]
    if not visits:
        return False
    # Images come first; of sequences nothing is known.
    sequences = any(len(visit.call.shape) == 3 for visit in visits)
    with _without_statistics(stage.arena.model) if sequences else nullcontext():
        return _found(stage)


def _found(stage: Stage) -> bool:
    passes, site = stage.passes, stage.arena.site
    slopes: list[list[Tensor]] = []
    samples = 0
    for sample in _ENDS:
        leaves: list[Tensor] = []
        with passes.frozen():
            reading = passes.run(measuring([], leaves))
            values = reading.loss if reading.predictions is None else reading.predictions
            if values.dim() == 0:
                return _by_moves(stage)
            if not values.requires_grad:
                return False
            samples = reading.samples
            own = values[sample].reshape(-1)
            weights = torch.linspace(1, 2, len(own), dtype=own.dtype, device=own.device)
            slopes.append(passes.differentiate((own * weights).sum(), leaves))
    for visit, *pair in zip(passes.kept[-1].visits, *slopes, strict=True):
        for second in (False, True):
            sizes = visit.call.shape[int(second)]
            there = (_lies_at(g, k, second) for g, k in zip(pair, _ENDS, strict=True))
            if visit.module in site.unsure and sizes == samples and all(there):
                site.orient(visit.module, second)
        if visit.module in site.unsure and _second_by_number(visit, samples):
            site.orient(visit.module, True)
    return _turned(stage)


def find_texts(stage: Stage) -> bool:
    """Find whether the model is told of texts within rows; see `beginnings`.

    Then rows may hold several in this batch or in others: a row of one text is that text. Where
    rows are mapped to samples, each sample is one.

    Returns:
        Whether it was found out now, so that what was measured is to be anew.

    Raises:
        GameError: where the model is told of texts that cannot be found at the site.
    """
    site, current = stage.arena.site, stage.passes.kept[-1]
    context, alone = current.context, stage.arena.solver.per == "sample"
    shapes = [v.call.shape for v in current.visits]
    # Of several calls, which may be of other sizes, the context is that of the last.
    sizes = next((shape[:2] for shape in reversed(shapes) if len(shape) == 3), None)
    if site.packed or sizes is None:
        return False
    if alone:
        _check_told(context, sizes)
    told = beginnings(context, sizes) is not None and owners(context, sizes) is None
    site.packed = alone and told
    return site.packed


def _check_told(context: Mapping[str, Any], sizes: torch.Size) -> None:
    """Check that texts which a model is told of lie in the rows at the site."""
    lengths, mask = ends(context), context.get("attention_mask")
    say = (
        "pass position_ids that begin anew with each text, or let each token play by itself, "
        "per='token'."
    )
    if lengths is not None and len(lengths) - 1 != sizes[0] and int(lengths[-1]) != sizes.numel():
        raise GameError(
            f"The model is told of {len(lengths) - 1} texts by cumulative lengths that end at "
            f"{int(lengths[-1])}, and the site returns {sizes[0]} rows of {sizes[1]} tokens: which "
            f"token is of which text cannot be told. Lay the rows end to end in one, or {say}"
        )
    if type(mask).__name__ == "BlockMask" and beginnings(context, sizes) is None:
        raise GameError(
            "The model is called with a BlockMask, which does not tell which tokens are of one "
            f"text: {say}"
        )


@contextmanager
def _without_statistics(model: nn.Module) -> Iterator[None]:
    """Leave out what normalises by the batch, through which samples see each other."""
    kinds = nn.modules.batchnorm._BatchNorm
    live = [m for m in model.modules() if isinstance(m, kinds) and m.training]
    handles = [m.register_forward_hook(_leave_out) for m in live]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leave_out(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return args[0].to(output.dtype)


def _lies_at(slope: Tensor, sample: int, second: bool) -> bool:
    """Return whether a gradient is 0 at all samples but one, if the second dimension is theirs."""
    slope = slope.nan_to_num(0, 0, 0)  # as it may be at padding
    there = (slope.transpose(0, 1) if second else slope).flatten(1).ne(0).any(1)
    return bool(there[sample]) and int(there.sum()) == 1


def _second_by_number(visit: Visit, samples: int) -> bool:
    first, second = visit.call.shape[:2]
    return samples == second != first and visit.call.owners is None


def _turned(stage: Stage) -> bool:
    site = stage.arena.site
    return any(site.second(visit.module) for visit in stage.passes.kept[-1].visits)


def _by_moves(stage: Stage) -> bool:
    """Find the batch by the gradient of a loss alone, in `[B, n, d]` or `[n, B, d]`."""
    site = stage.arena.site
    still = _slopes(stage)
    for index, visit in enumerate(stage.passes.kept[-1].visits):
        if visit.module not in site.unsure or len(visit.call.shape) != 3:
            continue
        for second in (False, True):
            moved = (_slopes(stage, index, second, sample)[index] for sample in _ENDS)
            changed = (_changed(g, still[index]) for g in moved)
            there = (_lies_at(g, k, second) for g, k in zip(changed, _ENDS, strict=True))
            if visit.module in site.unsure and all(there):
                site.orient(visit.module, second)
    return _turned(stage)


def check_batch(stage: Stage, zero: Reading) -> None:
    """Warn of a batch that a loss alone did not show."""
    site = stage.arena.site
    if zero.loss.dim() or zero.predictions is not None or stage.arena.solver.per == "token":
        return
    for visit in stage.passes.kept[-1].visits:
        if visit.module in site.unsure and len(visit.call.shape) == 3:
            warnings.warn(
                f"The site {site.names} returns {list(visit.call.shape)}, and it is not known "
                "which of the first two dimensions is the batch: the first is assumed to be. "
                "Return predictions with the loss, as in (loss, logits), or one loss per sample.",
                stacklevel=8,
            )
            return


def _slopes(
    stage: Stage, moved: int | None = None, second: bool = False, sample: int = 0
) -> list[Tensor]:
    """Return the gradients of the loss at δ = 0, but for one sample at one call that is moved."""
    passes = stage.passes
    leaves: list[Tensor] = []

    def provide(index: int, call: Call, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(call.empty())
        if index == moved:
            part = leaf.select(int(second), sample)
            way = torch.linspace(-1, 2, part.numel(), dtype=leaf.dtype, device=leaf.device)
            part.copy_(way.view_as(part) * output.detach().abs().mean())
        leaves.append(leaf.requires_grad_())
        return leaf

    with passes.frozen():
        return passes.differentiate(passes.run(provide).objective, leaves)


def _changed(slope: Tensor, before: Tensor) -> Tensor:
    """Return by how much a gradient changed, 0 where it is by rounding."""
    change = (slope - before).abs().nan_to_num(0, 0, 0)
    return change * (change > 1e-4 * before.abs().nan_to_num(0, 0, 0).max())
