"""One mirror step for payoffs of any size: a step in units of their spread, and its worth."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixadv.maths import mirror
from theory import bounds

# Whole numbers: payoffs are equal, or differ by more than rounding.
payoffs = st.tuples(st.integers(1, 6), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-9, 9).map(float))
)
steps = st.floats(0, 3)


def spreads(values):
    """The root of the mean square around the mean, column by column."""
    return np.sqrt(((values - values.mean(0)) ** 2).mean(0))


@given(payoffs, steps)
def test_it_is_the_absolute_step_over_the_spread_column_by_column(values, step_size):
    start = torch.tensor(values[::-1].copy()).log_softmax(0)
    found = mirror.relative_step(start, torch.tensor(values), step_size)
    for column, spread in enumerate(spreads(values)):
        own = step_size / spread if spread else 0.0
        expected = mirror.step(start[:, column], torch.tensor(values[:, column]), own)
        torch.testing.assert_close(found[:, column], expected, rtol=1e-11, atol=1e-11)


@given(payoffs, steps, st.floats(-30, 30), st.floats(-10, 10), st.integers(0, 99))
def test_units_and_offsets_of_each_samples_payoffs_do_not_matter(
    values, step_size, power, shift, seed
):
    other = np.random.default_rng(seed).uniform(0.1, 1, values.shape[1]) * 10**power
    start = torch.tensor(values[::-1].copy()).log_softmax(0)
    expected = mirror.relative_step(start, torch.tensor(values), step_size)
    found = mirror.relative_step(start, torch.tensor((values + shift) * other), step_size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(1, 7), st.floats(-1e6, 1e6), st.integers(0, 5))
def test_payoffs_that_are_equal_up_to_rounding_leave_the_weights(dtype, count, value, ulps):
    """Their mean need not be the value, and nothing else may tell them apart."""
    level = torch.full((count, 3), value, dtype=dtype)
    level[0] += ulps * level[0].abs() * torch.finfo(dtype).eps
    start = torch.arange(3.0 * count, dtype=dtype).view(count, 3).log_softmax(0)
    torch.testing.assert_close(mirror.relative_step(start, level, 3.0), start)


@pytest.mark.parametrize("scale", [1e-30, 0.03, 3.0, 1e30])
def test_one_step_serves_payoffs_of_any_size_in_single_precision(scale):
    values = scale * torch.tensor([1.0, 2.0, 4.0])
    z = np.array([-4, -1, 5]) / math.sqrt(14)
    found = mirror.relative_step(mirror.uniform(3), values, 0.5).exp()
    expected = np.exp(0.5 * z) / np.exp(0.5 * z).sum()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


# What it is worth ---------------------------------------------------------------------------------


def played(rounds, step_size):
    """Yield weights before each row of payoffs."""
    log_weights = mirror.uniform(rounds.shape[1], dtype=torch.float64)
    for values in rounds:
        yield log_weights.exp().numpy()
        log_weights = mirror.relative_step(log_weights, torch.tensor(values), step_size)


@given(st.integers(2, 6), st.integers(1, 60), st.floats(0.01, 2), st.integers(0, 9999))
def test_regret_in_units_of_the_spread_keeps_its_bound(points, rounds, step_size, seed):
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((rounds, points)) * 10 ** draw.uniform(-3, 3, (rounds, 1))
    own = spreads(values.T)
    earned = np.array([y @ u for y, u in zip(played(values, step_size), values, strict=True)])
    regret = ((values - earned[:, None]) / own[:, None]).sum(0).max() / (1 / own).sum()
    harmonic = rounds / (1 / own).sum()
    assert regret <= bounds.relative_hedge(harmonic, points, rounds, step_size) * (1 + 1e-9)


@given(st.integers(2, 9), st.integers(1, 30), st.floats(0.05, 2), st.integers(0, 9999))
def test_weights_on_still_points_come_as_near_to_the_best_as_they_must(
    points, rounds, step_size, seed
):
    values = np.random.default_rng(seed).standard_exponential(points)
    *_, last = played(np.tile(values, (rounds + 1, 1)), step_size)
    bound = bounds.relative_response(spreads(values), points, rounds, step_size)
    assert -1e-12 <= values.max() - last @ values <= bound + 1e-12


def test_regret_across_rounds_of_other_units_may_grow_for_ever():
    """Where H1 bounds what absolute steps lose."""
    values = np.tile([[1e-6, 0.0], [0.0, 1.0]], (200, 1))
    best = values.sum(0).max()
    for step_size in (0.05, 0.5, 2.0):
        earned = sum(y @ u for y, u in zip(played(values, step_size), values, strict=True))
        assert best - earned > len(values) / 5
    x, earned, step_size = mirror.uniform(2), 0.0, math.sqrt(8 * math.log(2) / len(values))
    for u in torch.tensor(values, dtype=torch.float32):
        earned, x = earned + float(x.exp() @ u), mirror.step(x, u, step_size)
    assert best - earned < math.sqrt(len(values) * math.log(2) / 2)
