"""The Gauss–Newton move: where a divergence grows fast, from the clean pass alone.

    D(f(X+δ), f(X)) = ½·δᵀ Jᵀ M J δ + O(|δ|³),      M ∝ diag(p) − ppᵀ    (KL, symmetric KL, JS)

With b the gradient in δ of the log-odds of the likeliest label, of probability π, at δ = 0,

    δᵀ Jᵀ M J δ  ≥  π(1 − π)·(bᵀδ)²,

the divergence of the predictions "that label" and "another": with equality for two classes, where b
is the first eigenvector. So one vector–Jacobian product through the graph that the clean pass has
made gives the direction, without a forward pass, and without the difference of almost equal
predictions that the gradient near δ = 0 is. −b goes towards the decision boundary, where the
divergence grows faster than along b. Predictions per token add up, weighted by √(π(1 − π)). For the
squared error of one output M ∝ 1, and b is that output's gradient.

The quadratic form is that of Miyato et al. 2018, arXiv:1704.03976, eq. 8, who approach its first
eigenvector by power iteration; its Gauss–Newton form is in Martens 2020, arXiv:1412.1193, §9.2.
"""

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.divergence import (
    Divergence,
    fixed_symmetric_kl,
    js,
    kl,
    log_probabilities,
    squared_error,
    symmetric_kl,
)

CURVED: tuple[str | Divergence, ...] = ("kl", "symmetric_kl", "fixed_symmetric_kl", "js")
CURVED += (kl, symmetric_kl, fixed_symmetric_kl, js)
FLAT: tuple[str | Divergence, ...] = ("squared_error", squared_error)


def cotangent(predictions: Tensor, kind: str | Divergence, real: Tensor | None = None) -> Tensor:
    """Return what to multiply the predictions' Jacobian by: its product is −b.

    Args:
        predictions: clean logits `[B, C]` or, per token, `[B, n, C]`.
        kind: the divergence, one of `CURVED` and `FLAT`.
        real: `[B, n]`, 1 at tokens that count; None is all.

    Returns:
        A tensor like the predictions, in at least fp32.

    Raises:
        GameError: for the squared error of several outputs, of which none is the one.

    Example:
        >>> cotangent(torch.tensor([[2.0, 0.0]]), "kl").tolist()
        [[-1.0, 1.0]]
    """
    if kind in FLAT:
        if predictions.shape[-1] > 1:
            raise GameError(
                "direction='gauss_newton' with 'squared_error' is for one output, and the "
                f"predictions have {predictions.shape[-1]}: use direction='gradient'."
            )
        return torch.ones_like(predictions)
    logs = log_probabilities(predictions)
    likeliest, label = logs.max(-1, keepdim=True)
    onto = torch.zeros_like(logs).scatter(-1, label, 1.0)
    rest = logs.masked_fill(onto > 0, -torch.inf)
    alone = rest.isneginf().all(-1, keepdim=True)  # every other class is ruled out
    odds = (rest.softmax(-1) - onto).masked_fill(alone, 0.0)
    if logs.dim() == 2:  # a sample's own length means nothing
        return odds
    # √(π(1 − π)), also where π rounds to 1
    weight = (0.5 * (likeliest + rest.logsumexp(-1, keepdim=True))).exp()
    return odds * (weight if real is None else weight * real[..., None])
