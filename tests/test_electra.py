"""Replaced token detection: who is drawn, what is sampled, both losses, ties, checkpoints."""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
)

from mixadv.tokens import ReplacedTokenDetection, generator_config
from mixadv.tokens.pretraining import electra
from mixadv.tokens.pretraining.electra import draw_positions, sample
from tests.tokenizers_zoo import word_pieces

PAD, CLS, SEP, MASK, FIRST, VOCABULARY = 0, 2, 3, 4, 5, 24
IDS = {"mask_token_id": MASK, "special_token_ids": [PAD, 1, CLS, SEP]}
TOKENIZER = word_pieces("a", "b", "c")


def config(**changes: Any) -> ElectraConfig:
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    rest = {"max_position_embeddings": 48, "hidden_dropout_prob": 0.0}
    rest["attention_probs_dropout_prob"] = 0.0
    return ElectraConfig(**{**sizes, **layers, **rest, "initializer_range": 0.5, **changes})


def bert(**changes: Any) -> BertConfig:
    """Return a BERT whose embeddings are as wide as those of the discriminator."""
    return BertConfig(**{**config().to_dict(), "hidden_size": 8, **changes})


def distilbert() -> DistilBertConfig:
    sizes = {"vocab_size": VOCABULARY, "dim": 8, "n_heads": 2, "n_layers": 1, "hidden_dim": 8}
    return DistilBertConfig(**sizes, max_position_embeddings=48, dropout=0.0, attention_dropout=0.0)


GENERATORS = {
    "electra": lambda: ElectraForMaskedLM(generator_config(config())),
    "bert": lambda: BertForMaskedLM(bert()),
    "distilbert": lambda: DistilBertForMaskedLM(distilbert()),
}


def game(generator: str = "electra", **settings: Any) -> ReplacedTokenDetection:
    discriminator = ElectraForPreTraining(config())
    return ReplacedTokenDetection(GENERATORS[generator](), discriminator, **{**IDS, **settings})


def batch(lengths: list[int], width: int | None = None) -> dict[str, Tensor]:
    """Return rows [CLS] ordinary tokens [SEP], padded with ordinary-looking tokens."""
    width = width or max(lengths) + 2
    ids = torch.randint(FIRST, VOCABULARY, (len(lengths), width))
    ids[:, 0] = CLS
    ends = torch.tensor(lengths)[:, None] + 1
    ids.scatter_(1, ends, SEP)
    return {"input_ids": ids, "attention_mask": (torch.arange(width) <= ends).long()}


class Unigram(nn.Module):
    """A generator that guesses alike everywhere: softmax(logits)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.output = nn.Linear(1, len(logits))
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.copy_(logits)

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.output(torch.zeros(*input_ids.shape, 1)))


class PerToken(nn.Module):
    """A discriminator that looks at each token alone."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(logits.clone())

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scores[input_ids])


def unigram_game(logits: Tensor, scores: Tensor | None = None, **settings: Any) -> Any:
    """Return a game whose law is known, of players that share nothing."""
    scores = torch.zeros_like(logits) if scores is None else scores
    return ReplacedTokenDetection(Unigram(logits), PerToken(scores), **IDS, **settings, tie=None)


def recorded(model: ReplacedTokenDetection) -> list[dict[str, Tensor]]:
    """Return a list that fills with what the generator reads."""
    read: list[dict[str, Tensor]] = []
    model.generator.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs), with_kwargs=True
    )
    return read


def held(model: ReplacedTokenDetection, player: str) -> set[str]:
    """Return the names of a player's parameters, each under its first name in the model."""
    own = {*getattr(model, player).parameters()}
    return {name for name, p in model.named_parameters() if p in own}


def shared(model: ReplacedTokenDetection) -> set[str]:
    return held(model, "generator") & held(model, "discriminator")


lengths = st.lists(st.integers(0, 24), min_size=1, max_size=4)


# --- positions -------------------------------------------------------------------------------


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1), st.floats(0.01, 1))
def test_a_row_has_its_rounded_share_of_positions_at_least_one(rows, rate):
    candidates = torch.tensor(rows)
    positions = draw_positions(candidates, rate)
    assert not (positions & ~candidates).any()
    for drawn, there in zip(positions.sum(1).tolist(), candidates.sum(1).tolist(), strict=True):
        assert drawn <= there
        assert drawn >= min(1, there)
        assert abs(drawn - rate * there) <= 0.5 + 1e-5 or drawn == min(1, there)


def test_each_pair_of_candidates_is_drawn_equally_often():
    rows, there, drawn = 20_000, 7, 3
    candidates = torch.tensor([True, False, True, True, True, True, False, True, True])
    positions = draw_positions(candidates.expand(rows, -1), 3 / 7)[:, candidates].double()
    pairs = positions.T @ positions / rows
    single, pair = drawn / there, drawn * (drawn - 1) / (there * (there - 1))
    expected = torch.full((there, there), pair).fill_diagonal_(single)
    error = (expected * (1 - expected) / rows).sqrt()
    assert ((pairs - expected).abs() < 4 * error).all()


@given(lengths, st.integers(0, 99))
def test_only_ordinary_tokens_are_drawn_masked_and_replaced(counts, seed):
    torch.manual_seed(seed)
    model = game()
    read = recorded(model)
    inputs = batch(counts, 26)
    inputs["input_ids"][:, 5] = MASK  # as if the text itself had one
    ids = inputs["input_ids"]
    output = model(**inputs)
    drawn = (read[0]["input_ids"] == MASK) & (ids != MASK)
    ordinary = inputs["attention_mask"].bool() & (ids > MASK)
    assert not (drawn & ~ordinary).any()
    torch.testing.assert_close(drawn.sum(1), draw_positions(ordinary, 0.15).sum(1))
    assert torch.equal(read[0]["input_ids"][~drawn], ids[~drawn])
    assert torch.equal(output.corrupted[~drawn], ids[~drawn])
    assert torch.equal(output.replaced, output.corrupted != ids)


def test_a_part_of_the_drawn_tokens_is_left_as_it_is():
    model = unigram_game(torch.zeros(VOCABULARY), mask_probability=0.85)
    read = recorded(model)
    model(torch.full((4000, 20), 9))
    masked = (read[0]["input_ids"] == MASK).sum(1)
    assert masked.max() == 3
    trials = 3 * 4000
    assert abs(masked.sum() / trials - 0.85) < 4 * math.sqrt(0.85 * 0.15 / trials)


# --- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_of_logits_over_temperature(temperature):
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, -1.0, 2.0, 0.0])
    model = unigram_game(logits, temperature=temperature, rate=1.0)
    output = model(torch.full((20_000, 2), 6))
    counts = output.corrupted.flatten().bincount(minlength=8).double()
    expected = counts.sum() * (logits.double() / temperature).softmax(0)
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(logits) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    mle = -logits.log_softmax(0)[6]  # the temperature is the samples' alone
    torch.testing.assert_close(output.generator_loss, mle)


def test_a_right_guess_counts_as_original():
    sure = torch.full((VOCABULARY,), -1e4)
    sure[7] = 0.0
    model = unigram_game(sure, rate=1.0)
    right, wrong = model(torch.full((2, 9), 7)), model(torch.full((2, 9), 8))
    assert (right.generator_accuracy, wrong.generator_accuracy) == (1.0, 0.0)
    assert not right.replaced.any()
    assert wrong.replaced.all()


def test_the_corruption_rate_is_the_drawing_rate_times_the_generators_errors():
    logits, rows, width = torch.randn(VOCABULARY), 4000, 20
    ids = torch.randint(FIRST, VOCABULARY, (width,))
    output = unigram_game(logits)(ids.expand(rows, -1))
    expected = 0.15 * (1 - logits.double().softmax(0)[ids].mean())
    rates = output.replaced.double().mean(1)
    assert abs(rates.mean() - expected) < 4 * rates.std() / math.sqrt(rows)
    exact = 0.15 * (1 - output.generator_accuracy)
    torch.testing.assert_close(output.replaced.float().mean(), exact, rtol=1e-5, atol=0)


# --- losses ----------------------------------------------------------------------------------


@given(lengths, st.sampled_from([*GENERATORS]), st.integers(0, 9), st.floats(0, 100))
def test_the_loss_is_that_of_a_computation_in_float64(counts, generator, seed, weight):
    torch.manual_seed(seed)
    model = game(generator, discriminator_weight=weight).eval()
    read = recorded(model)
    inputs = batch(counts, 26)
    ids, present = inputs["input_ids"], inputs["attention_mask"].bool()
    output = model(**inputs)
    reference = copy.deepcopy(model).double()
    mask = inputs["attention_mask"]
    drawn = read[0]["input_ids"] == MASK
    guesses = reference.generator(input_ids=read[0]["input_ids"], attention_mask=mask).logits
    surprise = -guesses.log_softmax(-1).gather(-1, ids[..., None])[..., 0][drawn]
    mlm = surprise.mean() if len(surprise) > 0 else torch.zeros((), dtype=torch.float64)
    scores = reference.discriminator(input_ids=output.corrupted, attention_mask=mask).logits
    truth = output.corrupted != ids
    detection = -torch.where(truth, F.logsigmoid(scores), F.logsigmoid(-scores))[present].mean()
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(output.generator_loss, mlm, **close)
    torch.testing.assert_close(output.discriminator_loss, detection, **close)
    parts = output.generator_loss + weight * output.discriminator_loss
    torch.testing.assert_close(output.loss, parts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", ["mle", "reinforce"])
def test_what_lies_under_padding_changes_nothing(objective):
    model = game(generator_objective=objective).eval()
    inputs = batch([3, 20, 11])
    padded = {**inputs, "input_ids": inputs["input_ids"].clone()}
    padded["input_ids"][inputs["attention_mask"] == 0] = PAD
    assert not torch.equal(padded["input_ids"], inputs["input_ids"])
    outputs = []
    for given_ in (inputs, padded):
        torch.manual_seed(3)
        outputs.append(model(**given_))
    for name in ("loss", "generator_loss", "discriminator_loss", "generator_accuracy"):
        assert getattr(outputs[0], name) == getattr(outputs[1], name)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("objective", ["mle", "reinforce"])
@pytest.mark.parametrize("tie", ["embeddings", None])
def test_each_loss_gives_a_gradient_to_its_player_and_the_shared_tables_alone(
    generator, objective, tie
):
    model = game(generator, generator_objective=objective, tie=tie)
    output = model(**batch([20, 9]))
    common = shared(model)
    assert bool(common) == (tie is not None)
    losses = {"generator": output.generator_loss, "discriminator": output.discriminator_loss}
    for player, loss in losses.items():
        touched = with_gradient(model, loss)
        assert touched <= held(model, player)
        assert common <= touched
        assert touched - common


def with_gradient(model: nn.Module, loss: Tensor) -> set[str]:
    """Return the names of the parameters that a loss reaches."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [*named.values()], retain_graph=True, allow_unused=True)
    return {name for name, g in zip(named, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("objective", ["mle", "reinforce"])
@pytest.mark.parametrize("counts", [[0, 0], [0, 12]])
def test_rows_without_ordinary_tokens_leave_the_loss_finite(objective, counts):
    model = game(generator_objective=objective)
    output = model(**batch(counts))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not output.replaced[0].any()
    if not any(counts):
        assert output.generator_loss == output.generator_accuracy == 0
        assert model.baseline == torch.tensor(math.log(2))


def test_a_batch_of_nothing_but_padding_has_no_loss():
    inputs = batch([9, 3])
    inputs["attention_mask"].zero_()
    assert game()(**inputs).loss == 0


def test_only_logits_at_drawn_positions_are_computed():
    model, rows = game(), []
    head = model.generator.get_output_embeddings()
    head.register_forward_hook(lambda _, args, out: rows.append(out.shape))
    model(**batch([20, 20]))
    assert rows == [(6, VOCABULARY)]


def test_without_a_mask_of_attention_all_tokens_count():
    model, ids = game().eval(), batch([20, 20])["input_ids"]
    losses = []
    for given_ in ({}, {"attention_mask": torch.ones_like(ids)}):
        torch.manual_seed(1)
        losses.append(model(ids, **given_, token_type_ids=torch.zeros_like(ids)).loss)
    assert losses[0] == losses[1]


def test_a_token_classifier_may_be_the_discriminator():
    discriminator = BertForTokenClassification(bert(num_labels=1))
    model = ReplacedTokenDetection(GENERATORS["electra"](), discriminator, **IDS)
    assert model(**batch([9, 4])).logits.shape == (2, 11)


# --- the adversarial generator ---------------------------------------------------------------

LOGITS, SCORES = torch.tensor([0.3, -1.0, 0.8]), torch.tensor([1.5, -0.4, 0.2])


def expected_gradient(ids: Tensor, temperature: float) -> Tensor:
    """Return the gradient of the discriminator's expected loss, over all outcomes, float64."""
    logits = LOGITS.double().requires_grad_()
    law = (logits / temperature).softmax(0)
    loss = torch.zeros((), dtype=torch.float64)
    for outcome in itertools.product(range(3), repeat=len(ids)):
        tokens = torch.tensor(outcome)
        truth = (tokens != ids).double()
        errors = F.binary_cross_entropy_with_logits(SCORES.double()[tokens], truth)
        loss = loss + law[tokens].prod() * errors
    return torch.autograd.grad(loss, logits)[0]


def small_adversary(**settings: Any) -> ReplacedTokenDetection:
    players = Unigram(LOGITS), PerToken(SCORES)
    ids = {"mask_token_id": 3, "special_token_ids": []}  # all three tokens are ordinary
    reinforce = {"generator_objective": "reinforce", "rate": 1.0, "tie": None}
    return ReplacedTokenDetection(*players, **ids, **{**reinforce, **settings})


def gradient_of(model: ReplacedTokenDetection, ids: Tensor) -> Tensor:
    loss = model(ids).generator_loss
    return torch.autograd.grad(loss, model.generator.output.bias)[0].double()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("baseline", [None, 0.0, 0.9, -40.0])
def test_the_adversary_ascends_the_discriminators_expected_loss(temperature, baseline, monkeypatch):
    """Summed over all outcomes with their probabilities, whatever the baseline."""
    decay = None if baseline is None else 0.9
    model = small_adversary(temperature=temperature, baseline_decay=decay).eval()
    model.baseline.fill_(baseline or 0.0)
    ids, law = torch.tensor([2, 0, 1]), (LOGITS.double() / temperature).softmax(0)
    mean = torch.zeros(3, dtype=torch.float64)
    for outcome in itertools.product(range(3), repeat=3):
        tokens = torch.tensor(outcome)
        monkeypatch.setattr(electra, "sample", lambda logits, tokens=tokens: tokens)
        mean += law[tokens].prod() * gradient_of(model, ids[None])
    torch.testing.assert_close(mean, -expected_gradient(ids, temperature), rtol=0, atol=1e-5)


def test_its_samples_have_that_gradient_on_average():
    model = small_adversary(temperature=0.7).eval()
    ids, draws = torch.tensor([2]), 40_000
    law = (LOGITS.double() / 0.7).softmax(0)
    rewards = F.binary_cross_entropy_with_logits(
        SCORES.double(), torch.tensor([1.0, 1.0, 0.0]).double(), reduction="none"
    )
    singles = -(rewards - math.log(2))[:, None] * (torch.eye(3) - law) / 0.7
    mean = law @ singles
    torch.testing.assert_close(mean, -expected_gradient(ids, 0.7))
    error = ((law @ singles**2 - mean**2) / draws).sqrt()
    estimate = gradient_of(model, ids.expand(draws, 1))
    assert ((estimate - mean).abs() < 4 * error).all()


def test_the_baseline_is_the_running_mean_of_rewards():
    model = small_adversary(baseline_decay=0.75)
    assert model.baseline == torch.tensor(math.log(2))
    before = model.baseline.clone()
    output = model(torch.tensor([[2, 0, 1]]))
    errors = F.binary_cross_entropy_with_logits(output.logits, output.replaced.float())
    torch.testing.assert_close(model.baseline, 0.75 * before + 0.25 * errors.detach())
    after = model.state_dict()["baseline"].clone()
    model.eval()(torch.tensor([[2, 0, 1]]))
    assert model.baseline == after


def test_the_adversary_learns_its_best_response():
    model, ids = small_adversary(), torch.tensor([2, 0, 1])
    optimizer = torch.optim.SGD(model.generator.parameters(), lr=10.0)
    for _ in range(100):
        optimizer.zero_grad()
        model(ids.expand(200, -1)).generator_loss.backward()
        optimizer.step()
    truth = (torch.arange(3)[:, None] != ids).float()
    errors = F.binary_cross_entropy_with_logits(
        SCORES[:, None].expand(3, 3), truth, reduction="none"
    )
    best = errors.mean(1).argmax()
    assert model.generator.output.bias.softmax(0)[best] > 0.9


# --- ties and checkpoints --------------------------------------------------------------------


def assert_tied(model: ReplacedTokenDetection) -> None:
    generator, discriminator = model.generator, model.discriminator
    table = discriminator.get_input_embeddings().weight
    assert generator.get_input_embeddings().weight is table
    assert generator.get_output_embeddings().weight is table
    places = generator.base_model.embeddings, discriminator.base_model.embeddings
    assert places[0].position_embeddings.weight is places[1].position_embeddings.weight


@pytest.mark.parametrize("generator", GENERATORS)
def test_ties_outlive_copies_moves_steps_and_checkpoints(generator, tmp_path):
    model = game(generator)
    assert_tied(model)
    types = getattr(model.generator.base_model.embeddings, "token_type_embeddings", None)
    name = "discriminator.electra.embeddings.token_type_embeddings.weight"
    assert (name in shared(model)) == (types is not None)
    assert_tied(copy.deepcopy(model))
    ours = {id(p) for p in model.parameters()}
    twin = copy.deepcopy(model)
    assert not any(id(p) in ours for p in twin.parameters())
    assert_tied(copy.deepcopy(model).to(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch([9])).loss.backward()
    optimizer.step()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    state = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    for assign in (False, True):
        fresh = game(generator)
        assert str(fresh.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert_tied(fresh)
        own, theirs = dict(model.named_parameters()), dict(fresh.named_parameters())
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_checkpoint_of_a_wrapper_holds_each_table_once():
    wrapped, fresh = nn.ModuleDict({"module": game()}), nn.ModuleDict({"module": game()})
    state = wrapped.state_dict()
    pointers = [value.data_ptr() for value in state.values()]
    assert len(pointers) == len({*pointers})
    fresh.load_state_dict(state)
    assert_tied(fresh["module"])
    assert torch.equal(*(m["module"].generator.generator_lm_head.weight for m in (wrapped, fresh)))


def test_what_a_checkpoint_lacks_is_still_missed():
    model, state = game(), game().state_dict()
    name = "discriminator.electra.embeddings.word_embeddings.weight"
    del state[name]
    assert name in model.load_state_dict(state, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_nothing_is_shared_where_nothing_is_tied():
    model = game(tie=None)
    assert not shared(model)
    assert model.generator.get_output_embeddings().weight is (
        model.generator.get_input_embeddings().weight
    )
    safetensors.torch.save(model.state_dict())


@given(st.sampled_from([16, 64, 96]), st.sampled_from([2, 4, 8]), st.floats(0.01, 1))
def test_a_narrower_generator_can_be_built_and_tied(width, heads, fraction):
    wide = config(hidden_size=width, num_attention_heads=heads)
    narrow = generator_config(wide, fraction)
    assert wide.to_dict() == config(hidden_size=width, num_attention_heads=heads).to_dict()
    assert narrow.embedding_size == wide.embedding_size
    assert abs(narrow.hidden_size - fraction * width) <= 0.5 or narrow.hidden_size == 1
    assert narrow.hidden_size % narrow.num_attention_heads == 0
    generator, discriminator = ElectraForMaskedLM(narrow), ElectraForPreTraining(wide)
    assert_tied(ReplacedTokenDetection(generator, discriminator, **IDS))


def test_the_exported_discriminator_is_an_encoder_to_fine_tune(tmp_path):
    model = ReplacedTokenDetection.from_tokenizer(
        GENERATORS["electra"](), ElectraForPreTraining(config()), TOKENIZER
    )
    assert model.special.tolist() == [0, 1, 2, 3, 4]
    assert model.mask_token_id == MASK
    model.export(tmp_path / "encoder", TOKENIZER)
    tuned, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "encoder", output_loading_info=True
    )
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    theirs = tuned.electra.state_dict()
    for name, weight in model.discriminator.electra.state_dict().items():
        assert torch.equal(weight, theirs[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "encoder").mask_token_id == MASK


# --- Trainer ---------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    def build(folder: str, objective: str, **changes: Any) -> Trainer:
        torch.manual_seed(5)
        discriminator = ElectraForPreTraining(config(hidden_dropout_prob=0.1))
        settings = {**IDS, "generator_objective": objective}
        model = ReplacedTokenDetection(GENERATORS["electra"](), discriminator, **settings)
        torch.manual_seed(6)
        rows = [{n: v[0] for n, v in batch([18 - i % 4], 20).items()} for i in range(24)]
        defaults = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 3}
        options = {**defaults, **quiet, "output_dir": str(tmp_path / folder), **changes}
        arguments = TrainingArguments(**options)
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:5])

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("objective", ["mle", "reinforce"])
def test_resuming_under_trainer_is_as_if_never_interrupted(trainer, tmp_path, objective):
    whole, resumed = trainer("whole", objective), trainer("resumed", objective)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_tied(resumed.model)
    expected, state = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    start = trainer("unused", objective).model.state_dict()
    moved = {
        name.split(".")[0] for name in expected if not torch.equal(expected[name], start[name])
    }
    assert moved >= {"generator", "discriminator"}
    assert ("baseline" in moved) == (objective == "reinforce")


def test_trainer_evaluates_and_keeps_the_best(trainer):
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = trainer("best", "mle", gradient_accumulation_steps=2, **best)
    run.train()
    assert math.isfinite(run.evaluate()["eval_loss"])
    assert_tied(run.model)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate must be finite and between 0.001 and 1, got 0"),
        ({"rate": 1.5}, "rate must be .* got 1.5"),
        ({"rate": float("nan")}, "rate must be .* got nan"),
        ({"temperature": 0.0}, "temperature must be .* got 0"),
        ({"mask_probability": -0.1}, "mask_probability must be .* got -0.1"),
        ({"discriminator_weight": -1.0}, "discriminator_weight must be .* got -1"),
        ({"baseline_decay": 2.0}, "baseline_decay must be .* got 2"),
        ({"generator_objective": "gan"}, "'mle' or 'reinforce', got 'gan'"),
        ({"tie": "all"}, "'embeddings' or None, got 'all'"),
        ({"mask_token_id": -1}, "mask_token_id must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        game(**settings)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"embedding_size": 4}, "token embeddings"),
        ({"vocab_size": 30}, "token embeddings"),
        ({"max_position_embeddings": 32}, "position_embeddings"),
    ],
)
def test_tables_of_different_size_cannot_be_shared(changes, name):
    generator = ElectraForMaskedLM(config(**changes))
    own = generator.get_input_embeddings().weight
    with pytest.raises(ValueError, match=f"cannot share their {name}.*embedding_size"):
        ReplacedTokenDetection(generator, ElectraForPreTraining(config()), **IDS)
    assert generator.get_input_embeddings().weight is own


def detection(generator: nn.Module, discriminator: nn.Module) -> ReplacedTokenDetection:
    return ReplacedTokenDetection(generator, discriminator, **IDS)


def unmasked() -> Any:
    """Return a tokenizer without a mask token."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.mask_token = None
    return tokenizer


REFUSED = {  # who cannot play, and what is said
    "mask_token_id must be an integer, got None": lambda: game(mask_token_id=None),
    "has no mask token": lambda: ReplacedTokenDetection.from_tokenizer(
        GENERATORS["electra"](), ElectraForPreTraining(config()), unmasked()
    ),
    "BertModel has no language-model head": lambda: detection(
        BertModel(bert()), ElectraForPreTraining(config())
    ),
    r"logits \[2, 11, 2\] for tokens \[2, 11\]": lambda: detection(
        GENERATORS["electra"](), BertForTokenClassification(bert(num_labels=2))
    )(**batch([9, 4])),
    "BertConfig has no embedding_size": lambda: generator_config(BertConfig()),
    "fraction must be .* got 1.5": lambda: generator_config(config(), 1.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_players_that_cannot_play_are_refused(message):
    wrong_kind = "integer" in message or "head" in message
    with pytest.raises(TypeError if wrong_kind else ValueError, match=message):
        REFUSED[message]()


def test_a_sample_has_no_gradient():
    assert not sample(torch.randn(3, 5, requires_grad=True)).requires_grad
