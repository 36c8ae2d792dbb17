"""Attacks that are made for mixtures: one δ for all members.

Gradients of single members, or of the mean of their losses, can miss what breaks a mixture: a
member that is sure of itself has next to no gradient, and one that cannot be broken can have all of
it. Attacks made for single models once made ensembles look robust that were less so than one of
their members (Dbouk and Shanbhag 2022, arXiv:2206.06737).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mixadv.maths import geometry
from mixadv.maths.geometry import Norm
from mixadv.mixtures.mixture import combine
from mixadv.model.closure import Reading
from mixadv.model.noise import Noise
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.robustness.ascents import step_length
from mixadv.robustness.mixture_play import (
    CHOSEN,
    CLIMBED,
    Drawn,
    MixturePlay,
    logits_of,
    loss_of,
)

DUAL: dict[Norm, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}
BEYOND = 0.05  # by what part of the radius ARC steps over a boundary, as its released code does

Standing = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Makes of logits `[M, B, C]`, probabilities and labels how well each row stands, `[B]`."""

Weigh = Callable[[Tensor, Tensor], Tensor]
"""Makes of losses `[M, B]` and probabilities the weights of the members' gradients, `[M, B]`."""


def drawn(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Return the expected accuracy of a row where a member is drawn: Σ_m π_m [m is right]."""
    return (weights.to(_wide(logits))[:, None] * (logits.argmax(-1) == labels)).sum(0)


def mean(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the mean of probabilities is right: above 1 where it is, else below."""
    return _stands(combine(_wide(logits).softmax(-1), weights, "mean"), labels)


def vote(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the vote is right: above 1 where it is, else below."""
    return _stands(combine(_wide(logits), weights, "vote"), labels)


def expected(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of the gradient of the expected loss, Σ_m π_m ℓ_m: π."""
    return weights.to(losses)[:, None].expand_as(losses)


def of_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return those of −log Σ_m π_m exp(−ℓ_m), the cross-entropy of the mean of probabilities."""
    return (weights.to(losses).log()[:, None] - losses).softmax(0)


def pgd(
    play: MixturePlay, ascent: Ascent, standing: Standing, weigh: Weigh, restarts: int
) -> Strategy:
    """Return where ascents of a loss of the members end: of several ends each row's worst.

    With `expected` it is EoT-PGD (Athalye et al. 2018, arXiv:1707.07397): steps are along the mean
    of the members' gradients, anew drawn in each step where members are draws. One ascent is from
    δ = 0, the others from random starts.
    """
    best, least = play.zero, _standing(play, play.zero, standing)
    for number in range(restarts + 1):
        q = play.start(ascent, number - 1) if number else play.zero
        for step in range(ascent.steps):
            members = play.drawn(CLIMBED + number * ascent.steps + step)
            found = [play.slopes(member, q, loss_of) for member in members]
            weights = weigh(torch.cat([losses for losses, _ in found]), play.weights)
            columns = zip(*(slopes for _, slopes in found), strict=True)
            gradients = [_sum(map(_by_row, weights, column)) for column in columns]
            q = _moved(q, replace(ascent, step_size=step_length(ascent, step)), gradients)
        best, least = _lower(play, standing, best, least, q)
    return best


def arc(play: MixturePlay, ascent: Ascent, standing: Standing, classes: int) -> Strategy:
    """Return where the attack of randomised classifiers ends (Dbouk and Shanbhag 2022, alg. 2).

    For one member after another, the likeliest first, δ steps just over the member's nearest
    boundary, found by linearisation. A row keeps the step unless its expected accuracy rises. For
    linear members the nearest boundary is exact: if any member that is right can be made wrong
    within the ball, expected accuracy falls. Unlike the released code, rounds after the first take
    steps that shrink, as those of `pgd` do.

    Of classes it looks at those of a member's top logits, the label's among them.
    """
    likeliest = play.weights.argsort(descending=True, stable=True).tolist()
    members = play.drawn(CHOSEN)
    order = [members[m] for m in likeliest if play.weights[m] > 0]
    q, least = play.zero, _standing(play, play.zero, standing)
    for step in range(ascent.steps):
        centre, size = q, step_length(ascent, step)
        for member in order:
            local = [p - c for p, c in zip(q.points, centre.points, strict=True)]
            beyond = _beyond(play, member, centre, local, ascent, size, classes)
            points = zip(centre.points, beyond, strict=True)
            new = [ascent.project((c + d)[0])[None] for c, d in points]
            q, least = _lower(play, standing, q, least, Strategy(new, q.masks))
    return q


ATTACKS: dict[str, Callable[[MixturePlay, Ascent, int, int], Strategy]] = {
    "EoT-PGD": lambda play, ascent, restarts, _: pgd(play, ascent, drawn, expected, restarts),
    "ARC": lambda play, ascent, _, classes: arc(play, ascent, drawn, classes),
    "PGD of the mean": lambda play, ascent, restarts, _: pgd(play, ascent, mean, of_mean, restarts),
    "ARC of the vote": lambda play, ascent, _, classes: arc(play, ascent, vote, classes),
}
"""Attacks of a mixture: two of a member drawn, one of the mean, one of the vote.

Of a play, an ascent, a number of restarts and one of classes.
"""


def _beyond(
    play: MixturePlay,
    member: Drawn,
    centre: Strategy,
    local: list[Tensor],
    ascent: Ascent,
    size: float,
    classes: int,
) -> list[Tensor]:
    """Return a step of a size from the centre over the member's nearest boundary.

    With ζ the distance of the boundary and p how far `local` goes towards it, local + β·g rescaled
    to the size s is over the boundary for β = s·(ζ − p)/(s − ζ), by the triangle inequality.
    """

    def margins(reading: Reading) -> Tensor:
        logits, labels = _wide(logits_of(reading)), play.batch.labels[:, None]
        rivals = logits.detach().scatter(1, labels, -torch.inf)
        rivals = rivals.topk(min(classes, logits.shape[1]) - 1).indices
        return (logits.gather(1, labels) - logits.gather(1, rivals)).T

    values, slopes = play.slopes(member, centre, margins)
    steep = _sum(_norms(slope, DUAL[ascent.norm]) for slope in slopes).clamp(min=1e-30)
    distances, which = (values.to(steep) / steep).min(0)
    rows = torch.arange(len(which), device=which.device)
    steep, slopes = steep[which, rows], [slope[which, rows] for slope in slopes]
    pairs = zip(slopes, local, strict=True)
    progress = -_sum((s * d[0]).flatten(1).sum(1) for s, d in pairs) / steep
    missing = (distances - progress).clamp(min=0) * size / (size - distances)
    far = distances >= size
    beta = torch.where(far, size, missing.masked_fill(far, 0)) + BEYOND * float(ascent.radius or 0)
    directions = [geometry.steepest(-slope, ascent.norm)[None] for slope in slopes]
    steps = [d + _by_row(beta, g) for d, g in zip(local, directions, strict=True)]
    longest = torch.stack([_norms(s, ascent.norm) for s in steps]).amax(0).clamp(min=1e-30)
    return [_by_row((size / longest)[0], s) for s in steps]


def _lower(
    play: MixturePlay, standing: Standing, old: Strategy, least: Tensor, new: Strategy
) -> tuple[Strategy, Tensor]:
    """Return the new δ in rows that stand no better there, the old one in others."""
    found = _standing(play, new, standing)
    lower = found <= least
    pairs = zip(new.points, old.points, strict=True)
    points = [torch.where(_by_row(lower, torch.ones_like(n)) > 0, n, o) for n, o in pairs]
    return Strategy([p.detach() for p in points], old.masks), torch.where(lower, found, least)


def _standing(play: MixturePlay, q: Strategy, standing: Standing) -> Tensor:
    return standing(play.logits(q, CHOSEN), play.weights, play.batch.labels)


def _stands(shares: Tensor, labels: Tensor) -> Tensor:
    """Return the margin of the label, in −1 to 1, and 2 more where it is what is predicted."""
    others = shares.scatter(1, labels[:, None], -1).amax(1)
    margin = shares.gather(1, labels[:, None])[:, 0] - others
    return margin + 2 * (shares.argmax(-1) == labels)


def _moved(q: Strategy, ascent: Ascent, gradients: list[Tensor]) -> Strategy:
    return q.move(gradients, lambda index, *at: ascent.move(*at), Noise(0))[0].detach()


def _norms(x: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each row, `[K, B]` of `[K, B, ...]`."""
    return geometry.norms(x.flatten(0, 1), norm).view(x.shape[:2])


def _by_row(values: Tensor, x: Tensor) -> Tensor:
    """Return `[K, B, ...]` times a value `[B]` for each row."""
    return values.to(x).view(1, -1, *[1] * (x.dim() - 2)) * x


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
