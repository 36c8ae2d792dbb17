"""Growing a mixture by boosting: a new member is trained where those before it are broken.

BARRE, Dbouk and Shanbhag 2023, arXiv:2302.01375, alg. 2. Member M begins as member M − 1 and alone
is trained, on attacks of all M with equal probabilities; then the probabilities may be weighed. As
in the released code (github.com/hsndbk4/BARRE) members are trained on PGD of the mean and weighed
under ARC. That code also weighs while a member is trained, from the fourth member on, and goes back
to the epoch that was best on test rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.game import Game
from mixadv.mixtures import Member, Mixture, Weighing, Weights, weigh_under
from mixadv.mixtures.members import Model
from mixadv.model.visits import Call
from mixadv.players.ascent import Start, Unit
from mixadv.players.opening import Begin
from mixadv.players.strategy import Strategy
from mixadv.robustness.mixture_accuracy import MixtureAttacks
from mixadv.robustness.mixture_play import JUDGED, MixturePlay, playing, unwarned
from mixadv.robustness.mixture_response import check_name, reached
from mixadv.robustness.predictions import Batch
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step

Batches = Callable[[Mixture], Iterable[Batch]]
"""Makes the batches of an epoch, whose closures call the mixture given."""

Train = Callable[[nn.Module, Iterable[Tensor]], object]
"""Trains a member on losses, a 0-d one for each batch."""


class Boosted(NamedTuple):
    """A mixture with one member more.

    Attributes:
        mixture: with the probabilities that were found, without members of probability 0.
        weighing: of all members: `1 − error` is the expected accuracy under ARC on the batches, and
            `gap` how much other probabilities could gain at most.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> def batches(mixture):
        ...     def closure():
        ...         logits = mixture(x)
        ...         return nn.functional.cross_entropy(logits, y, reduction="none"), logits
        ...     yield Batch(closure, y, [0, 1])
        >>> def train(member, losses):
        ...     optimizer = torch.optim.SGD(member.parameters(), lr=0.1)
        ...     for epoch in range(3):
        ...         for loss in losses:
        ...             loss.backward()
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        >>> grown = nn.Linear(2, 2)
        >>> for _ in range(2):
        ...     grown, weighing = boost(grown, batches, train, radius=0.1, unit=1.0)
        >>> len(grown), weighing.error <= 1
        (2, True)
    """

    mixture: Mixture
    weighing: Weighing


def boost(
    mixture: Mixture | nn.Module,
    batches: Batches,
    train: Train,
    attack: str = "PGD of the mean",
    *,
    rounds: int = 1,
    **settings: Any,
) -> Boosted:
    """Add a member that is trained against attacks of the whole mixture; return the new mixture.

    The member begins as a copy of the last one, as a whole model. While it is trained, all members
    have equal probabilities, and each batch is attacked as the member stands then, evaluating. Its
    loss under the δ found is taken in the modes that it has, as by `Game.loss`. Members before it
    are shared with the mixture given, which is left as it is. To go on later, save the new mixture.
    A plain model is where the first member begins, which is trained against attacks of itself.

    Args:
        mixture: to grow, or a model.
        batches: makes the batches of an epoch anew in each call, such as
            `lambda mixture: text_batches(mixture, tokenizer, rows)`; closures call the mixture.
        train: `train(member, losses)` trains the module in place, in a loop of its own. Each pass
            over `losses` is an epoch, and each loss, 0-d, the mean of a batch.
        attack: as in `attack_mixture`, by which the member is trained.
        rounds: attacks by ARC by which `weigh_under` weighs the members at the end; 1 measures the
            error and leaves equal probabilities.
        settings: those of `MixtureAttacks`; `radius` and `unit` are needed.

    Raises:
        TypeError: for arguments of other kinds, and for a last member that is an adapter or a
            dropout mask.
        ValueError: for an unknown attack, a last member that is frozen, no batches, a `train` that
            takes no loss.
        GameError: for closures that do not call the mixture they were made for.
    """
    check_integer("boost", "rounds", rounds, 1)
    attacks = _checked(mixture, batches, train, settings)
    grown, member = _with_a_copy(mixture)
    check_name(attack, len(grown))
    with _Losses(grown, member, batches, attack, attacks).open() as losses:
        train(member, losses)
    weighing = weigh_under(grown, partial(_errors, batches, attacks), rounds)
    return Boosted(grown.weighed(weighing.probabilities), weighing)


class _Losses:
    """The loss of a new member under attacks of the mixture that it is in, of each batch."""

    def __init__(
        self,
        mixture: Mixture,
        member: nn.Module,
        batches: Batches,
        attack: str,
        attacks: MixtureAttacks,
    ) -> None:
        self.mixture, self.member, self.batches = mixture, member, batches
        self.attack, self.attacks = attack, attacks
        self.taken = 0
        self._points: Sequence[Tensor] = ()

    @contextmanager
    def open(self) -> Iterator[_Losses]:
        """Keep the games by which members are attacked, and that of the new one's learner."""
        with (
            _attacked(self.attacks, self.mixture) as self._find,
            closing(Game(self.member, _Found(found=self._found), self.attacks.site)) as self._game,
        ):
            yield self
        if not self.taken:
            raise ValueError(
                "train(member, losses) took no loss, so the new member is the last one: write for "
                "loss in losses: loss.backward(); optimizer.step(); optimizer.zero_grad()."
            )

    def __iter__(self) -> Iterator[Tensor]:
        for batch in _each(self.batches, self.mixture):
            played, found = self._find(batch, self.attack)
            if not self.taken:
                played.check_moves(stacklevel=3)
            self._points = found.points
            with unwarned(), _in_training(self.mixture, self.member):
                loss = self._game.loss(batch.closure)
            self.taken += 1
            yield loss

    def _found(self, index: int, call: Call) -> Tensor:
        return self._points[index][0]


@dataclass(frozen=True, kw_only=True)
class _Found(Solver):
    """Minimise the loss at a δ that was found elsewhere."""

    found: Begin
    steps: int = 0
    start: Start = "zero"
    start_size: float = 0.0
    radius: float | None = None
    unit: Unit = "absolute"

    def play(self, stage: Moves) -> Play:
        yield Step(stage.loss(stage.start(self, self.found).detach()))


class _AsItIs(Member):
    """A model of its own that plays in the modes it has."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def playing(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Give the model, which is trained."""
        return nullcontext(self.module)


@contextmanager
def _in_training(mixture: Mixture, member: nn.Module) -> Iterator[None]:
    """Put the last member in play as it is: attacks have it evaluate."""
    own = mixture.members[-1]
    mixture.members[-1] = _AsItIs(member)
    try:
        with mixture.member(-1):
            yield
    finally:
        mixture.members[-1] = own


@contextmanager
def _attacked(
    attacks: MixtureAttacks, mixture: Mixture
) -> Iterator[Callable[[Batch, str], tuple[MixturePlay, Strategy]]]:
    """Give what attacks the mixture on a batch, by the name of the attack."""
    ascent, _ = attacks.ascent("boost", mixture, [])
    with playing(mixture, attacks.site, attacks.draws, attacks.seed) as play:

        def find(batch: Batch, attack: str) -> tuple[MixturePlay, Strategy]:
            played = play(batch)
            return played, reached(attacks, played, ascent, attack)

        yield find


def _errors(batches: Batches, attacks: MixtureAttacks, mixture: Mixture) -> Tensor:
    """Return how often each member errs where ARC attacks the mixture, `[M]`."""
    wrong = []
    with _attacked(attacks, mixture) as find:
        for batch in _each(batches, mixture):
            played, found = find(batch, "ARC")
            wrong.append(1 - played.right(played.logits(found, JUDGED)))
    return torch.cat(wrong, -1).mean((0, 2))


def _each(batches: Batches, mixture: Mixture) -> Iterator[Batch]:
    """Yield the batches of an epoch, of which there must be one."""
    none = True
    for batch in batches(mixture):
        if not isinstance(batch, Batch):
            raise TypeError(f"batches(mixture) must make Batches, got {batch!r:.80}.")
        none = False
        yield batch
    if none:
        raise ValueError(
            "batches(mixture) gave none: it is called for each epoch and each round of weighing, "
            "and must make them anew, not return an iterator that is used up."
        )


def _with_a_copy(mixture: nn.Module) -> tuple[Mixture, nn.Module]:
    """Return a mixture with a copy of the last member besides, and that; of a model it alone."""
    member = _copy_of_last(mixture)
    if isinstance(mixture, Mixture):
        return Mixture([*mixture.members, Model(member)], model=mixture.model), member
    return Mixture([member]), member


def _copy_of_last(mixture: nn.Module) -> nn.Module:
    """Return a model of its own that is what the last member is; of a plain model a copy."""
    if not isinstance(mixture, Mixture):
        member = copy.deepcopy(mixture)
    elif isinstance(last := mixture.members[-1], Model):
        member = copy.deepcopy(last.module)
    elif isinstance(last, Weights):
        member = copy.deepcopy(mixture.model)
        with torch.no_grad():
            for name, own in last.replaced(member).items():
                own.copy_(last.values[name])
    else:
        raise TypeError(
            f"The last member is of the kind {type(last).__name__}, and boost trains copies of "
            "whole models and of weights by name: train it by attack_mixture in a loop of your "
            "own, or start from a whole model, boost(Mixture([model]), …)."
        )
    if not any(parameter.requires_grad for parameter in member.parameters()):
        raise ValueError(
            "All parameters of the last member are frozen, and its copy could not be trained: "
            "call model.requires_grad_(True), or for those to train."
        )
    return member


def _checked(mixture: Any, batches: Any, train: Any, settings: dict[str, Any]) -> MixtureAttacks:
    """Return the attacks, and raise unless the arguments are of the kinds that `boost` takes."""
    if not isinstance(mixture, nn.Module):
        raise TypeError(f"boost grows a Mixture, or a model to begin with, got {mixture!r:.80}.")
    if not callable(batches):
        raise TypeError(
            "batches must be a function of the mixture that makes its batches, such as "
            f"lambda mixture: text_batches(mixture, tokenizer, rows), got {batches!r:.80}."
        )
    if not callable(train):
        raise TypeError(f"train must be a function train(member, losses), got {train!r:.80}.")
    if missing := [name for name in ("radius", "unit") if settings.get(name) is None]:
        raise TypeError(
            f"boost needs {missing[0]}=: one ball holds for all batches and members. Write "
            "radius=…, unit=token_norm(model, batches), or unit=1.0 for a radius as it stands."
        )
    return MixtureAttacks(**settings)
