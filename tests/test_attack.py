"""`mixadv.attack`: the best response to a model as it stands."""

import pytest
import torch

import mixadv
from mixadv.equilibrium import best_response, exploitability
from tests.zoo import assert_same, fingerprint, player, small

MADE = {"cat": {"source": "hidden"}, "creat": {"source": "hidden"}}


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_it_is_the_best_response_in_evaluation_mode_and_leaves_nothing(name: str):
    attacked, solver = small(), mixadv.make_solver(name, **MADE.get(name, {}))
    before, state = fingerprint(attacked.model), torch.get_rng_state()
    found = mixadv.attack(attacked.model, solver, attacked.closure(), seed=3)
    assert_same(fingerprint(attacked.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in attacked.model.modules())
    attacked.model.eval()
    base = torch.optim.SGD(attacked.model.parameters())
    game = mixadv.wrap(base, attacked.model, solver, seed=3).game
    expected = best_response(game, attacked.closure())
    assert_same([found.loss, found.predictions], [expected.loss, expected.predictions])
    assert_same(found.strategy.points, expected.strategy.points)


def test_it_raises_the_loss_within_the_ball():
    attacked, solver = small(reduction="none"), mixadv.PGD(steps=5, radius=0.5, unit="absolute")
    attacked.model.eval()
    found = mixadv.attack(attacked.model, solver, attacked.closure())
    assert (found.loss >= attacked.closure()()[0] - 1e-9).all()
    assert max(n.max() for n in found.strategy.norms()) <= 0.5 + 1e-9


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="Tanh has no parameters"):
        mixadv.attack(torch.nn.Tanh(), mixadv.PGD(), lambda: torch.zeros(()))


def test_it_moves_where_it_is_said_alone():
    one = player("bert", rows=4)
    one.model.eval()
    length = one.batch["input_ids"].shape[1]
    allowed = (torch.arange(length) % 3 == 0).expand(4, -1)
    found = mixadv.attack(one.model, mixadv.PGD(), one.closure(), where=allowed)
    [points] = found.strategy.points
    assert points[:, allowed].any()
    assert not points[:, ~allowed].any()
    game = mixadv.Game(one.model, mixadv.PGD())
    expected = best_response(game, one.closure(), where=allowed)
    assert_same(found.strategy.points, expected.strategy.points)
    far = mixadv.Game(one.model, mixadv.PGD(radius=3.0))
    free, held = (exploitability(far, one.closure(), where=w) for w in (None, allowed))
    assert float(held.reached.mean()) < float(free.reached.mean())
    assert best_response(game, one.closure()).strategy.points[0][:, ~allowed].any()
