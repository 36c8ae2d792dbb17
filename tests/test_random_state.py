"""Where rounds leave the random state: as plain training would, whatever is drawn within."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import mixadv
from tests.zoo import small, wrapped

BEFORE, BETWEEN = "before the first pass", "between two passes"


@dataclass(frozen=True, kw_only=True)
class Drawing(mixadv.Solver):
    """A solver of one's own that draws torch's numbers itself."""

    name: ClassVar[str] = "drawing"
    paper: ClassVar[str] = "none"

    when: str = BEFORE
    fail: bool = False

    def play(self, stage: Any) -> Any:
        if self.when == BEFORE:
            torch.rand(3)
        if self.fail:
            raise InterruptedError
        yield stage.plain_loss() / 2
        if self.when == BETWEEN:
            torch.rand(3)
        yield mixadv.Step(stage.loss(stage.start(self).detach()) / 2)


@dataclass(frozen=True, kw_only=True)
class DrawingSAM(mixadv.SAM):
    """An adversary of the weights of one's own, which draws torch's numbers itself."""

    def displacements(self, weights: Any, gradients: Any) -> Any:
        torch.rand(3)
        yield from super().displacements(weights, gradients)


SOLVERS = {
    "noise": mixadv.UniformNoise(),
    "pgd": mixadv.PGD(),
    "sam": mixadv.SAM(solver=mixadv.PGD()),
    "awp": mixadv.AWP(solver=mixadv.PGD()),
    BETWEEN: Drawing(when=BETWEEN),
    "a SAM of one's own": DrawingSAM(solver=mixadv.UniformNoise()),
}


@pytest.mark.parametrize("paid", [(0,), (0, 0), (0, 1), (1, 0), (0, 1, 1), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("how", ["step", "backward"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_round_ends_where_one_forward_of_each_micro_batch_would(name: str, how: str, paid: Any):
    """Of as many passes each, or not: only some have an adversary with a payoff of its own."""
    player = small()  # with dropout
    optimizer = wrapped(player, SOLVERS[name], lr=0.0)
    batches = [player.closure() for _ in paid]
    adversaries = [player.closure() if own else None for own in paid]
    given = {} if not any(paid) else {"adversary": adversaries}
    torch.manual_seed(5)
    for closure in batches:
        closure()
    expected = torch.get_rng_state()
    for _ in range(2):  # the first round is checked
        torch.manual_seed(5)
        if how == "step":
            optimizer.step(batches, **given)
        else:
            optimizer.game.backward(batches, **given)
        assert torch.equal(torch.get_rng_state(), expected)


def test_an_error_before_the_first_pass_leaves_the_random_state_as_it_was():
    optimizer = wrapped(player := small(), Drawing())
    optimizer.step(player.closure())
    failing = wrapped(player, Drawing(fail=True))
    failing.game.load_state_dict(optimizer.game.state_dict())
    found = torch.get_rng_state()
    with pytest.raises(InterruptedError):
        failing.step(player.closure())
    assert torch.equal(torch.get_rng_state(), found)
