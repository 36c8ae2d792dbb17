"""Adversarial training of images as its papers have it: TRADES, MART, published rows."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv import ALUM, MART, PGD, SOLVERS, TRADES, GameError
from mixadv.model.heads import shown
from mixadv.solvers.mart import margin
from tests.test_box import pixels
from tests.worlds import gradients
from tests.zoo import LABELS, Vision, assert_same, wrapped

EPS, STEP = 8 / 255, 2 / 255
WORDS: dict[str, Any] = {
    "steps": 3,
    "step_size": STEP,
    "radius": EPS,
    "norm": "linf",
    "unit": "absolute",
    "box": (0.0, 1.0),
}


def seen() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model whose passes all see the same, with a batch, in float64."""
    torch.manual_seed(0)
    images, labels = pixels(dtype=torch.float64)
    return Vision().double().eval(), images, labels


def closure_of(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    def closure() -> tuple[Tensor, ...]:
        logits = model(images)
        return F.cross_entropy(logits, labels), logits, labels

    return closure


def start_of(optimizer: mixadv.GameOptimizer, kind: str, like: Tensor) -> Tensor:
    """Return what the adversary draws at the start of the next round."""
    noise = optimizer.game.rounds.arena.noise
    noise.begin("adversary", optimizer.game.rounds.round, 0)
    return noise(kind, like)


def released(model: nn.Module, x: Tensor, delta: Tensor, payoff: Any) -> Tensor:
    """Return the adversarial images of the released loops: sign steps, ball, box."""
    x_adv = x + delta
    for _ in range(WORDS["steps"]):
        x_adv = x_adv.detach().requires_grad_()
        (slope,) = torch.autograd.grad(payoff(model(x_adv)), [x_adv])
        x_adv = x_adv.detach() + STEP * slope.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


# TRADES --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_is_its_formula(beta: float):
    """ℓ(x) + β·KL(f(x) ‖ f(x'))/B, gradients through both sides, x' of the released loop."""
    model, x, y = seen()
    words = {**WORDS, "start": "normal", "start_size": 1e-3, "smoothness_weight": beta}
    optimizer = wrapped(model, TRADES(**words))
    delta = 1e-3 * start_of(optimizer, "normal", x)
    delta = torch.min(torch.max(delta, -x), 1 - x)  # our start is an image too
    target = model(x).softmax(1).detach()
    kl = nn.KLDivLoss(reduction="sum")
    x_adv = released(model, x, delta, lambda logits: kl(logits.log_softmax(1), target))
    natural = F.cross_entropy(model(x), y)
    loss = natural + beta * kl(model(x_adv).log_softmax(1), model(x).softmax(1)) / len(x)
    loss.backward()
    expected = gradients(model)
    outcome = optimizer.game.backward(closure_of(model, x, y))
    torch.testing.assert_close(outcome.objective, loss.detach())
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_trades_is_alum_with_its_divergence():
    played = []
    for solver in (TRADES(**WORDS), ALUM(**WORDS, divergence="kl", smoothness_weight=6.0)):
        model, x, y = seen()
        optimizer = wrapped(model.train(), solver)
        for _ in range(3):
            optimizer.step(closure_of(model, x, y))
        played.append(model.state_dict())
    assert_same(*played)


def test_trades_needs_no_label():
    model, x, _ = seen()
    optimizer = wrapped(model, TRADES(**WORDS))

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(x)
        return logits.square().mean(), logits

    assert optimizer.step(closure).isfinite()


# MART ----------------------------------------------------------------------------------------


def by_hand(clean: Tensor, perturbed: Tensor, y: Tensor, weight: float) -> Tensor:
    """The loss of a sample at a time, from probabilities."""
    total = torch.zeros((), dtype=clean.dtype)
    for p, q, label in zip(clean.softmax(1), perturbed.softmax(1), y.tolist(), strict=True):
        rival = max(q[k] for k in range(len(q)) if k != label)
        kl = sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))
        total = total - q[label].log() - (1 - rival).log() + weight * kl * (1 - p[label])
    return total / len(y)


def test_mart_is_its_formula():
    model, x, y = seen()
    words = {**WORDS, "start": "normal", "start_size": 1e-3, "smoothness_weight": 5.0}
    optimizer = wrapped(model, MART(**words))
    delta = 1e-3 * start_of(optimizer, "normal", x)
    delta = torch.min(torch.max(delta, -x), 1 - x)
    x_adv = released(model, x, delta, lambda logits: F.cross_entropy(logits, y))
    loss = by_hand(model(x), model(x_adv), y, 5.0)
    loss.backward()
    expected = gradients(model)
    outcome = optimizer.game.backward(closure_of(model, x, y))
    torch.testing.assert_close(outcome.objective, loss.detach())
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


@given(
    logits=st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3),
    label=st.integers(0, 2),
)
def test_a_margin_is_finite_whatever_the_logits(logits, label):
    x = torch.tensor([logits], requires_grad=True)
    value = margin(x, torch.tensor([label]))
    value.sum().backward()
    assert value.isfinite().all()
    assert x.grad.isfinite().all()
    assert 0 <= float(value.detach()) <= 2e4 + 2


def test_labels_may_be_the_models_own_argument():
    """As those of transformers; a label below 0 counts nothing, as in cross entropy."""

    class Labelled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.inner(images)
            return F.cross_entropy(logits, labels), logits

    found = []
    for told in (True, False):
        inner, x, y = seen()
        y[1] = -100
        model = Labelled(inner) if told else inner
        closure = partial(model, x, y) if told else closure_of(model, x, y)
        optimizer = wrapped(model, MART(**WORDS))
        optimizer.step(closure)
        found.append(inner.state_dict())
    assert_same(*found)


LOSSES: dict[str, Any] = {
    "mean": F.cross_entropy,
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "each": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "weighed": lambda z, y: F.cross_entropy(z, y, torch.tensor([1.0, 3.0, 0.5]).to(z)),
    "by log-probabilities": lambda z, y: 2 * F.nll_loss(z.log_softmax(1), y),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cross_entropy_shows_its_labels(loss: str, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, LABELS, generator=draw)).to(dtype).requires_grad_()
    labels = torch.randint(0, LABELS, (64,), generator=draw)
    found = shown(LOSSES[loss](logits, labels), logits)
    assert bool(found.certain)
    assert torch.equal(found.labels, labels)


def test_tokens_without_a_loss_do_not_count():
    logits = torch.randn(3, 5, LABELS, requires_grad=True)
    labels = torch.randint(0, LABELS, (3, 5))
    labels[1, 2:] = -100
    found = shown(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)
    assert torch.equal(found.labels, labels)


OTHERS: dict[str, Any] = {
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "shares": lambda z, y: F.cross_entropy(z, torch.full_like(z, 1 / LABELS)),
    "squares": lambda z, y: (z - F.one_hot(y, LABELS)).square().mean(),
    "each class by itself": lambda z, y: F.binary_cross_entropy_with_logits(
        z, F.one_hot(y, LABELS).to(z)
    ),
}


@pytest.mark.parametrize("loss", OTHERS)
def test_labels_that_the_loss_does_not_show_are_asked_for(loss: str):
    """They are told where the closure returns them."""
    model, x, y = seen()

    def closure(*more: Tensor) -> tuple[Tensor, ...]:
        logits = model(x)
        return OTHERS[loss](logits, y), logits, *more

    with pytest.raises(GameError, match=r"return \(loss, logits \[B, C\], labels \[B\]\)|head"):
        wrapped(model, MART(**WORDS)).step(closure)
    if loss == "smoothed":
        assert wrapped(model, MART(**WORDS)).step(partial(closure, y)).isfinite()


@pytest.mark.parametrize("more", ["nothing", "shares", "too few"])
def test_shown_or_told_labels_are_the_same(more: str):
    """What is no label behind the logits is none."""
    found = []
    for others in ("labels", more):
        model, x, y = seen()
        behind = {"labels": (y,), "nothing": (), "too few": (y[1:],)}
        behind["shares"] = (F.one_hot(y, LABELS).double(),)

        def closure(m: nn.Module = model, x: Any = x, y: Any = y, b: Any = behind[others]) -> Any:
            logits = m(x)
            return F.cross_entropy(logits, y), logits, *b

        optimizer = wrapped(model, MART(**WORDS))
        for _ in range(2):
            optimizer.step(closure)
        found.append(model.state_dict())
    assert_same(*found)


def test_a_label_beyond_the_classes_is_told():
    model, x, y = seen()

    def closure() -> tuple[Tensor, ...]:
        logits = model(x)
        return OTHERS["smoothed"](logits, y), logits, y + 1

    with pytest.raises(GameError, match=rf"label {LABELS}, and .* from 0 to {LABELS - 1}"):
        wrapped(model, MART(**WORDS)).step(closure)


# Published rows ------------------------------------------------------------------------------

IMAGES = [
    (cls, task, model)
    for cls in SOLVERS.values()
    for model, tasks in cls.presets.items()
    for task, words in tasks.items()
    if "box" in words
]
NUMBERS = {  # steps, step size, radius, λ or β
    (PGD, "cifar10", "wide-resnet-28-10"): (10, 2 / 255, 8 / 255, None),
    (TRADES, "cifar10", "wide-resnet-34-10"): (10, 0.007, 0.031, 6.0),
    (TRADES, "mnist", "small-cnn"): (40, 0.01, 0.3, 1.0),
    (MART, "cifar10", "wide-resnet-34-10"): (10, 0.007, 0.031, 6.0),
    (MART, "cifar10", "resnet-18"): (10, 0.007, 0.031, 5.0),
}


@pytest.mark.parametrize("row", IMAGES, ids=lambda row: "-".join([row[0].name, *row[1:]]))
def test_a_row_of_images_is_that_of_the_released_code_and_plays(row: Any):
    cls, task, model = row
    solver = cls.published(task, model=model)
    weight = getattr(solver, "smoothness_weight", None)
    assert (solver.steps, solver.step_size, solver.radius, weight) == NUMBERS[row]
    assert (solver.norm, solver.unit, solver.box) == ("linf", "absolute", (0.0, 1.0))
    assert solver.start == ("uniform" if cls is PGD else "normal")
    network, x, y = seen()
    optimizer = wrapped(network, solver)
    optimizer.step(closure_of(network, x, y))
    (lengths,) = optimizer.game.strategy.norms("linf")
    assert 0 < float(lengths.max()) <= solver.radius * (1 + 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_two_classes_no_loss_shows_labels_for_certain(smoothing: float, dtype: torch.dtype):
    """Smoothed it has a cross entropy's gradient too, of the other label where p_y is large."""
    logits = (4 * torch.randn(16, 2)).to(dtype).requires_grad_()
    labels = torch.randint(0, 2, (16,))
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert not bool(shown(loss, logits).certain)
    model = nn.Linear(4, 2)
    x = torch.rand(16, 4)

    def closure(*more: Tensor) -> tuple[Tensor, ...]:
        logits = model(x)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits, *more

    with pytest.raises(GameError, match=r"three classes or more would: return \(loss, logits"):
        wrapped(model, MART(**WORDS)).step(closure)
    assert wrapped(model, MART(**WORDS)).step(partial(closure, labels)).isfinite()
