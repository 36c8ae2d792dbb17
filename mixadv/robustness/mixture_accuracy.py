"""How accurate a mixture is under attacks that are made for mixtures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from mixadv.checks import check_integer
from mixadv.errors import nearest
from mixadv.maths.geometry import NORMS, Norm
from mixadv.mixtures import Mixture
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.robustness.ascents import ascents_of
from mixadv.robustness.mixture_attacks import ATTACKS, drawn, mean, vote
from mixadv.robustness.mixture_play import CHOSEN, JUDGED, MixturePlay, playing
from mixadv.robustness.predictions import Batch, in_order

WAYS = (drawn, mean, vote)
"""How a mixture classifies: by a member that is drawn, by their mean or by their vote."""

OF_MEMBER = "PGD of member "

_ROUNDED = 1e-9  # by which sums of the same probabilities differ


@dataclass(frozen=True, eq=False)
class MixtureAccuracy:
    """What a mixture makes of each row under each attack, in the data set's order.

    Every classifier is judged at every δ. What an attack finds is an upper bound of the accuracy
    under the worst δ there is. A randomised classifier of two classes is never more robust than the
    best of some deterministic ones made of it (Gnecco Heredia et al. 2023, NeurIPS), which need
    not be the mean or the vote: look at all, and at `thresholded`.

    Attributes:
        probabilities: π of the members, `[M]`.
        right: in what share of draws a member is right under each attack, `[N, A, M]`: 0 or 1
            where none is a draw.
        settled: whether the mean of probabilities and the vote are right, `[N, A, 2]`.
        worst: by its place, the δ at which the member drawn, the mean and the vote stand worst,
            `[N, 3]`; where members are draws, as others than those that judge it saw it.
    """

    probabilities: NDArray[np.float64]
    right: NDArray[np.float64]
    settled: NDArray[np.bool_]
    worst: NDArray[np.int64]

    @property
    def attacks(self) -> list[str]:
        """The names of the A δ: none, attacks of the mixture, then PGD of each member alone."""
        return names(len(self.probabilities))

    @property
    def best(self) -> int:
        """The member that is most accurate without an attack; of equals the likeliest."""
        return best(self.right[:, 0].mean(0), self.probabilities)

    @property
    def rows(self) -> NDArray[np.float64]:
        """How often each row is classified right, `[N, A, 3]`: by a draw, the mean, the vote."""
        expected = self.right @ self.probabilities
        return np.concatenate([expected[..., None], self.settled.astype(np.float64)], -1)

    def under(self) -> dict[str, NDArray[np.float64]]:
        """Return how often each row is classified right, `[N, 3]`, by the name of the attack.

        `"transfer"` is PGD of the best member, `"worst of all"` of all δ in each row the worst.
        """
        rows, own = self.rows, 1 + len(ATTACKS)
        found = {name: rows[:, place] for place, name in enumerate(self.attacks[:own])}
        found["transfer"] = rows[:, own + self.best]
        found["worst of all"] = np.take_along_axis(rows, self.worst[:, None], 1)[:, 0]
        return found

    def thresholded(self, labels: Any) -> tuple[float, NDArray[np.bool_]]:
        """Return a threshold of two classes, and which rows it classifies right, `[N]`, attacked.

        The deterministic classifier answers 1 where members of more than the threshold's share do.
        At the best threshold it is at least as accurate under attack as a member drawn, which the
        vote, whose threshold is ½, need not be: M3 in `theory/statements.md`. It is the best on
        these very rows, under the worst of all attacks; others may want another one. Where members
        are draws, the worst is by other draws than those that judge it, and this is an estimate.

        Args:
            labels: 0 or 1 for each row, `[N]`; the model may know no third class.

        Raises:
            ValueError: for other labels.
        """
        positive, known = np.asarray(labels) == 1, np.isin(labels, (0, 1))
        if known.shape != (len(self.right),) or not known.all():
            raise ValueError(f"labels must be 0 or 1 for each of {len(self.right)} rows.")
        share = self.under()["worst of all"][:, 0]  # of members that are right, at the worst δ
        share = np.where(positive, share, 1 - share)  # that answer 1
        found = []
        for threshold in {0.0, *share[~positive].tolist()}:
            above = share > threshold + _ROUNDED
            found.append((float((above == positive).mean()), -threshold, above == positive))
        _, threshold, right = max(found, key=lambda way: way[:2])
        return -threshold, right

    def alone(self) -> NDArray[np.float64]:
        """Return whether each member alone is right, `[N, M, 2]`: clean, and under its own PGD."""
        own = self.right[:, 1 + len(ATTACKS) :].diagonal(axis1=1, axis2=2)
        return np.stack([self.right[:, 0], own], -1)


@dataclass(frozen=True, kw_only=True)
class MixtureAttacks:
    """How a mixture is attacked.

    Of M members, K steps and R restarts it costs about K·M·(3·(R + 1) + 2·(M + 1)) forwards for
    each batch; where members are draws, M is `draws` times as many, and ARC asks for its square.

    Attributes:
        radius: ε of the ball around each sample, in units.
        norm: of the ball, and of steps.
        steps: K of each ascent, and rounds of ARC.
        restarts: how many ascents start at random, besides the one from δ = 0.
        draws: how often members that are draws (`Dropout`) are drawn anew in each step, and for
            the judgement; others are never.
        classes: at how many of the top logits ARC looks for a boundary.
        site: where δ acts; None is the embedding, `"input"` what the model is called with.
        unit: a length; None takes the `token_norm` of the first member on these batches.
        seed: of random starts and draws.

    Raises:
        ValueError: for a number that nothing can be attacked with.
    """

    radius: float
    norm: Norm = "l2"
    steps: int = 10
    restarts: int = 1
    draws: int = 10
    classes: int = 4
    site: Any = None
    unit: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            choices = ", ".join(map(repr, NORMS))
            raise ValueError(
                f"norm={self.norm!r} is not one of {choices}.{nearest(self.norm, NORMS)}"
            )
        for name, least in {"restarts": 0, "draws": 1, "classes": 2}.items():
            check_integer("MixtureAttacks", name, getattr(self, name), least)
        if self.site is not None and self.unit is None:
            raise ValueError("Radii at a site that you name need a unit: unit=1.0 is absolute.")

    def measure(
        self, mixture: Mixture, batches: Iterable[Batch], progress: bool = False
    ) -> MixtureAccuracy:
        """Return what `mixture_accuracy` does."""
        ascent, batches = self.ascent("mixture_accuracy", mixture, batches)
        rows, columns = [], []
        with playing(mixture, self.site, self.draws, self.seed) as play:
            for batch in tqdm(batches, desc="mixture", unit="batch", disable=not progress):
                played = play(batch)
                if not rows:
                    played.check_moves()
                found = self._measured(played, ascent)
                rows.append(batch.rows)
                columns.append([column.cpu() for column in found])
        return MixtureAccuracy(mixture.probabilities.numpy(), *in_order(rows, columns))

    def ascent(
        self, who: str, mixture: Mixture, batches: Iterable[Batch]
    ) -> tuple[Ascent, list[Batch]]:
        """Check arguments; return the ascent, lengths as they stand, and the batches."""
        if not isinstance(mixture, Mixture):
            raise TypeError(
                f"mixture must be a mixadv.mixtures.Mixture, got {mixture!r:.80}: one model is the "
                "mixture of itself, Mixture([model]), which its closures call."
            )
        how = self.steps, self.unit, self.seed
        with mixture.member(0) as module:
            [ascent], found = ascents_of(who, module, batches, [self.radius], *how)
        return replace(ascent, norm=self.norm), found

    def reached(self, play: MixturePlay, ascent: Ascent, attack: str) -> Strategy:
        """Return the δ that an attack ends at, by its name in `MixtureAccuracy.attacks`."""
        if attack == "none":
            return play.zero
        if attack in ATTACKS:
            return ATTACKS[attack](play, ascent, self.restarts, self.classes)
        alone = play.only(int(attack.removeprefix(OF_MEMBER)) - 1)
        return ATTACKS["EoT-PGD"](alone, ascent, self.restarts, self.classes)

    def _measured(self, play: MixturePlay, ascent: Ascent) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch's columns of `MixtureAccuracy`, rows first."""
        weights, labels = play.weights, play.batch.labels
        standing, right, settled = [], [], []
        for attack in names(len(play.members)):
            q = self.reached(play, ascent, attack)
            chosen, judged = play.logits(q, CHOSEN), play.logits(q, JUDGED)
            standing.append(torch.stack([way(chosen, weights, labels) for way in WAYS]))
            right.append(play.right(judged).mean(0).T)
            settled.append(torch.stack([way(judged, weights, labels) > 1 for way in WAYS[1:]], 1))
        return torch.stack(right, 1), torch.stack(settled, 1), torch.stack(standing).argmin(0).T


def names(members: int) -> list[str]:
    """Return the names of the δ: none, attacks of the mixture, then PGD of each member alone."""
    return ["none", *ATTACKS, *(f"{OF_MEMBER}{member}" for member in range(1, members + 1))]


def best(clean: NDArray[np.float64], probabilities: NDArray[np.float64]) -> int:
    """Return the member that is most accurate without an attack; of equals the likeliest."""
    return int(np.lexsort((-probabilities, -clean))[0])


def mixture_accuracy(
    mixture: Mixture, batches: Iterable[Batch], *, progress: bool = False, **settings: Any
) -> MixtureAccuracy:
    """Return how accurate a mixture is under attacks that are made for mixtures.

    One δ for each row, whichever member plays. The attacks are EoT-PGD, ARC, PGD of the mean of
    probabilities, ARC of the vote, and PGD of each member alone; see `mixture_attacks`. Weights,
    modes, hooks and random state are left as they were.

    Args:
        mixture: which the closures call.
        batches: as `text_batches(mixture, …)` makes them, or your own; losses are cross-entropies.
        progress: whether to show a bar.
        settings: those of `MixtureAttacks`; `radius` is needed.

    Raises:
        ValueError: for a bad argument, closures without a loss per sample and logits, members that
            differ in shape at the site.
        GameError: if the loss does not depend on δ.

    Example:
        >>> import torch.nn.functional as F
        >>> mixture = Mixture([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def closure():
        ...     logits = mixture(x)
        ...     return F.cross_entropy(logits, y, reduction="none"), logits
        >>> found = mixture_accuracy(mixture, [Batch(closure, y, [0, 1])], radius=0.1, unit=1.0)
        >>> bool((found.under()["ARC"] <= found.under()["none"])[:, 0].all())
        True
    """
    return MixtureAttacks(**settings).measure(mixture, batches, progress)
