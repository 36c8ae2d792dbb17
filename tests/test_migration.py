"""docs/migration.md is true: what was there and what replaces it make the same step."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mixadv
from mixadv.model.noise import Noise
from tests.zoo import player, without_dropout

TEXT = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
SECTIONS = {
    heading: dict(re.findall(r"^(Before|After):\n\n```python\n(.*?)^```", body, re.M | re.S))
    for heading, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
}
FGM, PGD, FREELB, SMART, NEFTUNE, SAM = SECTIONS
WHEN = ["Before", "After"]


def text_rows(count: int, padded: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model without dropout in float64, and rows of it in which no token occurs twice."""
    bert = player("bert", rows=count)
    model, batch = without_dropout(bert.model.double()), bert.batch
    if not padded:
        order = 3 + torch.randperm(96)[: count * 9]
        batch |= {"input_ids": order.view(count, 9), "attention_mask": torch.ones(count, 9).long()}
    return model, batch


def run(
    section: str, when: str, model: nn.Module, batch: dict[str, Tensor], **changes: str
) -> dict[str, Any]:
    """Run a block, with changes to its text, on a copy of the model; return its variables."""
    model, looked_up = copy.deepcopy(model), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, ids, output: looked_up.append(output.detach()))
    variables = {
        "torch": torch,
        "transformers": transformers,
        "mixadv": mixadv,
        "model": model,
        "batch": batch,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "rows": [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))],
        "looked_up": looked_up,
    }
    torch.manual_seed(3)
    code = SECTIONS[section][when]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, f"migration.md, {section}, {when}", "exec"), variables)
    return variables


def both(
    section: str, model: nn.Module, batch: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    before, after = (run(section, when, model, batch) for when in WHEN)
    return before, after


def step(variables: dict[str, Any], start: nn.Module) -> Tensor:
    """How far the weights moved."""
    moves = zip(variables["model"].parameters(), start.parameters(), strict=True)
    return torch.cat([(new - old).detach().flatten() for new, old in moves])


def assert_same_step(
    before: dict[str, Any], after: dict[str, Any], start: nn.Module, error: float = 1e-12
) -> None:
    expected = step(before, start)
    assert float(expected.abs().max()) > 1e-6
    torch.testing.assert_close(step(after, start), expected, rtol=1e-8, atol=error)


def draws(monkeypatch: pytest.MonkeyPatch, draw: Callable[[Tensor], Tensor]) -> None:
    """Make the game draw as the code does that it replaces, after the same seed."""
    monkeypatch.setattr(Noise, "begin", lambda *_: torch.manual_seed(3))
    monkeypatch.setattr(Noise, "__call__", lambda self, kind, like: draw(like))


def test_every_block_is_one_before_or_after():
    assert [list(blocks) for blocks in SECTIONS.values()] == [WHEN] * 6
    assert TEXT.count("```python") == 12


# Equal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [FGM, PGD])
def test_attack_and_restore_is_the_game_on_one_row_without_repetition(section: str):
    model, batch = text_rows(1, padded=False)
    assert_same_step(*both(section, model, batch), model)


def test_a_freelb_loop_is_the_game_on_a_padded_batch(monkeypatch: pytest.MonkeyPatch):
    model, batch = text_rows(6, padded=True)
    draws(monkeypatch, lambda like: 2 * torch.rand_like(like) - 1)
    assert_same_step(*both(FREELB, model, batch), model)


def test_two_steps_of_sam_are_the_game_on_a_padded_batch():
    model, batch = text_rows(6, padded=True)
    assert_same_step(*both(SAM, model, batch), model)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("cast", "error"), [(Tensor.float, 3e-8), (Tensor.double, 1e-12)])
def test_sam_of_pytorch_optimizer_is_the_game(
    monkeypatch: pytest.MonkeyPatch, cast: Callable[[Tensor], Tensor], error: float, adaptive: bool
):
    """Over ten steps of SGD with momentum, in float64."""
    package = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    start, ours = copy.deepcopy(theirs), copy.deepcopy(theirs)
    rows, labels = torch.randn(12, 5).double(), torch.arange(12) % 3
    sgd = {"lr": 0.1, "momentum": 0.9}
    optimizer = package.SAM(
        theirs.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, perturb_eps=0.0, **sgd
    )
    solver = mixadv.ASAM(radius=0.3, stabilizer=0.0) if adaptive else mixadv.SAM(radius=0.3)
    game = mixadv.wrap(torch.optim.SGD(ours.parameters(), **sgd), ours, solver)
    for _ in range(10):
        game.step(lambda: nn.functional.cross_entropy(ours(rows), labels))

    def backward() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(rows), labels).backward()

    # It casts its norms by Tensor.float: ‖g‖ has the rounding of fp32, about 1e-7 of it. So has ρ.
    monkeypatch.setattr(Tensor, "float", cast)
    for _ in range(10):
        backward()
        optimizer.step(backward)
    expected, found = (step({"model": model}, start) for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=error)


def test_smart_pytorch_is_the_game_on_a_padded_batch(monkeypatch: pytest.MonkeyPatch):
    model, batch = text_rows(6, padded=True)
    draws(monkeypatch, torch.randn_like)
    assert_same_step(*both(SMART, model, batch), model)


def test_the_example_of_smart_pytorch_is_a_sum_over_the_batch_against_fixed_targets(
    monkeypatch: pytest.MonkeyPatch,
):
    model, batch = text_rows(6, padded=True)
    draws(monkeypatch, torch.randn_like)
    theirs = {
        "import SMARTLoss, kl_loss": "import SMARTLoss, kl_loss, sym_kl_loss",
        "(predict, kl_loss, step": "(predict, kl_loss, sym_kl_loss, step",
    }
    ours = {
        "smoothness_weight=0.02": 'smoothness_weight=0.02 * len(batch["labels"])',
        '"kl"': '"fixed_symmetric_kl"',
    }
    before = run(SMART, "Before", model, batch, **theirs)
    assert_same_step(before, run(SMART, "After", model, batch, **ours), model)


@pytest.fixture
def uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[float]]:
    """Make all uniform draws of a shape the same; return the bounds that are asked for."""
    monkeypatch.chdir(tmp_path)
    bounds: list[float] = []

    def fixed(like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return 2 * torch.rand(like.shape, generator=generator, dtype=like.dtype) - 1

    def uniform_(self: Tensor, low: Any, high: Any) -> Tensor:
        bounds.append(float(high))
        return self.copy_(float(high) * fixed(self))

    def patch() -> list[float]:
        draws(monkeypatch, fixed)
        monkeypatch.setattr(Tensor, "uniform_", uniform_)
        return bounds

    return patch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_neftune_is_the_game_without_padding(
    uniform: Callable[[], list[float]], micro: int, smoothing: float
):
    """With what else the trainer does to a loss: accumulation and label smoothing."""
    model, batch = text_rows(4, padded=False)
    bounds = uniform()
    others = f"gradient_accumulation_steps={micro}, label_smoothing_factor={smoothing}"
    size = f"max_steps=1, per_device_train_batch_size={4 // micro}, {others}"
    runs = [run(NEFTUNE, when, model, batch, **{"max_steps=1": size}) for when in WHEN]
    assert_same_step(*runs, model, 1e-9)  # their bound is in fp32
    assert bounds == micro * [pytest.approx(5 / (9 * 16) ** 0.5)]


# What differs --------------------------------------------------------------------------------


def test_attack_and_restore_spreads_one_radius_over_the_batch():
    model, batch = text_rows(4, padded=False)
    before, after = both(FGM, model, batch)
    clean, attacked = before["looked_up"]
    lengths = (attacked - clean).flatten(1).norm(dim=1)
    assert float(lengths.square().mean().sqrt()) == pytest.approx(1 / 4**0.5)
    (lengths,) = after["optimizer"].game.strategy.norms()
    torch.testing.assert_close(lengths.flatten(), torch.ones(4, dtype=torch.float64))


def test_a_perturbed_matrix_is_cat_without_contrast():
    """In L∞, where a perturbation shared by all rows has a size of its own for each token."""
    model, batch = text_rows(6, padded=True)
    sign = {"weight.grad / weight.grad.norm()": "weight.grad.sign()"}
    before = run(FGM, "Before", model, batch, **sign)
    cat = {"FGM(radius=1.0,": "CAT(contrast_weight=0.0, radius=1.0,"}
    after = run(FGM, "After", model, batch, **cat)
    torch.testing.assert_close(2 * step(after, model), step(before, model))


@pytest.mark.parametrize("tied", [False, True])
def test_only_attack_and_restore_perturbs_a_tied_output_layer(tied: bool):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=40, tie_word_embeddings=tied
    )
    model = without_dropout(transformers.GPT2LMHeadModel(config).double().train())
    _, batch = text_rows(1, padded=False)
    batch["labels"] = batch["input_ids"]
    before, after = (step(v, model) for v in both(FGM, model, batch))
    assert torch.allclose(before, after, rtol=1e-8, atol=1e-12) is not tied


def test_only_the_game_perturbs_a_frozen_embedding():
    model, batch = text_rows(1, padded=False)
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises((TypeError, AttributeError)):
        run(FGM, "Before", model, batch)
    game = run(FGM, "After", model, batch)["optimizer"].game
    assert float(game.outcome.radius) == pytest.approx(1.0)


def test_steps_of_pgd_build_no_gradients_of_weights():
    outcome = run(PGD, "After", *text_rows(1, padded=False))["game"].outcome
    assert (outcome.delta_backwards, outcome.theta_backwards) == (3, 1)


@pytest.mark.parametrize(("family", "same"), [("bert", True), ("roberta", False)])
def test_embeddings_in_place_of_ids_are_another_input_for_some_models(family: str, same: bool):
    model, batch, _ = player(family, rows=2, side="left")
    without_dropout(model)
    mask, ids = batch["attention_mask"], batch["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    one = model(input_ids=ids, attention_mask=mask).logits
    other = model(inputs_embeds=embedded, attention_mask=mask).logits
    assert torch.allclose(one, other, atol=1e-5) is same


def test_smart_pytorch_falls_some_per_cent_short_of_1_by_default():
    noise = 1e-5 * torch.randn(8, 128, 768)
    largest = noise.abs().amax(-1)
    short = 1 - largest / (largest + 1e-6)
    assert 0.01 < float(short.mean()) < 0.1


@pytest.mark.filterwarnings("ignore")
def test_neftune_counts_padding_and_the_game_does_not(uniform: Callable[[], list[float]]):
    model, batch = text_rows(4, padded=True)
    bounds = uniform()
    _, after = both(NEFTUNE, model, batch)
    padded = 5 / (9 * 16) ** 0.5
    assert bounds == [pytest.approx(padded)]
    (delta,), (mask,) = after["game"].strategy.points, after["game"].strategy.masks
    assert not (delta[0] * (1 - mask)).any()
    for one, real in zip(delta[0], mask.sum((1, 2)), strict=True):
        largest, bound = float(one.abs().max()), 5 / float(real * 16) ** 0.5
        assert 0.9 * bound < largest <= bound
        assert (bound > padded) is (real < 9).item()
