"""Any argument of anything public is taken, or refused in words; never by an accident."""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

import mixadv
from mixadv.equilibrium import best_response, exploitability
from mixadv.games import (
    METHODS,
    PARTICLE_METHODS,
    Ball,
    Box,
    ContinuousGame,
    Gaussian,
    MatrixGame,
    Torus,
    duality_gap,
    solve,
)
from tests.zoo import assert_same, fingerprint, small, wrapped

HUGE = 10**400
NOTHING = float("nan")
JUNK: list[Any] = [None, True, -1, 0, 2, HUGE, 10**25, 0.5, -0.5, 1e300, NOTHING, float("inf"), 1j]
JUNK += ["", "kl", "auto", "cpu", b"l2", [], ["kl"], [None], {}, {"loss": 1}, set(), (), (1, 2)]
JUNK += [(0.5, -0.5), [[1.0, 2.0], [3.0]], [[1, 2], [3, 4]], object(), print, int, lambda *_: None]
JUNK += [torch.float32, torch.int64, np.float64(0.5), np.int64(2), np.ones((2, 2)), np.array(["a"])]
JUNK += [torch.ones(()), torch.ones(2), torch.ones(2, 2), torch.ones(0, 2), [torch.ones(2)]]
JUNK += [torch.full((2, 2), NOTHING), torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2) * 1j]

matrix = MatrixGame([[0.0, 1.0], [1.0, 0.0]])
interval = Box(-1, 1)


def product(x: Any, y: Any) -> Any:
    return (x * y).sum()


continuous = ContinuousGame(product, interval, interval)
solids = ContinuousGame(product, Ball(3), Ball(3))
finitely = partial(solve, matrix, "hedge", 2, progress=False)
on_grid = partial(solve, continuous, "hedge", 2, grid=3, progress=False)
moving = partial(solve, continuous, "langevin", 2, grid=3, particles=2, progress=False)
points, cube = torch.zeros(1, 1), torch.zeros(1, 3)

# What is called, and which of its arguments are replaced. Numbers that only make it long are left
# out: `STEPS` takes none of a billion.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "matrix game": (MatrixGame, ("payoff",)),
    "box": (Box, ("low", "high", "dim")),
    "box of tuples": (lambda low, high: Box((0.0, low), (1.0, high)), ("low", "high")),
    "torus": (Torus, ("dim",)),
    "ball": (partial(Ball, dim=2), ("dim", "radius")),
    "gaussian": (Gaussian, ("dim", "scale")),
    "continuous game": (
        partial(ContinuousGame, payoff=product, learner=interval, adversary=interval),
        ("payoff", "learner", "adversary", "lipschitz", "dtype", "device"),
    ),
    "payoff": (
        lambda returned: ContinuousGame(lambda x, y: returned, interval, interval),
        ("returned",),
    ),
    "solve": (
        lambda game=matrix, method="hedge", steps=2, **more: solve(game, method, steps, **more),
        ("game", "method", "steps", "start", "tolerance", "grid", "seed", "progress", "step_size"),
    ),
    "start of weights": (lambda x, y=(0.5, 0.5): finitely(start=(x, y)), ("x", "y")),
    "solve on a grid": (on_grid, ("start", "grid", "tolerance", "step_size")),
    "solve by particles": (
        moving,
        ("start", "tolerance", "grid", "seed", "step_size", "temperature", "particles"),
    ),
    "start of points": (lambda x, y=points: moving(start=(x, y), particles=1), ("x", "y")),
    "gap": (
        lambda game=matrix, x=(0.5, 0.5), y=(0.5, 0.5): duality_gap(game, x, y),
        ("game", "x", "y"),
    ),
    "gap on a grid": (
        lambda x=points, y=points, grid=3: duality_gap(continuous, x, y, grid=grid),
        ("x", "y", "grid"),
    ),
    "gap by climbing": (
        lambda x=cube, y=cube, restarts=1, steps=1, seed=0: duality_gap(
            solids, x, y, restarts=restarts, steps=steps, seed=seed
        ),
        ("x", "y", "restarts", "steps", "seed"),
    ),
    "schedule": (mixadv.Schedule, ("start", "every", "radius")),
    "ascent": (mixadv.Ascent, tuple(f.name for f in fields(mixadv.Ascent))),
}
CALLS |= {
    name: (method, tuple(f.name for f in fields(method) if f.init))
    for name, method in {**METHODS, **PARTICLE_METHODS, **mixadv.SOLVERS}.items()
}


def wrap(**changed: Any) -> None:
    model = small().model
    base = SGD(model.parameters(), lr=0.1)
    mixadv.wrap(**{"optimizer": base, "model": model, "solver": mixadv.PGD(), **changed})


def game(**changed: Any) -> None:
    mixadv.Game(**{"model": small().model, "solver": mixadv.PGD(), **changed})


CALLS |= {
    "wrap": (wrap, ("optimizer", "model", "solver", "site", "seed")),
    "game": (game, ("model", "solver", "site", "seed", "optimizer")),
    "solver": (mixadv.make_solver, ("name",)),
}


def refused(call: Callable[[], Any]) -> bool:
    """Return whether a call is refused, in words; what else it raises is an accident."""
    found: list[str] = []
    try:
        call()
    except (TypeError, ValueError, mixadv.GameError) as error:
        found.append(str(error))
    assert all(len(words) > 10 for words in found)
    return bool(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_any_argument_alone_is_taken_or_refused_in_words(name: str):
    call, arguments = CALLS[name]
    verdicts = {refused(partial(call, **{a: v})) for a in arguments for v in JUNK}
    assert True in verdicts  # so that the calls reach what checks them


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_any_arguments_together_are_taken_or_refused_in_words(name: str, data: st.DataObject):
    call, arguments = CALLS[name]
    small_numbers = st.one_of(st.integers(-3, 9), st.floats(), st.text(max_size=2), st.booleans())
    values = st.one_of(small_numbers, st.lists(small_numbers, max_size=3), st.sampled_from(JUNK))
    refused(partial(call, **data.draw(st.dictionaries(st.sampled_from(arguments), values))))


def load_with(part: str, name: str, optimizer: Any, closure: Any, junk: Any) -> None:
    """Load a checkpoint with one entry replaced, and train on."""
    state = optimizer.state_dict()
    ours = dict(state["mixadv"])
    if ours[part] is None:
        raise ValueError("nothing to replace")
    ours[part] = {**ours[part], name: junk}
    optimizer.load_state_dict({**state, "mixadv": ours})
    optimizer.step(closure)


USES: dict[str, Callable[[mixadv.GameOptimizer, Any, Any], Any]] = {
    "step": lambda optimizer, closure, junk: optimizer.step(0 if junk is None else junk),
    "backward": lambda optimizer, closure, junk: optimizer.game.backward(junk),
    "loss": lambda optimizer, closure, junk: optimizer.game.loss(junk),
    "plain loss": lambda optimizer, closure, junk: torch.no_grad()(optimizer.game.loss)(junk),
    "a closure's result": lambda optimizer, closure, junk: optimizer.step(lambda: junk),
    "a loss": lambda optimizer, closure, junk: optimizer.game.loss(lambda: (junk, closure()[1])),
    "check": lambda optimizer, closure, junk: optimizer.step(closure, check=junk),
    "explain": lambda optimizer, closure, junk: optimizer.game.explain(junk),
    "attack": lambda optimizer, closure, junk: best_response(optimizer.game, junk),
    "attack on": lambda optimizer, closure, junk: best_response(junk, closure),
    "certificate": lambda optimizer, closure, junk: exploitability(optimizer.game, junk),
    "certificate of": lambda optimizer, closure, junk: exploitability(junk, closure),
    "level": lambda optimizer, closure, junk: exploitability(
        optimizer.game, closure, steps=1, restarts=1, level=junk
    ),
    "a game's state": lambda optimizer, closure, junk: optimizer.game.load_state_dict(junk),
    "our state": lambda optimizer, closure, junk: optimizer.load_state_dict(
        {**optimizer.state_dict(), "mixadv": junk}
    ),
    "our game's state": lambda optimizer, closure, junk: optimizer.load_state_dict(
        {**optimizer.state_dict(), "mixadv": {**optimizer.state_dict()["mixadv"], "game": junk}}
    ),
    "our learner's state": lambda optimizer, closure, junk: optimizer.load_state_dict(
        {**optimizer.state_dict(), "mixadv": {**optimizer.state_dict()["mixadv"], "learner": junk}}
    ),
    **{
        f"{part}'s {name}": partial(load_with, part, name)
        for part, names in {
            "game": ("seed", "round", "updates", "unit", "memory", "modules"),
            "learner": ("count", "position", "rounds", "backup", "average", "samples"),
        }.items()
        for name in names
    },
    "schedule": lambda optimizer, closure, junk: mixadv.wrap(
        optimizer.base, optimizer.game.model, mixadv.PGD(), schedule=junk
    ),
    "radius of a schedule": lambda optimizer, closure, junk: mixadv.Game(
        optimizer.game.model, mixadv.PGD(), schedule=mixadv.Schedule(radius=lambda update: junk)
    ).backward(closure),
    "backward=": lambda optimizer, closure, junk: optimizer.game.backward(closure, junk),
}


# A solver without a learner where that is another way through.
WITHOUT = ("step", "backward", "loss", "a closure's result", "a game's state", "our state")
WITHOUT += ("our game's state", "our learner's state")


@pytest.mark.parametrize(
    ("use", "name"), [(use, "mat") for use in USES] + [(use, "pgd") for use in WITHOUT]
)
def test_what_is_refused_leaves_no_trace(use: str, name: str):
    """In a later round, whose checks are fewer."""
    player = small()
    optimizer = wrapped(player, name, partial(SGD, momentum=0.5))
    optimizer.step(player.closure())
    saved = copy.deepcopy([player.model.state_dict(), optimizer.state_dict()])
    found, count = fingerprint(player.model, optimizer), 0
    for junk in JUNK:
        if use == "backward=" and callable(junk):
            continue  # which may do as it likes
        if refused(lambda junk=junk: USES[use](optimizer, player.closure(), junk)):
            assert_same(fingerprint(player.model, optimizer), found)
            count += 1
            continue
        player.model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        found = fingerprint(player.model, optimizer)
    assert count > 20
