"""`mixadv.attack`: the best response to a model as it stands."""

import pytest
import torch

import mixadv
from mixadv.equilibrium import best_response
from tests.zoo import assert_same, fingerprint, small

MADE = {"cat": {"source": "hidden"}, "creat": {"source": "hidden"}}


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_it_is_the_best_response_in_evaluation_mode_and_leaves_nothing(name: str):
    player, solver = small(), mixadv.make_solver(name, **MADE.get(name, {}))
    before, state = fingerprint(player.model), torch.get_rng_state()
    found = mixadv.attack(player.model, solver, player.closure(), seed=3)
    assert_same(fingerprint(player.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in player.model.modules())
    player.model.eval()
    base = torch.optim.SGD(player.model.parameters())
    game = mixadv.wrap(base, player.model, solver, seed=3).game
    expected = best_response(game, player.closure())
    assert_same([found.loss, found.predictions], [expected.loss, expected.predictions])
    assert_same(found.strategy.points, expected.strategy.points)


def test_it_raises_the_loss_within_the_ball():
    player, solver = small(reduction="none"), mixadv.PGD(steps=5, radius=0.5, unit="absolute")
    player.model.eval()
    found = mixadv.attack(player.model, solver, player.closure())
    assert (found.loss >= player.closure()()[0] - 1e-9).all()
    assert max(n.max() for n in found.strategy.norms()) <= 0.5 + 1e-9
