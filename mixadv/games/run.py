"""A run of a method: how long, from where, until what gap, and the loop that plays it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mixadv.checks import check_flag, check_integer, check_number
from mixadv.games.method import Method, Profile
from mixadv.games.particles import ParticleMethod

Strategy = TypeVar("Strategy")
Reply = TypeVar("Reply", covariant=True)


@dataclass(frozen=True)
class Run:
    """What `solve` is asked for besides the game and the method; see there."""

    steps: int
    start: tuple[Any, Any] | None
    tolerance: float
    grid: int | None
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        pair = isinstance(self.start, (tuple, list)) and len(self.start) == 2
        if self.start is not None and not pair:
            raise TypeError(
                f"start must be a pair (learner's, adversary's), got {reprlib.repr(self.start)}."
            )
        check_integer("solve", "steps", self.steps, 1)
        check_integer("solve", "seed", self.seed, 0)
        check_number("solve", "tolerance", self.tolerance)
        check_flag("solve", "progress", self.progress)


class Ledger(Protocol[Strategy, Reply]):
    """What answers the profiles that a method plays, and keeps what a solution is made of."""

    @property
    def method(self) -> Method | ParticleMethod:
        """Which plays."""
        ...

    def answer(self, profile: Profile[Strategy]) -> Reply:
        """Return what the game says to a profile; keep the profile if it counts."""
        ...

    def gap(self) -> Tensor:
        """Return the gap of the method's output so far."""
        ...


def play(
    players: Generator[Profile[Strategy], Reply, None],
    ledger: Ledger[Strategy, Reply],
    run: Run,
    every: int,
) -> tuple[list[int], list[Tensor]]:
    """Play the steps; return those recorded, each `every` and the last, and the gaps there."""
    recorded, gaps = [], []
    profile = next(players)
    with _bar(run.steps, ledger.method.name, run.progress) as advance:
        for step in range(1, run.steps + 1):
            while not profile.counts:
                profile = players.send(ledger.answer(profile))
            reply = ledger.answer(profile)
            if step % every == 0 or step == run.steps:
                recorded.append(step)
                gaps.append(ledger.gap())
                if run.tolerance and (gaps[-1] <= run.tolerance).all():
                    break
            if step < run.steps:
                profile = players.send(reply)
            advance()
    return recorded, gaps


@contextmanager
def _bar(steps: int, name: str, wanted: bool) -> Iterator[Callable[[], object]]:
    """Yield what advances a progress bar; nothing is shown off a terminal or without tqdm."""
    if not wanted or find_spec("tqdm") is None:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, delay=2, disable=None, leave=False) as bar:
        yield bar.update
