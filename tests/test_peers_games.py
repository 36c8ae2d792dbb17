"""Other libraries find the same values, where they solve a game at all.

nashpy and open_spiel maximise for the row player, so they are given the payoffs with the sign
changed. What they return is judged by the gap that mixadv computes from the payoffs alone.
"""

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import games_compared
from mixadv.games import MatrixGame, Solution, solve
from peers import CONTENDERS, relative_gap

SHAPES = [(3, 3), (2, 5), (4, 4)]
EXACT = 1e-8
STEPS = 30_000

Equilibria = list[tuple[Any, Any]]


@pytest.fixture(scope="module")
def nashpy() -> Any:
    """Return nashpy."""
    return pytest.importorskip("nashpy", reason="nashpy is the peer: pip install nashpy")


@pytest.fixture(scope="module")
def pyspiel() -> Any:
    """Return open_spiel's bindings."""
    return pytest.importorskip("pyspiel", reason="open_spiel is the peer: pip install open_spiel")


@cache
def random_games(shape: tuple[int, int], count: int = 20, seed: int = 0) -> Solution:
    """Return uniform random games, solved together."""
    draw = torch.Generator().manual_seed(seed)
    payoff = torch.rand((count, *shape), generator=draw, dtype=torch.float64)
    return solve(MatrixGame(payoff), "restarted", STEPS, tolerance=EXACT / 10)


def value(payoff: Tensor, x: Any, y: Any) -> float:
    """Return the value of a game if the pair is an equilibrium; else fail."""
    game = MatrixGame(payoff)
    x, y = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))
    assert min(x.min().item(), y.min().item()) > -1e-9
    assert max(abs(x.sum().item() - 1), abs(y.sum().item() - 1)) < 1e-9
    assert game.duality_gap(x, y) < EXACT
    return game.value(x, y).item()


def found(library: Any, payoff: Tensor, method: str) -> Equilibria:
    """Return what a method of nashpy finds; it warns where it suspects degeneracy."""
    game = library.Game(-payoff.numpy(), payoff.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if method == "linear_program":
            return [game.linear_program()]
        if method == "lemke_howson":
            return [game.lemke_howson(initial_dropped_label=0)]
        return list(getattr(game, method)())


# nashpy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_random_games_are_solved_to_rounding(shape: tuple[int, int]):
    assert random_games(shape).gap.value.max() < EXACT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "solved"),
    [
        ("linear_program", 1.0),
        ("lemke_howson", 1.0),
        ("vertex_enumeration", 1.0),
        ("support_enumeration", 0.7),  # rounding hides some equilibria from it, see below
    ],
)
def test_values_are_those_of_nashpy(
    method: str, solved: float, shape: tuple[int, int], nashpy: Any
):
    ours = random_games(shape)
    theirs = [found(nashpy, payoff, method) for payoff in ours.game.payoff]
    assert sum(map(bool, theirs)) >= solved * len(theirs)
    for payoff, mine, equilibria in zip(ours.game.payoff, ours.value, theirs, strict=True):
        for x, y in equilibria:
            assert abs(value(payoff, x, y) - mine.item()) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (5, 5), (10, 10), (8, 20), (20, 20)])
def test_values_of_many_games_are_those_of_a_linear_program(shape: tuple[int, int], nashpy: Any):
    """The hardest of these games keep a gap above rounding; the gap still brackets the value."""
    ours = random_games(shape, count=50, seed=1)
    assert ours.gap.value.median() < EXACT
    assert ours.gap.value.max() < 1e-4
    for payoff, mine, gap in zip(ours.game.payoff, ours.value, ours.gap.value, strict=True):
        [(x, y)] = found(nashpy, payoff, "linear_program")
        assert abs(value(payoff, x, y) - mine.item()) < gap.item() + EXACT


KNOWN: dict[str, tuple[list[list[float]], float]] = {
    "matching pennies": ([[1, -1], [-1, 1]], 0),
    "rock, paper, scissors": ([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], 0),
    "mixed 2 by 2": ([[3, -1], [-2, 1]], 1 / 7),
    "saddle point": ([[4, 2, 5], [3, 1, 1], [6, 0, 2]], 3),
    "cost of hiding": ([[1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4]], 12 / 25),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_values_are_found_by_both(name: str, nashpy: Any):
    payoff, known = torch.tensor(KNOWN[name][0], dtype=torch.float64), KNOWN[name][1]
    ours = solve(MatrixGame(payoff), "restarted", STEPS, tolerance=EXACT / 10)
    assert ours.value.item() == pytest.approx(known, abs=EXACT)
    [(x, y)] = found(nashpy, payoff, "linear_program")
    assert value(payoff, x, y) == pytest.approx(known, abs=EXACT)


# Degenerate games ------------------------------------------------------------------------------

TIED = torch.tensor([[1, -1, 0], [-1, 0, 1], [-1, 1, 0]]).double()
WEAK = torch.tensor([[0, 0], [0, 1]]).double()
TWINS = torch.tensor([[1, -1], [1, -1], [-1, 1]]).double()
CONSTANT = torch.full((3, 3), 2.0, dtype=torch.float64)


def nothing(library: Any, payoff: Tensor) -> None:
    """Support enumeration finds no equilibrium, and suspects degeneracy."""
    with pytest.warns(RuntimeWarning, match=r"An even number of \(0\) equilibria"):
        assert list(library.Game(-payoff.numpy(), payoff.numpy()).support_enumeration()) == []


def no_vertex(library: Any, payoff: Tensor) -> None:
    """Vertex enumeration divides by zero and finds no equilibrium."""
    with pytest.warns(RuntimeWarning):
        assert list(library.Game(-payoff.numpy(), payoff.numpy()).vertex_enumeration()) == []


def no_polytope(library: Any, payoff: Tensor) -> None:
    """Vertex enumeration fails on polytopes without an inner point."""
    with pytest.raises(TypeError):
        list(library.Game(-payoff.numpy(), payoff.numpy()).vertex_enumeration())


def an_even_number(library: Any, payoff: Tensor) -> None:
    """Support enumeration warns of degeneracy; games in general position have an odd number."""
    with pytest.warns(RuntimeWarning, match=r"An even number of \(2\) equilibria"):
        assert len(list(library.Game(-payoff.numpy(), payoff.numpy()).support_enumeration())) == 2


@pytest.mark.parametrize(
    ("payoff", "known", "fails"),
    [
        (TIED, 0.0, nothing),
        (WEAK, 0.0, no_vertex),
        (CONSTANT, 2.0, no_polytope),
        (TWINS, 0.0, an_even_number),
    ],
    ids=["integers with ties", "weakly dominated", "constant", "duplicated rows"],
)
def test_degenerate_games_are_solved(
    payoff: Tensor, known: float, fails: Callable[[Any, Tensor], None], nashpy: Any
):
    fails(nashpy, payoff)
    ours = solve(MatrixGame(payoff), "restarted", STEPS, tolerance=EXACT / 10)
    assert float(ours.gap) < EXACT
    assert ours.value.item() == pytest.approx(known, abs=EXACT)


def test_games_whose_ties_are_lost_to_rounding_are_solved(nashpy: Any):
    ours = random_games((4, 4))
    lost = [p for p in ours.game.payoff if not found(nashpy, p, "support_enumeration")]
    assert lost, "support enumeration compares best responses exactly; here it solved all games"
    nothing(nashpy, lost[0])
    assert ours.gap.value.max() < EXACT


# open_spiel ------------------------------------------------------------------------------------


def payoffs(game: Any) -> Tensor:
    """Return what the row player pays."""
    return -torch.from_numpy(np.array(game.row_utilities()))


@pytest.mark.parametrize(
    ("name", "known"),
    [("matrix_mp", 0.0), ("matrix_rps", 0.0), ("matrix_rpsw", 0.0), ("matrix_brps", 0.0)],
)
def test_matrix_games_of_open_spiel_have_their_values(name: str, known: float, pyspiel: Any):
    payoff = payoffs(pyspiel.load_matrix_game(name))
    ours = solve(MatrixGame(payoff), "restarted", STEPS, tolerance=EXACT / 10)
    assert float(ours.gap) < EXACT
    assert ours.value.item() == pytest.approx(known, abs=EXACT)


def test_kuhn_poker_costs_its_second_player_an_eighteenth(pyspiel: Any):
    game = pyspiel.extensive_to_matrix_game(pyspiel.load_game("kuhn_poker"))
    ours = solve(MatrixGame(payoffs(game)), "restarted", STEPS, tolerance=EXACT / 10)
    assert float(ours.gap) < EXACT
    assert ours.value.item() == pytest.approx(1 / 18, abs=EXACT)


def test_values_are_those_of_the_linear_program_of_open_spiel(pyspiel: Any):
    """Which asks its solver for 1e-7, so its weights are on the simplex up to that."""
    for module in ("cvxpy", "ecos"):
        pytest.importorskip(module, reason=f"open_spiel's linear program needs {module}")
    from open_spiel.python.algorithms import lp_solver

    for shape in SHAPES:
        ours = random_games(shape)
        for payoff, mine in zip(ours.game.payoff[:5], ours.value, strict=False):
            game = pyspiel.create_matrix_game((-payoff).tolist(), payoff.tolist())
            x, y, row, column = lp_solver.solve_zero_sum_matrix_game(game)
            x, y = (torch.from_numpy(w).clamp(min=0) for w in (x, y))
            gap = MatrixGame(payoff).duality_gap(x / x.sum(), y / y.sum())
            assert gap < 1e-7
            assert -row == pytest.approx(mine.item(), abs=1e-7)
            assert column == pytest.approx(mine.item(), abs=1e-7)


def test_regret_matching_of_open_spiel_lies_within_its_gap(pyspiel: Any):
    from open_spiel.python.algorithms.regret_matching import regret_matching

    ours = random_games((4, 4))
    for payoff, mine in zip(ours.game.payoff[:3], ours.value, strict=False):
        x, y = regret_matching([-payoff.numpy(), payoff.numpy()], iterations=3000)
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        theirs = MatrixGame(payoff)
        gap = theirs.duality_gap(x, y).item()
        assert EXACT < gap < 0.1
        assert abs(theirs.value(x, y).item() - mine.item()) < gap


# The comparison --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(CONTENDERS)), ids=[c.name for c in CONTENDERS])
def test_every_solver_of_the_comparison_solves_a_batch(number: int):
    contender = CONTENDERS[number]
    for module in contender.needs:
        pytest.importorskip(module, reason=f"{contender.name} needs {module}")
    payoffs = np.array([[[1.0, 0.0], [0.2, 0.6]], [[0.0, 1.0], [0.5, 0.25]]])
    found = games_compared.measure(contender, payoffs)
    assert found["seconds"] > 0
    assert found["gap"] <= (contender.aim or 1e-7)


def test_payoffs_of_the_comparison_range_from_0_to_1():
    payoffs = games_compared.draw(5, 3, 4)
    assert (payoffs.min((1, 2)) == 0).all()
    assert (payoffs.max((1, 2)) == 1).all()


def test_gaps_of_the_comparison_are_in_units_of_the_range():
    payoff, x, y = np.diag([7.0, 0.0]), np.array([0.0, 1.0]), np.array([0.5, 0.5])
    assert relative_gap(payoff, x, y) == pytest.approx(0)  # the second row never pays
    assert relative_gap(payoff, x[::-1], y) == pytest.approx(1)
    assert relative_gap(payoff, 2 * x, y) == pytest.approx(0)  # weights are normalised first


@pytest.mark.slow
def test_a_solver_that_takes_too_long_is_stopped():
    number = next(i for i, c in enumerate(CONTENDERS) if "regret_matching" in c.name)
    pytest.importorskip("pyspiel", reason="regret matching is open_spiel's")
    found = games_compared.run(number, (50, 10, 10), limit=0.1)
    assert found == {"failed": "not in 0.1 s"}


def test_the_table_has_medians_by_solver_and_size_and_losers_too():
    results = [
        {"size": [1, 4, 5], "solver": "a", "aim": None, "seconds": [3.0, 1.0, 2.0], "gap": 2e-16},
        {"size": [1, 4, 5], "solver": "b", "aim": 1e-3, "failed": "not in 60 s"},
        {"size": [3, 4, 5], "solver": "b", "aim": 1e-3, "seconds": [0.5], "gap": 9e-4},
        {"size": [3, 4, 5], "solver": "a", "aim": None, "seconds": [0.1], "gap": 0.0},
    ]
    assert games_compared.table(results).splitlines() == [
        "| solver | stops at | 4×5 | 3 of 4×5 |",
        "| --- | --- | --- | --- |",
        "| a | its end | 2 s, 2e-16 | 0.1 s, 0e+00 |",
        "| b | 0.001 | not in 60 s | 0.5 s, 9e-04 |",
    ]


def test_results_are_of_every_solver_at_every_size():
    lines = games_compared.RESULTS.read_text().splitlines()
    found = [(tuple(r["size"]), r["solver"], r["aim"]) for r in map(json.loads, lines)]
    solvers = [(c.name, c.aim) for c in CONTENDERS]
    assert found == [(size, *solver) for size in games_compared.SIZES for solver in solvers]


@pytest.mark.slow
def test_the_comparison_prints_a_table_of_what_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "found.jsonl"
    assert games_compared.main(["--quick", "--output", str(path)]) == 0
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert capsys.readouterr().out.strip() == games_compared.table(results)
    ours = [r for r in results if r["solver"].startswith("mixadv")]
    assert len(ours) == 6 * len(games_compared.QUICK)
    assert all(result["gap"] <= result["aim"] for result in ours)
