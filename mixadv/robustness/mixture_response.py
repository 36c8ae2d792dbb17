"""What an attack of a mixture finds: δ for each row, and what the members predict there."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mixadv.errors import nearest
from mixadv.mixtures import Mixture
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.robustness.mixture_accuracy import OF_MEMBER, MixtureAttacks, best, names
from mixadv.robustness.mixture_play import JUDGED, MixturePlay, playing
from mixadv.robustness.predictions import Batch

TRANSFER = "transfer"


class MixtureResponse(NamedTuple):
    """The end of an attack of a mixture.

    Attributes:
        strategy: δ, one for each row and for all members: `strategy.points` holds, for each call at
            the site, `[1, B, ...]`, in lengths as they stand.
        predictions: the logits of each member under δ, `[M, B, C]`; where members are draws, those
            of `draws` fresh ones, one after another, `[D·M, B, C]`.
    """

    strategy: Strategy
    predictions: Tensor


def attack_mixture(
    mixture: Mixture, batch: Batch, attack: str = "ARC", **settings: Any
) -> MixtureResponse:
    """Attack a mixture on one batch; return one δ for each row, and each member's predictions.

    It is the attack that `mixture_accuracy` measures by, such as to train a new member on what it
    finds. Without `unit=` the radius is in token norms of this batch, and the ball another one in
    each batch: `token_norm` of all batches gives one for all. Weights, modes, hooks and random
    state are left as they were. An attack is approximate: another δ in the ball can be worse.

    Args:
        mixture: which the batch's closure calls; one model is `Mixture([model])`.
        batch: a closure that returns one loss per sample and logits, labels, and the places of its
            rows, which random starts depend on.
        attack: `"ARC"`, `"EoT-PGD"`, `"PGD of the mean"`, `"ARC of the vote"`, `"PGD of member 1"`
            and so on; `"transfer"` is PGD of the member that is most accurate on the batch.
        settings: those of `MixtureAttacks`; `radius` is needed.

    Raises:
        ValueError: for an unknown attack, and as in `mixture_accuracy`.
        TypeError: for what is no mixture or no batch, and without a radius.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> mixture = Mixture([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def closure():
        ...     logits = mixture(x)
        ...     return F.cross_entropy(logits, y, reduction="none"), logits
        >>> found = attack_mixture(mixture, Batch(closure, y, [0, 1]), radius=0.1, unit=1.0)
        >>> perturbed = x + found.strategy.points[0][0]
        >>> torch.equal(perturbed, x), found.predictions.shape
        (False, torch.Size([2, 2, 2]))
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"attack_mixture attacks one Batch at a time, got {batch!r:.80}.")
    if "radius" not in settings:
        raise TypeError("attack_mixture needs the radius of the ball: radius=….")
    attacks = MixtureAttacks(**settings)
    ascent, [batch] = attacks.ascent("attack_mixture", mixture, [batch])
    check_name(attack, len(mixture))
    with playing(mixture, attacks.site, attacks.draws, attacks.seed) as play:
        played = play(batch)
        played.check_moves(stacklevel=3)
        found = reached(attacks, played, ascent, attack)
        return MixtureResponse(found, played.logits(found, JUDGED))


def reached(attacks: MixtureAttacks, play: MixturePlay, ascent: Ascent, attack: str) -> Strategy:
    """Return the δ that an attack ends at, by its name in `attack_mixture`."""
    which = f"{OF_MEMBER}{_best(play) + 1}" if attack == TRANSFER else attack
    return attacks.reached(play, ascent, which)


def check_name(attack: str, members: int) -> None:
    """Raise for an attack that there is not against so many members."""
    known = [*names(members)[1:], TRANSFER]
    if attack not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"attack={attack!r} is not one of {choices}.{nearest(attack, known)}")


def _best(play: MixturePlay) -> int:
    """Return the member that is most accurate on the batch."""
    clean = play.right(play.logits(play.zero, JUDGED)).mean((0, 2))
    return best(clean.numpy(), play.probabilities.numpy())
