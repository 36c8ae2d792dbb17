"""Rounds that are not played are plain training; updates count as optimizer steps do."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

import mixadv
from mixadv import MAT, PGD, FreeLB, Game, Schedule
from mixadv.equilibrium import best_response
from tests.zoo import assert_same, copies, fingerprint, small, wrapped


def start(solver=None, **schedule):
    player = small()
    return wrapped(player, solver or PGD(), schedule=Schedule(**schedule)), player


def rounds(optimizer, player, count):
    """Return for each of several steps whether the adversary played."""
    played = []
    for _ in range(count):
        optimizer.step(player.closure())
        played.append(optimizer.outcome.payoff is not None)
    return played


def trained(solver, schedule=None, count=4):
    player = small()
    played = rounds(wrapped(player, solver, schedule=schedule), player, count)
    return copies(player.model.parameters()), played


@pytest.mark.parametrize("solver", [PGD(), FreeLB(), mixadv.SMART(proximal_weight=0.0)])
def test_training_before_the_start_is_plain_training(solver):
    plain = small()
    optimizer = SGD(plain.model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        plain.closure()()[0].backward()
        optimizer.step()
    later, played = trained(solver, Schedule(start=4))
    assert not any(played)
    assert_same(copies(plain.model.parameters()), later)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_every_solver_follows_a_schedule(name):
    optimizer, player = start(mixadv.make_solver(name), start=1, every=2)
    for expected in [False, True] * 3:
        assert rounds(optimizer, player, 1) == [expected]
        outcome = optimizer.outcome
        assert expected == (outcome.radius is not None)
        assert expected or outcome.forwards == outcome.steps  # each a clean pass


@given(st.integers(0, 4), st.integers(1, 4))
def test_the_adversary_plays_every_nth_update_from_the_start(start, every):
    _, played = trained(PGD(steps=1), Schedule(start=start, every=every), count=8)
    assert [i for i, yes in enumerate(played) if yes] == list(range(start, 8, every))


def test_a_schedule_that_always_plays_changes_nothing():
    assert_same(trained(MAT(), Schedule())[0], trained(MAT(), None)[0])


def test_the_radius_follows_the_schedule():
    radii = [0.0, 0.1, 0.3]
    sphere = PGD(projection="sphere")
    optimizer, player = start(sphere, start=1, radius=lambda update: radii[update])
    optimizer.step(player.closure())
    for radius in radii:
        optimizer.step(player.closure())
        assert float(optimizer.outcome.radius) == pytest.approx(radius)


def test_a_plain_round_of_a_sampled_learner_closes_its_samples():
    optimizer, player = start(MAT(learner_steps=3, average="uniform"), every=2)
    for count in range(1, 5):
        optimizer.step(player.closure())
        assert (optimizer.game.learner.rounds, optimizer.game.learner.position) == (count, 0)


@pytest.mark.parametrize("how", ["backward", "loss"])
def test_micro_batches_of_one_optimizer_step_are_one_update(how):
    optimizer, player = start(every=2)
    for expected in [True, False] * 2:
        for _ in range(3):
            if how == "backward":
                optimizer.game.backward(player.closure())
            else:
                optimizer.game.loss(player.closure()).backward()
            assert (optimizer.outcome.payoff is not None) == expected
        optimizer.step()
        optimizer.zero_grad()


def test_a_game_beside_an_optimizer_counts_every_round():
    player = small()
    game = Game(player.model, PGD(), schedule=Schedule(start=2))
    played = [game.backward(player.closure()).payoff is not None for _ in range(4)]
    assert played == [False, False, True, True]


def test_a_resumed_schedule_goes_on_where_it_was():
    words = {"start": 1, "every": 2, "radius": lambda update: 0.05 * (1 + update)}
    optimizer, whole = start(FreeLB(), **words)
    rounds(optimizer, whole, 6)
    optimizer, first = start(FreeLB(), **words)
    rounds(optimizer, first, 3)
    state, model, random = optimizer.state_dict(), first.model.state_dict(), torch.get_rng_state()
    optimizer, second = start(FreeLB(), **words)
    second.model.load_state_dict(model)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    rounds(optimizer, second, 3)
    assert_same(copies(whole.model.parameters()), copies(second.model.parameters()))


def broken():
    raise KeyError("no batch")


def test_a_broken_round_is_no_update():
    optimizer, player = start(every=2)
    rounds(optimizer, player, 2)
    before = fingerprint(player.model)
    with pytest.raises(KeyError):
        optimizer.step(broken)
    assert_same(fingerprint(player.model)["weights"], before["weights"])
    assert rounds(optimizer, player, 1) == [True]


def test_a_pickled_optimizer_still_counts_its_steps():
    optimizer, player = start(every=2)
    optimizer.step(player.closure())
    optimizer = pickle.loads(pickle.dumps(optimizer))
    player = player._replace(model=optimizer.game.model)
    assert rounds(optimizer, player, 3) == [False, True, False]


def test_a_copied_game_counts_the_steps_of_its_own_optimizer():
    player = small()
    base = SGD(player.model.parameters(), lr=0.1)
    words = {"schedule": Schedule(every=2), "optimizer": base}
    game = Game(player.model, MAT(learner_steps=1), **words)
    for each in (game, copy.deepcopy(game)):
        for expected in [True, False] * 2:
            each.backward(player._replace(model=each.model).closure())
            each.optimizer.step()
            each.optimizer.zero_grad()
            assert (each.outcome.payoff is not None) == expected
        assert each.learner.count == 4


def test_a_broken_round_beside_an_optimizer_is_no_update():
    player = small()
    game = Game(player.model, PGD(), schedule=Schedule(every=2))
    game.backward(player.closure())
    with pytest.raises(KeyError):
        game.backward(broken)
    assert game.backward(player.closure()).payoff is None


def test_a_checkpoint_loaded_between_micro_batches_begins_an_update():
    optimizer, player = start(every=2)
    game, state = optimizer.game, optimizer.state_dict()
    game.backward(player.closure())  # the first micro-batch of two
    optimizer.load_state_dict(state)
    assert game.backward(player.closure()).payoff is not None
    optimizer.step()
    assert game.backward(player.closure()).payoff is None


def test_evaluating_a_best_response_is_no_update():
    player = small()
    game = Game(player.model, PGD(), schedule=Schedule(every=2))
    game.backward(player.closure())
    best_response(game, player.closure())
    assert game.backward(player.closure()).payoff is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"every": 1.5}, "every must be an integer, got 1.5"),
        ({"radius": 0.3}, "radius must be a function of the update, got 0.3"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(words, why):
    with pytest.raises((ValueError, TypeError), match=why):
        Schedule(**words)


def test_a_radius_that_cannot_be_meant_is_refused_when_it_comes():
    optimizer, player = start(radius=lambda update: -1.0)
    before = fingerprint(player.model)
    with pytest.raises(ValueError, match="PGD: radius must be finite and at least 0, got -1"):
        optimizer.step(player.closure())
    assert_same(fingerprint(player.model)["weights"], before["weights"])


def test_a_radius_that_cannot_be_meant_leaves_the_game_as_it_was():
    wanted = {1: -1.0}
    optimizer, player = start(radius=lambda update: wanted.pop(update, 0.1))
    rounds(optimizer, player, 1)
    with pytest.raises(ValueError, match="got -1"):
        optimizer.step(player.closure())
    assert optimizer.game.rounds.updates == 1
    optimizer.load_state_dict(optimizer.state_dict())  # which is refused within a round
    assert rounds(optimizer, player, 1) == [True]
