"""Which rows at the site belong to a sample, and what is given for samples, given for rows."""

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.geometry import known_samples, of_samples


def of_rows(owners: Tensor | None) -> Tensor | None:
    """Return the sample of each row; None where rows are samples, or hold several texts."""
    return None if owners is None or owners.dim() > 1 else owners


def by_row(values: Tensor, like: Tensor, owners: Tensor | None = None) -> Tensor:
    """Return values `[M, B]` of samples, shaped to multiply the rows of a tensor `[M, R, ...]`.

    Raises:
        GameError: where there are not as many rows as samples, and no owners of them are known.
    """
    samples, rows, owners = values.shape[1], like.shape[1], of_rows(owners)
    if owners is not None and samples > 1:
        with known_samples(owners, samples):
            values = values[:, owners]
    elif samples not in (1, rows):
        raise GameError(
            f"There are {samples} predictions and {rows} rows at the site, and which row is "
            "whose is not known. Call the model with a map of its rows, named batch or "
            "segments, or leave out what needs it: play_as='ensemble', sign='any'."
        )
    values = values.expand(-1, rows)
    return values.reshape(*values.shape, *[1] * (like.dim() - 2))


def repeat_mask(mask: Tensor | None, times: int) -> Tensor | None:
    """Return the mask of so many copies of the batch."""
    return mask if mask is None or times == 1 else mask.repeat(times, *[1] * (mask.dim() - 1))


def repeat_owners(owners: Tensor | None, times: int) -> Tensor | None:
    """Return the samples of the rows of so many copies of the batch, each with its own numbers."""
    if owners is None or times == 1:
        return owners
    copy = torch.arange(times, device=owners.device).view(-1, *[1] * owners.dim())
    return (owners + owners.numel() * copy).flatten(0, 1)


def once(owners: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """Return weights by which each sample counts once, to multiply a tensor `[M, R, ...]`.

    Of packed rows each text does, over the tokens where the mask is 1.
    """
    numbers = owners.flatten()
    ones = torch.ones_like(numbers, dtype=like.dtype)
    if owners.dim() > 1 and mask is not None:
        ones = (mask[..., 0] > 0).expand(owners.shape).flatten().to(like.dtype)
    counts = of_samples(ones, numbers, "sum")[numbers].clamp(min=1)
    return (ones / counts).view(*owners.shape, *[1] * (like.dim() - 1 - owners.dim()))


def mean_where(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of values, 0-d, by weights that broadcast to them; None weighs all alike."""
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)
