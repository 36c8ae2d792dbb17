"""Loss increases have closed forms on linear models, which any start and batch has to reach."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tests.tokenizers_zoo as tokenizers
from mixadv import GameError
from mixadv.model import parallel
from mixadv.robustness import (
    Batch,
    LossIncrease,
    Rows,
    accuracy_at_radii,
    all_correct,
    loss_increase,
    predict,
    text_batches,
    token_norm,
)
from tests.zoo import tiny_bert

seeds = st.integers(0, 10**6)
radii = st.floats(0.01, 3.0)
ROWS = 6
few = settings(max_examples=settings.default.max_examples // 3)


def batches_of(model, x, y, size=ROWS, loss=F.cross_entropy, order=None):
    order = list(range(len(x))) if order is None else order

    def batch(rows):
        def closure():
            logits = model(x[rows])
            return loss(logits, y[rows], reduction="none"), logits

        return Batch(closure, y[rows], rows)

    return [batch(order[i : i + size]) for i in range(0, len(order), size)]


def linear(seed, classes=2, width=5):
    """A linear model in fp64, with rows and labels."""
    random = torch.Generator().manual_seed(seed)
    model = nn.Linear(width, classes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    x = torch.randn(ROWS, width, generator=random, dtype=torch.double)
    return model, x, torch.randint(classes, (ROWS,), generator=random)


class Curved(nn.Module):
    """A network of tokens whose loss is not linear in δ."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(20, 6)
        self.hidden, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        hidden = (2 * self.hidden(self.embedding(input_ids))).tanh() * mask
        return self.head(hidden.sum(1) / mask.sum(1))


def tokens(seed, pads=0, side="right"):
    """Rows of 3 to 7 tokens, padded to 7 and by `pads` more."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (ROWS,), generator=random)
    ids = torch.randint(1, 20, (ROWS, 7), generator=random)
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids, mask = (F.pad(t, (0, pads)) for t in (ids * mask, mask))
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    return ids, mask


def curved(seed, size=ROWS, order=None, shift=0.0, ids=None):
    """A curved network in fp64 with batches of its rows."""
    model = Curved(seed).double()
    ids, mask = ids or tokens(seed)
    y = torch.arange(ROWS) % 3

    def forward(rows):
        return model(input_ids=ids[rows], attention_mask=mask[rows]) + shift

    return model, batches_of(forward, torch.arange(ROWS), y, size, order=order)


# Closed forms ----------------------------------------------------------------------------------


@few
@given(seeds, radii)
def test_the_logistic_loss_rises_as_far_as_it_can(seed, radius):
    """max L = log(1 + exp(−s + ε‖w‖)) of the score s of the right class, w its weights."""
    model, x, y = linear(seed)
    found = loss_increase(
        model, batches_of(model, x, y), radius=radius, steps=24, restarts=1, unit=1.0
    )
    logits = model(x).detach()
    score = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None]))[:, 0]
    slope = (model.weight[1] - model.weight[0]).norm().detach()
    highest, clean = F.softplus(-score + radius * slope), F.softplus(-score)
    assert found.clean_loss == pytest.approx(clean.numpy())
    assert found.from_zero == pytest.approx((highest - clean).numpy())
    assert found.from_random == pytest.approx((highest - clean).numpy(), rel=1e-5)
    assert (found.correct == (score > 0).numpy()).all()


@given(seeds, radii, st.integers(1, 3))
def test_from_zero_a_step_is_enough_for_a_linear_model(seed, radius, steps):
    one, more = (
        loss_increase(model, batches_of(model, x, y), radius=radius, steps=n, unit=1.0)
        for n in (1, steps)
        for model, x, y in [linear(seed)]
    )
    assert one.from_zero == pytest.approx(more.from_zero)


@few
@given(seeds, radii)
def test_the_squared_loss_rises_as_far_as_it_can(seed, radius):
    """max (y − w·(x + δ))² = (|y − w·x| + ε‖w‖)²."""
    model, x, _ = linear(seed, classes=1)
    y = torch.zeros(ROWS, dtype=torch.long)

    def squared(output, y, reduction):
        return output[:, 0].square()

    batches = batches_of(model, x, y, loss=squared)
    found = loss_increase(model, batches, radius=radius, steps=10, unit=1.0)
    residual = model(x).detach()[:, 0].abs()
    highest = (residual + radius * model.weight.norm().detach()).square()
    assert found.from_zero == pytest.approx((highest - residual.square()).numpy())
    assert (found.increase <= highest.numpy() * (1 + 1e-9)).all()


@few
@given(seeds, st.lists(st.floats(0, 2), min_size=1, max_size=4))
def test_a_linear_model_is_right_up_to_its_margin(seed, some):
    """A row withstands every radius below s/‖w‖, and none above."""
    model, x, y = linear(seed)
    found = accuracy_at_radii(model, batches_of(model, x, y), some, steps=24, unit=1.0)
    logits = model(x).detach()
    score = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None]))[:, 0]
    margin = (score / (model.weight[1] - model.weight[0]).norm().detach()).numpy()
    assert found.shape == (len(some), ROWS)
    for radius, right in zip(some, found, strict=True):
        clear = abs(margin - radius) > 1e-4
        assert (right == (margin > radius))[clear].all()


# Any model -------------------------------------------------------------------------------------


@few
@given(seeds, st.floats(0.01, 1.0))
def test_the_increase_is_at_least_zero_and_grows_with_the_radius(seed, radius):
    """What is found in a ball is in every larger one; an ascent of 12 steps loses little of it."""
    model, batches = curved(seed)
    words = {"steps": 12, "restarts": 1, "unit": 1.0}
    small = loss_increase(model, batches, radius=radius, **words)
    large = loss_increase(model, batches, radius=2 * radius, **words)
    assert (small.from_zero >= 0).all()
    assert (large.increase >= 0.98 * small.increase).all()
    assert small.increase.min() > 0


@given(seeds)
def test_radius_zero_changes_nothing(seed):
    model, batches = curved(seed)
    found = loss_increase(model, batches, radius=0.0, steps=2, unit=1.0)
    assert (found.from_zero == 0).all()
    assert found.from_random == pytest.approx(np.zeros(ROWS), abs=1e-12)
    clean = predict(model, batches)
    assert found.clean_loss == pytest.approx(clean.losses)
    assert (found.correct == clean.correct).all()
    assert (accuracy_at_radii(model, batches, [0.0], unit=1.0)[0] == clean.correct).all()


def both(model, batches):
    found = loss_increase(model, batches, radius=0.5, steps=4, restarts=2, unit=1.0, seed=3)
    right = accuracy_at_radii(model, batches, [0.2, 0.6], steps=4, unit=1.0, seed=3)
    return {**vars(found), "right": right}


def assert_alike(one, other):
    for name, values in one.items():
        assert other[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


@few
@given(seeds, st.integers(1, ROWS), st.permutations(range(ROWS)))
def test_a_row_does_not_depend_on_its_batch(seed, size, order):
    """Its random starts are its own too."""
    assert_alike(both(*curved(seed)), both(*curved(seed, size, order)))


@few
@given(seeds, st.integers(0, 3), st.sampled_from(["left", "right"]))
def test_padding_changes_nothing(seed, pads, side):
    plain, padded = (
        both(*curved(seed, ids=tokens(seed, n, s))) for n, s in [(0, side), (pads, side)]
    )
    assert_alike(plain, padded)


@few
@given(seeds, st.floats(-20, 20))
def test_a_constant_added_to_the_logits_changes_nothing(seed, shift):
    plain, shifted = both(*curved(seed)), both(*curved(seed, shift=shift))
    right = plain.pop("right"), shifted.pop("right")
    assert (right[0] == right[1]).all()
    for name, values in plain.items():
        assert shifted[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name


def test_the_seed_draws_the_random_starts_and_nothing_else():
    model, batches = curved(0)
    words = {"radius": 1.0, "steps": 1, "restarts": 1, "unit": 1.0}
    one, same, other = (loss_increase(model, batches, **words, seed=s) for s in (1, 1, 2))
    assert (one.from_random == same.from_random).all()
    assert (one.from_random != other.from_random).all()
    assert (one.from_zero == other.from_zero).all()


def test_more_restarts_find_no_less():
    model, batches = curved(0)
    words = {"radius": 1.0, "steps": 1, "unit": 1.0}
    found = [loss_increase(model, batches, **words, restarts=n).from_random for n in (1, 2, 5)]
    assert (found[0] <= found[1]).all()
    assert (found[1] <= found[2]).all()
    assert found[0].sum() < found[2].sum()


def test_every_point_visited_counts_not_the_last_alone():
    """Where the loss is a cosine, steps of 3, −2 and −1 from −0.9 come past 0.1 and end at −0.9."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    x, y = torch.full((1, 1), -0.9, dtype=torch.double), torch.zeros(1, dtype=torch.long)

    def peaked(output, y, reduction):
        return output[:, 0].cos()

    batches = batches_of(model, x, y, loss=peaked)
    found = loss_increase(model, batches, radius=3.0, steps=3, unit=1.0)
    assert found.from_zero == pytest.approx(math.cos(0.1) - math.cos(0.9))


def test_radii_are_in_token_norms_unless_a_unit_is_given():
    model, batches = curved(0)
    ids, mask = tokens(0)
    lengths = model.embedding(ids).norm(dim=-1).detach()
    unit = token_norm(model, batches)
    assert unit == pytest.approx(float((lengths * mask).sum() / mask.sum()))
    words = {"steps": 3, "restarts": 1}
    relative = loss_increase(model, batches, radius=0.2, **words)
    absolute = loss_increase(model, batches, radius=0.2 * unit, unit=1.0, **words)
    assert relative.radius == pytest.approx(0.2 * unit)
    assert relative.increase == pytest.approx(absolute.increase)
    right = accuracy_at_radii(model, batches, [0.2])
    assert (right == accuracy_at_radii(model, batches, [0.1], unit=2 * unit)).all()


@few
@given(seeds, st.integers(1, ROWS), st.permutations(range(ROWS)))
def test_the_unit_is_the_mean_over_all_tokens_however_they_are_batched(seed, size, order):
    whole = token_norm(*curved(seed))
    model, batches = curved(seed, size, order)
    assert token_norm(model, batches) == pytest.approx(whole, rel=1e-6)


def test_a_process_that_measures_waits_for_no_other(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)  # with no group to talk to
    model, batches = curved(0)
    for measure in MEASURES.values():
        measure(model, batches)


def test_texts_are_measured_through_their_tokenizer():
    words = ["a", "fine", "film", "bad", "story"]
    config = tiny_bert(10, hidden_size=8, intermediate_size=8, max_position_embeddings=12)
    model = transformers.BertForSequenceClassification(config)
    rows = Rows(["a fine film", "a bad story", "bad film bad", "fine"], [1, 0, 0, 1])
    batches = text_batches(model, tokenizers.word_pieces(*words), rows, batch_size=3)
    found = loss_increase(model, batches, radius=0.5, steps=3)
    assert (found.increase > 0).all()
    assert found.clean_loss == pytest.approx(predict(model, batches).losses)
    assert model.training


# What is left behind ---------------------------------------------------------------------------

MEASURES = {
    "increase": lambda model, batches: loss_increase(model, batches, radius=0.5, steps=2),
    "accuracy": lambda model, batches: accuracy_at_radii(model, batches, [0.1, 0.2], steps=2),
    "unit": token_norm,
    "predict": predict,
}


class Everything(Curved):
    """With what a measurement could change."""

    def __init__(self):
        super().__init__(0)
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return self.norm(self.dropout(super().forward(input_ids, attention_mask)))


def with_state():
    model = Everything()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.hidden.requires_grad_(False)
    model.train()
    model.dropout.eval()
    model.head.register_forward_hook(lambda *_: None)
    return model


def state_of(model):
    hooks = [
        [list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)]
        for m in model.modules()
    ]
    return {
        "values": {n: v.clone() for n, v in model.state_dict().items()},
        "grads": {n: p.grad.clone() for n, p in model.named_parameters()},
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


def assert_untouched(before, after):
    for kind in ("flags", "modes", "hooks", "enabled"):
        assert after[kind] == before[kind], kind
    assert after["random"].equal(before["random"])
    for kind in ("values", "grads"):
        assert all(after[kind][n].equal(v) for n, v in before[kind].items()), kind


def batches_for(model, breaks_at=None):
    ids, mask = tokens(0)
    y, calls = torch.arange(ROWS) % 3, []

    def closure():
        calls.append(1)
        if len(calls) == breaks_at:
            raise KeyboardInterrupt
        logits = model(input_ids=ids, attention_mask=mask)
        torch.rand(1)
        return F.cross_entropy(logits, y, reduction="none"), logits

    return [Batch(closure, y, list(range(ROWS)))]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measurement_leaves_nothing_behind(measure, grad):
    model = with_state()
    with torch.set_grad_enabled(grad):
        before = state_of(model)
        measure(model, batches_for(model))
        assert_untouched(before, state_of(model))


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_frozen_model_is_measured_as_another_and_stays_frozen(measure):
    model, frozen = with_state(), with_state()
    frozen.load_state_dict(model.state_dict())
    frozen.requires_grad_(False)
    before = state_of(frozen)
    one, other = (str(measure(of, batches_for(of))) for of in (model, frozen))
    assert one == other
    assert_untouched(before, state_of(frozen))


def test_the_unit_of_a_compiled_model_leaves_no_hook_behind():
    model = Everything()
    compiled = torch.compile(model, backend="eager")
    token_norm(compiled, batches_for(compiled))
    assert not any(len(part._forward_hooks) for part in model.modules())


@pytest.mark.parametrize("call", [1, 2, 4, 8])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_nor_does_one_that_breaks(measure, call):
    model = with_state()
    before = state_of(model)
    try:
        measure(model, batches_for(model, call))
        broke = False
    except KeyboardInterrupt:
        broke = True
    assert broke == (call == 1 or measure in (MEASURES["increase"], MEASURES["accuracy"]))
    assert_untouched(before, state_of(model))


# Summaries -------------------------------------------------------------------------------------


def increase(values, correct=None):
    values = np.array(values, dtype=float)
    right = np.ones(len(values), bool) if correct is None else np.array(correct, bool)
    return LossIncrease(values / 10, right, values, values - 1, 0.1)


def test_a_summary_has_median_and_quartiles():
    found = increase([1, 2, 3, 4, 9]).summary()
    assert found["n"] == 5
    assert found["increase"] == {"median": 3, "lower": 2, "upper": 4}
    assert found["from_random"]["median"] == 2
    assert found["clean_loss"]["median"] == pytest.approx(0.3)
    assert increase([1, 2, 3]).summary([0, 2])["increase"]["median"] == 2
    assert increase([1, 2, 3]).summary(np.array([True, False, False]))["n"] == 1
    with pytest.raises(ValueError, match="no rows to sum up"):
        increase([1, 2]).summary([])


def test_models_are_compared_on_the_rows_that_all_get_right():
    table = all_correct(
        {
            "plain": increase([1, 2, 3, 4], [True, True, False, True]),
            "mat": increase([5, 6, 7, 8], [True, False, True, True]),
        }
    )
    assert [table[name]["n"] for name in table] == [2, 2]
    assert table["plain"]["increase"]["median"] == 2.5
    assert table["mat"]["increase"]["median"] == 6.5


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="'plain': 2, 'mat': 3"):
        all_correct({"plain": increase([1, 2]), "mat": increase([1, 2, 3])})
    with pytest.raises(ValueError, match="No row is classified correctly by all of plain, mat"):
        all_correct({"plain": increase([1, 2], [1, 0]), "mat": increase([1, 2], [0, 1])})
    with pytest.raises(ValueError, match=r"measured on \{\}"):
        all_correct({})


# Refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({"radius": -0.1}, ValueError, "radius must be finite and at least 0, got -0.1"),
        ({"radius": math.nan}, ValueError, "radius must be finite"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"unit": "token"}, TypeError, "unit must be a number, got 'token'"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
    ],
)
def test_bad_arguments_are_refused(words, error, said):
    model, batches = curved(0)
    with pytest.raises(error, match=said):
        loss_increase(model, batches, **{"radius": 0.1, **words})


def test_closures_that_tell_too_little_are_refused():
    model, x, y = linear(0)

    def refused(closure, said, error=ValueError):
        with pytest.raises(error, match=said):
            loss_increase(model, [Batch(closure, y, list(range(ROWS)))], radius=0.1, unit=1.0)

    refused(lambda: F.cross_entropy(model(x), y, reduction="none"), "losses and logits")
    refused(lambda: (F.cross_entropy(model(x), y), model(x)), "one loss per sample")
    refused(lambda: (F.cross_entropy(model(x).detach(), y), model(x)), "detached", GameError)
    with pytest.raises(ValueError, match="batches are empty"):
        loss_increase(model, [], radius=0.1, unit=1.0)
    with pytest.raises(ValueError, match="batches are empty"):
        token_norm(model, [])


@settings(max_examples=5)
@given(seeds)
def test_models_in_bfloat16_are_measured_in_fp32_or_wider(seed):
    model, batches = curved(seed)
    wide = loss_increase(model, batches, radius=1.0, steps=3, unit=1.0)
    model.bfloat16()
    narrow = loss_increase(model, batches, radius=1.0, steps=3, unit=1.0)
    assert (narrow.from_zero >= 0).all()
    assert narrow.increase == pytest.approx(wide.increase, rel=0.2, abs=0.1)
