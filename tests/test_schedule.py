"""Rounds that are not played are plain training; updates count as optimizer steps do."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

import mixadv
import mixadv.equilibrium
from mixadv import MAT, PGD, FreeLB, Schedule, wrap
from tests.zoo import assert_same, fingerprint, small


def weights(player):
    return [p.detach().clone() for p in player.model.parameters()]


def trained(solver, schedule=None, rounds=4, seed=0):
    player = small(seed=seed)
    optimizer = SGD(player.model.parameters(), lr=0.1)
    if solver is not None:
        optimizer = wrap(optimizer, player.model, solver, schedule=schedule)
    payoffs = []
    for _ in range(rounds):
        if solver is None:
            optimizer.zero_grad()
            player.closure()()[0].backward()
            optimizer.step()
        else:
            optimizer.step(player.closure())
            payoffs.append(optimizer.outcome.payoff)
    return player, payoffs


@pytest.mark.parametrize("solver", [PGD(), FreeLB(), mixadv.SMART(proximal_weight=0.0)])
def test_training_before_the_start_is_plain_training(solver):
    plain, _ = trained(None)
    later, payoffs = trained(solver, Schedule(start=4))
    assert payoffs == [None] * 4
    assert_same(weights(plain), weights(later))


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_every_solver_follows_a_schedule(name):
    player = small()
    optimizer = SGD(player.model.parameters(), lr=0.1)
    schedule = Schedule(start=1, every=2)
    optimizer = wrap(optimizer, player.model, mixadv.make_solver(name), schedule=schedule)
    played = []
    for _ in range(6):
        optimizer.step(player.closure())
        outcome = optimizer.outcome
        played.append(outcome.payoff is not None)
        assert played[-1] == (outcome.radius is not None)
        assert played[-1] or outcome.forwards == outcome.steps  # each a clean pass
    assert played == [False, True] * 3


@given(st.integers(0, 4), st.integers(1, 4))
def test_the_adversary_plays_every_nth_update_from_the_start(start, every):
    _, payoffs = trained(PGD(steps=1), Schedule(start=start, every=every), rounds=8)
    played = [i for i, payoff in enumerate(payoffs) if payoff is not None]
    assert played == list(range(start, 8, every))


def test_a_schedule_that_always_plays_changes_nothing():
    always, _ = trained(MAT(), Schedule())
    without, _ = trained(MAT(), None)
    assert_same(weights(always), weights(without))


def test_the_radius_follows_the_schedule():
    radii = [0.0, 0.1, 0.3]
    player = small()
    schedule = Schedule(start=1, radius=lambda update: radii[update])
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1),
        player.model,
        PGD(projection="sphere"),
        schedule=schedule,
    )
    optimizer.step(player.closure())
    for radius in radii:
        optimizer.step(player.closure())
        assert float(optimizer.outcome.radius) == pytest.approx(radius)


def test_a_plain_round_of_a_sampled_learner_closes_its_samples():
    player = small()
    solver = MAT(learner_steps=3, average="uniform")
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1), player.model, solver, schedule=Schedule(every=2)
    )
    for rounds in range(1, 5):
        optimizer.step(player.closure())
        assert (optimizer.game.learner.rounds, optimizer.game.learner.position) == (rounds, 0)


@pytest.mark.parametrize("how", ["backward", "loss"])
def test_micro_batches_of_one_optimizer_step_are_one_update(how):
    player = small()
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1), player.model, PGD(), schedule=Schedule(every=2)
    )
    played = []
    for _ in range(4):
        for _ in range(3):
            if how == "backward":
                optimizer.game.backward(player.closure())
            else:
                optimizer.game.loss(player.closure()).backward()
            played.append(optimizer.outcome.payoff is not None)
        optimizer.step()
        optimizer.zero_grad()
    assert played == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def test_a_game_beside_an_optimizer_counts_every_round():
    player = small()
    game = mixadv.Game(player.model, PGD(), schedule=Schedule(start=2))
    played = [game.backward(player.closure()).payoff is not None for _ in range(4)]
    assert played == [False, False, True, True]


def test_a_resumed_schedule_goes_on_where_it_was():
    def player_and_optimizer():
        player = small()
        schedule = Schedule(start=1, every=2, radius=lambda update: 0.05 * (1 + update))
        return player, wrap(
            SGD(player.model.parameters(), lr=0.1), player.model, FreeLB(), schedule=schedule
        )

    whole, optimizer = player_and_optimizer()
    for _ in range(6):
        optimizer.step(whole.closure())
    first, optimizer = player_and_optimizer()
    for _ in range(3):
        optimizer.step(first.closure())
    state, model, random = optimizer.state_dict(), first.model.state_dict(), torch.get_rng_state()
    second, optimizer = player_and_optimizer()
    second.model.load_state_dict(model)
    optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    for _ in range(3):
        optimizer.step(second.closure())
    assert_same(weights(whole), weights(second))


def test_a_broken_round_is_no_update():
    player = small()
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1), player.model, PGD(), schedule=Schedule(every=2)
    )
    optimizer.step(player.closure())
    optimizer.step(player.closure())
    before = fingerprint(player.model)

    def broken():
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    assert_same(fingerprint(player.model)["weights"], before["weights"])
    optimizer.step(player.closure())
    assert optimizer.outcome.payoff is not None


def test_a_pickled_optimizer_still_counts_its_steps():
    player = small()
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1), player.model, PGD(), schedule=Schedule(every=2)
    )
    optimizer.step(player.closure())
    optimizer = pickle.loads(pickle.dumps(optimizer))
    player = player._replace(model=optimizer.game.model)
    played = []
    for _ in range(3):
        optimizer.step(player.closure())
        played.append(optimizer.outcome.payoff is not None)
    assert played == [False, True, False]


def test_a_copied_game_counts_the_steps_of_its_own_optimizer():
    player = small()
    base = SGD(player.model.parameters(), lr=0.1)
    game = mixadv.Game(
        player.model, MAT(learner_steps=1), schedule=Schedule(every=2), optimizer=base
    )
    twin = copy.deepcopy(game)
    for one in (game, twin):
        played = []
        for _ in range(4):
            one.backward(player._replace(model=one.model).closure())
            one.optimizer.step()
            one.optimizer.zero_grad()
            played.append(one.outcome.payoff is not None)
        assert played == [True, False, True, False]
        assert one.learner.count == 4


def test_a_broken_round_beside_an_optimizer_is_no_update():
    player = small()
    game = mixadv.Game(player.model, PGD(), schedule=Schedule(every=2))
    game.backward(player.closure())

    def broken():
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        game.backward(broken)
    assert game.backward(player.closure()).payoff is None


def test_a_checkpoint_loaded_between_micro_batches_begins_an_update():
    player = small()
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1), player.model, PGD(), schedule=Schedule(every=2)
    )
    game, state = optimizer.game, optimizer.state_dict()
    game.backward(player.closure())  # the first micro-batch of two
    optimizer.load_state_dict(state)
    assert game.backward(player.closure()).payoff is not None
    optimizer.step()
    assert game.backward(player.closure()).payoff is None


def test_evaluating_a_best_response_is_no_update():
    player = small()
    game = mixadv.Game(player.model, PGD(), schedule=Schedule(every=2))
    game.backward(player.closure())
    mixadv.equilibrium.best_response(game, player.closure())
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
    player = small()
    optimizer = wrap(
        SGD(player.model.parameters(), lr=0.1),
        player.model,
        PGD(),
        schedule=Schedule(radius=lambda update: -1.0),
    )
    before = fingerprint(player.model)
    with pytest.raises(ValueError, match="PGD: radius must be finite and at least 0, got -1"):
        optimizer.step(player.closure())
    assert_same(fingerprint(player.model)["weights"], before["weights"])
