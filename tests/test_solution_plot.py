"""What `Solution.plot` draws, on every kind of game."""

from collections.abc import Iterator

import matplotlib as mpl
import pytest
import torch

from mixadv.games import Ball, Box, ContinuousGame, MatrixGame, Solution, solve

mpl.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().sum()


def heights(axes: plt.Axes) -> torch.Tensor:
    return torch.tensor([bar.get_height() for bar in axes.patches], dtype=torch.float64)


def test_weights_of_a_finite_game_stand_over_whole_numbers():
    payoff = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, -1.0], [-1.0, 1.0]]])
    solution = solve(MatrixGame(payoff), steps=50)
    gap, *sides = solution.plot(game=1)
    torch.testing.assert_close(torch.tensor(gap.lines[0].get_ydata()), solution.gaps[:, 1])
    assert (gap.get_xscale(), gap.get_yscale()) == ("log", "log")
    for axes, side in zip(sides, (solution.learner, solution.adversary), strict=True):
        torch.testing.assert_close(heights(axes).float(), side[1])
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_every_node_of_a_grid_has_a_bar_of_its_own():
    solution = solve(ContinuousGame(distance, Box(), Box()), "hedge", steps=20, grid=101)
    for axes, side in zip(solution.plot()[1:], (solution.learner, solution.adversary), strict=True):
        torch.testing.assert_close(heights(axes), side.weights)


def test_points_of_the_plane_are_drawn_without_distortion():
    game = ContinuousGame(distance, Ball(2), Ball(2))
    solution = solve(game, "langevin", steps=3, particles=5, grid=5)
    for axes in solution.plot()[1:]:
        assert axes.get_aspect() == 1


@pytest.mark.parametrize(
    "solution",
    [
        solve(MatrixGame([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]), steps=3),
        solve(MatrixGame([[1.0]]), steps=1),
    ],
    ids=["no gap at all", "one action"],
)
def test_games_that_are_solved_at_once_are_drawn_without_a_warning(solution: Solution):
    solution.plot()[0].figure.canvas.draw()
