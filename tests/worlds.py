"""What many tests build alike: closures, wrapped models, gradients, a δ added by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from mixadv.model.site import first_of, with_first
from tests.zoo import Player, assert_same


class Twice(nn.Module):
    """Calls its embedding for two texts, which may differ in length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(one).mean(1) * self.words(other).mean(1)))


def classified(model: Callable[..., Tensor], *inputs: Any, labels: Tensor) -> Callable[[], Any]:
    """Return a closure of the cross-entropy and the logits."""

    def run() -> tuple[Tensor, Tensor]:
        logits = model(*inputs)
        return F.cross_entropy(logits, labels), logits

    return run


def breaking(closure: Callable[[], Any], last: int) -> Callable[[], Any]:
    """Return a closure that runs out of memory at the end of its n-th pass."""
    passes = 0

    def run() -> Any:
        nonlocal passes
        passes += 1
        result = closure()
        if passes == last:
            raise MemoryError
        return result

    return run


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Return the gradients that a model has, and clear them."""
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def played(game: mixadv.Game) -> Tensor:
    """Return the first point of what was played last."""
    return game.strategy.points[0][0]


@contextmanager
def added(*moves: tuple[nn.Module, Any]) -> Iterator[None]:
    """Add to the output of each module a δ."""
    hooks = [
        module.register_forward_hook(
            lambda *call, d=delta: with_first(call[2], first_of(call[2]) + d)
        )
        for module, delta in moves
    ]
    yield
    for hook in hooks:
        hook.remove()


def hidden_at(one: Player, *deltas: Any) -> list[Tensor]:
    """Return what a `small` has in its hidden layer at each δ, under one dropout mask."""
    seen: list[Tensor] = []
    hook = one.model.hidden.register_forward_hook(lambda *call: seen.append(call[2]))
    for delta in deltas:
        torch.manual_seed(3)
        with added((one.model.embedding, delta)):
            one.closure()()
    hook.remove()
    return seen


def assert_resumes(build: Callable[[int], Any], folder: Path, before: int, after: int) -> None:
    """Assert that a run which is saved goes on as another one that begins by another seed.

    `build` takes the seed and returns a player and its optimizer.
    """
    one, optimizer = build(0)
    for _ in range(before):
        optimizer.step(one.closure())
    state = [one.model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    torch.save(state, folder / "checkpoint")
    for _ in range(after):
        optimizer.step(one.closure())

    other, resumed = build(5)
    model, game, random = torch.load(folder / "checkpoint", weights_only=True)
    other.model.load_state_dict(model)
    resumed.load_state_dict(game)
    torch.set_rng_state(random)
    for _ in range(after):
        resumed.step(other._replace(batch=one.batch).closure())
    assert_same(other.model.state_dict(), one.model.state_dict())
    assert_same(resumed.state_dict(), optimizer.state_dict())
