"""What holds on every finite game: simplices, units, copies, symmetries, extremes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixadv.games import METHODS, MatrixGame, duality_gap, solve
from mixadv.games.method import Scene
from mixadv.maths import mirror
from tests.games_zoo import answers, profiles
from theory import bounds, oracles

BOUNDED = ("hedge", "anytime_hedge", "optimistic_hedge", "mirror_prox", "magnetic")
FORWARD = ("hedge", "optimistic_hedge", "mirror_prox")

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 12)
every_method = pytest.mark.parametrize("name", METHODS)
bounded_methods = pytest.mark.parametrize("name", BOUNDED)


def trajectory(payoff, name, steps, start=None, **parameters):
    """Every strategy that counts, as log-weights `[steps, .., m]` and `[steps, .., n]`."""
    game = MatrixGame(payoff)
    games = game.payoff.shape[:-2]
    if start is None:
        uniform = [mirror.uniform(k, dtype=torch.float64) for k in game.shape]
        x, y = (z.expand(*games, len(z)) for z in uniform)
    else:
        x, y = (z.log() for z in start)
    players = METHODS[name](**parameters).play(x, y, Scene(game.spread[..., None], steps))
    played = profiles(players, answers(game), steps)
    return [torch.stack([profile[side] for profile in played]) for side in (0, 1)]


def gaussian(seed, m, n, count=8):
    return torch.tensor(np.random.default_rng(seed).standard_normal((count, m, n)))


def awkward(seed, m, n):
    return torch.tensor(oracles.games(len(oracles.SHAPES), m, n, seed))


@every_method
@given(seeds, sizes, sizes)
def test_iterates_stay_on_the_simplex(name, seed, m, n):
    payoff = awkward(seed, m, n)
    found = solve(MatrixGame(payoff), name, 20)
    pairs = *trajectory(payoff, name, 20), found.learner.log(), found.adversary.log()
    for log_weights in pairs:
        weights = log_weights.exp()
        assert (weights >= 0).all()
        assert abs(weights.sum(-1) - 1).max() <= 1e-12


@every_method
@given(seeds, sizes, sizes, st.integers(1, 30))
def test_solution_is_of_the_strategies_played(name, seed, m, n, steps):
    payoff = awkward(seed, m, n)
    found = solve(MatrixGame(payoff), name, steps)
    x, y = (side.exp() for side in trajectory(payoff, name, steps))
    scale = payoff.abs().amax((1, 2))
    for pair, expected in ((found.average, (x.mean(0), y.mean(0))), (found.last, (x[-1], y[-1]))):
        for side, weights in zip(pair, expected, strict=True):
            torch.testing.assert_close(side, weights, rtol=0, atol=1e-12)
    exact = torch.tensor(oracles.gap(payoff, found.learner, found.adversary))
    for gap in (found.gap.value, found.gaps[-1]):
        assert (abs(gap - exact.clamp(min=0)) <= 1e-12 * scale).all()
    paid = torch.einsum("gm,gmn,gn->g", found.learner, payoff, found.adversary)
    assert (abs(found.value - paid) <= 1e-12 * scale).all()


@given(seeds, sizes, sizes)
def test_gap_is_never_negative_and_vanishes_at_the_equilibrium(seed, m, n):
    payoff = awkward(seed, m, n)
    exact = [oracles.equilibrium(game) for game in payoff.numpy()]
    x, y = (torch.tensor(np.stack([e[k] for e in exact])) for k in (1, 2))
    scale = payoff.abs().amax((1, 2))
    assert (duality_gap(MatrixGame(payoff), x, y).value <= 1e-9 * scale).all()
    draw = np.random.default_rng(seed)
    x, y = (torch.tensor(draw.dirichlet(np.ones(k), len(payoff))) for k in (m, n))
    gap = duality_gap(MatrixGame(payoff), x, y).value
    assert (gap >= 0).all()
    assert (abs(gap - torch.tensor(oracles.gap(payoff, x, y))) <= 1e-12 * scale).all()


@given(seeds, sizes, sizes)
def test_value_lies_between_what_both_players_can_make_sure_of(seed, m, n):
    payoff = awkward(seed, m, n)
    value = torch.tensor(np.array([oracles.equilibrium(game).value for game in payoff.numpy()]))
    slack, game = 1e-9 * payoff.abs().amax((1, 2)), MatrixGame(payoff)
    for name in METHODS:
        found = solve(game, name, 30)
        assert (game.losses(found.adversary).amin(-1) <= value + slack).all()
        assert (game.gains(found.learner).amax(-1) >= value - slack).all()
        assert (abs(found.value - value) <= found.gap.value + slack).all()


@bounded_methods
@given(seeds, sizes, sizes, st.floats(0.01, 100), st.floats(-5, 5))
def test_units_of_the_payoff_do_not_change_the_strategies(name, seed, m, n, unit, shift):
    payoff = gaussian(seed, m, n)
    expected = trajectory(payoff, name, 20)
    for side, known in zip(trajectory(unit * payoff + shift, name, 20), expected, strict=True):
        torch.testing.assert_close(side.exp(), known.exp(), rtol=0, atol=1e-9)
    heat = {"temperature": 0.3} if name == "magnetic" else {}
    heated = {key: tau * unit for key, tau in heat.items()}
    found = trajectory(unit * payoff + shift, name, 20, step_size=0.5 / unit, **heated)
    expected = trajectory(payoff, name, 20, step_size=0.5, **heat)
    for side, known in zip(found, expected, strict=True):
        torch.testing.assert_close(side.exp(), known.exp(), rtol=0, atol=1e-9)


@bounded_methods
@given(seeds, sizes, sizes)
def test_a_copied_row_that_shares_its_weight_changes_no_gap(name, seed, m, n):
    draw = np.random.default_rng(seed)
    payoff = draw.standard_normal((m, n))
    x, y = draw.dirichlet(np.full(m, 3.0)), draw.dirichlet(np.full(n, 3.0))
    row = draw.integers(m)
    copied, split = np.vstack([payoff, payoff[row]]), np.append(x, x[row] / 2)
    split[row] /= 2
    steps = {"step_size": 0.4} | ({"temperature": 0.2} if name == "magnetic" else {})
    single, doubled = (
        solve(MatrixGame(game), name, 30, start=(start, y), **steps)
        for game, start in ((payoff, x), (copied, split))
    )
    torch.testing.assert_close(single.gaps, doubled.gaps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FORWARD)
@given(seeds, st.integers(2, 8), sizes, st.floats(0.01, 2))
def test_a_dominated_row_loses_its_weight_exponentially(name, seed, m, n, margin):
    payoff = gaussian(seed, m, n)
    payoff[:, 0] = payoff[:, 1] + margin + gaussian(seed, 1, n)[:, 0].abs()
    x, _ = trajectory(payoff, name, 30, step_size=0.5)
    ratio = x[:, :, 0] - x[:, :, 1]
    assert (ratio <= -0.5 * margin * torch.arange(30)[:, None] + 1e-9).all()


@every_method
@given(seeds, sizes, sizes)
def test_swapping_the_players_swaps_the_answer(name, seed, m, n):
    payoff = gaussian(seed, m, n)
    game = solve(MatrixGame(payoff), name, 20)
    swapped = solve(MatrixGame(-payoff.mT), name, 20)
    for found, expected in ((swapped.learner, game.adversary), (swapped.adversary, game.learner)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(swapped.value, -game.value, rtol=0, atol=1e-9)


@every_method
@given(seeds, sizes)
def test_players_of_a_skew_symmetric_game_play_alike(name, seed, n):
    payoff = gaussian(seed, n, n)
    x, y = trajectory(payoff - payoff.mT, name, 20)
    torch.testing.assert_close(x.exp(), y.exp(), rtol=0, atol=1e-9)


@every_method
@given(seeds, sizes, sizes)
def test_a_batch_is_solved_as_its_games_are_alone(name, seed, m, n):
    payoff = gaussian(seed, m, n, count=3)
    together = solve(MatrixGame(payoff), name, 30)
    for k, game in enumerate(payoff):
        alone = solve(MatrixGame(game), name, 30)
        torch.testing.assert_close(alone.learner, together.learner[k], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.gaps, together.gaps[:, k], rtol=0, atol=1e-9)


@bounded_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seeds, sizes, sizes)
def test_huge_steps_neither_overflow_nor_leave_the_simplex(name, dtype, seed, m, n):
    payoff = gaussian(seed, m, n).to(dtype)
    steps = {"step_size": 1e4} | ({"temperature": 1e-6} if name == "magnetic" else {})
    found = solve(MatrixGame(payoff), name, 100, **steps)
    for weights in (*found.average, *found.last):
        assert weights.isfinite().all()
        assert abs(weights.sum(-1) - 1).max() <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert found.gaps.isfinite().all()


def test_weights_in_a_list_are_as_exact_as_the_game():
    assert MatrixGame([[0.0, 1.0]]).weights("y", [0.1, 0.9], 1).tolist() == [0.1, 0.9]


@given(sizes, sizes, st.integers(1, 1000), st.floats(1e-6, 1e6))
def test_automatic_step_sizes_are_those_of_the_bounds(m, n, steps, range_):
    scene = Scene(torch.tensor([range_]).double(), steps)
    x, y = (torch.zeros(k).double() for k in (m, n))

    def automatic(name):
        return [float(size) for size in METHODS[name]().step_sizes(x, y, scene)]

    assert automatic("hedge") == pytest.approx(bounds.hedge_steps(range_, m, n, steps))
    assert automatic("anytime_hedge") == pytest.approx(bounds.hedge_steps(range_, m, n, steps))
    assert automatic("optimistic_hedge") == pytest.approx([1 / range_] * 2)
    assert automatic("mirror_prox") == pytest.approx([2 / range_] * 2)
    tau = METHODS["magnetic"]().heat(x, y, scene).item()
    assert automatic("magnetic") == pytest.approx([bounds.magnetic_step(range_, tau)] * 2)
    if m * n > 1:
        least, found = (
            bounds.magnetic(range_, m, n, steps, t, bounds.magnetic_step(range_, t))
            for t in (bounds.magnetic_temperature(range_, m, n, steps), tau)
        )
        assert found <= 1.01 * least
