"""Norms, steepest ascent and projections: the geometry of the set the adversary plays in.

Every function acts on a tensor `[B, ...]` and treats each *group* of coordinates by itself: all
coordinates of a sample (`per="sample"`), or the last dimension (`per="token"`). Padding needs no
mask here: masked coordinates are zero, and zero stays zero under every function of this file.

A sample may have several rows, such as a graph of many nodes: `owners` `[B]` then numbers the
sample of each row from 0, and a group is all coordinates of all its rows. None is one row for each.
Where rows hold several texts, `owners` `[B, n]` numbers the text of each token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from mixadv.errors import GameError

Norm = Literal["l1", "l2", "linf"]
Per = Literal["sample", "token"]

NORMS = ("l1", "l2", "linf")
PERS = ("sample", "token")

_HALVINGS = 40  # of an interval of length 1, for thresholds in fp32


def _dims(x: Tensor, per: Per) -> tuple[int, ...]:
    return (x.dim() - 1,) if per == "token" else tuple(range(1, x.dim()))


def of_samples(values: Tensor, owners: Tensor, how: Literal["sum", "amax", "amin"]) -> Tensor:
    """Return `[B]`: at the number of each sample what `how` gives over its rows.

    As long as there are rows, so that nothing is read from the device; what is behind the samples
    means nothing.

    Args:
        values: of rows, `[B]`.
        owners: the sample of each row, `[B]`.
        how: a reduction.

    Example:
        >>> of_samples(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]), "sum")[:2].tolist()
        [4.0, 2.0]
    """
    with known_samples(owners, len(values)):
        return torch.zeros_like(values).scatter_reduce(0, owners, values, how, include_self=False)


@contextmanager
def known_samples(owners: Tensor, count: int) -> Iterator[None]:
    """Say in words which sample there is no place for, where torch says which index.

    Numbers are read after that alone. An accelerator may stop in its own words before.

    Raises:
        GameError: where indexing by `owners` fails, as there are no more than `count` places.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        largest = int(owners.max())
        if largest < count:
            raise
        raise GameError(
            f"A row at the site belongs to sample {largest}, counted from 0, and there is room for "
            f"{count}: as many as there are rows, or predictions. Samples without a row, such as "
            "empty graphs, leave gaps in the numbers: leave them out of the batch, and number the "
            "others from 0."
        ) from error


def _of_texts(owners: Tensor | None) -> TypeGuard[Tensor]:
    return owners is not None and owners.dim() == 2


def _by_token(function: Callable[..., Tensor], x: Tensor, owners: Tensor, *words: Any) -> Tensor:
    """Return what a function gives where each token of `[B, n, ...]` is a row of its text."""
    return function(x.flatten(0, 1), *words, owners.flatten()).unflatten(0, owners.shape)


def _of_groups(
    values: Tensor, how: Literal["sum", "amax"], per: Per, rows: Tensor | None
) -> Tensor:
    """Return what `how` gives over the rows of a group, at each of them."""
    if rows is None or per == "token":
        return values
    return of_samples(values.flatten(), rows, how)[rows].view_as(values)


def _largest(x: Tensor, per: Per, owners: Tensor | None = None) -> Tensor:
    return _of_groups(x.abs().amax(_dims(x, per), keepdim=True), "amax", per, owners)


def total(x: Tensor, per: Per = "sample", owners: Tensor | None = None) -> Tensor:
    """Return the sum over each group, shaped as `norms` returns it.

    Example:
        >>> total(torch.tensor([[3.0, -4.0], [0.0, 1.0]])).tolist()
        [[-1.0], [1.0]]
    """
    if _of_texts(owners):
        return _by_token(total, x, owners, per)
    return _of_groups(x.sum(_dims(x, per), keepdim=True), "sum", per, owners)


def _safe(divisor: Tensor) -> Tensor:
    """Return the divisor, at least the smallest normal number, so that 0/0 gives 0."""
    return divisor.clamp(min=torch.finfo(divisor.dtype).tiny)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norms(
    x: Tensor, norm: Norm = "l2", per: Per = "sample", owners: Tensor | None = None
) -> Tensor:
    """Return the norm of each group, shaped to broadcast against `x`.

    The tensor is divided by its largest entry first: the squares of 1e30 overflow in fp32, those
    of 1e-30 vanish, and a gradient over its norm would be 0/0.

    Args:
        x: `[B, ...]`, any float dtype.
        norm: `"l1"`, `"l2"` or `"linf"`.
        per: `"sample"` (all but the first dimension) or `"token"` (the last dimension).
        owners: `[B]`, the sample of each row where one has several.

    Returns:
        `[B, 1, ...]` for `per="sample"`, `[..., 1]` for `per="token"`.

    Example:
        >>> norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[5.0], [0.0]]
    """
    if _of_texts(owners):
        return _by_token(norms, x, owners, norm, per)
    return _measured(x, norm, per, owners)[0]


def _measured(
    x: Tensor, norm: Norm, per: Per, owners: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of each group, x over its largest entry there, and the norm of that."""
    wide = _wide(x)
    largest = _largest(wide, per, owners)
    scale = _safe(largest)
    scaled = wide / scale
    if norm == "linf":
        return largest.to(x.dtype), scaled, largest / scale
    if norm == "l1":
        length = total(scaled.abs(), per, owners)
    else:
        length = total(scaled.square(), per, owners).sqrt()
    return (scale * length).to(x.dtype), scaled, length


def unit(g: Tensor, norm: Norm = "l2", per: Per = "sample", owners: Tensor | None = None) -> Tensor:
    """Return `g / ||g||` per group; a group of zeros stays zero.

    In L∞ this keeps the proportions of the gradient, unlike its sign: what the released code of
    FreeLB and MAT computes.
    """
    if _of_texts(owners):
        return _by_token(unit, g, owners, norm, per)
    _, scaled, length = _measured(g, norm, per, owners)
    return (scaled / _safe(length)).to(g.dtype)


def steepest(
    g: Tensor, norm: Norm = "l2", per: Per = "sample", owners: Tensor | None = None
) -> Tensor:
    """Return the steepest ascent direction `argmax { <g, v> : ||v|| <= 1 }` per group.

    L2: `g / ||g||`; L∞: `sign(g)`; L1: the sign at the coordinate with the largest magnitude.

    Example:
        >>> steepest(torch.tensor([[3.0, -4.0]]), "linf").tolist()
        [[1.0, -1.0]]
        >>> steepest(torch.tensor([[3.0, -4.0]]), "l1").tolist()
        [[0.0, -1.0]]
    """
    if norm == "l2":
        return unit(g, "l2", per, owners)
    if norm == "linf":
        return g.sign()
    if _of_texts(owners):
        return _by_token(steepest, g, owners, norm, per)
    flat = g if per == "token" else g.flatten(1)
    where = flat.abs().argmax(-1, keepdim=True)
    signs = flat.gather(-1, where).sign()
    if owners is not None and per == "sample":
        signs = signs * _first_largest(flat, owners)
    return torch.zeros_like(flat).scatter(-1, where, signs).view_as(g)


def _first_largest(flat: Tensor, owners: Tensor) -> Tensor:
    """Return 1 at the first row of each sample that has its largest entry, `[B, 1]`."""
    place = torch.arange(len(flat), device=flat.device)
    largest = (_largest(flat, "sample") == _largest(flat, "sample", owners))[:, 0]
    first = of_samples(torch.where(largest, place, len(flat)), owners, "amin")[owners]
    return (place == first)[:, None].to(flat.dtype)


def project(
    x: Tensor,
    radius: float,
    norm: Norm = "l2",
    per: Per = "sample",
    owners: Tensor | None = None,
) -> Tensor:
    """Return the Euclidean projection of each group onto the ball of the given radius.

    Idempotent and 1-Lipschitz. L2: rescaling; L∞: clamping; L1: soft thresholding with the
    threshold found by sorting (Duchi et al. 2008, fig. 1), over several rows by bisection.

    Example:
        >>> project(torch.tensor([[3.0, 4.0]]), 1.0).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    if norm == "linf":
        return x.clamp(-radius, radius)
    if _of_texts(owners):
        return _by_token(project, x, owners, radius, norm, per)
    found, scaled, length = _measured(x, norm, per, owners)
    inside = found <= radius
    if norm == "l2":
        return torch.where(inside, x, radius * (scaled / _safe(length)).to(x.dtype))
    if owners is not None and per == "sample":
        return torch.where(inside, x, _rows_onto_l1_sphere(x, radius, owners))
    return torch.where(inside, x, _onto_l1_sphere(x, radius, per))


def onto_sphere(
    x: Tensor,
    radius: float,
    norm: Norm = "l2",
    per: Per = "sample",
    owners: Tensor | None = None,
) -> Tensor:
    """Return each group rescaled to norm `radius` (zero stays zero).

    Not a projection onto a ball: it also enlarges. The released code of SMART and ALUM and their
    ports do this with `norm="linf", per="token", radius=1`.
    """
    return radius * unit(x, norm, per, owners)


def _onto_l1_sphere(x: Tensor, radius: float, per: Per) -> Tensor:
    flat = _wide(x if per == "token" else x.flatten(1))
    magnitudes = flat.abs()
    # Distances below the largest entry, in radii: no cancellation at any scale, and what lies
    # more than one radius below is never kept.
    below = ((_largest(flat, "token") - magnitudes) / (radius or 1.0)).clamp(max=1)
    ordered = below.sort(-1).values
    ranks = torch.arange(1, flat.shape[-1] + 1, device=x.device, dtype=flat.dtype)
    depths = (1 + ordered.cumsum(-1)) / ranks
    kept = (ordered < depths).sum(-1, keepdim=True).clamp(min=1)  # a row of NaN keeps none
    shrunk = (depths.gather(-1, kept - 1) - below).clamp(min=0)
    return (radius * unit(shrunk, "l1", "token") * flat.sign()).view_as(x).to(x.dtype)


def _rows_onto_l1_sphere(x: Tensor, radius: float, owners: Tensor) -> Tensor:
    """Return what `_onto_l1_sphere` does, over all rows of a sample."""
    flat = _wide(x.flatten(1))
    largest = _largest(flat, "sample", owners)
    below = ((largest - flat.abs()) / (radius or 1.0)).clamp(max=1)
    depth = torch.ones_like(largest)
    low = torch.zeros_like(depth)
    for _ in range(_HALVINGS):
        middle = (low + depth) / 2
        deep = total((middle - below).clamp(min=0), "sample", owners) > 1
        low, depth = torch.where(deep, low, middle), torch.where(deep, middle, depth)
    kept = (below < depth).to(flat.dtype)  # what is kept is known, and then the depth exactly
    depth = (1 + total(below * kept, "sample", owners)) / total(kept, "sample", owners)
    shrunk = (depth - below).clamp(min=0)
    onto = unit(shrunk, "l1", "sample", owners) * flat.sign()
    return (radius * onto).view_as(x).to(x.dtype)
