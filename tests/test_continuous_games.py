"""Games on intervals, circles and balls: their sets, their gaps, and who solves them."""

import pytest
import torch

from mixadv.games import Box, ContinuousGame, Gaussian, Langevin, particles, solve


def product(x, y):
    return (x * y).sum()


def test_automatic_steps_are_stable_where_the_reference_is_steeper_than_the_payoff():
    """The pull towards N(0, s²) counts: τ/s² is 10⁴ times the payoff's own curvature here."""
    game = ContinuousGame(lambda x, y: 1e-2 * product(x, y), Gaussian(1, 0.1), Gaussian(1, 2.0))
    steps = Langevin(temperature=1.0).step_sizes(game, 100, 1.0)
    for size, scale in zip(steps, (0.1, 2.0), strict=True):
        torch.testing.assert_close(size * (1e-2 + 1 / scale**2), 0.1)


def test_a_cloud_larger_than_what_is_kept_still_moves(monkeypatch):
    monkeypatch.setattr(particles, "KEPT", 8)
    game = ContinuousGame(product, Box(), Box())
    solution = solve(game, "langevin", 40, particles=20, progress=False)
    kept = solution.average.learner.points.view(-1, 20, 1)
    assert len(kept) >= 10
    begin = game.learner.sample(20, game.generator(0), game.dtype)
    assert not (kept == begin).all(2).all(1).any()


@pytest.mark.parametrize("steps", [1, 7, 130])
def test_history_of_the_average_ends_at_its_gap(steps):
    """It is summed cloud by cloud, as payoffs are linear; the certificate sees the union."""
    game = ContinuousGame(lambda x, y: (x - y).square().sum(), Box(), Box())
    for method in ("langevin", "wasserstein_fisher_rao", "gradient_descent_ascent"):
        solution = solve(game, method, steps, particles=3, grid=40, progress=False)
        torch.testing.assert_close(solution.gaps[-1], solution.gap.value)
        assert solution.steps[-1] == steps
