"""Whether calls that share one δ agree where it acts. Checked in a first round."""

from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.model.places import marks, rows_in, tokenwise
from mixadv.model.values import is_whole
from mixadv.model.visits import Call
from mixadv.round.goals import Whose
from mixadv.round.stage import Stage

_SAY = (
    "Say where the calls agree with where=: a mask of a prompt's positions, a function of the "
    "call, or one for each closure, where={'closure': …, 'adversary': …}."
)


class Seen(NamedTuple):
    """A call at the site, and what the model read there."""

    whose: Whose
    place: int
    call: Call
    ids: Tensor | None  # [B, n] of the model's call, else of the site's own
    inputs: list[Tensor]  # of the model's call
    output: Tensor  # of the site

    @property
    def name(self) -> str:
        """The closure in words."""
        return "closure" if self.whose == "closure" else "adversary="


def check_sharing(stage: Stage) -> None:
    """Check that all calls of `closure` and `adversary` agree at the positions of one δ.

    Raises:
        GameError: where they do not, with the row and the position.
    """
    seen = {whose: _calls(stage, whose) for whose in ("adversary", "closure")}
    counts = {whose: 1 + max(s.place for s in found) for whose, found in seen.items()}
    if len({*counts.values()}) > 1:
        raise GameError(
            f"A call of the model calls the site {stage.site} {counts['adversary']} times in "
            f"adversary= and {counts['closure']} times in closure, and one δ acts at both: name "
            "with site= what both call."
        )
    found = [*seen["adversary"], *seen["closure"]]
    for place in range(counts["closure"]):
        first, *others = [s for s in found if s.place == place]
        _check_played(first)
        for other in others:
            _check_alike(first, other)


def _calls(stage: Stage, whose: Whose) -> list[Seen]:
    passes, seen = stage.passes, []

    def provide(index: int, call: Call, output: Tensor) -> Tensor:
        current = stage.arena.site.current
        context = {} if current is None else current.context
        inputs = [v for v in context.values() if isinstance(v, Tensor)]
        ids = context.get("input_ids")
        if not (isinstance(ids, Tensor) and is_whole(ids) and ids.shape == call.shape[:2]):
            ids = call.ids
        seen.append(Seen(whose, index, call, ids, inputs, output.detach()))
        return torch.zeros_like(call.empty()).requires_grad_()

    with passes.frozen():
        passes.run(provide, whose=whose)
    return seen


def _check_played(one: Seen) -> None:
    """Check that δ may act in each row."""
    mask = one.call.mask
    if mask is None:
        return
    empty = (mask.flatten(1) > 0).sum(1) == 0
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        few = ", ".join(map(str, rows[:5])) + ", …" * (len(rows) > 5)
        raise GameError(
            f"δ may act nowhere in {len(rows)} of {len(empty)} rows ({few}) of a call in "
            f"{one.name}: where= is empty there, so that they have no adversary. Leave these rows "
            "to retain=, or mark their prompts."
        )


def _check_alike(one: Seen, other: Seen) -> None:
    device = one.output.device
    rows = rows_in(len(one.output), len(other.output), 1, device)
    rows = torch.arange(len(other.output), device=device) if rows is None else rows
    masks = one.call.mask, other.call.mask
    if not tokenwise(*masks, one.call.shape, other.call.shape):
        _check_whole(one, other, rows)
        return
    first = marks(masks[0], one.call.shape, device)[rows]
    second = marks(masks[1], other.call.shape, device)
    apart = (first.sum(1) != second.sum(1)).nonzero().flatten().tolist()
    if apart:
        row = apart[0]
        raise GameError(
            f"δ may act on {int(first[row].sum())} positions of row {int(rows[row])} in the first "
            f"call of {one.name}, and on {int(second[row].sum())} of row {row} in a call of "
            f"{other.name}: one δ acts on the same positions of each. {_SAY}"
        )
    known = one.ids is not None and other.ids is not None
    if not known and _same_inputs(one, other):
        return
    read = (one.ids, other.ids) if known else (one.output, other.output)
    for row, own in enumerate(rows.tolist()):
        pair = read[0][own][first[row]], read[1][row][second[row]]  # pyright: ignore
        differs = _differs(*pair).nonzero().flatten().tolist()
        if differs:
            what = "reads other tokens" if known else "has other values at the site"
            raise GameError(
                f"Row {row} of a call in {other.name} {what} than row {own} of the first call in "
                f"{one.name}, at position {differs[0]} of those where δ may act: one δ acts on "
                f"what both read. {_SAY}"
            )


def _check_whole(one: Seen, other: Seen, rows: Tensor) -> None:
    """Check calls whose positions are not tokens: they are the same throughout."""
    shapes = one.call.shape[1:], other.call.shape[1:]
    alike = shapes[0] == shapes[1]
    if alike:
        masks = [
            torch.ones(()) if s.call.mask is None else s.call.mask.expand(s.call.shape)
            for s in (one, other)
        ]
        first = masks[0][rows] if masks[0].dim() else masks[0]
        alike = bool((first == masks[1]).all())
    if not alike:
        raise GameError(
            f"The site returns {[*one.call.shape]} in the first call of {one.name} and "
            f"{[*other.call.shape]} in a call of {other.name}, or δ may act on other parts of it: "
            f"one δ acts on the same positions of each. {_SAY}"
        )
    differs = _differs(one.output[rows], other.output).nonzero().flatten().tolist()
    if differs and not _same_inputs(one, other):
        raise GameError(
            f"Row {differs[0]} of a call in {other.name} has other values at the site than the "
            f"first call in {one.name}, and one δ acts on both: call the model on the same inputs."
        )


def _same_inputs(one: Seen, other: Seen) -> bool:
    """Return whether the model was called with the same, and differs itself: dropout, a mixture."""
    pairs = list(zip(one.inputs, other.inputs, strict=False))
    return bool(pairs) and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """Return for each row, or position, whether two tensors differ there by more than rounding."""
    if is_whole(one):
        return one != other
    eps = 16 * torch.finfo(one.dtype).eps ** 0.5
    return ~torch.isclose(one, other, eps, eps).flatten(1).all(1)
