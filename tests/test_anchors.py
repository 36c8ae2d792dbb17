"""Frozen anchors: an encoder stays robustly where a copy of it puts its inputs."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from mixadv import PGD, GameError
from mixadv.anchors import Anchor, embedding_of
from tests.test_box import pixels
from tests.zoo import Small, assert_same, wrapped

WORDS: dict[str, Any] = {
    "steps": 4,
    "step_size": 0.05,
    "radius": 0.1,
    "norm": "linf",
    "unit": "absolute",
    "box": (0.0, 1.0),
}


class Encoder(nn.Module):
    """Returns embeddings `[B, 5]` of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout = nn.Conv2d(1, 4, 3), nn.Dropout(0.1)
        self.second = nn.Linear(144, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.first(images)))
        return self.second(x.flatten(1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().double()


def test_a_round_is_fare_written_by_hand():
    """Sign steps up the distance to the frozen embedding, then one down it at the end."""
    model, (x, _) = encoder().eval(), pixels(dtype=torch.float64)
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        model.second.weight.mul_(1.1)
    target = frozen(x).detach()
    solver = PGD(**WORDS)
    optimizer = wrapped(model, solver, lr=0.0)
    noise = optimizer.game.rounds.arena.noise
    noise.begin("adversary", 0, 0)
    start = 0.1 * noise("uniform", x)
    x_adv = torch.min(torch.max(x + start, x - 0.1), x + 0.1).clamp(0, 1)
    for _ in range(4):
        x_adv.requires_grad_()
        (slope,) = torch.autograd.grad((model(x_adv) - target).square().sum(), [x_adv])
        x_adv = x_adv.detach() + 0.05 * slope.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    expected = (model(x_adv) - target).square().sum(1).mean()
    expected.backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    anchor = Anchor(frozen)
    outcome = optimizer.game.backward(anchor(model, x))
    torch.testing.assert_close(outcome.objective, expected.detach())
    torch.testing.assert_close([p.grad for p in model.parameters()], slopes)


def displacement(model: nn.Module, frozen: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the distances from the frozen embeddings, clean and under a stronger attack."""
    target = frozen(x).detach()

    def closure() -> Tensor:
        return (model(x) - target).square().sum(1)

    with torch.no_grad():
        clean = float(copy.deepcopy(model).eval()(x).sub(target).square().sum(1).mean())
    strong = PGD(**{**WORDS, "steps": 20, "step_size": 0.02})
    return clean, float(mixadv.attack(model, strong, closure).loss.mean())


@pytest.mark.parametrize("name", ["pgd", "freelb"])
def test_embeddings_become_robust_and_stay_where_they_were(name: str):
    model, (x, _) = encoder(), pixels(24, dtype=torch.float64)
    frozen = copy.deepcopy(model).eval()
    anchor = Anchor(model)
    optimizer = wrapped(model, name, torch.optim.Adam, lr=3e-3, **WORDS)
    _, before = displacement(model, frozen, x)
    for _ in range(60):
        optimizer.step(anchor(model, x))
    clean, after = displacement(model, frozen, x)
    assert after < 0.7 * before
    assert clean < after
    assert_same(anchor.state_dict(), frozen.state_dict())
    assert not any(p.requires_grad for p in anchor.encoder.parameters())


def test_the_first_round_is_not_warned_of_and_moves():
    """At θ_0 the distance has no slope at δ = 0, and the ascent starts elsewhere."""
    model, (x, _) = encoder().eval(), pixels(dtype=torch.float64)
    optimizer = wrapped(model, PGD(**WORDS), lr=0.01)
    assert optimizer.step(Anchor(model)(model, x)) > 0


def test_an_ascent_that_starts_there_is_warned_of():
    model, (x, _) = encoder().eval(), pixels(dtype=torch.float64)
    optimizer = wrapped(model, PGD(**WORDS, start="zero", start_size=0.0), lr=0.01)
    with pytest.warns(UserWarning, match="exactly zero in the first round"):
        optimizer.step(Anchor(model)(model, x))


def test_a_checkpoint_goes_on_where_it_was():
    ends = []
    for stops in (False, True):
        model, (x, _) = encoder(), pixels(dtype=torch.float64)
        anchor, optimizer = Anchor(model), wrapped(model, PGD(**WORDS))
        for number in range(4):
            if stops and number == 2:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                kept, random = copy.deepcopy(anchor.state_dict()), torch.get_rng_state()
                model = Encoder().double()
                optimizer, anchor = wrapped(model, PGD(**WORDS)), Anchor(model)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                anchor.load_state_dict(kept)
                torch.set_rng_state(random)
            optimizer.step(anchor(model, x))
        ends.append(model.state_dict())
    assert_same(*ends)


def test_supervised_it_is_pgd_on_similarities_to_frozen_names():
    """TeCoA: classes are frozen embeddings, and the closure returns logits."""
    model, (x, _) = encoder(), pixels(24, dtype=torch.float64)
    names = F.normalize(torch.randn(3, 5, dtype=torch.float64), dim=1)
    labels = torch.arange(24) % 3

    def closure() -> tuple[Tensor, Tensor]:
        logits = 10 * F.normalize(model(x), dim=-1) @ names.T
        return F.cross_entropy(logits, labels), logits

    optimizer = wrapped(model, PGD(**{**WORDS, "radius": 0.02}), torch.optim.Adam, lr=0.01)
    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert losses[-1] < losses[0] / 2


# What encoders return ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image_embeds", "pooler_output"])
def test_embeddings_are_read_from_outputs(name: str):
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder().eval()

        def forward(self, images: Tensor) -> Any:
            return SimpleNamespace(**{name: self.inner(images)})

    model, (x, _) = Output(), pixels(dtype=torch.float64)
    read = Anchor(model.inner)(model.inner, x)()
    assert_same(Anchor(model)(model, x)(), read)


def test_tokens_are_read_by_a_function():
    torch.manual_seed(0)
    model, ids = Small().eval(), torch.randint(1, 12, (4, 5))
    anchor = Anchor(model, read=lambda logits: F.normalize(logits, dim=-1))
    optimizer = wrapped(model, "pgd", site="embedding")
    assert optimizer.step(anchor(model, ids)) > 0


def test_what_is_no_embedding_is_told():
    model = nn.Identity()
    with pytest.raises(GameError, match=r"Tensor.*read=lambda output"):
        Anchor(model)(model, torch.zeros(3))
    with pytest.raises(GameError, match=r"SimpleNamespace"):
        embedding_of(SimpleNamespace(logits=torch.zeros(2, 2)))


def test_another_encoder_is_told():
    anchor = Anchor(nn.Linear(4, 2))
    closure = anchor(nn.Linear(4, 3), torch.zeros(5, 4))
    with pytest.raises(GameError, match=r"\[5, 3\], and its frozen copy \[5, 2\]"):
        closure()
