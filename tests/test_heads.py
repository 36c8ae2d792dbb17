"""What is compared is what heads predict: of all heads, where the loss reads them, as they are."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.maths.divergence import DIVERGENCES, symmetric_kl
from mixadv.model.closure import parse_output
from mixadv.model.heads import kind_of, read_by, shown
from tests.zoo import player, tiny_bert

COMPARING = ["vat", "r3f", "alum", "smart", "mat"]


def solver(name: str, **how: Any) -> mixadv.Solver:
    """Return a solver that compares predictions and needs no optimizer."""
    extra = {"proximal_weight": 0.0} if name == "smart" else {}
    return mixadv.make_solver(name, **extra, **how)


def step(model: nn.Module, played: mixadv.Solver, closure: Callable[[], Any]) -> Any:
    """Play a round that leaves the weights, and return the game."""
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mixadv.wrap(base, model, played)
    optimizer.step(closure)
    return optimizer.game


# Several heads -----------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 4), st.integers(2, 5))


@pytest.mark.parametrize("name", DIVERGENCES)
@given(st.lists(sizes, min_size=2, max_size=4), st.booleans(), st.integers(0, 99))
def test_the_divergence_of_several_heads_is_the_sum_of_theirs(
    name: str, heads: list[tuple[int, int]], flat: bool, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 5 * torch.randn(*shape, generator=generator)  # noqa: E731
    shapes = [(3, c) if flat and i == 0 else (3, n, c) for i, (n, c) in enumerate(heads)]
    clean, moved = ([draw(*shape) for shape in shapes] for _ in range(2))
    expected = torch.zeros(3)
    for one, other in zip(moved, clean, strict=True):
        values = DIVERGENCES[name](one, other)
        expected += values if values.dim() == 1 else values.mean(1)
    loss = torch.zeros(())
    found = parse_output((loss, tuple(moved)))
    target = parse_output((loss, tuple(clean))).compared
    measured = found.diverge(target, DIVERGENCES[name])
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)


class Joint(nn.Module):
    """A model of an intent and of a slot for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(tiny_bert(50))
        self.intent, self.slots = nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.bert(ids).last_hidden_state
        return self.intent(hidden[:, 0]), self.slots(hidden)


def joint() -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Return a model of two heads, and a function to its loss and their logits."""
    model, ids = Joint(), torch.randint(10, 50, (4, 7))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        intent, slots = model(ids)
        slot_loss = F.cross_entropy(slots.flatten(0, 1), (ids % 5).flatten())
        return F.cross_entropy(intent, torch.arange(4) % 3) + slot_loss, intent, slots

    return model, run


@pytest.mark.parametrize("name", COMPARING)
def test_heads_in_a_tuple_are_all_compared(name: str):
    model, run = joint()
    game = step(model, solver(name), lambda: (lambda loss, *heads: (loss, heads))(*run()))
    assert game.outcome.payoff > 0
    for rest in ([], [0]):  # in any order
        order = lambda loss, a, b: (loss, [b, a] if rest else [a, b])  # noqa: B023, E731
        assert parse_output(order(*run())).heads == 2


@pytest.mark.parametrize("name", COMPARING)
def test_heads_that_may_be_none_are_asked_for(name: str):
    model, run = joint()
    with pytest.raises(mixadv.GameError, match=r"return \(loss, \(one, other\)\)"):
        step(model, solver(name), run)
    step(model, mixadv.PGD(), run)  # which compares nothing


def test_what_models_return_behind_their_logits_is_no_head():
    one = player("bert", rows=4)
    one.model.config.output_hidden_states = True
    outputs = lambda: one.model(**one.batch, return_dict=False)  # noqa: E731
    game = step(one.model, solver("alum"), outputs)
    assert game.outcome.payoff > 0
    loss, logits = outputs()[:2]
    assert parse_output((loss, outputs()), (), one.model).predictions.shape == logits.shape
    pretraining = transformers.BertForPreTraining(tiny_bert(50))
    found = parse_output(pretraining(torch.randint(50, (2, 6))) | {"loss": torch.zeros(())})
    assert (found.heads, found.predictions.shape) == (2, (2, 7, 50))


# Where the loss reads them -----------------------------------------------------------------------


@given(st.integers(0, 99), st.sampled_from(["shifted", "smooth", "weighted", "focal", "plain"]))
def test_predictions_count_where_the_loss_reads_them(seed: int, kind: str):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, 5, generator=generator, requires_grad=True)
    labels = torch.randint(5, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.5] = -100
    used, targets = (logits[:, :-1], labels[:, 1:]) if kind == "shifted" else (logits, labels)
    how = {"smooth": {"label_smoothing": 0.1}, "weighted": {"weight": torch.rand(5) + 0.1}}
    flat = F.cross_entropy(
        used.flatten(0, 1), targets.flatten(), reduction="none", **how.get(kind, {})
    )
    loss = (flat * (1 - (-flat).exp()) ** 2 if kind == "focal" else flat).sum() / 10
    counted = targets >= 0
    counted = F.pad(counted, (0, 1)) if kind == "shifted" else counted
    counted = torch.where(counted.any(1, keepdim=True), counted, torch.ones_like(counted))
    assert read_by(loss, logits).equal(counted)
    assert logits.grad is None


@pytest.mark.parametrize("name", ["vat", "alum", "smart", "mat"])
def test_labels_outside_of_the_model_are_played_as_those_inside(name: str):
    one = player("llama-causal", rows=4)
    one.model.eval()
    ids, mask = one.batch["input_ids"], one.batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100

    def inside() -> Any:
        return one.model(input_ids=ids, attention_mask=mask, labels=labels)

    def outside() -> Any:
        logits = one.model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits

    found = [
        step(one.model, solver(name), closure).strategy.points[0] for closure in (inside, outside)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_loss_whose_backward_changes_what_it_saved_is_asked_once_by_1():
    """As fused losses do, which scale their gradient in place; by 1 that changes nothing."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
            flat = logits.detach().flatten(0, 1).requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(flat, labels.flatten())
                [slope] = torch.autograd.grad(loss, flat)
            ctx.slope = slope.view_as(logits)
            return loss.detach()

        @staticmethod
        def backward(ctx: Any, factor: Tensor) -> Any:
            return ctx.slope.mul_(factor), None

    model, x, labels = nn.Linear(6, 5), torch.randn(3, 4, 6), torch.randint(5, (3, 4))

    def closure() -> Any:
        logits = model(x)
        return Fused.apply(logits, labels), logits

    closure()[0].backward()
    plain = model.weight.grad.clone()
    model.zero_grad()
    mixadv.Game(model, mixadv.R3F(smoothness_weight=0.0)).backward(closure)
    torch.testing.assert_close(model.weight.grad, plain)


@pytest.mark.parametrize("gap", [20.0, 40.0, 60.0, 120.0])
def test_a_sample_that_is_sure_hides_the_labels_of_no_other(gap: float):
    logits = torch.tensor([[gap, 0.0, 0.0], [0.1, 0.2, 0.3]], requires_grad=True)
    found = shown(F.cross_entropy(logits, torch.tensor([0, 1])), logits)
    assert found is not None
    assert found.certain
    assert found.labels.tolist() == [0, 1]


def test_hidden_states_are_no_heads_and_answers_no_predictions():
    model, x, labels = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(4, 4), None
    labels = torch.arange(4) % 3

    def run() -> tuple[Tensor, Tensor, Tensor]:
        hidden = model[0](x)
        logits = model[1](hidden)
        return F.cross_entropy(logits, labels), logits, hidden

    loss, logits, hidden = run()
    assert parse_output((loss, logits, hidden)).compared is logits
    assert parse_output((loss, (logits, hidden, None))).compared is logits
    assert parse_output((loss, logits.argmax(-1) == labels)).predictions is None
    one = player("t5", rows=4)
    ids = one.batch["input_ids"]
    found = one.model(input_ids=ids, labels=one.batch["labels"], return_dict=False)
    assert parse_output((found[0], found[1:3]), (), one.model).heads == 1
    with pytest.raises(mixadv.GameError, match="differ in their rows"):
        parse_output((loss, (logits, logits[:2])))


@pytest.mark.parametrize("name", [*COMPARING, "gauss_newton"])
def test_a_vocabulary_that_is_ruled_out_in_part_is_played_as_if_it_were_not_there(name: str):
    model, x, allowed = nn.Linear(6, 9), torch.randn(5, 6), torch.arange(9) < 4
    labels = torch.arange(5) % 4
    moves = {"direction": "gauss_newton"} if name == "gauss_newton" else {}
    played = solver("vat" if moves else name, **moves)

    def points(cut: bool) -> Tensor:
        def closure() -> Any:
            logits = model(x)
            seen = logits[:, allowed] if cut else logits.masked_fill(~allowed, -torch.inf)
            return F.cross_entropy(seen, labels), seen

        game = step(model, played, closure)
        assert game.outcome.payoff > 0
        return game.strategy.points[0]

    torch.testing.assert_close(points(False), points(True), rtol=1e-4, atol=1e-6)


# No softmax --------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 6))
def test_bernoulli_is_the_symmetric_kl_of_two_classes_for_each_label(seed: int, labels: int):
    one, other = 4 * torch.randn(2, 5, labels, generator=torch.Generator().manual_seed(seed))
    classes = [torch.stack([x, torch.zeros_like(x)], -1) for x in (one, other)]
    expected = symmetric_kl(*classes).sum(-1)
    torch.testing.assert_close(DIVERGENCES["bernoulli"](one, other), expected)


@pytest.mark.parametrize("name", [*COMPARING, "pgd"])
@pytest.mark.parametrize(
    ("problem", "suits"),
    [("multi_label_classification", "bernoulli"), ("regression", "squared_error")],
)
def test_softmaxes_of_other_heads_are_refused_with_what_suits_them(
    name: str, problem: str, suits: str
):
    config = tiny_bert(50, num_labels=6, problem_type=problem)
    model = transformers.BertForSequenceClassification(config)
    ids, labels = torch.randint(10, 50, (8, 9)), (torch.rand(8, 6) > 0.5).float()
    closure = lambda: model(input_ids=ids, labels=labels)  # noqa: E731
    word = "payoff" if name == "pgd" else "divergence"
    with pytest.raises(mixadv.GameError, match=f"divergence='{suits}'"):
        step(model, solver(name, **({"payoff": "kl"} if name == "pgd" else {})), closure)
    assert step(model, solver(name, **{word: suits}), closure).outcome.payoff > 0


def test_what_suits_a_head_is_told_by_labels_and_by_the_loss():
    logits = torch.randn(4, 3, requires_grad=True)
    yes = (torch.rand(4, 3) > 0.5).float()
    yes[0] = 1.0
    soft, real = torch.rand(4, 3).softmax(-1), 5 * torch.randn(4, 3)
    weighted = -(2 * soft * logits.log_softmax(-1)).sum()
    assert kind_of(None, 2 * soft, weighted, logits) is None  # the softmax stands in the loss
    loss = logits.sum()
    assert kind_of(None, yes, loss, logits).divergence == "bernoulli"
    assert kind_of(None, real, loss, logits).divergence == "squared_error"
    assert kind_of(None, soft, loss, logits) is None
    signs = 2 * yes - 1
    told = [
        ("bernoulli", F.binary_cross_entropy_with_logits(logits, yes)),
        ("bernoulli", F.binary_cross_entropy(logits.sigmoid(), yes)),
        ("bernoulli", -F.logsigmoid(signs * logits).mean()),
        ("bernoulli", ((logits.sigmoid() - yes) ** 2 * 3).log1p().mean()),
        ("squared_error", F.mse_loss(logits, real) / 2),
    ]
    for suits, loss in told:
        assert kind_of(None, None, loss, logits)[::2] == (suits, False)
    both = F.cross_entropy(logits, yes.argmax(-1)) + F.mse_loss(logits, real)
    assert kind_of(None, None, both, logits) is None


def test_a_loss_that_is_no_softmax_is_warned_of():
    model, x, labels = nn.Linear(4, 3), torch.randn(5, 4), (torch.rand(5, 3) > 0.5).float()

    def closure() -> Any:
        logits = model(x)
        return F.binary_cross_entropy_with_logits(logits, labels), logits

    with pytest.warns(UserWarning, match=r"BinaryCrossEntropy: build ALUM .*'bernoulli'"):
        mixadv.Game(model, mixadv.ALUM()).backward(closure)


# Passes that repeat ------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_what_numpy_and_python_draw_is_replayed_and_goes_on(draw: Callable[[], float]):
    model, x, labels = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5) % 3
    drawn: list[float] = []

    def closure() -> Any:
        drawn.append(draw())
        logits = model(x * (0.5 + drawn[-1]))
        return F.cross_entropy(logits, labels), logits

    game = mixadv.Game(model, mixadv.ALUM())
    game.backward(closure)
    first, count = set(drawn), len(drawn)
    assert len(first) == 1
    game.backward(closure)
    [second] = set(drawn[count:])
    assert second not in first  # as after one plain forward


def test_passes_that_differ_a_little_on_an_untrained_head_are_refused():
    """Their losses hardly differ: only their predictions tell."""
    model, x, labels = nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3
    nn.init.normal_(model.weight, std=1e-4)
    own = np.random.default_rng(0)

    def closure() -> Any:
        logits = model(x * torch.tensor(own.random(x.shape), dtype=torch.float32))
        return F.cross_entropy(logits, labels), logits

    with pytest.raises(mixadv.GameError, match="gave predictions that differ by up to"):
        mixadv.Game(model, mixadv.ALUM()).backward(closure)


def test_a_cache_that_grows_is_refused_in_words():
    one = player("llama-causal", rows=4)
    ids = one.batch["input_ids"]
    with torch.no_grad():
        cache = one.model(ids[:, :4], use_cache=True).past_key_values
    closure = lambda: one.model(ids[:, 4:], past_key_values=cache, labels=ids[:, 4:])  # noqa: E731
    with pytest.raises(mixadv.GameError, match="past_key_values"):
        mixadv.Game(one.model, mixadv.PGD()).backward(closure)


@pytest.mark.parametrize("name", ["pgd", "smart", "mat"])
def test_a_model_that_edits_its_labels_leaves_them_to_the_next_pass(name: str):
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            labels.clamp_(0, 2)
            logits = self.out(self.words(ids).mean(1))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model, ids, labels = Clamps(), torch.randint(9, (5, 4)), torch.tensor([0, 1, 2, 7, 9])
    step(model, solver(name), lambda: model(ids, labels))
    assert labels.tolist() == [0, 1, 2, 7, 9]


# Weights and optimizers --------------------------------------------------------------------------


class Sharp(torch.optim.SGD):
    """An optimizer of the shape of published ones that need a closure."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "a closure is needed"
        return super().step(closure)


def test_an_optimizer_whose_step_needs_a_closure_is_refused_when_it_is_wrapped():
    model = nn.Linear(4, 3)
    with pytest.raises(TypeError, match="Sharp runs the model between the two halves of its step"):
        mixadv.wrap(Sharp(model.parameters(), lr=0.1), model, mixadv.FGM())


@pytest.mark.parametrize("name", ["smart", "mat"])
def test_weights_that_another_optimizer_trains_are_not_averaged_with_old_ones(name: str):
    one = player("bert", rows=4)
    head = [*one.model.classifier.parameters()]
    rest = [p for p in one.model.parameters() if not any(p is q for q in head)]
    other = torch.optim.SGD(rest, lr=0.1)
    optimizer = mixadv.wrap(torch.optim.SGD(head, lr=0.1), one.model, mixadv.make_solver(name))
    optimizer.step(one.closure())
    optimizer.step(one.closure())  # weights that stay as they are may be left out
    one.closure()().loss.backward()
    other.step()
    with pytest.raises(
        mixadv.GameError, match=r"changed since the last round .*not in the wrapped"
    ):
        optimizer.step(one.closure())


@pytest.mark.parametrize("name", ["freeat", "smart", "mat"])
def test_a_vocabulary_that_was_resized_is_refused_in_words(name: str):
    one = player("bert", rows=4)
    base = torch.optim.SGD(one.model.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, one.model, mixadv.make_solver(name))
    optimizer.step(one.closure())
    one.model.resize_token_embeddings(120, mean_resizing=False)
    for _ in range(2):  # nothing is left open
        with pytest.raises(mixadv.GameError, match="wrap it again"):
            optimizer.step(one.closure())
    assert not optimizer.game.rounds.busy


def test_a_registered_name_is_a_solver():
    model = nn.Linear(4, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert mixadv.wrap(base, model, "freelb").game.solver == mixadv.FreeLB()
    assert mixadv.Game(model, "pgd").solver == mixadv.PGD()
    with pytest.raises(ValueError, match="Did you mean 'mat'"):
        mixadv.Game(model, "mats")


@pytest.mark.parametrize(
    ("word", "ours"),
    [("eps", "radius"), ("alpha", "step_size"), ("lr", "step_size"), ("K", "steps")],
)
def test_words_of_papers_are_answered_with_ours(word: str, ours: str):
    for cls in (mixadv.PGD, mixadv.MAT):
        with pytest.raises(TypeError, match=f"no hyper-parameter '{word}'. Here it is '{ours}'"):
            cls(**{word: 1})
