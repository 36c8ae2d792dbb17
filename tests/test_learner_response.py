"""The learner's side of the certificate: below the exact gain, near it, and without a trace."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import mixadv
from mixadv.equilibrium import exploitability
from mixadv.learner_response import LearnerGain, learner_exploitability
from tests.zoo import BrokenError, Fault, assert_same, fingerprint, small, wrapped

# Whose payoff is the loss.
NAMES = [name for name in mixadv.SOLVERS if mixadv.make_solver(name).gain == "loss"]


class Regression:
    """Squared error of a linear model, of which the best weights against any δ are known."""

    def __init__(self, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(12, 2, generator=source, dtype=torch.float64)
        self.y = torch.randn(12, generator=source, dtype=torch.float64)
        torch.manual_seed(seed)
        self.model = nn.Linear(2, 1).double()

    def closure(self) -> Tensor:
        return (self.model(self.x).squeeze(1) - self.y).square()

    def exact(self, delta: Tensor) -> float:
        """What the best weights gain against δ, by least squares."""
        moved = torch.cat([self.x + delta, torch.ones(12, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(moved, self.y[:, None]).solution
        own = self.model(self.x + delta).squeeze(1).detach() - self.y
        return (own.square().mean() - (moved @ best).squeeze(1).sub(self.y).square().mean()).item()


@pytest.mark.parametrize("radius", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_below_the_exact_gain_and_near_it(radius: float, seed: int):
    """Where the batch that the response sees is the one it is judged on."""
    r = Regression(seed)
    game = mixadv.Game(r.model, mixadv.FGM(radius=radius, unit="absolute"))
    game.backward(r.closure)
    exact = r.exact(game.strategy.points[0][0])  # pyright: ignore
    few, many = (
        float(learner_exploitability(game, [r.closure] * 2, steps=steps, rate=0.05).gain)
        for steps in (3, 300)
    )
    assert few < many <= exact + 1e-12
    assert many > 0.98 * exact


def test_no_gain_is_found_where_the_learner_plays_best():
    r = Regression()
    moved = torch.cat([r.x, torch.ones(12, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(moved, r.y[:, None]).solution[:, 0]
    r.model.weight.data[0], r.model.bias.data[0] = best[:2], best[2]
    game = mixadv.Game(r.model, mixadv.FGM(radius=0.0, unit="absolute"))
    found = learner_exploitability(game, [r.closure] * 2, rate=0.01)
    assert found.gain == 0
    assert float(found.interval[0]) == 0  # pyright: ignore[reportOptionalSubscript]


def test_what_is_learnt_by_heart_is_no_gain():
    """A judge that saw the rows would report the noise in their labels as a gain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2)).double()
    x, y = torch.randn(2, 40, 3).double(), torch.randint(0, 2, (2, 40))

    def closure(half: int) -> Any:
        return lambda: nn.functional.cross_entropy(model(x[half]), y[half], reduction="none")

    game = mixadv.Game(model, mixadv.PGD(radius=0.1, unit="absolute"), model[0])
    options = {"steps": 150, "rate": 0.02}
    judged = learner_exploitability(game, [closure(0), closure(1)], **options)
    by_heart = learner_exploitability(game, [closure(0), closure(0)], **options)
    assert by_heart.gain > 0.2
    assert judged.gain < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_changed(name: str):
    player = small(reduction="none")
    optimizer = wrapped(player, mixadv.make_solver(name))
    optimizer.step(player.closure())
    weight = next(player.model.parameters())
    weight.grad = torch.ones_like(weight)
    before = fingerprint(player.model, optimizer)
    found = learner_exploitability(optimizer.game, [player.closure()] * 2, steps=2)
    assert_same(fingerprint(player.model, optimizer), before)
    again = learner_exploitability(optimizer.game, [player.closure()] * 2, steps=2)
    assert_same((again.played, again.reached), (found.played, found.reached))
    total = exploitability(optimizer.game, [player.closure()] * 2, steps=2).gain + found.gain
    assert total >= 0


def test_nothing_is_left_changed_where_it_breaks():
    player = small(reduction="none")
    optimizer = wrapped(player, mixadv.PGD())
    optimizer.step(player.closure())
    before = fingerprint(player.model, optimizer)

    def counting(fault: Fault) -> Any:
        def failing() -> Any:
            fault()
            return player.closure()()

        return failing

    fault = Fault()
    learner_exploitability(optimizer.game, [counting(fault)] * 2, steps=2)
    for at in range(1, fault.calls + 1):
        with pytest.raises(BrokenError):
            learner_exploitability(optimizer.game, [counting(Fault(at))] * 2, steps=2)
        assert_same(fingerprint(player.model, optimizer), before)


def test_the_interval_is_of_the_mean_gain():
    """Gains of one response may be negative for some samples: cutting each at 0 would add up."""
    found = LearnerGain(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), "a guess", 0.95)
    assert found.gain == 0
    assert "lower bound 0, 95% interval 0 to " in str(found)
    assert LearnerGain(torch.ones(1), torch.zeros(1), "a guess", 0.95).interval is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g, c: learner_exploitability(g, [c]), ValueError, "two batches"),
        (lambda g, c: learner_exploitability(g, [c, c], steps=0), ValueError, "steps"),
        (lambda g, c: learner_exploitability(g, [c, c], level=1.0), ValueError, "level"),
        (lambda g, c: learner_exploitability(g, [c, cast(Any, 3)]), TypeError, "takes a closure"),
        (lambda g, c: learner_exploitability(3, [c, c]), TypeError, r"mixadv\.Game"),  # pyright: ignore
    ],
)
def test_what_cannot_be_measured_is_refused(make: Any, error: Any, message: str):
    r = Regression()
    game = mixadv.Game(r.model, mixadv.FGM(radius=0.1, unit="absolute"))
    with pytest.raises(error, match=message):
        make(game, r.closure)
    divergence = mixadv.Game(r.model, mixadv.PGD(payoff="js", unit="absolute"))
    with pytest.raises(ValueError, match="whose payoff is the loss"):
        learner_exploitability(divergence, [r.closure] * 2)
