"""Frozen anchors: an encoder stays robustly where a copy of it puts its inputs."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
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


# CLIP ----------------------------------------------------------------------------------------


class Tower(nn.Module):
    """CLIP's image tower, with the normalisation of pixels in it."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Any:
        return self.clip.get_image_features(pixel_values=(images - 0.45) / 0.27)


def clip_of() -> tuple[Tower, Tensor]:
    """Return a tiny CLIP in float64, and the frozen embeddings of three classes' names."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2}
    text = {**size, "vocab_size": 9, "max_position_embeddings": 4, "eos_token_id": 2}
    eyes = {**size, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=eyes, projection_dim=8)
    clip = transformers.CLIPModel(config).double().eval()
    with torch.no_grad():
        names = clip.get_text_features(torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2]]))
    return Tower(clip), F.normalize(names.pooler_output, dim=-1)


def photographs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(12, 3, 8, 8, generator=draw, dtype=torch.float64), torch.arange(12) % 3


def zero_shot(tower: Tower, images: Tensor, names: Tensor) -> Tensor:
    return 100 * F.normalize(tower(images).pooler_output, dim=-1) @ names.T


def test_tecoa_trains_the_image_tower_of_clip_against_the_frozen_names():
    """Mao et al. 2023, eq. 3, by hand: sign steps up the contrastive loss, then one down it."""
    tower, names = clip_of()
    x, labels = photographs()
    optimizer = wrapped(tower, PGD(**WORDS), torch.optim.SGD, lr=0.0, site="input")
    noise = optimizer.game.rounds.arena.noise
    noise.begin("adversary", 0, 0)
    x_adv = torch.min(torch.max(x + 0.1 * noise("uniform", x), x - 0.1), x + 0.1).clamp(0, 1)
    for _ in range(WORDS["steps"]):
        x_adv.requires_grad_()
        loss = F.cross_entropy(zero_shot(tower, x_adv, names), labels)
        (slope,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + WORDS["step_size"] * slope.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    expected = F.cross_entropy(zero_shot(tower, x_adv, names), labels)
    expected.backward()
    slopes = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()

    def closure() -> tuple[Tensor, Tensor]:
        logits = zero_shot(tower, x, names)
        return F.cross_entropy(logits, labels), logits

    outcome = optimizer.game.backward(closure)
    torch.testing.assert_close(outcome.objective, expected.detach())
    found = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, slopes, rtol=1e-7, atol=1e-10)
    assert found
    assert not any("text" in name for name in found)


def robust_accuracy(tower: Tower, names: Tensor) -> float:
    x, labels = photographs()

    def closure() -> tuple[Tensor, Tensor]:
        logits = zero_shot(tower, x, names)
        return F.cross_entropy(logits, labels, reduction="none"), logits

    strong = PGD(**{**WORDS, "radius": 0.02, "steps": 10, "step_size": 0.005})
    x = x + mixadv.attack(tower, strong, closure, site="input").strategy.points[0][0]
    return float((zero_shot(tower, x, names).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("way", ["FARE", "TeCoA"])
def test_clip_becomes_robust_in_both_ways(way: str):
    """FARE pulls its embeddings back to the frozen ones, TeCoA its zero-shot classes."""
    tower, names = clip_of()
    (x, labels), anchor = photographs(), Anchor(tower, read=lambda output: output.pooler_output)
    text = copy.deepcopy(tower.clip.text_model.state_dict())
    strong = PGD(**{**WORDS, "radius": 0.02, "step_size": 0.01})

    def moved() -> float:
        return float(mixadv.attack(tower, strong, anchor(tower, x), site="input").loss.mean())

    def supervised() -> tuple[Tensor, Tensor]:
        logits = zero_shot(tower, x, names)
        return F.cross_entropy(logits, labels), logits

    closure = supervised if way == "TeCoA" else anchor(tower, x)
    before, right = moved(), robust_accuracy(tower, names)
    optimizer = wrapped(tower, strong, torch.optim.Adam, lr=3e-3, site="input")
    for _ in range(40):
        optimizer.step(closure)
    if way == "FARE":
        assert moved() < 0.7 * before
    else:
        assert robust_accuracy(tower, names) > right + 0.3
    assert_same(tower.clip.text_model.state_dict(), text)


def test_clip_whose_site_is_not_named_is_refused_in_words():
    tower, _ = clip_of()
    with pytest.raises(ValueError, match=r"3 embeddings.*site="):
        wrapped(tower, PGD(**WORDS))


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


def test_one_of_two_embeddings_is_not_chosen_in_silence():
    """Retrieval reads the mean of a BERT's tokens, zero-shot classes what a CLIP pooled."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=12, num_hidden_layers=1, **size)
    model, ids = transformers.BertModel(config).eval(), torch.randint(1, 12, (4, 5))
    with pytest.raises(GameError, match=r"(?s)which.*output\.pooler_output.*last_hidden_state\)"):
        Anchor(model)(model, ids)
    for name in ("pooler_output", "last_hidden_state"):
        anchor = Anchor(model, read=lambda output, name=name: output[name])
        assert_same(anchor.embed(ids), model(ids)[name])


def test_what_is_no_encoder_cannot_be_anchored():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got <function.*read=lambda"):
        Anchor(photographs)  # pyright: ignore[reportArgumentType]


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


def test_padding_counts_nothing_where_tokens_are_embedded():
    """Else the loss of a sentence would depend on the length of those beside it."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.embed(ids)

    encoder = Tokens()
    anchor = Anchor(encoder)
    with torch.no_grad():
        encoder.embed.weight += 1
    for length in (3, 6):
        ids = F.pad(torch.tensor([[1, 2, 3]]), (0, length - 3))
        assert anchor(encoder, ids, attention_mask=(ids > 0).long())().item() == pytest.approx(12)
