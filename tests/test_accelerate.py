"""Accelerate: prepared optimizers, accumulation, schedulers and checkpoints."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW, lr_scheduler

import mixadv
from tests.test_optimizer import MIXED, weights, wrapped
from tests.zoo import Player, assert_same, or_refused, small

accelerate: Any = pytest.importorskip("accelerate")


@pytest.fixture(params=list(mixadv.SOLVERS))
def solver(request: pytest.FixtureRequest) -> mixadv.Solver:
    head = torch.nn.Linear(3, 2).double()
    return mixadv.CAT(head=head) if request.param == "cat" else mixadv.make_solver(request.param)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    def reset() -> None:  # state that all accelerators of a process share
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()  # what a Trainer of another test has left
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["backward", "loss"])
@or_refused()
def test_prepared_it_accumulates_and_schedules(
    solver: mixadv.Solver, way: str, accelerator: Any
) -> None:
    def train(accelerated: bool) -> list[Any]:
        optimizer, player = wrapped(solver)
        game, model, path = optimizer.game, player.model, []
        scheduler: Any = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if accelerated:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        backward = accelerator.backward if accelerated else lambda loss: (loss / 2).backward()
        for micro in range(4):
            with accelerator.accumulate(model) if accelerated else nullcontext():
                if way == "loss":
                    backward(game.loss(player.closure()))
                else:
                    game.backward(player.closure(), backward=backward)
                if accelerated or micro % 2:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            path += [weights(player), optimizer.param_groups[0]["lr"]]
        base = game.optimizer
        return [*path, base.param_groups[0]["lr"]]

    assert_same(train(accelerated=True), train(accelerated=False))


def test_a_round_is_played_by_the_step_of_a_prepared_optimizer(accelerator: Any):
    bare, player = wrapped(MIXED, AdamW)
    losses = [bare.step(player.closure()) for _ in range(2)]
    optimizer, other = wrapped(MIXED, AdamW)
    model, prepared = accelerator.prepare(other.model, optimizer)
    assert model is other.model
    for _ in losses:
        prepared.step(other.closure())
    assert_same(weights(other), weights(player))
    assert_same(optimizer.outcome.objective, losses[-1])


def forget(accelerator: Any) -> None:
    """Be as in a new process."""
    for known in ("_models", "_optimizers", "_schedulers", "_custom_objects"):
        getattr(accelerator, known).clear()


def assert_resumes(accelerator: Any, folder: Path, begin: Any, train: Any) -> None:
    """Assert that a run loaded after some training goes on as the one that was saved."""
    run = begin()
    train(*run)
    accelerator.save_state(folder)
    whole = train(*run)
    resumed = begin()
    accelerator.load_state(folder)
    assert_same(train(*resumed), whole)


def prepared(accelerator: Any, solver: mixadv.Solver) -> tuple[Any, Any, Player]:
    """Return optimizer and scheduler as of a new process, prepared."""
    optimizer, player = wrapped(solver, AdamW)
    forget(accelerator)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return *accelerator.prepare(player.model, optimizer, scheduler)[1:], player


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_players_resume_from_a_saved_state(
    solver: mixadv.Solver, accelerator: Any, tmp_path: Path
) -> None:
    if solver.name == "mat":
        solver = mixadv.MAT(learner_steps=3, samples=1)

    def train(optimizer: Any, scheduler: Any, player: Player) -> list[Any]:
        for _ in range(4):  # of a sampled learner one round and a third
            if solver.name == "freeat":
                optimizer.step(player.closure())
            else:
                optimizer.optimizer.game.backward(player.closure())
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
        state = optimizer.optimizer.state_dict()
        return [weights(player), state, scheduler.get_last_lr(), torch.get_rng_state()]

    assert_resumes(accelerator, tmp_path, lambda: prepared(accelerator, solver), train)


def test_a_game_beside_an_optimizer_is_registered_for_checkpoints(
    accelerator: Any, tmp_path: Path
) -> None:
    def begin() -> tuple[Any, mixadv.Game, Player]:
        forget(accelerator)
        player = small()
        game = mixadv.Game(player.model, mixadv.TextAT())
        base = AdamW(player.model.parameters(), lr=0.1)
        _, optimizer = accelerator.prepare(player.model, base)
        accelerator.register_for_checkpointing(game)
        return optimizer, game, player

    def train(optimizer: Any, game: mixadv.Game, player: Player) -> list[Any]:
        for _ in range(3):
            game.backward(player.closure(), backward=accelerator.backward)
            optimizer.step()
            optimizer.zero_grad()
        return [weights(player), game.state_dict(), torch.get_rng_state()]

    assert_resumes(accelerator, tmp_path, begin, train)


def test_an_optimizer_that_was_prepared_is_refused(accelerator: Any):
    player = small()
    prepared = accelerator.prepare(AdamW(player.model.parameters()))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer was prepared .* wrap that one firs"):
        mixadv.wrap(prepared, player.model, mixadv.FGM())
