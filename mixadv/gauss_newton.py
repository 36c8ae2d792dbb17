"""The Gauss–Newton ascent: where a divergence grows fastest, from the clean pass alone.

    D(f(X+δ), f(X)) = ½·δᵀ Jᵀ M J δ + O(|δ|³),      M ∝ diag(p) − ppᵀ    (KL, symmetric KL, JS)

Let b_k be the gradient in δ of the log-odds of the k-th likeliest label against all but the K
likeliest, at δ = 0: one vector–Jacobian product each, through the graph of the clean pass. With B
their matrix and π their labels' probabilities, merging all other labels into one gives

    δᵀ Jᵀ M J δ  ≥  δᵀ Bᵀ m B δ,        m = diag(π) − ππᵀ,

with equality for K = C − 1: for two classes from K = 1. On a sphere the right side is largest along
Bᵀx, with x the first eigenvector of m·BBᵀ. For the squared error M is the identity and b_k the
gradient of the k-th output. Per token, the log-odds of each token's likeliest label are added up,
weighted by √(π(1 − π)): K = 1.

δ and −δ do as well to second order. Towards the decision boundary the log-odds of the likeliest
label fall.

The quadratic form is that of Miyato et al. 2018, arXiv:1704.03976, eq. 8, who approach its first
eigenvector by power iteration; its Gauss–Newton form is in Martens 2020, arXiv:1412.1193, §9.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.divergence import Divergence, js, kl, squared_error, symmetric_kl
from mixadv.errors import GameError

CURVED: tuple[str | Divergence, ...] = ("kl", "symmetric_kl", "js", kl, symmetric_kl, js)
FLAT: tuple[str | Divergence, ...] = ("squared_error", squared_error)

_SQUARINGS = 12  # of a matrix whose first eigenvector is wanted: 4096 steps of power iteration


class Contrasts(NamedTuple):
    """What is differentiated, and what the divergence is to second order.

    Attributes:
        cotangents: K tensors like the predictions, `[B, C]` or `[B, n, C]`.
        metric: m, up to a factor, `[B, K, K]`.
        odds: `[B, K]`: to first order the log-odds of the likeliest label against all others are
            the contrasts' sum with these weights; None where labels mean nothing.
    """

    cotangents: list[Tensor]
    metric: Tensor
    odds: Tensor | None


def contrasts(
    predictions: Tensor, kind: str | Divergence, most: int, real: Tensor | None = None
) -> Contrasts:
    """Return the contrasts of clean predictions.

    Args:
        predictions: logits `[B, C]` or, per token, `[B, n, C]`; detached.
        kind: the divergence, one of `CURVED` and `FLAT`.
        most: K; fewer are taken where there are no more.
        real: `[B, n]`, 1 at tokens that count; None is all.
    """
    if kind in FLAT:
        outputs = torch.arange(min(most, predictions.shape[-1]), device=predictions.device)
        metric = torch.eye(len(outputs)).to(predictions).expand(len(predictions), -1, -1)
        return Contrasts([_one_hot(k, predictions) for k in outputs], metric, None)
    logs = predictions.to(torch.promote_types(predictions.dtype, torch.float32)).log_softmax(-1)
    wanted = 1 if logs.dim() == 3 else min(most, logs.shape[-1] - 1)
    values, labels = logs.topk(wanted, -1)
    others = logs.scatter(-1, labels, -torch.inf).softmax(-1)
    cotangents = [_one_hot(k, logs) - others for k in labels.unbind(-1)]
    pi, left = values.exp(), -values[..., :1].expm1()  # 1 − π_1, where π_1 rounds to 1
    if logs.dim() == 3:
        weight = (pi * left).sqrt() if real is None else (pi * left).sqrt() * real[..., None]
        one = torch.ones(len(logs), 1).to(logs)
        return Contrasts([weight * cotangents[0]], one[..., None], one)
    metric = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    metric[:, 0, 0] = (pi[:, :1] * left)[:, 0]
    odds = torch.cat([torch.ones_like(left), -pi[:, 1:] / left.clamp(min=1e-30)], 1)
    return Contrasts(cotangents, metric, odds)


def direction(gradients: list[list[Tensor]], found: Contrasts) -> list[Tensor]:
    """Return the direction in which the divergence grows fastest, towards the boundary.

    Args:
        gradients: of the K contrasts, each per call at the site as `[R, ...]`, zero off real
            tokens; R rows are those of B predictions, as many of each.
        found: the contrasts.

    Returns:
        Per call `[R, ...]`, of any length; zero for a sample whose gradients are.
    """
    samples, count = found.metric.shape[:2]
    if count == 1:
        return [-g for g in gradients[0]]
    rows = {len(g) for one in gradients for g in one}
    if any(r % samples for r in rows):
        raise GameError(
            f"{samples} predictions and {sorted(rows)} rows at the site do not belong to each "
            "other, so that several contrasts cannot be combined: set steps=1."
        )
    basis = torch.stack(
        [torch.cat([g.reshape(samples, -1) for g in one], 1).double() for one in gradients], 1
    )
    basis = basis / basis.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
    gram = basis @ basis.mT
    x = _first_eigenvector(found.metric.double() @ gram)
    if found.odds is not None:
        rising = (found.odds.double()[:, None] @ gram @ x[..., None]).flatten()
        x = torch.where(rising[:, None] > 0, -x, x)
    mixed = []
    for call in zip(*gradients, strict=True):
        weights = x.to(call[0]).repeat_interleave(len(call[0]) // samples, 0)
        parts = [w.view(-1, *[1] * (g.dim() - 1)) * g for w, g in zip(weights.T, call, strict=True)]
        mixed.append(torch.stack(parts).sum(0))
    return mixed


def _first_eigenvector(matrix: Tensor) -> Tensor:
    """Return the first eigenvectors `[B, K]` of matrices with real eigenvalues of at least 0.

    By squaring, which reads nothing from the device.
    """
    for _ in range(_SQUARINGS):
        size = matrix.abs().amax((1, 2), keepdim=True)
        matrix = matrix / torch.where(size > 0, size, torch.ones_like(size))
        matrix = matrix @ matrix
    column = matrix.norm(dim=1).argmax(1)
    x = matrix.gather(2, column[:, None, None].expand(-1, matrix.shape[1], 1))[..., 0]
    size = x.norm(dim=1, keepdim=True)
    return x / torch.where(size > 0, size, torch.ones_like(size))


def _one_hot(label: Tensor, like: Tensor) -> Tensor:
    """Return 1 at a label, `[...]` or the same for all, and 0 elsewhere, like the predictions."""
    index = label.expand(like.shape[:-1])[..., None]
    return torch.zeros_like(like).scatter(-1, index, 1.0)
