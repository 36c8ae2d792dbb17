"""What a user meets who asks for a game that cannot be played: what, why, what to change."""

import math

import numpy as np
import pytest
import torch

from mixadv.games import (
    Ball,
    Box,
    ContinuousGame,
    Gaussian,
    Hedge,
    Langevin,
    Magnetic,
    MatrixGame,
    Particles,
    Restarted,
    Torus,
    WassersteinFisherRao,
    duality_gap,
    solve,
)
from tests.test_errors import words

NAN, INF = math.nan, math.inf
PENNIES = MatrixGame([[1.0, -1.0], [-1.0, 1.0]])


def product(x, y):
    return (x * y).sum()


def game(payoff=product, learner=None, adversary=None, **how):
    return ContinuousGame(payoff, learner or Box(), adversary or Box(), **how)


def points(*shape):
    return torch.zeros(shape)


def branching(x, y):
    return product(x, y) if x.sum() > 0 else -product(x, y)


MATRICES = {
    "no rows": ([], ValueError, ("at least one row", "[0]")),
    "no columns": ([[]], ValueError, ("at least one row", "[1, 0]")),
    "a vector": ([1.0, 2.0], ValueError, ("matrix [m, n]", "[2]")),
    "four dimensions": (torch.zeros(1, 1, 1, 1), ValueError, ("batch [g, m, n]", "[1, 1, 1, 1]")),
    "an empty batch": (torch.zeros(0, 2, 2), ValueError, ("at least one row", "[0, 2, 2]")),
    "ragged rows": ([[1.0, 2.0], [3.0]], ValueError, ("rows of one length",)),
    "text": ([["a", "b"]], ValueError, ("numbers",)),
    "None": (None, ValueError, ("numbers",)),
    "NaN": ([[0.0, NAN]], ValueError, ("finite", "1 entries", "nan", "(0, 1)")),
    "infinity": ([[0.0], [-INF]], ValueError, ("finite", "-inf", "(1, 0)", "large")),
    "NaN in a batch": (torch.full((2, 1, 1), NAN), ValueError, ("2 entries", "(0, 0, 0)")),
    "complex": (torch.zeros(2, 2, dtype=torch.cfloat), TypeError, ("real", "complex64")),
    "complex list": ([[1j]], TypeError, ("real", "complex")),
    "overflowing range": ([[-1e308, 1e308]], ValueError, ("overflows", "1e+308", "divide")),
    "float32 range": (torch.tensor([[-3e38, 3e38]]), ValueError, ("overflows", "float32")),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_that_is_no_game_is_refused(name):
    payoff, error, expected = MATRICES[name]
    with pytest.raises(error, match=words(*expected)):
        MatrixGame(payoff)


@pytest.mark.parametrize(
    ("payoff", "dtype"),
    [
        ([[1, 2]], torch.float64),
        ([[True, False]], torch.float64),
        (np.array([[1, 2]], dtype=np.int32), torch.float64),
        (np.array([[1.0]], dtype=np.float32), torch.float32),
        (torch.ones(2, 2, dtype=torch.float16), torch.float32),
        (torch.ones(2, 2, dtype=torch.bfloat16), torch.float32),
        (torch.ones(2, 2, dtype=torch.long), torch.float64),
        (torch.ones(2, 2, requires_grad=True), torch.float32),
    ],
)
def test_numbers_of_every_kind_are_payoffs(payoff, dtype):
    made = MatrixGame(payoff)
    assert made.payoff.dtype == dtype
    assert not made.payoff.requires_grad
    assert solve(made, "hedge", 3, progress=False).gap.value >= 0


SETS = {
    "unbounded box": (lambda: Box(0.0, INF), ValueError, ("[0.0, inf]", "Gaussian(dim, scale)")),
    "unbounded below": (lambda: Box(-INF, 0.0), ValueError, ("unbounded", "Gaussian")),
    "one unbounded end of two": (lambda: Box([0.0, 0.0], [1.0, INF]), ValueError, ("inf",)),
    "empty box": (lambda: Box(1.0, 1.0), ValueError, ("low must be below high", "[1.0, 1.0]")),
    "reversed box": (lambda: Box([0.0, 2.0], [1.0, 1.0]), ValueError, ("[2.0, 1.0]",)),
    "NaN box": (lambda: Box(NAN, 1.0), ValueError, ("low", "nan")),
    "uneven ends": (
        lambda: Box([0.0], [1.0, 2.0]),
        ValueError,
        ("differ in their number of dimensions", "2"),
    ),
    "no ends": (lambda: Box([], []), ValueError, ("differ in their number",)),
    "tensor ends": (lambda: Box(torch.zeros(2), 1.0), TypeError, ("low", "number")),
    "text ends": (lambda: Box("a", 1.0), TypeError, ("low", "'a'")),
    "box of no dimension": (lambda: Box(0.0, 1.0, 0), ValueError, ("dim", "0")),
    "half a torus": (lambda: Torus(0.5), TypeError, ("Torus", "0.5")),
    "negative ball": (lambda: Ball(2, -1.0), ValueError, ("Ball", "radius", "-1.0")),
    "flat ball": (lambda: Ball(2, 0.0), ValueError, ("Ball", "above 0")),
    "flat Gaussian": (lambda: Gaussian(1, 0.0), ValueError, ("Gaussian", "above 0")),
    "no set": (lambda: game(learner="[-1, 1]"), TypeError, ("learner", "Box(-1, 1)")),
    "a class for a set": (lambda: game(adversary=Torus), TypeError, ("adversary", "Torus")),
}

GAMES = {
    "no function": (lambda: game(3.0), TypeError, ("function", "3.0")),
    "a vector": (
        lambda: game(lambda x, y: x * y, Box(dim=2), Box(dim=2)),
        ValueError,
        ("one number", "[2]", "sum"),
    ),
    "a number": (lambda: game(lambda x, y: 1.0), TypeError, ("real tensor", "float", "torch")),
    "an integer": (lambda: game(lambda x, y: (x > y).sum()), TypeError, ("int64",)),
    "a complex number": (lambda: game(lambda x, y: product(x, y) * 1j), TypeError, ("complex",)),
    "NaN": (lambda: game(lambda x, y: (x - y).log().sum()), ValueError, ("finite", "nan", "x=[")),
    "infinity": (lambda: game(lambda x, y: (x * INF).sum()), ValueError, ("finite", "inf")),
    "a branch": (lambda: game(branching), TypeError, ("vmap", "torch.where")),
    "an item": (lambda: game(lambda x, y: x.sum() * y.item()), TypeError, ("vmap", ".item()")),
    "negative slope": (lambda: game(lipschitz=-1.0), ValueError, ("lipschitz", "-1.0")),
    "slope in words": (lambda: game(lipschitz="steep"), TypeError, ("lipschitz", "'steep'")),
    "integer points": (lambda: game(dtype=torch.int64), TypeError, ("dtype", "int64")),
}

ASKED = {
    "no game": (lambda: solve([[1.0]]), TypeError, ("MatrixGame(payoff)", "list")),
    "unknown method": (lambda: solve(PENNIES, "hegde"), ValueError, ("'hegde'", "mean 'hedge'")),
    "near particles": (lambda: solve(game(), "langevine"), ValueError, ("mean 'langevin'",)),
    "a class": (lambda: solve(PENNIES, Hedge), TypeError, ("Hedge()",)),
    "a list": (lambda: solve(PENNIES, ["hedge"]), TypeError, ("name or an object", "['hedge']")),
    "parameters twice": (
        lambda: solve(PENNIES, Hedge(), step_size=0.1),
        TypeError,
        ("step_size", "Hedge(...)"),
    ),
    "unknown parameter": (
        lambda: solve(game(), "langevin", temperatur=0.1),
        ValueError,
        ("'temperatur'", "mean 'temperature'"),
    ),
    "particles of a matrix": (
        lambda: solve(PENNIES, "langevin"),
        ValueError,
        ("langevin moves points", "MatrixGame", "hedge"),
    ),
    "no steps": (lambda: solve(PENNIES, steps=0), ValueError, ("steps", "0")),
    "half steps": (lambda: solve(PENNIES, steps=1.5), TypeError, ("steps", "1.5")),
    "negative seed": (lambda: solve(game(), seed=-1), ValueError, ("seed", "-1")),
    "negative tolerance": (lambda: solve(PENNIES, tolerance=-1.0), ValueError, ("tolerance",)),
    "negative step": (lambda: solve(PENNIES, step_size=-1.0), ValueError, ("step_size", "-1.0")),
    "step in words": (lambda: Langevin(step_size="small"), ValueError, ("'auto'", "'small'")),
    "three steps": (lambda: Hedge(step_size=(1, 1, 1)), ValueError, ("pair",)),
    "NaN step": (lambda: WassersteinFisherRao(mirror_step=NAN), ValueError, ("mirror_step",)),
    "negative heat": (lambda: Langevin(temperature=-0.1), ValueError, ("temperature", "-0.1")),
    "no heat": (lambda: Magnetic(temperature=0.0), ValueError, ("temperature=0", "mirror_prox")),
    "no particles": (lambda: Langevin(particles=0), ValueError, ("particles", "0")),
    "no grid": (lambda: solve(game(), "hedge", grid=0), ValueError, ("grid", "0")),
    "no grid for particles": (lambda: solve(game(), "langevin", grid=0), ValueError, ("grid",)),
    "one node": (lambda: solve(game(), "hedge", grid=1), ValueError, ("grid", "at least 2")),
    "too many nodes": (
        lambda: solve(game(learner=Box(dim=2), adversary=Box(dim=2)), "hedge", grid=1000),
        ValueError,
        ("1000 nodes", "1000000", "particles"),
    ),
    "a grid in three dimensions": (
        lambda: solve(game(learner=Box(dim=3), adversary=Box(dim=3)), "hedge"),
        ValueError,
        ("3 dimensions", "grid=", "langevin"),
    ),
    "one start": (lambda: solve(PENNIES, start=[[0.5, 0.5]]), TypeError, ("pair",)),
    "a tensor as start": (lambda: solve(game(), start=points(2, 2)), TypeError, ("pair",)),
    "start of another size": (
        lambda: solve(PENNIES, start=([0.5, 0.5], [1.0])),
        ValueError,
        ("start[1]", "[..., 2]", "[1]"),
    ),
    "start off the simplex": (
        lambda: solve(PENNIES, start=([0.5, 0.6], [0.5, 0.5])),
        ValueError,
        ("start[0]", "simplex"),
    ),
    "start of another count": (
        lambda: solve(game(), "langevin", particles=4, start=(points(4, 1), points(3, 1))),
        ValueError,
        ("start[1]", "[4, 1]", "[3, 1]"),
    ),
    "start of another dimension": (
        lambda: solve(game(), "langevin", particles=4, start=(points(4, 2), points(4, 2))),
        ValueError,
        ("start[0]", "[N, 1]", "[4, 2]"),
    ),
    "NaN start": (
        lambda: solve(game(), "langevin", particles=1, start=(points(1, 1) * NAN, points(1, 1))),
        ValueError,
        ("start[0]", "outside", "nan"),
    ),
    "NaN start on a circle": (
        lambda: game(learner=Torus(), adversary=Torus()).duality_gap(points(1, 1) * NAN, [[0.0]]),
        ValueError,
        ("learner", "outside", "nan"),
    ),
    "start outside": (
        lambda: solve(game(), "langevin", particles=1, start=(points(1, 1) + 2, points(1, 1))),
        ValueError,
        ("start[0]", "outside", "2.0", "project"),
    ),
    "gap off the simplex": (
        lambda: duality_gap(PENNIES, [0.5, 0.4], [0.5, 0.5]),
        ValueError,
        ("learner", "simplex"),
    ),
    "gap of points outside": (
        lambda: duality_gap(game(), points(2, 1), points(2, 1) - 7),
        ValueError,
        ("adversary", "2 points outside", "-7.0"),
    ),
    "gap of wide points": (
        lambda: duality_gap(game(), points(2, 3), points(2, 1)),
        ValueError,
        ("learner", "[N, 1]", "[2, 3]"),
    ),
    "gap of no points": (
        lambda: duality_gap(game(), points(2, 1), points(0, 1)),
        ValueError,
        ("adversary", "at least 1"),
    ),
    "no restarts": (
        lambda: game(learner=Box(dim=3), adversary=Box(dim=3)).duality_gap(
            points(1, 3), points(1, 3), restarts=0
        ),
        ValueError,
        ("restarts", "0"),
    ),
}


@pytest.mark.parametrize("table", [SETS, GAMES, ASKED], ids=["sets", "games", "solve"])
def test_what_cannot_be_played_is_refused_with_a_reason(table):
    for name, (build, error, expected) in table.items():
        with pytest.raises(error) as raised:
            build()
        assert raised.match(words(*expected)), name


def test_particles_that_leave_for_infinity_are_an_error_not_a_gap():
    runaway = game(lambda x, y: (x**4).sum() + product(x, y), Gaussian(1, 3.0), Gaussian(1))
    with pytest.raises(FloatingPointError, match="step_size"):
        solve(runaway, "langevin", 50, step_size=1.0, progress=False)


MATRIX = MatrixGame([[3, -1], [-2, 1]])
HEAVY = Particles(torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
POLE = game(lambda x, y: 1 / (x - 0.5).abs().sum() + y.sum(), Torus(), Torus())


@pytest.mark.parametrize(
    ("call", "kind", "why"),
    [
        (lambda: game().duality_gap(torch.zeros(1, 1), HEAVY), ValueError, "sum 1, got .* sum 2"),
        (lambda: POLE.duality_gap([[0.0]], [[0.0]], grid=10), ValueError, r"x=\[0.5\] is inf"),
        (lambda: solve(PENNIES, grid=3), ValueError, "grid=3 is for continuous games"),
        (lambda: Box([0, 0], [1, 1], dim=3), ValueError, "differ in their number"),
        (lambda: Restarted(inner="hedge"), TypeError, "class of methods such as Hedge"),
        (lambda: solve(PENNIES, start=(torch.ones(3, 2) / 2, [0.5, 0.5])), ValueError, r"\[3, 2\]"),
        (lambda: solve(MATRIX, "hedge", step_size=1e308), FloatingPointError, "overflow"),
    ],
)
def test_what_would_give_a_wrong_answer_is_refused(call, kind, why):
    with pytest.raises(kind, match=why):
        call()


def test_a_payoff_may_compute_in_another_precision():
    single = game(lambda x, y: (x.float() * y.float()).sum())
    assert solve(single, "langevin", 5).value.dtype == torch.float64
