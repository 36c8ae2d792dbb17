"""Games on intervals, circles and balls: their sets, their gaps, and who solves them."""

import torch

from mixadv.games import ContinuousGame, Gaussian, Langevin


def product(x, y):
    return (x * y).sum()


def test_automatic_steps_are_stable_where_the_reference_is_steeper_than_the_payoff():
    """The pull towards N(0, s²) counts: τ/s² is 10⁴ times the payoff's own curvature here."""
    game = ContinuousGame(lambda x, y: 1e-2 * product(x, y), Gaussian(1, 0.1), Gaussian(1, 2.0))
    steps = Langevin(temperature=1.0).step_sizes(game, 100, 1.0)
    for size, scale in zip(steps, (0.1, 2.0), strict=True):
        torch.testing.assert_close(size * (1e-2 + 1 / scale**2), 0.1)
