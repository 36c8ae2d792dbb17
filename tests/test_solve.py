"""What `solve` promises whatever it plays: seeds, early stops, dtypes, no side effects."""

import numpy as np
import pytest
import torch

from mixadv.games import (
    METHODS,
    PARTICLE_METHODS,
    Box,
    ContinuousGame,
    Hedge,
    MatrixGame,
    Torus,
    solve,
)

MATRIX = [[3.0, -1.0, 0.5], [-2.0, 1.0, 0.0]]


def distance(x, y):
    return (x - y).square().sum()


def continuous(dim=1, dtype=torch.float64):
    return ContinuousGame(distance, Box(-1, 1, dim), Torus(dim), dtype=dtype)


def tensors(solution):
    """All numbers of a solution."""
    pairs = [(solution.learner, solution.adversary), solution.average, solution.last]
    sides = [side for pair in pairs for side in pair]
    parts = [part for side in sides for part in (side if isinstance(side, tuple) else [side])]
    return [*parts, solution.value, solution.gap.value, solution.gaps]


def played(name, dtype=torch.float64, **how):
    if name in METHODS:
        return solve(MatrixGame(torch.tensor(MATRIX, dtype=dtype)), name, 30, progress=False, **how)
    return solve(continuous(dtype=dtype), name, 30, grid=21, progress=False, **how)


@pytest.mark.parametrize("name", [*METHODS, *PARTICLE_METHODS])
def test_same_seed_same_solution_and_the_global_state_is_untouched(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = played(name, seed=3)
    torch.manual_seed(99)
    again = played(name, seed=3)
    for a, b in zip(tensors(first), tensors(again), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(99)
    reseeded = played(name, seed=4)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(99).get_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    moved = not torch.equal(tensors(first)[-1], tensors(reseeded)[-1])
    assert moved == (name in PARTICLE_METHODS)


@pytest.mark.parametrize("name", [*METHODS, *PARTICLE_METHODS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_game_is_solved_in_its_own_precision(name, dtype):
    found = tensors(played(name, dtype))
    assert {tensor.dtype for tensor in found} == {dtype}
    assert all(tensor.isfinite().all() for tensor in found[-3:])


def test_single_precision_solves_as_double_does():
    begin = tuple(torch.linspace(low, 0.9, 64)[:, None] for low in (0.0, 0.3))
    for name in ("hedge", "mirror_prox", "wasserstein_fisher_rao"):
        how = {} if name in METHODS else {"start": begin, "step_size": 0.01}
        single, double = (played(name, dtype, **how) for dtype in (torch.float32, torch.float64))
        torch.testing.assert_close(single.gaps.double(), double.gaps, rtol=1e-3, atol=1e-4)


def test_tolerance_stops_at_the_first_record_that_reaches_it():
    game = MatrixGame(MATRIX)
    full = solve(game, "mirror_prox", 500, progress=False)
    found = solve(game, "mirror_prox", 500, tolerance=0.01, progress=False)
    reached = int((full.gaps <= 0.01).nonzero()[0])
    assert found.steps[-1] == full.steps[reached] < 500
    assert torch.equal(found.gaps, full.gaps[: reached + 1])
    assert found.gap.value <= 0.01
    batch = MatrixGame(torch.tensor([MATRIX, [[0.0, 0.0, 0.0]] * 2], dtype=torch.float64))
    assert solve(batch, "mirror_prox", 500, tolerance=0.01, progress=False).steps == found.steps
    boxes = ContinuousGame(distance, Box(), Box())
    moving = solve(boxes, "wasserstein_fisher_rao", 1000, tolerance=0.2, grid=21, progress=False)
    assert moving.steps[-1] < 1000
    torch.testing.assert_close(moving.gap.value, moving.gaps[-1])
    assert moving.gap.value <= 0.2


@pytest.mark.parametrize("steps", [1, 2, 999, 2500])
def test_history_is_recorded_evenly_and_to_the_end(steps):
    found = solve(MatrixGame(MATRIX), "hedge", steps, progress=False)
    assert len(found.steps) == len(found.gaps) <= 1000
    assert found.steps[-1] == steps
    torch.testing.assert_close(found.gaps[-1], found.gap.value)


def test_games_in_three_dimensions_record_a_few_lower_bounds():
    game = ContinuousGame(distance, Box(-1, 1, 3), Box(-1, 1, 3))
    found = solve(game, "langevin", 10, particles=4, progress=False)
    assert found.steps == [2, 4, 6, 8, 10]
    assert found.gap.kind == "lower bound"
    torch.testing.assert_close(found.gaps[-1], found.gap.value)


def test_no_bar_is_left_where_output_is_no_terminal(capsys):
    solve(MatrixGame(MATRIX), "hedge", 10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", METHODS)
def test_a_pure_start_and_a_constant_game_keep_weights_on_the_simplex(name):
    games = MatrixGame(torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[3.0, -1.0], [-2.0, 1.0]]]))
    solution = solve(games, name, 20, start=([1.0, 0.0], [0.5, 0.5]))
    for weights in (*solution.average, *solution.last):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    assert solution.gap.value[0] == 0


def test_payoffs_near_the_largest_number_are_summed_without_overflow():
    game = MatrixGame(torch.tensor([[1.8e38, -1e38], [-1.5e38, 1e38]]))
    assert float(solve(game, "anytime_hedge", 1000).gap) < 0.1 * float(game.spread)


def test_a_restarted_method_is_chosen_by_name():
    game = MatrixGame([[3, -1], [-2, 1]])
    of_hedge = solve(game, "restarted", 200, inner=Hedge)
    assert of_hedge.method.inner is Hedge
    assert not torch.equal(of_hedge.gaps, solve(game, "restarted", 200).gaps)
