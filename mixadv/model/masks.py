"""Which positions of what the site returns are real, and which of its dimensions is the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.modules import configuration
from mixadv.model.values import is_whole
from mixadv.model.visits import Call

Plain = Tensor | Sequence[Tensor] | Callable[[Call], Tensor] | None
"""Where δ may act, 1 or True there: a mask with the leading sizes of what the site returns, or that
broadcasts to it; one for each call at the site; or a function of the call. None: at real tokens."""

Where = Plain | Mapping[str, Plain]
"""The same, or one for each closure of a round by its name, `"closure"` and `"adversary"`."""


def where_in(where: Where, whose: str) -> Plain:
    """Return where δ may act in the passes of a closure: what is retained has no δ."""
    if whose == "retain":
        return None
    return where.get(whose) if isinstance(where, Mapping) else where


def told(where: Plain, index: int, call: Call, copies: int = 1) -> Call:
    """Return a call whose mask says where δ may act, of a batch stacked in so many copies.

    Raises:
        GameError: if the mask does not fit what the site returned.
    """
    if where is None:
        return call
    if copies > 1:
        rows = call.shape[0] // copies
        one = call._replace(shape=torch.Size([rows, *call.shape[1:]]))
        parts = {n: v[:rows] for n in ("mask", "ids") if (v := getattr(call, n)) is not None}
        mask = told(where, index, one._replace(**parts)).mask
        assert mask is not None
        return call._replace(mask=mask.repeat(copies, *[1] * (mask.dim() - 1)))
    if isinstance(where, Sequence) and index >= len(where):
        raise GameError(
            f"where= has {len(where)} masks, and the site is called more often: give one for each "
            "call, or a function of the call."
        )
    if isinstance(where, Tensor):
        mask = where
    else:
        mask = where[index] if isinstance(where, Sequence) else where(call)
    shape = getattr(mask, "shape", None)
    if shape is not None and shape == call.shape[: len(shape)]:
        mask = mask.reshape(*shape, *[1] * (len(call.shape) - len(shape)))
    try:
        assert isinstance(mask, Tensor)
        assert torch.broadcast_shapes(mask.shape, call.shape) == call.shape
    except (AssertionError, RuntimeError):
        raise GameError(
            f"where= is {list(shape) if shape is not None else type(mask).__name__}, and the site "
            f"returns {list(call.shape)}: give a mask of its leading sizes, 1 where δ may act."
        ) from None
    mask = (mask > 0).to(call.device, torch.promote_types(call.dtype, torch.float32))
    mask = mask.view(*[1] * (len(call.shape) - mask.dim()), *mask.shape)
    return call._replace(mask=mask.expand(call.shape[0], *mask.shape[1:]))


def batch_is_second(
    contexts: Iterable[Mapping[str, Any]], output: Tensor, entered: Any, before: bool | None = None
) -> bool | None:
    """Return whether the batch is the second dimension of what a module returned; None if unknown.

    As of models that go along a sequence. Ids or mask of the model, which begin with the batch,
    tell by their sizes. Where these are alike, the ids that the module was called with do.

    Args:
        contexts: arguments of the model's call and of modules within.
        output: what the module returned.
        entered: what it was called with.
        before: what was found before, which holds where sizes do not tell.
    """
    sizes = output.shape[:2]
    if output.dim() < 3:
        return False
    for context in contexts:
        for name in ("input_ids", "attention_mask"):
            known = context.get(name)
            if not isinstance(known, Tensor) or known.dim() != 2:
                continue
            if sizes[0] != sizes[1] and known.shape in (sizes, sizes[::-1]):
                return known.shape != sizes
            same = isinstance(entered, Tensor) and entered.shape == known.shape == sizes
            if name == "input_ids" and same and before is None:  # else nothing is read
                ways = torch.equal(entered, known), torch.equal(entered, known.T)
                return ways[1] if any(ways) and not all(ways) else None
    return None


class Around(NamedTuple):
    """What the modules around a call were told of its tokens."""

    masks: tuple[Tensor, ...] = ()  # `[B, n]`, the nearest first
    ids: Tensor | None = None  # that the nearest came with
    decodes: bool = False  # whether they decode what an encoder read, whose masks are left outside

    def within(self, arguments: Mapping[str, Any]) -> Around:
        """Return what there is around calls within a module that is called with arguments."""
        names = ("attention_mask", "input_ids", "encoder_hidden_states")
        mask, ids, encoded = (arguments.get(name) for name in names)
        decodes = self.decodes or isinstance(encoded, Tensor)
        masks = () if decodes and not self.decodes and mask is None else self.masks
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return Around((mask, *masks), ids if isinstance(ids, Tensor) else None, decodes)
        told = self.ids
        if told is not None and isinstance(ids, Tensor) and ids.shape == told.shape:
            masks = tuple(_of_text(m, ids, told) for m in masks)
        return Around(masks, self.ids, decodes)


def _of_text(mask: Tensor, ids: Tensor, told: Tensor) -> Tensor:
    """Return the mask that came with ids, at other ids of this size: all ones for another text.

    It is the same text if most of it is: a model may replace some ids. Nothing is read from the
    device.
    """
    if mask.shape != ids.shape or ids is told or {ids.device, told.device} != {mask.device}:
        return mask
    real = mask > 0
    same = 2 * ((ids == told) & real).sum() > real.sum()
    return torch.where(same, mask, torch.ones_like(mask))


_OTHERS = ("target", "label", "output", "decoder", "max", "min")
"""Words in the names of lengths that are not those of the input."""


def real_tokens(
    output: Tensor,
    masks: Iterable[Tensor],
    inputs: Mapping[str, Any],
    entered: Any,
    embeddings: Sequence[nn.Module],
) -> Tensor | None:
    """Return which positions `[B, n]` are real: by a mask, by lengths, or by the padding of ids.

    Args:
        output: `[B, n, ...]`.
        masks: of the modules around, the nearest first.
        inputs: of the model, where the output is its own input.
        entered: what the module was called with.
        embeddings: of the site.
    """
    sizes = output.shape[:2]
    for mask in masks:
        if mask.shape == sizes:
            return mask
    lengths = [
        value
        for name, value in inputs.items()
        if is_whole(value) and "length" in name and value.shape == sizes[:1]
        if not any(word in name for word in _OTHERS)
    ]
    if len(lengths) == 1:
        return torch.arange(sizes[1], device=lengths[0].device) < lengths[0][:, None]
    if isinstance(entered, Tensor) and entered.shape == sizes:
        for embedding in embeddings:
            if (padding := getattr(embedding, "padding_idx", None)) is not None:
                return entered != padding
    return None


_SEGMENTS = ("batch", "segments", "segment_ids", "graph_ids", "batch_index")


def owners(
    context: Mapping[str, Any],
    shape: torch.Size,
    device: torch.device | None = None,
    packed: bool = False,
) -> Tensor | None:
    """Return the sample that each of the rows at the site belongs to, where the model is told.

    By a map of segments, as of graphs in a batch, or by inputs `[B, C, ...]` of several rows each,
    as of multiple choice: what is chosen between is one sample. It is never guessed from sizes.
    Where texts are packed into rows, the text of each token `[B, n]`.
    """
    rows = shape[0]
    if packed and (begun := beginnings(context, shape[:2])) is not None:
        return texts(begun)
    whole = {name: value for name, value in context.items() if is_whole(value)}
    for name in _SEGMENTS:
        if name in whole and whole[name].shape == (rows,):
            return whole[name].to(torch.long, copy=True)  # the batch may be filled anew
    for ids in whole.values():
        if ids.dim() > 2 and ids.shape[1] > 1 and ids.shape[:2].numel() == rows:
            return torch.arange(rows, device=device) // ids.shape[1]
    return None


_ENDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
_UNSEEN = -1e3  # what is added to an attention that is not to be, at the least


def ends(context: Mapping[str, Any]) -> Tensor | None:
    """Return where texts end in rows that are laid end to end, behind a 0, `[T + 1]`."""
    found = (context.get(name) for name in _ENDS)
    return next((x for x in found if isinstance(x, Tensor) and x.dim() == 1), None)


def beginnings(context: Mapping[str, Any], sizes: torch.Size) -> Tensor | None:
    """Return where a text begins within the rows `[B, n]` of a call; None where nothing tells.

    Told by positions that begin anew, by cumulative lengths or numbers of texts, as padding-free
    batches have them, and by an attention `[B, 1, n, n]` in which a token does not see the one
    before it. Padding begins no text, nor does what follows padding at the start of a row.
    """
    found, lengths = [], ends(context)
    positions, numbers = (context.get(name) for name in ("position_ids", "seq_idx"))
    if isinstance(positions, Tensor) and positions.shape == sizes:
        found.append(positions[:, 1:] <= positions[:, :-1])
    if isinstance(numbers, Tensor) and numbers.shape == sizes:
        found.append(numbers[:, 1:] != numbers[:, :-1])
    if lengths is not None:
        begun = torch.zeros(sizes.numel() + 1, dtype=torch.bool, device=lengths.device)
        if len(lengths) - 1 != sizes[0]:  # else each row is a text, which may be padded
            begun.index_fill_(0, lengths.long().clamp(max=sizes.numel()), True)
        found.append(begun[:-1].view(sizes)[:, 1:])
    if (seen := sight(context, sizes)) is not None:
        found.append(~seen.diagonal(-1, 1, 2))
    if not found:
        return None
    begun = torch.ones(sizes, dtype=torch.bool, device=found[0].device)
    anew = torch.stack([x.to(begun.device) for x in found]).any(0)
    mask = context.get("attention_mask")
    real = mask > 0 if isinstance(mask, Tensor) and mask.shape == sizes else None
    real = real if seen is None else seen.any(1)  # a token that none sees is padding
    if real is not None:
        real = real.to(begun.device)
        anew = anew & real[:, 1:] & (real.cumsum(1)[:, :-1] > 0)
    begun[:, 1:] = anew
    return begun


def sight(context: Mapping[str, Any], sizes: torch.Size) -> Tensor | None:
    """Return which token sees which by an attention of four dimensions, `[B, n, n]`."""
    mask, length = context.get("attention_mask"), sizes[1]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2:] != (length, length):
        return None
    seen = mask > _UNSEEN if mask.is_floating_point() else mask > 0
    return seen.any(1).expand(sizes[0], length, length)


def texts(begun: Tensor) -> Tensor:
    """Return the number of the text that each token of packed rows belongs to, `[B, n]`.

    Example:
        >>> texts(torch.tensor([[True, False, True, False], [True, False, False, False]])).tolist()
        [[0, 0, 1, 1], [2, 2, 2, 2]]
    """
    return begun.flatten().cumsum(0).view_as(begun) - 1


_PLACES = [
    f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")
]


def placeholders(model: nn.Module) -> list[int]:
    """Return the ids in whose places a model reads something else, as its configuration says."""
    config = configuration(model, *_PLACES, "is_encoder_decoder")
    return [place for name in _PLACES if isinstance(place := getattr(config, name, None), int)]


def without_placeholders(
    mask: Tensor | None, places: Sequence[int], output: Tensor, entered: Any
) -> Tensor | None:
    """Return the mask without `placeholders`, whose embeddings a model overwrites."""
    if not places or not is_whole(entered) or entered.shape != output.shape[:2]:
        return mask
    text = entered != places[0]
    for place in places[1:]:
        text = text & (entered != place)
    return text if mask is None else text & (mask > 0)
