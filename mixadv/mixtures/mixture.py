"""The learner's mixed strategy as an object: members, and the probability of each.

p = Σ_m π_m δ_(θ_m)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.errors import GameError, nearest
from mixadv.game import Game
from mixadv.mixtures import saved
from mixadv.mixtures.adapters import Adapter, ByRow, drawn, in_one_pass
from mixadv.mixtures.members import Member, Model, Weights
from mixadv.model.contexts import no_grad
from mixadv.model.logits import probabilities_in, stacked
from mixadv.model.modules import unwrap

How = Literal["mean", "draw", "vote"]
Playing = TypeVar("Playing", bound=Callable[..., Any])


class Mixture(nn.Module):
    """Several models, of which one is drawn, by its probability, for each prediction.

    It is called as the member in play is: within `with mixture.member(m):`, closures that call the
    mixture run the member m, so that whatever attacks or measures a model does so of each.

    Args:
        members: weights by name that differ from those of the model (a fine-tuned copy, an adapter,
            a sample of the learner's), whole models, `Adapter(name)` or `Dropout(seed)`.
        probabilities: π, `[M]`, not negative, which are divided by their sum; None is uniform.
        model: whose weights are exchanged; needed unless all members are models.

    Attributes:
        model: in whose place the members play.
        members: in their order.
        probabilities: π, `[M]`, fp64 on the CPU.

    Raises:
        ValueError: for members that do not fit the model, or numbers that are no probabilities.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> mixture = Mixture([{}, {"bias": torch.ones(2)}], [3, 1], model=model)
        >>> mixture.predict(lambda: mixture(torch.eye(2))).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        members: Sequence[Mapping[str, Tensor] | nn.Module | Member],
        probabilities: Sequence[float] | Tensor | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.members = [_member(value) for value in members]
        if not self.members:
            raise ValueError("A mixture needs at least one member.")
        if model is None:
            first = self.members[0]
            if not all(isinstance(member, Model) for member in self.members):
                raise ValueError(
                    "Members that are not whole models need one: Mixture(…, model=model)."
                )
            assert isinstance(first, Model)
            model = first.module
        self.model = model
        for member in self.members:
            member.check(model)
        self._others = nn.ModuleList(m.module for m in self.members if isinstance(m, Model))
        self.probabilities = _normalised(probabilities, len(self.members))
        self._playing: list[Callable[..., Any]] = []  # not an attribute, which would be a submodule

    def __len__(self) -> int:
        """Return M, the number of members."""
        return len(self.members)

    @property
    def config(self) -> Any:
        """The configuration of the model, of transformers."""
        return getattr(self.model, "config", None)

    @contextmanager
    def member(self, number: int) -> Iterator[nn.Module]:
        """Put a member in play while the body runs, and give the module that plays.

        It plays in evaluation mode. Weights, modes and random state are afterwards as they were.
        """
        with self._in_play(self.members[number].playing(self.model)) as module:
            yield module

    @contextmanager
    def _in_play(self, playing: AbstractContextManager[Playing]) -> Iterator[Playing]:
        if self._playing:
            raise GameError("A member of the mixture is in play: leave it before another one.")
        with playing as called:
            self._playing.append(called)
            try:
                yield called
            finally:
                self._playing.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the member in play."""
        if not self._playing:
            raise GameError(
                "A mixture has an output only while one of its members is in play: predict with "
                "mixture.predict(lambda: mixture(…)), or call it within mixture.member(m)."
            )
        return self._playing[0](*args, **kwargs)

    def each(self, forward: Callable[[], Any]) -> Tensor:
        """Return the probabilities that each member gives, `[M, B, C]`; of tokens `[M, B, n, C]`.

        Args:
            forward: calls the mixture; returns logits `[B, C]`, an output that holds them, or what
                a closure of a game does, such as `(loss, logits)`.
        """
        found = []
        for number in range(len(self)):
            with no_grad(), self.member(number):
                found.append(probabilities_in(forward()))
        return stacked(found)

    def predict(
        self, forward: Callable[[], Any], how: How = "mean", *, seed: int | None = None
    ) -> Tensor:
        """Return the probabilities of classes, `[B, C]`; of tokens `[B, n, C]`.

        Args:
            forward: as in `each`.
            how: `"mean"` of the members' probabilities, by π; `"draw"` a member for each row, by
                π, and give its probabilities (of LoRA adapters in one pass); `"vote"`, the share by
                π of the members whose likeliest class it is.
            seed: of the draw, to repeat it; None draws anew in each call, apart from torch's own
                random numbers. With one seed a row's member depends on its place alone, which an
                adversary can learn.
        """
        if how not in get_args(How):
            choices = ", ".join(map(repr, get_args(How)))
            raise ValueError(f"how={how!r} is not one of {choices}.{nearest(how, get_args(How))}")
        if seed is not None:
            check_integer("predict", "seed", seed, 0)
        if how == "draw" and in_one_pass(self.members, self.model):
            once = self._drawn_in_one_pass(forward, self.members, seed)
            if once is not None:
                return once
        return combine(self.each(forward), self.probabilities, how, seed)

    def _drawn_in_one_pass(
        self, forward: Callable[[], Any], members: Sequence[Adapter], seed: int | None
    ) -> Tensor | None:
        """Return what rows predict under the adapters drawn for them, None where PEFT cannot."""
        rows = ByRow(self.model, members, partial(drawn, self.probabilities, seed))
        try:
            with no_grad(), self._in_play(rows.playing()):
                found = probabilities_in(forward())
        except (ValueError, TypeError):  # merged weights, DoRA, whole heads beside the adapters,
            return None  # or inputs whose rows are not the encoder's
        return found if rows.rows == [len(found)] else None

    def weighed(self, probabilities: Sequence[float] | Tensor) -> Mixture:
        """Return the mixture of these members with other probabilities, `[M]`.

        Members of probability 0 are left out. Weights are shared with this mixture, not copied.
        """
        shares = _normalised(probabilities, len(self))
        kept = [m for m, share in zip(self.members, shares, strict=True) if share > 0]
        whole = all(isinstance(member, Model) for member in kept)
        return Mixture(kept, shares[shares > 0], model=None if whole else self.model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the members' weights (safetensors) and probabilities (JSON) into a folder.

        What the members share, the model that they change, is not among it. A mixture that is
        there already is replaced once the new one is whole. Needs safetensors.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> model = nn.Linear(2, 2)
            >>> mixture = Mixture([{}, {"bias": torch.ones(2)}], [3, 1], model=model)
            >>> with TemporaryDirectory() as folder:
            ...     mixture.save_pretrained(folder)
            ...     print(Mixture.from_pretrained(folder, model).probabilities.tolist())
            [0.75, 0.25]
        """
        saved.write(Path(folder), self.members, self.probabilities, self.model)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: nn.Module | None = None,
        *,
        models: Sequence[nn.Module] | None = None,
        check_base: bool = True,
    ) -> Mixture:
        """Return the mixture that `save_pretrained` wrote into a folder.

        Args:
            folder: of the mixture.
            model: that the members change; adapters are loaded into it, under another name where
                theirs is taken, and whole models into copies of it, unless `models` are given.
            models: one for each member that is a whole model, in whose place its weights are put.
            check_base: whether what members take from the model must be, bit for bit, what it was
                when they were saved; False for that base in another number format.

        Raises:
            FileNotFoundError: if the folder has no mixture, or a part of it is missing.
            ValueError: for files that are none of a mixture, or do not fit the model.
        """
        members, probabilities, changed = saved.read(Path(folder), model, models, check_base)
        return cls(members, probabilities, model=changed)


def combine(each: Tensor, probabilities: Tensor, how: How, seed: int | None = None) -> Tensor:
    """Return what a mixture predicts `[B, C]`, of the probabilities that each member gives.

    Args:
        each: `[M, B, C]`, or of tokens `[M, B, n, C]`.
        probabilities: of members, `[M]`.
        how: as in `Mixture.predict`.
        seed: as in `Mixture.predict`.
    """
    if how == "draw":
        members = drawn(probabilities, seed, each.shape[1]).to(each.device)
        return each[members, torch.arange(each.shape[1], device=each.device)]
    if how == "vote":
        each = nn.functional.one_hot(each.argmax(-1), each.shape[-1]).to(each.dtype)
    return (probabilities.to(each).view(-1, *[1] * (each.dim() - 1)) * each).sum(0)


def mixture_of(game: Game) -> Mixture:
    """Return the mixture, with equal probabilities, of the samples of θ that a game keeps.

    MAT keeps as many as its `samples=` says. They are copied, with the buffers that the model has
    now (such as those of batch norm), so training can continue.

    Raises:
        GameError: if it keeps none.

    Example:
        >>> import mixadv
        >>> model = nn.Linear(2, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = mixadv.wrap(base, model, mixadv.MAT(samples=2))
        >>> def closure():
        ...     logits = model(torch.eye(2))
        ...     return nn.functional.cross_entropy(logits, torch.tensor([0, 1])), logits
        >>> loss = optimizer.step(closure)
        >>> len(mixture_of(optimizer.game))
        2
    """
    if not isinstance(game, Game):
        raise TypeError(f"game must be a mixadv.Game, such as optimizer.game, got {game!r:.80}.")
    model = unwrap(game.model)
    saved_ones = model.state_dict(keep_vars=True).keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved_ones}
    samples = [
        {name: value.detach().clone() for name, value in {**buffers, **sample}.items()}
        for sample in game.learner_samples
    ]
    return Mixture(samples, model=model)


def _member(value: Any) -> Member:
    if isinstance(value, Member):
        return value
    if isinstance(value, nn.Module):
        return Model(value)
    if isinstance(value, Mapping):
        return Weights(value)
    raise TypeError(
        "A member is weights by name, a model or a Member such as Dropout(seed), got "
        f"{value!r:.80}."
    )


def _normalised(values: Sequence[float] | Tensor | None, count: int) -> Tensor:
    if values is None:
        return torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")
    found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    usable = found.shape == (count,) and bool(found.isfinite().all() and (found >= 0).all())
    if not usable or float(found.sum()) == 0:
        raise ValueError(
            f"probabilities must be {count} numbers that are not negative and not all 0, one for "
            f"each member, got {found.tolist()}."
        )
    found = found / found.max()  # whose sum is finite
    return found / found.sum()
