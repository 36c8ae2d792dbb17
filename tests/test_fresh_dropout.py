"""A new dropout mask in every pass, the learner's too, and the random state of one forward."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixadv
from tests.worlds import classified
from tests.zoo import wrapped

ROWS = 6


class Net(nn.Module):
    """An embedding and a head, and the mask of the dropout between them in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2)
        self.masks: list[Tensor] = []
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        self.masks.append(self.dropout(torch.ones_like(x)))
        return self.head((x * self.masks[-1]).mean(1))


def reading(model: nn.Module, label: int) -> Callable[[], tuple[Tensor, Tensor]]:
    ids = torch.arange(3 * ROWS).view(ROWS, 3) % 9
    target = torch.full((ROWS,), label)
    return classified(model, ids, labels=target)


def adversary(model: nn.Module) -> dict[str, Any]:
    """Return a payoff of its own, of passes as large as the learner's."""
    return {"adversary": lambda: -reading(model, 1)()[0]}


def retained(model: nn.Module) -> dict[str, Any]:
    return {**adversary(model), "retain": lambda: reading(model, 0)()[0].mean()}


GOALS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "zero-sum": lambda model: {},
    "its own payoff": adversary,
    "retained": retained,
}
SOLVERS = {
    "pgd": mixadv.PGD(steps=3, fresh_dropout=True),
    "freelb": mixadv.FreeLB(steps=2, fresh_dropout=True),
    "mat": mixadv.MAT(particles=2, learner_steps=2, fresh_dropout=True),
}


@pytest.mark.parametrize(
    ("name", "goals"), [*product(("pgd", "freelb"), GOALS), ("mat", "zero-sum")]
)
def test_no_mask_comes_twice(name: str, goals: str):
    """Nor does one of a round come again in the next, as along one stream that is put back."""
    torch.manual_seed(0)
    model = Net()
    optimizer = wrapped(model, SOLVERS[name])
    optimizer.step(reading(model, 0), **GOALS[goals](model))  # whose checks replay a mask
    model.masks.clear()
    state = torch.get_rng_state()
    for _ in range(3):
        optimizer.step(reading(model, 0), **GOALS[goals](model))
    masks, after = [*model.masks], torch.get_rng_state()
    assert len(masks) >= 6
    seen = {mask.numpy().tobytes() for mask in masks}
    assert len(seen) == len(masks)

    torch.set_rng_state(state)  # one forward for each step is what plain training takes
    model.masks.clear()
    for _ in range(6 if name == "mat" else 3):
        reading(model, 0)()
    assert torch.equal(torch.get_rng_state(), after)
    assert {mask.numpy().tobytes() for mask in model.masks} <= seen


def test_new_masks_are_those_of_the_round_and_the_seed():
    """They come from the game's two integers: a resumed run sees them again."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = Net()
        solver = mixadv.PGD(steps=2, fresh_dropout=True)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = mixadv.wrap(base, model, solver, seed=seed)
        for _ in range(2):
            optimizer.step(reading(model, 0), **adversary(model))
        found.append(model.masks[-3:])
    assert all(map(torch.equal, found[0], found[1]))
    learned = [masks[-1] for masks in found]
    assert torch.equal(learned[0], learned[2])  # the learner's is that of plain training
    assert not torch.equal(found[0][0], found[2][0])
