"""The sign of a perturbation: which of δ and −δ goes towards the decision boundary.

    D(f(X−δ), f(X)) = D(f(X+δ), f(X)) + O(|δ|³)

A divergence cannot tell them apart to second order, so half of the ascents go away from the
boundary, where predictions get surer and the divergence grows slower (`theory/statements.md`, D2).
Of a point that a pass has shown to do so, the opposite one is taken, with the opposite gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixadv.maths.divergence import log_probabilities
from mixadv.model.closure import Reading
from mixadv.players.strategy import Strategy


def turn(
    q: Strategy, gradients: Sequence[Tensor], predictions: Tensor, clean: Reading
) -> tuple[Strategy, list[Tensor]]:
    """Return the strategy with the points turned where the likeliest label got likelier.

    The gradients of a divergence are turned with them; predictions are `[M, B, C]`, or
    `[M, B, n, C]`, of which the tokens that count are added up.
    """
    sign = _signs(predictions, clean)
    signs = [values.to(g) for values, g in zip(q.spread(sign), gradients, strict=True)]
    return q.turned(signs), [s * g for s, g in zip(signs, gradients, strict=True)]


def _signs(predictions: Tensor, clean: Reading) -> Tensor:
    """Return −1 where the likeliest label got likelier, else 1, `[M, B]`."""
    assert clean.predictions is not None
    before = clean.predictions.detach()
    label = before.argmax(-1, keepdim=True).expand(*predictions.shape[:-1], 1)
    gained = log_probabilities(predictions) - log_probabilities(before)
    gained = gained.gather(-1, label)[..., 0]
    if gained.dim() == 3:
        gained = (gained if clean.mask is None else gained * clean.mask).sum(-1)
    return torch.where(gained > 0, -1.0, 1.0)
