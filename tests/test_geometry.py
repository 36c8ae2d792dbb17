"""Norms, ascent directions and projections against formulas in float64, at every scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixadv.maths import geometry
from mixadv.maths.geometry import NORMS, PERS

ORDER = {"l1": 1, "l2": 2, "linf": np.inf}
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}
SHAPES = [(1, 1), (2, 3), (3, 2, 4), (2, 5, 1), (2, 2, 2, 2)]
RADII = [0.0, 1e-6, 0.3, 1.0, 1e4]
SLACK = {torch.float64: 1e-12, torch.float32: 1e-6}

norms = st.sampled_from(NORMS)
pers = st.sampled_from(PERS)
radii = st.sampled_from(RADII)


@st.composite
def points(draw, count=1, dtypes=tuple(SLACK)):
    """Tensors of one shape, each sample at its own scale, zeros among them."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(dtypes))
    entries = st.floats(-1, 1, width=16)
    every = {"fill": st.nothing()}  # draw each entry, rather than a few and one common rest
    scales = st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4, 1e30])
    drawn = []
    for _ in range(count):
        scale = draw(arrays(np.float64, shape[0], elements=scales, **every))
        values = draw(arrays(np.float64, shape, elements=entries, **every))
        values *= scale.reshape(-1, *[1] * (len(shape) - 1))
        drawn.append(torch.tensor(values).to(dtype))
    return drawn[0] if count == 1 else drawn


def groups(x, per):
    """The groups that a norm is taken of, as rows in float64."""
    rows = x.double().numpy()
    return rows.reshape(-1, rows.shape[-1]) if per == "token" else rows.reshape(len(rows), -1)


def lengths(x, norm, per):
    return np.linalg.norm(groups(x, per), ORDER[norm], axis=1)


def nearest_in_ball(row, radius, norm):
    """The point of the ball nearest to `row`: clipping, scaling, soft thresholding by bisection."""
    if norm == "linf":
        return row.clip(-radius, radius)
    length = np.linalg.norm(row, ORDER[norm])
    if length <= radius:
        return row
    if norm == "l2":
        return radius * (row / length)
    below = np.abs(row).max() - np.abs(row)  # how far below the largest entry
    low, high = 0.0, radius
    for _ in range(200):
        middle = (low + high) / 2
        high, low = (middle, low) if (middle - below).clip(0).sum() > radius else (high, middle)
    return np.sign(row) * (low - below).clip(0)


@given(points(), norms, pers)
def test_norm_of_each_group(x, norm, per):
    result = geometry.norms(x, norm, per)
    assert result.dtype == x.dtype
    assert result.expand_as(x).shape == x.shape
    np.testing.assert_allclose(
        result.double().flatten(), lengths(x, norm, per), rtol=SLACK[x.dtype], atol=1e-44
    )


@given(points(), norms, pers)
def test_unit_keeps_the_direction_and_has_norm_one(x, norm, per):
    rows, length = groups(x, per), lengths(x, norm, per)
    expected = rows / np.where(length > 0, length, 1)[:, None]
    result = geometry.unit(x, norm, per)
    assert result.shape == x.shape
    np.testing.assert_allclose(groups(result, per), expected, rtol=2e-6, atol=1e-44)


@given(points(), norms, pers)
def test_steepest_direction_attains_the_dual_norm(g, norm, per):
    direction = geometry.steepest(g, norm, per)
    assert direction.shape == g.shape
    assert (lengths(direction, norm, per) <= 1 + 1e-6).all()
    ascent = (groups(g, per) * groups(direction, per)).sum(1)
    np.testing.assert_allclose(ascent, lengths(g, DUAL[norm], per), rtol=2e-6)


def assert_nearest(x, radius, norm, per):
    result = geometry.project(x, radius, norm, per)
    assert result.shape == x.shape
    expected = np.stack([nearest_in_ball(row, radius, norm) for row in groups(x, per)])
    scale = min(radius, float(x.abs().max()))
    np.testing.assert_allclose(groups(result, per), expected, rtol=2e-6, atol=2e-6 * scale)


@given(points(), radii, norms, pers)
def test_projection_is_the_nearest_point_of_the_ball(x, radius, norm, per):
    assert_nearest(x, radius, norm, per)


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_many_points_inside_and_outside_the_ball(norm, per):
    x = torch.randn(40, 3, 5) * torch.linspace(0.1, 2, 40).view(-1, 1, 1)
    for radius in (0.2, 1.0, 3.0):
        assert_nearest(x, radius, norm, per)


@given(points(dtypes=[torch.float64]), st.sampled_from([1e-3, 0.3, 1.0, 1e4]), norms, pers)
def test_projection_meets_the_variational_inequality(x, radius, norm, per):
    """p = Π(x) iff ‖p‖ ≤ r and ⟨x − p, z − p⟩ ≤ 0 on the ball, i.e. r·‖x − p‖_* ≤ ⟨x − p, p⟩."""
    p = geometry.project(x, radius, norm, per)
    rest, p = groups(x - p, per), groups(p, per)
    support = radius * np.linalg.norm(rest, ORDER[DUAL[norm]], axis=1)
    inner = (rest * p).sum(1)
    assert (support - inner <= 1e-10 * (1 + support)).all()


@given(points(), radii, norms, pers)
def test_projection_is_feasible_and_idempotent(x, radius, norm, per):
    once = geometry.project(x, radius, norm, per)
    assert once.isfinite().all()
    assert (lengths(once, norm, per) <= radius * (1 + 1e-6)).all()
    twice = geometry.project(once, radius, norm, per)
    torch.testing.assert_close(twice, once, rtol=SLACK[x.dtype], atol=0.0)


@given(points(count=2, dtypes=[torch.float64]), radii, norms, pers)
def test_projection_is_nonexpansive(pair, radius, norm, per):
    x, y = pair
    moved = geometry.project(x, radius, norm, per) - geometry.project(y, radius, norm, per)
    apart = lengths(x - y, "l2", per)
    assert (lengths(moved, "l2", per) <= apart * (1 + 1e-9) + 1e-12 * radius).all()


@given(points(), radii, norms, pers)
def test_sphere_has_every_group_but_zero_at_the_radius(x, radius, norm, per):
    result = geometry.onto_sphere(x, radius, norm, per)
    expected = np.where(lengths(x, "linf", per) > 0, radius, 0.0)
    np.testing.assert_allclose(lengths(result, norm, per), expected, rtol=1e-6)
    assert (result * x >= 0).all()


@given(points(), st.sampled_from(RADII[1:]), norms, pers, st.data())
def test_rows_of_a_sample_share_its_norm_and_ball(x, radius, norm, per, data):
    """As if they stood in one row."""
    rows = data.draw(st.permutations(range(len(x))))
    x = x[rows]
    owners = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(x), max_size=len(x))))
    _, owners = owners.unique(return_inverse=True)
    for act in (
        lambda x, **how: geometry.norms(x, norm, per, **how).expand_as(x),
        lambda x, **how: geometry.unit(x, norm, per, **how),
        lambda x, **how: geometry.steepest(x, norm, per, **how),
        lambda x, **how: geometry.project(x, radius, norm, per, **how),
        lambda x, **how: geometry.onto_sphere(x, radius, norm, per, **how),
    ):
        found = act(x, owners=owners)
        for sample in owners.unique():
            mine = x[owners == sample]
            alone = act(mine[None])[0] if per == "sample" else act(mine)
            torch.testing.assert_close(found[owners == sample], alone, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("norm", NORMS)
def test_zero_coordinates_stay_exactly_zero(norm, per):
    x = torch.randn(3, 5, 4)
    x[0, 2:] = 0
    x[1] = 0
    x[2, :, 1] = 0
    for result in (
        geometry.unit(x, norm, per),
        geometry.steepest(x, norm, per),
        geometry.project(x, 0.1, norm, per),
        geometry.onto_sphere(x, 0.1, norm, per),
    ):
        assert not result[x == 0].any()


@pytest.mark.parametrize("value", [6e-8, 1e-3, 300.0, 65504.0])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_vanishes(dtype, norm, value):
    g = torch.full((2, 128, 768), value, dtype=dtype)
    g[1, 1:] = 0
    length = lengths(g, norm, "sample")
    for result in (geometry.unit(g, norm), geometry.onto_sphere(g, 1.0, norm)):
        np.testing.assert_allclose(lengths(result, norm, "sample"), 1.0, rtol=0.02)
    result = lengths(geometry.project(g, 1.0, norm), norm, "sample")
    np.testing.assert_allclose(result, length.clip(max=1.0), rtol=0.02)
    if length.max() < torch.finfo(dtype).max:
        np.testing.assert_allclose(geometry.norms(g, norm).double().flatten(), length, rtol=0.02)


def test_large_tensor_stays_in_the_ball():
    delta = torch.randn(2, 512, 1024)
    for norm in NORMS:
        radius = 0.5 * lengths(delta, norm, "sample").min()
        result = lengths(geometry.project(delta, float(radius), norm), norm, "sample")
        assert (result <= radius * (1 + 1e-6)).all()
