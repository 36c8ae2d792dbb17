"""Divergences between the predictions on the perturbed and on the clean input.

Each takes two tensors of logits `[..., C]` and returns one value per prediction `[...]`, in at
least fp32 also under autocast, from `log_softmax`: finite for logits of ±200 and beyond, where
`softmax().log()` is `-inf` and its gradient NaN. A class that both rule out by a logit of −∞, as of
a masked vocabulary, counts nothing. Gradients flow through both arguments; detach the one that is
meant as a fixed target.

    kl             KL(clean ‖ perturbed)                            Miyato et al. 2017, eq. 5
    symmetric_kl   KL(clean ‖ perturbed) + KL(perturbed ‖ clean)    Jiang et al. 2020, §3.1
    fixed_symmetric_kl   the same number; the target of each of the two is a constant, so that its
                   gradient is another: what mt-dnn, ALUM and smart-pytorch release
    js             ½ KL(clean ‖ m) + ½ KL(perturbed ‖ m), m their mean
    bernoulli      Σ_c (p_c − q_c)·(logit p_c − logit q_c), p and q sigmoids: the symmetric KL of
                   each label by itself, for multi-label heads; no softmax
    squared_error  Σ_c (perturbed_c − clean_c)²                     for regression; no softmax
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixadv.errors import nearest

Divergence = Callable[[Tensor, Tensor], Tensor]


NEVER = -1e30
"""A logit, in at least fp32, whose probability is 0 whatever the others are."""


def never(dtype: torch.dtype) -> float:
    """Return such a logit in a number format; in fp16 others must be above −3e4."""
    return max(NEVER, torch.finfo(dtype).min / 2)


def log_probabilities(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Return log-probabilities in at least fp32, finite where a class is `out`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if out is None else wide.masked_fill(out, NEVER)).log_softmax(-1)


def _both(perturbed: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of clean and perturbed predictions.

    Those of a class that both rule out are finite: 0 · ∞ would be NaN.
    """
    out = perturbed.isneginf() & clean.isneginf()
    return log_probabilities(clean, out), log_probabilities(perturbed, out)


def _relative(p: Tensor, q: Tensor) -> Tensor:
    """Return `p log(p/q)` of log-probabilities, class by class; 0 where p rules a class out."""
    return p.exp() * (p.clamp_min(NEVER) - q)


def kl(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return `KL(clean ‖ perturbed)` per prediction.

    Example:
        >>> float(kl(torch.tensor([200.0, 0.0]), torch.tensor([0.0, 200.0])))
        200.0
    """
    p, q = _both(perturbed, clean)
    return _relative(p, q).sum(-1)


def symmetric_kl(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return `KL(clean ‖ perturbed) + KL(perturbed ‖ clean)` per prediction.

    Written as `Σ (p − q)(log p − log q)`: value and gradient are exactly zero when the two agree.
    """
    p, q = _both(perturbed, clean)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def fixed_symmetric_kl(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return `KL(clean ‖ perturbed) + KL(perturbed ‖ clean)`, each KL's target held constant.

    In released code of mt-dnn, ALUM and smart-pytorch a gradient goes through the second argument
    of each KL alone. It is about half that of `symmetric_kl`, not quite in its direction: on the
    embedded MiniLM, fine-tuned on intents, of 0.37 to 0.50 times its norm and at a cosine of 0.92
    to 0.99 in evaluation mode; of 0.37 to 0.58 and at 0.28 to 0.51 under dropout. So their weight
    of the term is about twice that of `symmetric_kl`. The adversary climbs `KL(clean ‖ perturbed)`.

    Example:
        >>> clean = torch.tensor([2.0, 0.0])
        >>> perturbed = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> for measure in (symmetric_kl, fixed_symmetric_kl):
        ...     value = measure(perturbed, clean)
        ...     (slope,) = torch.autograd.grad(value, perturbed)
        ...     print(f"{value.item():.3f} {slope[0].item():.3f}")
        0.150 -0.346
        0.150 -0.150
    """
    return kl(perturbed, clean.detach()) + kl(clean, perturbed.detach())


def js(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return the Jensen–Shannon divergence per prediction (nats, at most log 2)."""
    p, q = _both(perturbed, clean)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (_relative(p, m) + _relative(q, m)).sum(-1)


def bernoulli(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return the symmetric KL of independent labels, summed over them, per prediction.

    Example:
        >>> float(bernoulli(torch.tensor([0.0, 200.0]), torch.tensor([0.0, 200.0])))
        0.0
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    p, q = clean.to(wide), perturbed.to(wide)
    return ((p.sigmoid() - q.sigmoid()) * (p - q)).sum(-1)


def squared_error(perturbed: Tensor, clean: Tensor) -> Tensor:
    """Return the squared distance between two outputs per prediction, for regression."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    return (perturbed.to(dtype) - clean.to(dtype)).square().sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "kl": kl,
    "symmetric_kl": symmetric_kl,
    "fixed_symmetric_kl": fixed_symmetric_kl,
    "js": js,
    "bernoulli": bernoulli,
    "squared_error": squared_error,
}


def divergence(name: str | Divergence) -> Divergence:
    """Return the divergence of that name, or the callable itself.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if callable(name):
        return name
    if isinstance(name, str) and name in DIVERGENCES:
        return DIVERGENCES[name]
    known = ", ".join(map(repr, DIVERGENCES))
    raise ValueError(
        f"Unknown divergence {name!r}.{nearest(name, DIVERGENCES)} There are {known}, and any "
        "callable (perturbed [B, C], clean [B, C]) -> [B]."
    )
