"""Predictions at masked positions alone: the loss of all logits, at the labels only."""

import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from transformers import BertConfig, BertForPreTraining, BertModel

import mixadv
from mixadv.tokens.reading.masked import at_positions, masked_predictions, predictions_at
from tests.zoo import ROWS

WORDS = 23
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"intermediate_size": 24, "max_position_embeddings": 24, "vocab_size": WORDS}
SMALL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}


def masked_lm(family: str, **size: Any) -> Callable[[], Any]:
    """Return what builds a masked-language model of a family of transformers."""
    config, model = (getattr(transformers, f"{family}{part}") for part in ("Config", "ForMaskedLM"))
    return lambda: model(config(**size))


MODELS = {
    "bert": masked_lm("Bert", **SIZE),
    "roberta": masked_lm("Roberta", **SIZE),
    "distilbert": masked_lm("DistilBert", vocab_size=WORDS, **SMALL),
    "electra": masked_lm("Electra", **SIZE, embedding_size=12),
    "albert": masked_lm("Albert", **SIZE, embedding_size=12),
    "deberta": masked_lm("DebertaV2", **SIZE),
    "modernbert": masked_lm("ModernBert", **SIZE, pad_token_id=0, attn_implementation="eager"),
}


def batch(seed: int, rows: int = 3, length: int = 7, rate: float = 0.3) -> dict[str, torch.Tensor]:
    """Return ids, a mask of padding and labels of some positions."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, length), generator=draw)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=draw)
    mask = (torch.arange(length) < lengths).long()
    chosen = (torch.rand(rows, length, generator=draw) < rate) & (mask > 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(chosen, ids, -100)}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(name: str):
    torch.manual_seed(0)
    model, inputs = MODELS[name]().double().eval(), batch(1)
    found = masked_predictions(model, **inputs)
    found["loss"].backward()
    ours = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    torch.testing.assert_close(found["loss"], loss)
    real = found["labels"] != -100
    torch.testing.assert_close(found["logits"][real], logits[labels != -100])
    torch.testing.assert_close(found["labels"][real], labels[labels != -100])
    assert not found["logits"][~real].any()
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        if parameter.grad is not None:
            assert mine is not None
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-7)


@given(st.integers(0, 999), st.floats(0, 1))
def test_rows_of_logits_are_in_reading_order(seed: int, rate: float):
    torch.manual_seed(0)
    model, inputs = MODELS["bert"]().eval(), batch(seed, rate=rate)
    labels = inputs.pop("labels")
    every = predictions_at(model, torch.ones_like(labels, dtype=torch.bool), **inputs)
    chosen = predictions_at(model, labels != -100, **inputs)
    torch.testing.assert_close(chosen, every.view(*labels.shape, WORDS)[labels != -100])


def test_a_batch_without_labels_has_loss_zero_and_gradients_zero():
    model = MODELS["bert"]()
    inputs = batch(0)
    found = masked_predictions(model, **inputs | {"labels": torch.full((3, 7), -100)})
    found["loss"].backward()
    assert found["loss"] == 0
    assert found["logits"].shape == (3, 1, WORDS)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_both_heads_of_a_model_are_read():
    model, inputs = BertForPreTraining(BertConfig(**SIZE)).eval(), batch(2)
    labels = inputs.pop("labels")
    with at_positions(model, labels != -100):
        output = model(**inputs)
    assert output.prediction_logits.shape == ((labels != -100).sum(), WORDS)
    order = torch.tensor([0, 1, 1])
    found = masked_predictions(model, labels=labels, order=order, **inputs)
    own = model(labels=labels, next_sentence_label=order, **inputs)
    torch.testing.assert_close(found["loss"], own.loss)
    torch.testing.assert_close(found["order_logits"], own.seq_relationship_logits)
    with pytest.raises(TypeError, match=r"no seq_relationship_logits.*AutoModelForPreTraining"):
        masked_predictions(MODELS["bert"](), labels=labels, order=order, **inputs)


def test_the_hook_is_gone_after_an_error():
    model, inputs = MODELS["bert"](), batch(0)
    with pytest.raises(ValueError, match="input_ids"):
        masked_predictions(model, labels=inputs["labels"])
    with pytest.raises(ValueError, match=r"reads \[3, 7, 16\], and positions are \[3, 6\]"):
        masked_predictions(model, **inputs | {"labels": inputs["labels"][:, 1:]})
    assert not model.cls.predictions.decoder._forward_pre_hooks
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 7, WORDS)


def test_a_model_without_a_language_model_head_is_refused():
    with pytest.raises(TypeError, match=r"BertModel has no language-model head.*ForMaskedLM"):
        masked_predictions(BertModel(BertConfig(**SIZE)), **batch(0))
    with pytest.raises(TypeError, match="Linear has no language-model head"):
        predictions_at(torch.nn.Linear(2, 2), torch.ones(1, 1, dtype=torch.bool))


# The game --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [n for n in mixadv.SOLVERS if n not in ("cat", "mart", *ROWS)])
def test_every_solver_plays_at_masked_positions(solver: str):
    torch.manual_seed(0)
    model, inputs = MODELS["bert"](), batch(3)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = mixadv.wrap(base, model, mixadv.make_solver(solver))
    for _ in range(3):
        loss = optimizer.step(lambda: masked_predictions(model, **inputs))
    assert loss.isfinite()


def test_virtual_labels_are_those_of_masked_positions_only():
    """ALUM's divergence is that of the masked tokens of a row, computed here from all logits."""
    torch.manual_seed(0)
    model, inputs = MODELS["bert"]().double().eval(), batch(5)
    labels = inputs["labels"]
    ids = {name: value for name, value in inputs.items() if name != "labels"}
    solver = mixadv.ALUM(smoothness_weight=2.0, divergence="kl")
    game = mixadv.Game(model, solver)
    objective = game.loss(lambda: masked_predictions(model, **inputs))

    assert game.strategy is not None
    delta = game.strategy.unit * game.strategy.points[0][0]
    site = model.get_input_embeddings()
    hook = site.register_forward_hook(lambda *found: found[2] + delta)
    with torch.no_grad():
        moved = model(**ids).logits[labels != -100].log_softmax(-1)
    hook.remove()
    with torch.no_grad():
        clean = model(**ids).logits
    loss = F.cross_entropy(clean.flatten(0, 1), labels.flatten())
    clean = clean[labels != -100].log_softmax(-1)
    kl = (clean.exp() * (clean - moved)).sum(-1)
    row = (labels != -100).nonzero()[:, 0]
    assert sorted(set(row.tolist())) == [0, 1, 2]
    kl = torch.stack([kl[row == i].mean() for i in range(3)]).mean()
    torch.testing.assert_close(objective.detach().double(), loss + 2 * kl, rtol=1e-5, atol=1e-7)
    assert kl > 1e-6


@pytest.mark.parametrize("solver", ["pgd", "smart", "mat", "r3f"])
def test_the_game_is_that_of_the_model_s_own_output(solver: str):
    """Which has the logits of all tokens, and labels that tell which count."""
    played = []
    for own in (False, True):
        torch.manual_seed(0)
        model, inputs = MODELS["bert"]().double().eval(), batch(5)
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = mixadv.wrap(base, model, mixadv.make_solver(solver))
        for _ in range(2):
            optimizer.step(lambda: model(**inputs) if own else masked_predictions(model, **inputs))  # noqa: B023
        played.append(optimizer.outcome)
    torch.testing.assert_close(played[0].objective, played[1].objective, rtol=1e-9, atol=0)
    torch.testing.assert_close(played[0].payoff, played[1].payoff, rtol=1e-9, atol=0)


def test_curriculum_is_plain_training_then_adversarial():
    """The first steps are those of the optimizer alone, bit for bit; later ones are not."""
    weights = {}
    for name in ("plain", "alum"):
        torch.manual_seed(0)
        model = MODELS["bert"]()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        if name == "alum":
            when = mixadv.Schedule(start=2)
            optimizer = mixadv.wrap(optimizer, model, mixadv.ALUM(), schedule=when)
        for step in range(4):
            inputs = batch(step)
            if name == "alum":
                optimizer.step(lambda: masked_predictions(model, **inputs))  # noqa: B023
            else:
                optimizer.zero_grad()
                masked_predictions(model, **inputs)["loss"].backward()
                optimizer.step()
            weights[name, step] = model.get_input_embeddings().weight.detach().clone()
    assert torch.equal(weights["plain", 1], weights["alum", 1])
    assert not torch.equal(weights["plain", 3], weights["alum", 3])


def test_nothing_is_said_while_a_round_is_played():
    model = MODELS["bert"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixadv.Game(model, mixadv.ALUM()).loss(lambda: masked_predictions(model, **batch(0)))


SMALLEST = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
REFUSED = {
    "next token": ("GPT2Config", "GPT2LMHeadModel", SMALLEST, "predicts the next token"),
    "decoder": ("BartConfig", "BartForConditionalGeneration", BART, "predicts the next token"),
    "own output layer": (
        "MobileBertConfig",
        "MobileBertForMaskedLM",
        {**SIZE, "embedding_size": 8, "intra_bottleneck_size": 16},
        "did not call its output layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_whose_loss_is_another_are_refused(case: str):
    config, model, size, message = REFUSED[case]
    size = {**size, "vocab_size": WORDS}
    built = getattr(transformers, model)(getattr(transformers, config)(**size))
    with pytest.raises(TypeError, match=message):
        masked_predictions(built, **batch(0))


def test_adapters_hide_no_causal_model():
    config = transformers.GPT2Config(**SMALLEST, vocab_size=WORDS)
    adapted = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config), peft.LoraConfig(fan_in_fan_out=True)
    )
    with pytest.raises(TypeError, match="predicts the next token"):
        masked_predictions(adapted, **batch(0))
