"""Ascents whose direction is not their norm's: that of `torch.optim.Adam`, and signs in L2."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from mixadv.maths.geometry import project
from mixadv.model.noise import Noise
from mixadv.players.strategy import Strategy
from tests.worlds import classified, played
from tests.zoo import small, wrapped

STEPS, RATE, RADIUS = 6, 0.05, 0.12
WORDS = {"normalize": "adam", "steps": STEPS, "step_size": RATE, "unit": "absolute"}


def world() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(3, 4).double(), torch.tensor([0, 2, 1])


def by_torch(run: Any, like: Tensor, start: Tensor, radius: float | None) -> Tensor:
    """Return where torch's own Adam ends, projected onto the L2 ball of each row."""
    delta = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([delta], lr=RATE, maximize=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        run(like + delta).backward()
        optimizer.step()
        with torch.no_grad():
            length = delta.flatten(1).norm(dim=1, keepdim=True)
            if radius is not None:
                delta *= (radius / length).clamp(max=1.0)
    return delta.detach()


@pytest.mark.parametrize("radius", [None, RADIUS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ascent_is_that_of_torchs_adam(reduction: str, radius: float | None):
    model, x, y = world()

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y, reduction=reduction)

    solver = mixadv.PGD(**WORDS, radius=radius, start="zero")
    game = mixadv.Game(model, solver, site="input")
    game.backward(closure)

    def summed(moved: Tensor) -> Tensor:
        return F.cross_entropy(model(moved), y, reduction="sum")

    expected = by_torch(summed, x, torch.zeros_like(x), radius)
    torch.testing.assert_close(played(game), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_signs_are_projected_onto_the_ball_of_any_norm(norm: str):
    model, x, y = world()
    words = {**WORDS, "normalize": "sign"}
    game = mixadv.Game(model, mixadv.PGD(**words, radius=RADIUS, norm=norm, start="zero"), "input")
    game.backward(lambda: F.cross_entropy(model(x), y))
    delta = torch.zeros_like(x)
    for _ in range(STEPS):
        delta.requires_grad_()
        loss = F.cross_entropy(model(x + delta), y, reduction="sum")
        [gradient] = torch.autograd.grad(loss, delta)
        delta = project(delta.detach() + RATE * gradient.sign(), RADIUS, norm, "sample")
    torch.testing.assert_close(played(game), delta, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["freelb", "freeat", "smart", "alum", "mat"])
def test_every_ascent_of_several_steps_remembers(name: str):
    found = []
    for normalize in ("adam", "steepest"):
        p = small()
        settings = {"proximal_weight": 0.0} if name == "smart" else {}
        optimizer = wrapped(
            p, name, normalize=normalize, steps=3, radius=0.1, norm="linf", **settings
        )
        optimizer.step(p.closure())
        points = played(optimizer.game)
        assert bool((points.abs() <= 0.1).all())
        found.append(points)
    assert not torch.allclose(*found)


def test_each_particle_has_moments_of_its_own():
    model, x, y = world()
    still = {"mirror_step": 0.0, "temperature": 0.0, "start": "zero", "start_size": None}
    solver = mixadv.MAT(**WORDS, **still, radius=RADIUS, divergence=toward, particles=2)
    optimizer = wrapped(model, solver, site="input")
    optimizer.step(classified(model, x, labels=y))
    first, second = optimizer.game.strategy.points[0]
    torch.testing.assert_close(first, second)

    def run(moved: Tensor) -> Tensor:
        return toward(model(moved), None).sum()

    optimizer.game.close()
    again, x, y = world()
    model.load_state_dict(again.state_dict())
    expected = by_torch(run, x, torch.zeros_like(x), RADIUS)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-9)


def toward(perturbed: Tensor, clean: Any) -> Tensor:
    return perturbed[:, 0] - perturbed[:, 1]


def test_a_gradient_that_is_not_finite_is_not_remembered():
    ascent = mixadv.Ascent(normalize="adam", step_size=RATE, radius=None)

    def rule(index: int, *move: Any) -> Tensor:
        return ascent.move(*move)

    def moved(q: Strategy, slope: Tensor) -> tuple[Strategy, list[Tensor]]:
        return q.move([slope], rule, Noise(0), remembers=True)

    slope = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    broken = slope.clone()
    broken[0, 1, 0] = torch.nan
    q, fallen = moved(Strategy([torch.zeros_like(slope)]), broken)
    assert fallen[0].tolist() == [False, True]
    assert q.points[0][0, 1].tolist() == [0, 0]
    q, fallen = moved(q, slope)
    assert fallen[0].tolist() == [False, False]
    assert bool((q.points[0][0] > 0).all())


@pytest.mark.parametrize("name", ["fgm", "cat", "vat", "textat"])
def test_solvers_without_an_ascent_of_several_steps_refuse_it(name: str):
    with pytest.raises(ValueError, match="normalize='adam' remembers the gradients of an ascent"):
        mixadv.make_solver(name, normalize="adam")


def test_moments_turn_with_the_points():
    """−δ under gradients of the other sign is the mirror image of δ."""
    ascent = mixadv.PGD(normalize="adam", step_size=0.1, radius=1.0, start="zero", unit="absolute")

    def moved(q: Strategy, slope: float) -> Strategy:
        gradient = torch.full_like(q.points[0], slope)
        return q.move([gradient], lambda _, *at: ascent.move(*at), Noise(0), remembers=True)[0]

    q = moved(Strategy([torch.zeros(1, 1, 1)]), 1.0)
    mirrored = moved(q.turned([-torch.ones(1, 1, 1)]), -0.5)
    torch.testing.assert_close(mirrored.points[0], -moved(q, 0.5).points[0])
