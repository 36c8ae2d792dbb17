"""Families of the transformers library: δ is r·g/‖g‖, padding is still, and every solver learns.

Each test finds the gradient by a hook of its own.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixadv
from tests.families_zoo import CANNOT, FAMILIES, IMAGE, REFUSED, Batch
from tests.zoo import note_refusal

# WavLM's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
    pytest.mark.filterwarnings("ignore:The model is called with .* too, which stay as they are"),
]

RADIUS = 0.1
STEPS = 30
# One of each kind in the fast tests.
USUAL = ("XLMRoberta", "Qwen2", "XLNet", "Mamba", "Swin", "Llava", "Wav2Vec2")
SOLVERS = ("fgm", "freelb", "smart", "mat", "cat")


def rows(*names: str) -> list[Any]:
    """Return the families, or each with each name; those that are not usual are slow."""
    found = []
    for family in FAMILIES:
        marks = () if family in USUAL else pytest.mark.slow
        for row in [(family, name) for name in names] or [(family,)]:
            found.append(pytest.param(*row, marks=marks, id="-".join(row)))
    return found


def fresh(family: str) -> tuple[nn.Module, Batch]:
    """Return a model in training mode, and its batch."""
    torch.manual_seed(0)
    return FAMILIES[family].build().train(), FAMILIES[family].batch()


def played(family: str, solver: mixadv.Solver) -> tuple[mixadv.Game, Batch]:
    """Return the game of a round, whose gradients are those of the model, and the batch."""
    model, batch = fresh(family)
    game = mixadv.Game(model, solver, FAMILIES[family].site)
    torch.manual_seed(5)
    game.backward(lambda: model(**batch))
    return game, batch


def slopes(game: mixadv.Game, batch: Batch) -> list[Tensor]:
    """Return the gradients at what the site returns, call by call, batch first."""
    game.close()
    [(name, site)] = game.site.targets
    leaves: list[Tensor] = []

    def moved(first: Any) -> Any:
        if isinstance(first, tuple):
            return moved(first[0]), *first[1:]
        leaves.append(torch.zeros_like(first).requires_grad_())
        return first + leaves[-1]

    if name == "input":
        read = game.model.main_input_name
        batch, hook = {**batch, read: moved(batch[read])}, None
    else:
        hook = site.register_forward_hook(lambda module, args, output: moved(output))
    torch.manual_seed(5)
    gradients = torch.autograd.grad(game.model(**batch).loss, leaves)
    if hook is not None:
        hook.remove()
    rows = len(next(iter(batch.values())))
    return [g if len(g) == rows else g.transpose(0, 1) for g in gradients]


def counts(batch: Batch, point: Tensor) -> Tensor:
    """Return where δ may act: at real tokens which are no places of an image."""
    mask, images = batch.get("attention_mask"), batch.get("pixel_values")
    if mask is None or (images is not None and point.shape == images.shape):
        return torch.ones_like(point)
    assert mask.shape == point.shape[:2]
    if images is not None:
        mask = mask * (batch["input_ids"] != IMAGE)
    return mask.view(*mask.shape, *[1] * (point.dim() - 2)).expand_as(point).to(point)


@pytest.mark.parametrize("family", rows())
def test_one_step_is_the_radius_times_the_direction_of_the_gradient(family: str):
    solver = mixadv.PGD(start="zero", steps=1, step_size=RADIUS, radius=RADIUS, unit="absolute")
    game, batch = played(family, solver)
    points = [p[0] for p in game.strategy.points]
    gradients = slopes(game, batch)
    assert len(points) == len(gradients)
    for point, gradient in zip(points, gradients, strict=True):
        gradient = gradient * counts(batch, gradient)
        length = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.dim() - 1))
        assert (length > 0).all()
        expected = RADIUS * gradient / length
        torch.testing.assert_close(point, expected, rtol=1e-3, atol=1e-4 * RADIUS)


@pytest.mark.parametrize("family", rows())
def test_what_does_not_count_stays_still(family: str):
    game, batch = played(family, mixadv.UniformNoise(radius=RADIUS, unit="absolute"))
    for points in game.strategy.points:
        real = counts(batch, points[0]) > 0
        assert not points[0][~real].any()
        assert points[0][real].all()
    assert game.unit is not None


@pytest.mark.parametrize("family", rows())
def test_at_radius_zero_the_gradient_is_the_plain_one(family: str):
    game, batch = played(family, mixadv.PGD(steps=1, radius=0.0))
    model, batch = fresh(family)
    torch.manual_seed(5)
    model(**batch).loss.backward()
    for (name, plain), mine in zip(model.named_parameters(), game.model.parameters(), strict=True):
        assert (plain.grad is None) == (mine.grad is None), name
        if plain.grad is not None:
            torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6)


def falls(family: str, name: str) -> tuple[float, float]:
    """Train until the loss has fallen; return the first and the last."""
    row = FAMILIES[family]
    settings = {
        "smart": {"proximal_weight": 0.0, "divergence": row.divergence},
        "mat": {"divergence": row.divergence},
        "cat": row.settings,
    }
    model, batch = fresh(family)
    solver = mixadv.make_solver(name, **settings.get(name, {}))
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = mixadv.wrap(base, model, solver, site=row.site)

    def value() -> float:
        torch.manual_seed(5)
        return float(model(**batch).loss.detach())

    begin = end = value()
    for _ in range(STEPS):
        optimizer.step(lambda: model(**batch))
        end = value()
        if end < 0.97 * begin:
            break
    return begin, end


@pytest.mark.parametrize(("family", "name"), rows(*SOLVERS))
def test_the_loss_falls_or_the_solver_says_why_not(family: str, name: str):
    said = CANNOT.get((family, name))
    if said is not None:
        with pytest.raises(mixadv.GameError, match=re.escape(said)) as caught:
            falls(family, name)
        note_refusal(str(caught.value))
        return
    begin, end = falls(family, name)
    assert end < 0.97 * begin


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_write(name: str):
    family, said = REFUSED[name]
    torch.manual_seed(0)
    model, batch = family.build().train(), family.batch()
    with pytest.raises((mixadv.GameError, ValueError), match=re.escape(said)) as caught:
        mixadv.Game(model, mixadv.FGM()).backward(lambda: model(**batch))
    note_refusal(str(caught.value))
