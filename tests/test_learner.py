"""The learner through the wrapped optimizer: when it moves, and what is kept for evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import mixadv
from mixadv.model import parallel

OUTER = 0.4
COLD = {"learner_temperature": 0.0}
PULLED = {**COLD, "learner_steps": 1, "damping": 0.0, "round_damping": OUTER}
FREE = {"learner_steps": 1, "damping": 0.0, "round_damping": 0.0}


class Training:
    """A linear classifier under a solver, on a new batch in every round.

    `samples` holds the weights after each step as the base optimizer's own update left them, seen
    by a hook that runs before the learner's.
    """

    def __init__(self, solver: mixadv.Solver, **options) -> None:
        self.model = nn.Linear(4, 3).double()
        self.base = torch.optim.SGD(self.model.parameters(), lr=0.5, **options)
        self.samples: list[Tensor] = []
        self.base.register_step_post_hook(lambda *_: self.samples.append(self.weights))
        self.optimizer = mixadv.wrap(self.base, self.model, solver)
        self.game = self.optimizer.game

    @property
    def weights(self) -> Tensor:
        return parameters_to_vector(self.model.parameters()).detach().clone()

    def closure(self) -> Callable:
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))

        def forward() -> tuple[Tensor, Tensor]:
            logits = self.model(x)
            return nn.functional.cross_entropy(logits, y), logits

        return forward

    def backward(self, **options) -> None:
        self.game.backward(self.closure(), **options)

    def play(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.optimizer.step(self.closure())

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()


def vector(weights: dict[str, Tensor]) -> Tensor:
    assert list(weights) == ["weight", "bias"]
    return parameters_to_vector(weights.values())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# When it moves -----------------------------------------------------------------------------------


def test_a_round_of_samples_closes_over_successive_batches():
    training = Training(mixadv.MAT(**COLD, learner_steps=3, damping=0.3, round_damping=OUTER))
    for _ in range(2):
        start = mean = training.weights
        for _ in range(3):
            training.step()
            mean = 0.3 * mean + 0.7 * training.samples[-1]
            if len(training.samples) % 3:
                assert torch.equal(training.weights, training.samples[-1])
        close(training.weights, OUTER * start + (1 - OUTER) * mean)


def test_step_with_a_closure_plays_a_whole_round_on_one_batch():
    training = Training(mixadv.MAT(**COLD, learner_steps=3, damping=0.3, round_damping=OUTER))
    start = training.weights
    training.play()
    a, b, c = training.samples
    mean = 0.3**3 * start + 0.7 * (0.09 * a + 0.3 * b + c)
    close(training.weights, OUTER * start + (1 - OUTER) * mean)
    assert training.optimizer.outcome.steps == 3


def by_base(training: Training) -> None:
    training.backward()
    training.base.step()


def by_scaler(training: Training) -> None:
    scaler = torch.amp.GradScaler("cpu")
    training.backward(backward=lambda loss: scaler.scale(loss).backward())
    scaler.step(training.optimizer)


@pytest.mark.parametrize("caller", [Training.step, Training.play, by_base, by_scaler])
def test_learner_moves_once_with_each_step_whoever_calls_it(caller):
    training = Training(mixadv.MAT(**PULLED))
    for number in (1, 2):
        start = training.weights
        caller(training)
        assert len(training.samples) == number
        close(training.weights, OUTER * start + (1 - OUTER) * training.samples[-1])
        training.optimizer.zero_grad()


def test_micro_batches_are_no_samples():
    training = Training(mixadv.MAT(**PULLED, samples=8))
    start = training.weights
    for _ in range(3):
        training.backward()
        assert torch.equal(training.weights, start)
    training.optimizer.step()
    assert len(training.game.learner_samples) == 1
    close(training.weights, OUTER * start + (1 - OUTER) * training.samples[-1])


HOT = mixadv.MAT(learner_steps=2, learner_temperature=1.0, damping=0.3, round_damping=OUTER)
SKIPPED = [HOT, mixadv.MAT(**{**PULLED, "damping": "uniform"}), mixadv.SMART(ema_decay=0.5)]


def overflow(training: Training, stepped: torch.optim.Optimizer) -> None:
    """A step with a non-finite gradient under loss scaling."""
    scaler = torch.amp.GradScaler("cpu")
    training.optimizer.zero_grad()
    training.backward(backward=lambda loss: scaler.scale(loss).backward())
    training.model.bias.grad[0] = torch.inf
    scaler.step(stepped)
    scaler.update()
    training.optimizer.zero_grad()


@pytest.mark.parametrize("solver", SKIPPED, ids=["mat", "uniform", "smart"])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_loss_scaling_skips_move_nothing(solver, fused):
    """A fused optimizer is called all the same, and skips on the device by its `found_inf`."""

    def kept() -> list[Tensor]:
        game = training.game
        if isinstance(solver, mixadv.SMART):
            return [training.weights, vector(game.teacher())]
        with game.averaged():
            average = training.weights
        return [training.weights, average]

    training = Training(solver, fused=fused)
    training.step(3)
    before = kept()
    for _ in range(3):
        overflow(training, training.base if fused else training.optimizer)
        assert all(torch.equal(a, b) for a, b in zip(kept(), before, strict=True))
    training.step(2)
    assert not torch.equal(training.weights, before[0])


MOVING = {"mat": mixadv.MAT(**COLD, learner_steps=2), "smart": mixadv.SMART()}


@pytest.mark.parametrize("solver", MOVING.values(), ids=MOVING)
def test_layers_may_be_frozen_and_thawed_between_rounds(solver):
    training = Training(solver)
    for frozen in (False, True, False):
        before = training.model.bias.requires_grad_(not frozen).detach().clone()
        training.play(2)
        assert torch.equal(training.model.bias, before) is frozen


def test_a_layer_that_was_frozen_stays_where_it_is_when_a_round_fails():
    training = Training(mixadv.MAT(**COLD, learner_steps=2))
    training.play(2)
    training.model.bias.requires_grad_(False)
    before, forward, calls = training.model.bias.clone(), training.closure(), []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(training.game.learner.position)
        if calls[-1]:
            raise KeyError("no memory")
        return forward()

    with pytest.raises(KeyError):
        training.optimizer.step(closure)
    assert torch.equal(training.model.bias, before)


@pytest.mark.parametrize("solver", MOVING.values(), ids=MOVING)
def test_parameters_may_be_added_between_rounds(solver):
    training = Training(solver)
    training.play()
    added, forward = nn.Parameter(torch.zeros(3, dtype=torch.float64)), training.closure()
    training.optimizer.add_param_group({"params": [added]})

    def closure() -> tuple[Tensor, Tensor]:
        loss, logits = forward()
        return loss + added.sum(), logits

    training.optimizer.step(closure)
    assert (added < 0).all()


# What is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["uniform", 0.8])
def test_average_is_over_closed_rounds(average):
    training = Training(mixadv.MAT(learner_steps=2, average=average))
    expected, closed = None, []
    for _ in range(4):
        training.step(2)
        closed.append(training.weights)
        expected = closed[0] if expected is None else 0.8 * expected + 0.2 * closed[-1]
    training.step()  # an open round does not count
    live = training.weights
    with training.game.averaged():
        close(training.weights, sum(closed) / 4 if average == "uniform" else expected)
    assert torch.equal(training.weights, live)


def test_live_weights_return_bit_for_bit_after_an_exception():
    training = Training(mixadv.MAT(**COLD))
    training.play(3)
    live = training.weights
    places = [p.data_ptr() for p in training.model.parameters()]

    def interrupted() -> None:
        with training.game.averaged():
            assert not torch.equal(training.weights, live)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(training.weights, live)
    assert [p.data_ptr() for p in training.model.parameters()] == places


def test_live_weights_return_from_an_interrupt_while_the_average_moves_in(
    monkeypatch: pytest.MonkeyPatch,
):
    training = Training(mixadv.MAT(**COLD))
    training.play(3)
    live, put = training.weights, parallel._put

    def interrupted(values: Any) -> None:
        monkeypatch.setattr(parallel, "_put", put)
        put(dict(list(values.items())[:1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.game.averaged().__enter__()
    assert torch.equal(training.weights, live)


def test_a_round_is_refused_within_averages_of_averages():
    training = Training(mixadv.MAT(**COLD))
    training.play()
    with training.game.averaged():
        with training.game.averaged():
            pass
        with pytest.raises(mixadv.GameError, match=r"within game\.averaged"):
            training.play()


def test_averaged_weights_are_refused_within_a_round_and_are_the_live_ones_before_the_first():
    training = Training(mixadv.MAT(**COLD))
    live = training.weights
    with training.game.averaged():
        assert torch.equal(training.weights, live)
    training.play()
    live, forward = training.weights, training.closure()

    def evaluating() -> tuple[Tensor, Tensor]:
        with training.game.averaged():
            return forward()

    with pytest.raises(mixadv.GameError, match="between rounds"):
        training.game.backward(evaluating)
    assert torch.equal(training.weights, live)


def test_last_samples_are_kept_oldest_first():
    training = Training(mixadv.MAT(**COLD, learner_steps=2, samples=3))
    training.step(5)
    kept = [vector(sample) for sample in training.game.learner_samples]
    assert torch.equal(torch.stack(kept), torch.stack(training.samples[-3:]))


def test_samples_carry_the_langevin_noise():
    training = Training(mixadv.MAT(**FREE, samples=1, learner_temperature=0.1))
    training.step()
    assert not torch.equal(training.weights, training.samples[-1])
    assert torch.equal(vector(training.game.learner_samples[0]), training.weights)


def test_mixture_averages_the_predictions_of_the_samples():
    training = Training(mixadv.MAT(learner_steps=2, samples=3, learner_temperature=0.5))
    training.step(4)
    x, live = torch.randn(5, 4, dtype=torch.float64), training.weights
    predictions = [
        torch.softmax(x @ sample["weight"].T + sample["bias"], -1)
        for sample in training.game.learner_samples
    ]
    log_mixture = training.game.mixture(lambda: training.model(x))
    close(log_mixture, torch.stack(predictions).mean(0).log())
    assert torch.equal(training.weights, live)


def test_teacher_is_the_exponential_average_of_the_learner():
    training = Training(mixadv.SMART(ema_decay=0.9))
    teacher = training.weights
    for _ in range(4):
        training.step()
        teacher = 0.9 * teacher + 0.1 * training.weights
        close(vector(training.game.teacher()), teacher)


def test_teacher_without_momentum_is_the_last_outer_iterate():
    training = Training(mixadv.SMART(ema_decay=0.0, teacher_every=3))
    iterates = [training.weights]
    for step in range(1, 8):
        training.step()
        iterates.append(training.weights)
        close(vector(training.game.teacher()), iterates[step - step % 3])


def drift(solver: mixadv.Solver) -> tuple[mixadv.Game, nn.Module, list[float]]:
    """bf16 weights that move by one unit of rounding per step, and where they were."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, solver)
    path = [1.0]
    for _ in range(50):
        model.weight.grad = torch.full_like(model.weight, -(2.0**-7))
        optimizer.base.step()
        path.append(model.weight.item())
    return optimizer.game, model, path


def exponential(values: list[float]) -> float:
    average = values[0]
    for value in values[1:]:
        average = 0.99 * average + 0.01 * value
    return average


@pytest.mark.parametrize("solver", [mixadv.PGD(), mixadv.MAT(**COLD)])
def test_a_solver_without_a_teacher_says_so(solver: mixadv.Solver):
    training = Training(solver)
    training.play()
    with pytest.raises(mixadv.GameError, match="keeps no teacher"):
        training.game.teacher()


def test_average_of_half_precision_weights_is_not_lost_to_rounding():
    game, model, path = drift(mixadv.MAT(**FREE, average=0.99))
    with game.averaged():
        assert model.weight.item() == pytest.approx(exponential(path[1:]), abs=2**-8)


def test_teacher_of_half_precision_weights_is_not_lost_to_rounding():
    game, _, path = drift(mixadv.SMART(ema_decay=0.99))
    assert game.teacher()["weight"].item() == pytest.approx(exponential(path), abs=2**-8)
