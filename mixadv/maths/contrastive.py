"""NT-Xent: the contrastive loss between clean and adversarial views.
van den Oord et al. 2018, arXiv:1807.03748, eq. 4; Chen et al. 2020, arXiv:2002.05709, eq. 1.

    ℓ(i, j) = −log [ exp(s_ij/τ) / Σ_{k≠i} exp(s_ik/τ) ],     s_ij = cos(z_i, z_j)

over the 2N views of N samples, averaged over the pairs (clean_i, adversarial_i) both ways round.
`negatives="all"` sums over the other 2N − 1 views, of which 2N − 2 are negatives; `"cross"` over
the N views of the other kind, as between two modalities.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mixadv.checks import check_number
from mixadv.errors import nearest

Negatives = Literal["all", "cross"]


def nt_xent(
    clean: Tensor, adversarial: Tensor, temperature: float = 0.1, negatives: Negatives = "all"
) -> Tensor:
    """Return the loss, 0-d, in at least fp32 and outside autocast.

    Symmetric in its two views. A batch of one sample has no negatives, and loss 0.

    Args:
        clean: `[N, d]`, any float dtype; rows need not be normalised.
        adversarial: `[N, d]`, row i a view of the same sample as row i of `clean`.
        temperature: τ of the similarities, positive; no unit.
        negatives: `"all"` or `"cross"`.

    Raises:
        ValueError: for views of different shapes, or arguments out of range.

    Example:
        >>> views = torch.eye(4)
        >>> round(float(nt_xent(views, views, temperature=1.0)), 4)  # log(1 + 6/e)
        1.1654
    """
    check_nt_xent(temperature, negatives)
    if clean.shape != adversarial.shape or clean.dim() != 2:
        raise ValueError(
            "NT-Xent compares two views [N, d] of the same N samples, got "
            f"{list(clean.shape)} and {list(adversarial.shape)}."
        )
    with torch.autocast(clean.device.type, enabled=False):
        first, second = directions(clean), directions(adversarial)
        partner = torch.arange(len(first), device=first.device)
        if negatives == "cross":
            similarity = first @ second.T / temperature
            both = F.cross_entropy(similarity, partner), F.cross_entropy(similarity.T, partner)
            return (both[0] + both[1]) / 2
        views = torch.cat([first, second])
        similarity = (views @ views.T / temperature).fill_diagonal_(-math.inf)
        return F.cross_entropy(similarity, torch.cat([partner + len(first), partner]))


def directions(views: Tensor) -> Tensor:
    """Return the rows at length 1, zero where a row is zero, in at least fp32."""
    wide = views.to(torch.promote_types(views.dtype, torch.float32))
    # Squares of 1e30 overflow in fp32 and those of 1e-30 vanish. With 1 as the largest entry a row
    # is at least 1 long, so that eps is for rows of zeros alone: their gradient stays finite.
    largest = wide.detach().abs().amax(-1, keepdim=True)
    return F.normalize(wide / torch.where(largest > 0, largest, 1.0), dim=-1, eps=1.0)


def check_nt_xent(
    temperature: Any, negatives: Any, who: str = "NT-Xent", name: str = "temperature"
) -> None:
    """Raise unless the parameters are in range."""
    check_number(who, name, temperature)
    if temperature == 0:
        raise ValueError(f"{who}: {name} must be positive, got {temperature}.")
    if negatives not in get_args(Negatives):
        raise ValueError(
            f"{who}: negatives={negatives!r} is not 'all' or 'cross'."
            f"{nearest(negatives, get_args(Negatives))}"
        )
