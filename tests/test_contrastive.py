"""NT-Xent against the sum written out view by view, at every scale of its rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixadv.maths.contrastive import nt_xent

NEGATIVES = ["all", "cross"]
either = pytest.mark.parametrize("negatives", NEGATIVES)
sizes = st.integers(1, 6)
seeds = st.integers(0, 999)
temperatures = st.floats(0.01, 10.0)
scales = st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4, 1e30])


def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of the angle, 0 where one of the two is no direction."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def by_hand(one: Tensor, other: Tensor, temperature: float, negatives: str) -> float:
    """−log [ exp(s_ij/τ) / Σ_k exp(s_ik/τ) ], averaged over i, one view after another."""
    n = len(one)
    views = [*one.tolist(), *other.tolist()]
    losses = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        same_kind = range(n) if i < n else range(n, 2 * n)
        left_out = {i} if negatives == "all" else set(same_kind)
        pulls = [
            cosine(views[i], view) / temperature
            for k, view in enumerate(views)
            if k not in left_out
        ]
        largest = max(pulls)
        total = largest + math.log(sum(math.exp(pull - largest) for pull in pulls))
        losses.append(total - cosine(views[i], views[partner]) / temperature)
    return sum(losses) / len(losses)


def views(n: int, d: int, seed: int, size=1.0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, n, d, generator=draw, dtype=torch.float64) * size
    return one.to(dtype), other.to(dtype)


@either
@given(n=sizes, d=sizes, seed=seeds, temperature=temperatures, data=st.data())
def test_it_is_the_sum_written_out(negatives, n, d, seed, temperature, data):
    sizes = data.draw(st.lists(scales, min_size=2 * n, max_size=2 * n))
    size = torch.tensor(sizes, dtype=torch.float64).view(2, n, 1)
    one, other = views(n, d, seed, size)
    expected = by_hand(one, other, temperature, negatives)
    assert float(nt_xent(one, other, temperature, negatives)) == pytest.approx(expected, abs=1e-10)


@either
@given(n=sizes, d=sizes, seed=seeds, temperature=st.floats(0.05, 10.0))
def test_it_is_symmetric_in_its_views_and_blind_to_scale_and_order(
    negatives, n, d, seed, temperature
):
    one, other = views(n, d, seed)
    expected = nt_xent(one, other, temperature, negatives)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    larger = 10 ** torch.linspace(-30, 30, n, dtype=torch.float64)[:, None]
    for a, b in [(other, one), (one[order], other[order]), (one * larger, other / larger)]:
        torch.testing.assert_close(
            nt_xent(a, b, temperature, negatives), expected, rtol=1e-12, atol=1e-12
        )


@either
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-12, 1e12, 1e30, 1e36])
def test_rows_whose_squares_overflow_or_vanish_keep_their_direction(negatives, size):
    one, other = views(5, 8, 0, dtype=torch.float32)
    expected = nt_xent(one, other, 0.1, negatives)
    for a, b in [(one * size, other), (one, other * size), (one * size, other / size)]:
        torch.testing.assert_close(nt_xent(a, b, 0.1, negatives), expected, rtol=1e-5, atol=1e-6)


@either
@given(n=st.integers(1, 4), d=st.integers(2, 4), seed=seeds, size=st.sampled_from([0.1, 1.0, 9.0]))
def test_gradients_are_those_of_finite_differences(negatives, n, d, seed, size):
    pair = [x.requires_grad_() for x in views(n, d, seed, size)]
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5, negatives), pair)


@either
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_without_direction_costs_a_finite_gradient(negatives, dtype):
    """A dead representation: its similarity to all others is 0, its gradient of their order."""
    one, other = views(4, 3, 0, dtype=dtype)
    one[1] = 0
    pair = [x.requires_grad_() for x in (one, other)]
    nt_xent(*pair, 0.5, negatives).backward()
    for view in pair:
        assert view.grad.abs().max() <= 1 / 0.5


@either
def test_rows_along_an_axis_are_normalised_too(negatives):
    """A gradient along the row itself would only change its length."""
    one = torch.eye(3, dtype=torch.float64).requires_grad_()
    other = torch.roll(torch.eye(3, dtype=torch.float64), 1, 0) + 0.3
    nt_xent(one, other, 0.5, negatives).backward()
    along = (one.grad * one).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-15)


@either
@pytest.mark.parametrize("n", [1, 2, 7])
def test_known_values(negatives, n):
    """Orthonormal pairs, and views that cannot be told apart."""
    others = 2 * n - 2 if negatives == "all" else n - 1
    eye = torch.eye(n, dtype=torch.float64)
    told_apart = math.log1p(others * math.exp(-1 / 0.5))
    assert float(nt_xent(eye, eye, 0.5, negatives)) == pytest.approx(told_apart, abs=1e-12)
    equal = torch.ones(n, 3, dtype=torch.float64)
    assert float(nt_xent(equal, equal, 0.5, negatives)) == pytest.approx(math.log1p(others))


@either
def test_a_batch_of_one_has_nothing_to_learn_from(negatives):
    one, other = (x.requires_grad_() for x in views(1, 4, 0))
    loss = nt_xent(one, other, 0.1, negatives)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not one.grad.any()
    assert not other.grad.any()


@either
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_half_precision_views_lose_nothing_but_their_own_rounding(
    negatives, autocast, dtype, temperature
):
    """Similarities over τ, and their sum over 2048 views, are beyond fp16."""
    one, noise = views(1024, 16, 0)
    pair = [x.to(dtype).requires_grad_() for x in (one, one + 0.3 * noise)]
    exact = [x.detach().double().requires_grad_() for x in pair]
    expected = nt_xent(*exact, temperature, negatives)
    expected.backward()
    low = dtype if dtype != torch.float32 else torch.bfloat16
    with torch.autocast("cpu", low, enabled=autocast):
        loss = nt_xent(*pair, temperature, negatives)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for view, wide in zip(pair, exact, strict=True):
        assert view.grad.isfinite().all()
        error = (view.grad.double() - wide.grad).norm() / wide.grad.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be .*got {temperature}"):
        nt_xent(*views(2, 3, 0), temperature)


def test_arguments_that_are_no_pair_of_views_are_refused():
    one, other = views(3, 4, 0)
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[2, 4\]"):
        nt_xent(one, other[:2])
    with pytest.raises(ValueError, match=r"\[3, 1, 4\] and \[3, 1, 4\]"):
        nt_xent(one[:, None], other[:, None])
    with pytest.raises(ValueError, match=r"'crss' is not 'all' or 'cross'.*'cross'\?"):
        nt_xent(one, other, negatives="crss")
