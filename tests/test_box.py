"""Pixels stay in their box: projection onto ball and box, in every pass of every solver."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv import PGD, SOLVERS, Ascent
from mixadv.maths.box import Room, project_into, room_around
from mixadv.maths.geometry import NORMS, norms, project
from tests.zoo import ASCENDING, LABELS, Vision, wrapped

BOX = (0.0, 1.0)
EPS = 8 / 255
ROWS = 6


# The projection ------------------------------------------------------------------------------


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Return δ and the room of points in the box, some of them on its boundary."""
    draw = torch.Generator().manual_seed(seed)
    delta = torch.randn(shape, generator=draw, dtype=dtype)
    x = torch.rand(shape, generator=draw, dtype=dtype).mul(1.4).sub(0.2).clamp(0, 1)
    return delta, room_around(x, BOX)


def oracle(delta: Tensor, room: Room, radius: float, norm: str) -> np.ndarray[Any, Any]:
    """Return the nearest point by a general solver, on the positive and the negative part of it."""
    d, low, high = (t.numpy() for t in (delta, *room))
    n = len(d)
    sizes = {
        "l1": lambda z: radius - z.sum(),
        "l2": lambda z: radius**2 - (z**2).sum(),
        "linf": lambda z: radius - z,
    }
    found = scipy.optimize.minimize(
        lambda z: ((z[:n] - z[n:] - d) ** 2).sum(),
        np.zeros(2 * n),
        jac=lambda z: 2 * np.concatenate([z[:n] - z[n:] - d, d - z[:n] + z[n:]]),
        bounds=[(0, h) for h in high] + [(0, -x) for x in low],
        constraints=[{"type": "ineq", "fun": sizes[norm]}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[:n] - found.x[n:]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_nearest_point_of_ball_and_box(norm: Any, seed: int):
    delta, room = drawn(seed, (1, 7))
    radius = {"l1": 1.2, "l2": 0.6, "linf": 0.3}[norm] * (1 + seed % 2)
    found = project_into(delta, room, radius, norm)[0]
    expected = oracle(delta[0], Room(room.low[0], room.high[0]), radius, norm)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


def test_one_after_the_other_is_another_point():
    room = room_around(torch.tensor([[0.5, 0.0]], dtype=torch.float64), BOX)
    delta = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    found, cut = project_into(delta, room, 1.0), room.clamp(project(delta, 1.0))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.75**0.5]]).double())
    assert (cut - delta).norm() > (found - delta).norm() + 0.05


@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(NORMS),
    per=st.sampled_from(["sample", "token"]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 30.0, 1e20]),
    radius=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 50.0]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_in_both_and_never_farther_apart(seed, norm, per, scale, radius):
    delta, room = drawn(seed, (3, 4, 5), torch.float32)
    one, other = scale * delta, scale * (delta + 0.1 * delta.flip(0))
    a, b = (project_into(x, room, radius, norm, per) for x in (one, other))
    assert bool(((a >= room.low) & (a <= room.high)).all())
    assert bool((norms(a, norm, per) <= radius * (1 + 1e-5)).all())
    assert float((a - b).norm()) <= float((one - other).norm()) * (1 + 1e-4) + 1e-6
    torch.testing.assert_close(project_into(a, room, radius, norm, per), a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_box_that_is_far_away_is_none(norm: Any):
    delta, _ = drawn(3, (4, 6))
    wide = room_around(torch.zeros_like(delta), (-1e6, 1e6))
    expected = project(delta, 0.7, norm)
    torch.testing.assert_close(project_into(delta, wide, 0.7, norm), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_a_sample_share_its_ball(norm: Any):
    delta, room = drawn(5, (4, 6))
    owners = torch.tensor([0, 1, 0, 1])
    found = project_into(delta, room, 0.5, norm, "sample", owners)
    for sample in (0, 1):
        rows = owners == sample
        joined = Room(*(x[rows].view(1, -1) for x in room))
        alone = project_into(delta[rows].view(1, -1), joined, 0.5, norm)
        torch.testing.assert_close(found[rows].view(1, -1), alone)


def test_what_lies_outside_may_come_back_and_go_no_further():
    room = room_around(torch.tensor([[-0.5, 1.5]]), BOX)
    assert room.low.tolist() == [[0.0, -1.5]]
    assert room.high.tolist() == [[1.5, 0.0]]


# What models see -----------------------------------------------------------------------------


def watch(module: nn.Module) -> list[Tensor]:
    """Return a list that fills with what a module is called with: a first round probes besides."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def pixels(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return images, with many pixels black or white, and labels."""
    draw = torch.Generator().manual_seed(0)
    images = (torch.rand(rows, 1, 8, 8, generator=draw) * 2 - 0.5).clamp(0, 1)
    return images.to(dtype), torch.randint(0, LABELS, (rows,), generator=draw)


def closure_of(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    def closure() -> tuple[Tensor, Tensor]:
        logits = model(images).float()
        return F.cross_entropy(logits, labels, reduction="none"), logits

    return closure


def in_box(name: str, **words: Any) -> mixadv.Solver:
    """Build a solver that plays in the box, with those of the words that it has."""
    known = {f.name for f in fields(SOLVERS[name]) if f.init}
    given = {"radius": EPS, "step_size": EPS, "unit": "absolute", "box": BOX, "norm": "linf"}
    reads = {"source": "dropout", "representation": lambda h: h, "shared": False}
    given = {**given, **reads, **words}
    return SOLVERS[name](**{k: v for k, v in given.items() if k in known})


SETTINGS: dict[str, dict[str, Any]] = {
    "linf": {},
    "l2": {"norm": "l2", "radius": 1.5, "step_size": 2.0},
    "l1": {"norm": "l1", "radius": 4.0, "step_size": 3.0},
    "of particles": {"particles": 3, "temperature": 0.1},
    "without a ball": {"radius": None, "start_size": 2.0, "step_size": 2.0, "projection": "ball"},
    "in units of the site": {"unit": "relative", "radius": 0.5, "norm": "l2", "step_size": 0.5},
    "a sphere": {"projection": "sphere"},
}


@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [name for name in ASCENDING if name != "textat"])
def test_every_pass_of_every_solver_stays_in_the_box(name: str, setting: str):
    solver = in_box(name, **SETTINGS[setting])
    torch.manual_seed(0)
    model, (images, labels) = Vision(), pixels()
    optimizer = wrapped(model, solver)
    closure = closure_of(model, images, labels)
    optimizer.step(closure)
    seen = watch(model.convolution)
    optimizer.step(closure)
    moved = 0
    for x in seen:
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        delta = x - images.repeat(len(x) // ROWS, 1, 1, 1)
        moved += bool(delta.any())
        if solver.radius is not None and solver.unit == "absolute":
            assert float(norms(delta, solver.norm).max()) <= solver.radius * (1 + 1e-5)
    assert moved
    assert any(bool((x == 1).any() and (x == 0).any()) for x in seen[-1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["pgd", "mat"])
def test_the_box_holds_in_other_formats_and_layouts(name: str, dtype: torch.dtype):
    """Rounding x + δ to the model's format does not leave a box whose ends it has."""
    torch.manual_seed(0)
    model, (images, labels) = Vision().to(dtype), pixels(dtype=dtype)
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    optimizer = wrapped(model, in_box(name, radius=0.2, step_size=0.2))
    optimizer.step(closure_of(model, images, labels))
    seen = watch(model.convolution)
    optimizer.step(closure_of(model, images, labels))
    assert any(bool((x != images).any()) for x in seen)
    assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for x in seen)


def test_a_patch_moves_in_the_box_alone():
    """An adversarial patch: `where` says which pixels play, the box what they may become."""
    model, (images, labels) = Vision().eval(), pixels()
    patch = torch.zeros(1, 1, 8, 8)
    patch[..., :3, :3] = 1
    optimizer = wrapped(model, in_box("pgd", radius=1.0, step_size=0.5))
    closure, where = closure_of(model, images, labels), patch.expand(ROWS, -1, -1, -1)
    optimizer.step(closure, where=where)
    seen = watch(model.convolution)
    optimizer.step(closure, where=where)
    moved = torch.stack([(x - images).abs().amax(0)[0] for x in seen]).amax(0)
    assert bool((moved[:3, :3] > 0).all())
    assert not moved[3:].any()
    assert not moved[:, 3:].any()
    assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for x in seen)


def test_a_move_is_that_of_the_loop_written_by_hand():
    """x ← clip(x + α·sign g) into ball and box: the lines of every script of adversarial vision."""
    torch.manual_seed(0)
    model, (images, labels) = Vision().double().eval(), pixels(dtype=torch.float64)
    solver = PGD(
        steps=4, radius=EPS, step_size=2 / 255, norm="linf", unit="absolute", start="zero", box=BOX
    )
    optimizer = wrapped(model, solver, lr=0.0)
    optimizer.step(closure_of(model, images, labels))
    x = images.clone()
    for _ in range(4):
        x.requires_grad_()
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, [x])
        x = x.detach() + 2 / 255 * slope.sign()
        x = torch.min(torch.max(x, images - EPS), images + EPS).clamp(0, 1)
    torch.testing.assert_close(images + optimizer.game.strategy.points[0][0], x)


def test_the_box_is_that_of_the_batch_that_is_played_on():
    """What FreeAT carries from black images is no way out of the box at white ones."""
    model, (_, labels) = Vision(), pixels()
    optimizer = wrapped(model, in_box("freeat", steps=2))
    seen = []
    for grey in (0.0, 1.0, 0.0):
        optimizer.step(closure_of(model, torch.full((ROWS, 1, 8, 8), grey), labels))
        seen = seen or watch(model.convolution)
    assert seen
    assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for x in seen)


class Squashed(nn.Module):
    """A model whose site is within, and moves with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squash, self.head = nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.squash(self.first(x)))


@pytest.mark.parametrize("name", ["mat", "freeat"])
def test_a_layer_that_moves_with_the_weights_stays_in_its_box(name: str):
    """In later steps of a round the site returns another x than δ was found at."""
    torch.manual_seed(0)
    model, x, labels = Squashed(), torch.randn(ROWS, 5), torch.arange(ROWS) % LABELS
    solver = in_box(name, radius=0.9, step_size=0.9)
    optimizer = wrapped(model, solver, lr=5.0, site="squash")
    optimizer.step(closure_of(model, x, labels))
    seen = watch(model.head)
    for _ in range(2):
        optimizer.step(closure_of(model, x, labels))
    assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for x in seen)


def test_one_delta_for_two_goals_stays_in_the_box():
    """The adversary drives towards other labels; the learner sees each image twice."""
    torch.manual_seed(0)
    model, (images, labels) = Vision().eval(), pixels()
    optimizer = wrapped(model, in_box("pgd", radius=0.3, step_size=0.3))
    aims, both = (labels + 1) % LABELS, torch.cat([images, images])
    closure = closure_of(model, both, labels.repeat(2))
    optimizer.step(closure, adversary=lambda: -F.cross_entropy(model(images), aims))
    seen = watch(model.convolution)
    optimizer.step(closure, adversary=lambda: -F.cross_entropy(model(images), aims))
    assert all(0 <= float(x.min()) <= float(x.max()) <= 1 for x in seen)


def test_normalisation_inside_of_the_model_is_all_that_is_asked():
    """The six lines of a user: pixels in [0, 1], ε of 255, the site found."""
    torch.manual_seed(0)
    images, labels = pixels()
    model = nn.Sequential(nn.BatchNorm2d(1, affine=False), Vision())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    solver = PGD(steps=3, step_size=2 / 255, radius=8 / 255, norm="linf", unit="absolute", box=BOX)
    optimizer = mixadv.wrap(optimizer, model, solver)
    losses = [optimizer.step(lambda: F.cross_entropy(model(images), labels)) for _ in range(20)]
    assert optimizer.game.explain().site == ["input"]
    assert "x + δ in [0, 1]" in str(optimizer.game.explain())
    assert losses[-1] < losses[0]


# What there is not ---------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(1.0, 0.0), (0.0,), 1.0, (0.0, 1.0, 2.0), (0.5, 0.5)])
def test_what_is_no_interval_is_refused(box: Any):
    with pytest.raises(ValueError, match=r"is no interval.*box=\(0.0, 1.0\)"):
        Ascent(box=box)


@pytest.mark.parametrize("box", [(math.nan, 1.0), ("0", 1.0)])
def test_ends_that_are_no_numbers_are_refused(box: Any):
    with pytest.raises((TypeError, ValueError), match="an end of box"):
        Ascent(box=box)


def test_normalised_images_are_told():
    model, (images, labels) = Vision(), pixels()
    optimizer = wrapped(model, in_box("pgd"))
    with pytest.raises(mixadv.GameError, match=r"from -2 to 2.*Normalise inside of the model"):
        optimizer.step(closure_of(model, 4 * images - 2, labels))


def test_a_layer_within_a_compiled_model_does_not_show_what_it_returns():
    model = torch.compile(Squashed(), backend="eager")
    optimizer = wrapped(model, in_box("pgd"), site="squash")
    with pytest.raises(mixadv.GameError, match=r"compiled model.*site='input'"):
        optimizer.step(closure_of(model, torch.randn(ROWS, 5), torch.arange(ROWS) % LABELS))


def test_words_have_no_box():
    with pytest.raises(TypeError, match="box"):
        mixadv.TextAT(box=BOX)
