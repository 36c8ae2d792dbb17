"""Gradient checkpointing: a recomputed pass meets the δ that it was played with."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixadv
from tests import zoo
from tests.zoo import (
    CANNOT,
    TRANSFORMERS,
    USUAL,
    WAYS,
    Player,
    copies,
    hooks,
    or_refused,
    player,
)

Kind = Literal["none", "reentrant", "non-reentrant"]
KINDS = ["reentrant", "non-reentrant"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear(x).tanh())


class Encoder(nn.Module):
    """Two blocks, checkpointed apart, together or nested; "shared" is one block called twice."""

    def __init__(self, kind: Kind, shape: str = "apart") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block()] * 2 if "shared" in shape else [Block(), Block()])
        self.head = nn.Linear(8, 3)
        self.kind, self.shape = kind, shape
        self.double()

    def run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.kind == "none":
            return part(x)
        return checkpoint(part, x, use_reentrant=self.kind == "reentrant")

    def stack(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x) if "nested" in self.shape else block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for part in self.blocks if self.shape in ("apart", "shared") else [self.stack]:
            x = self.run(part, x)
        return self.head(x.mean(1))


def closure(model: nn.Module, seed: int = 0, twice: bool = False) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (4, 5), generator=draw)
    labels = torch.randint(0, 3, (4,), generator=draw)

    def call() -> tuple[Tensor, Tensor]:
        logits = model(ids)
        loss = F.cross_entropy(logits, labels)
        if twice:
            loss = loss + 0.1 * (model(ids.flip(0)) - logits).square().sum(-1).mean()
        return loss, logits

    return call


def wrapped(model: nn.Module, name: str, site: Any = None, **settings: Any) -> mixadv.GameOptimizer:
    torch.manual_seed(2)
    return zoo.wrapped(model, name, site=site, **settings)


def play(optimizer: mixadv.GameOptimizer, call: Callable[[], Any], way: str) -> list[Tensor]:
    """Play two rounds and return what they came to: outcomes, δ and weights."""
    seen: list[Any] = []
    for _ in range(2):
        zoo.play(optimizer, call, way)
        outcome = optimizer.game.outcome
        seen += [outcome.objective, outcome.clean_loss, outcome.payoff, outcome.radius]
        seen += copies(optimizer.game.strategy.points)
    seen += copies(optimizer.game.model.parameters())
    assert not hooks(optimizer.game.model)
    return [value for value in seen if value is not None]


def transformer(family: str, kind: Kind) -> Player:
    p = player(family, rows=4)
    p.model.double()
    if kind != "none":
        use = {"use_reentrant": kind == "reentrant"}
        p.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=use)
    return p


def assert_same_rounds(one: list[Tensor], other: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def alike(run: Callable[[Kind], list[Tensor]], kind: Kind = "non-reentrant") -> None:
    """Assert that checkpointed rounds are the plain ones."""
    assert_same_rounds(run("none"), run(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused()
def test_checkpointed_rounds_equal_plain_ones(name: str, kind: Kind) -> None:
    def run(kind: Kind) -> list[Tensor]:
        model = Encoder(kind)
        return play(wrapped(model, name), closure(model), "step")

    alike(run, kind)


# Which passes a solver makes is one thing, whether a model checkpoints its layers another.
BOTH = [("bert", name) for name in mixadv.SOLVERS] + [("llama", name) for name in USUAL]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name"), BOTH)
@or_refused()
def test_checkpointed_transformers_play_the_same_rounds(family: str, name: str, kind: Kind) -> None:
    def run(kind: Kind) -> list[Tensor]:
        p, way = transformer(family, kind), "step" if (name, "backward") in CANNOT else "backward"
        return play(wrapped(p.model, name), p.closure(), way)

    alike(run, kind)


@pytest.mark.parametrize("family", sorted(set(TRANSFORMERS) - {"albert"}))
def test_every_family_plays_the_same_rounds_checkpointed(family: str) -> None:
    def run(kind: Kind) -> list[Tensor]:
        p = transformer(family, kind)
        return play(wrapped(p.model, "mat", particles=2, play_as="ensemble"), p.closure(), "step")

    alike(run)


SHAPES = ("apart", "shared", "together", "shared together", "nested")
# How a layer lies in its checkpoint is one thing, which passes a solver makes another: each kind of
# solver at every shape, and each solver at the shape that asks the most.
PLACED = [(n, s) for n in mixadv.SOLVERS for s in SHAPES if n in USUAL or s == "shared together"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "shape"), PLACED)
@or_refused("hidden layer")
def test_a_layer_inside_a_checkpoint_is_perturbed_in_its_recompute(
    name: str, shape: str, way: str
) -> None:
    def run(kind: Kind) -> list[Tensor]:
        model = Encoder(kind, shape)
        optimizer = wrapped(model, name, site="blocks.1.linear")
        seen = play(optimizer, closure(model), way)
        assert len(optimizer.game.strategy.points) == 1 + ("shared" in shape)
        return seen

    alike(run)


@pytest.mark.parametrize("site", ["blocks.0", "blocks.0.linear"])
def test_a_layer_shared_by_nested_checkpoints_is_right_or_refused(site: str) -> None:
    def run(kind: Kind) -> list[Tensor]:
        model = Encoder(kind, "shared nested")
        return play(wrapped(model, "freelb", site=site), closure(model), "step")

    try:
        alike(run)
    except mixadv.GameError as error:
        assert "nested checkpoints" in str(error)  # noqa: PT017


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [n for n in mixadv.SOLVERS if n != "mart"])  # one loss of labels
@or_refused("hidden layer")
def test_an_encoder_called_twice_gets_each_delta_back(name: str, way: str) -> None:
    def run(kind: Kind) -> list[Tensor]:
        model = Encoder(kind, "shared")
        optimizer = wrapped(model, name, site="blocks.0")
        seen = play(optimizer, closure(model, twice=True), way)
        points = optimizer.game.strategy.points
        assert len(points) == 4
        assert not any(torch.equal(points[0], other) for other in points[1:])
        return seen

    alike(run)


@pytest.mark.parametrize("way", WAYS)
def test_shared_layers_of_albert_get_each_delta_back(way: str) -> None:
    def run(kind: Kind) -> list[Tensor]:
        p = transformer("albert", "none")
        layer = p.model.albert.encoder.albert_layer_groups[0].albert_layers[0]
        if kind != "none":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        optimizer = wrapped(p.model, "freelb", site=layer.ffn)
        seen = play(optimizer, p.closure(), way)
        assert len(optimizer.game.strategy.points) == p.model.config.num_hidden_layers
        return seen

    alike(run)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("order", ["together", "first first", "last first"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("loss", "hidden layer")
def test_two_pending_losses_are_recomputed_each_with_its_own_delta(name: str, order: str) -> None:
    def run(kind: Kind) -> list[Tensor]:
        model = Encoder(kind)
        game = wrapped(model, name, site="blocks.0.linear").game
        losses = [game.loss(closure(model, seed)) for seed in (0, 1)]
        if order == "together":
            losses = [2 * losses[0] + losses[1]]
        for loss in reversed(losses) if order == "last first" else losses:
            loss.backward()
        assert not hooks(model)
        return gradients_of(model)

    alike(run)


def test_the_model_is_unperturbed_while_a_loss_waits_for_its_backward() -> None:
    def run(kind: Kind) -> list[Tensor]:
        model = Encoder(kind).eval()
        other = closure(model, seed=1)
        plain = other()[1]
        loss = wrapped(model, "freelb", site="blocks.0.linear").game.loss(closure(model))
        assert torch.equal(other()[1], plain)
        other()[0].backward()  # recomputes a pass that no round played
        loss.backward()
        return gradients_of(model)

    alike(run)


def test_a_loss_differentiated_twice_keeps_its_delta() -> None:
    model = Encoder("non-reentrant")
    loss = wrapped(model, "pgd", site="blocks.0.linear").game.loss(closure(model))
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    assert_same_rounds(gradients_of(model), list(first))


def test_a_loss_that_is_never_differentiated_leaves_no_hooks_behind() -> None:
    model = Encoder("non-reentrant")
    game = wrapped(model, "pgd", site="blocks.0.linear").game
    game.loss(closure(model))
    game.backward(closure(model))
    assert not hooks(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_reentrant_checkpoint_around_the_site_is_refused(name: str) -> None:
    model = Encoder("reentrant")
    optimizer = wrapped(model, name, site="blocks.1.linear")
    with pytest.raises(mixadv.GameError, match="use_reentrant=False"):
        optimizer.step(closure(model))
    assert not hooks(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("site", ["bert.encoder.layer.0.intermediate", "bert.encoder.layer.1"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_site_in_a_reentrant_checkpoint_is_never_silently_wrong(name: str, site: str) -> None:
    """Transformers make the input of the checkpoint require grad, so it can be played there."""
    rounds = []
    for kind in ("none", "reentrant"):
        p = transformer("bert", kind)
        try:
            rounds.append(play(wrapped(p.model, name, site=site), p.closure(), "step"))
        except mixadv.GameError as error:
            says = CANNOT.get((name, "hidden layer"), "use_reentrant=False")
            assert re.search(says, str(error))  # noqa: PT017
            return
    assert_same_rounds(*rounds)


@pytest.mark.parametrize("source", ["blocks.0", "blocks.0.dropout"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["creat", "cat"])
def test_a_representation_read_at_or_in_a_checkpoint_has_its_gradient(
    name: str, kind: Kind, source: str
) -> None:
    """Or is refused: a reentrant checkpoint runs without gradients what lies in it."""
    plain, model = Encoder("none"), Encoder(kind)
    expected = play(wrapped(plain, name, source=source), closure(plain), "step")
    optimizer = wrapped(model, name, source=source)
    if kind == "reentrant" and (name == "cat" or "dropout" in source):
        with pytest.raises(mixadv.GameError, match=r"use_reentrant=False|not depend on δ.*source="):
            optimizer.step(closure(model))
    else:
        assert_same_rounds(play(optimizer, closure(model), "step"), expected)


def test_a_round_that_fails_leaves_no_hooks_behind() -> None:
    model = Encoder("non-reentrant")
    game = wrapped(model, "freelb", site="blocks.0.linear").game
    game.backward(call := closure(model))
    runs: list[int] = []

    def failing() -> Any:
        result = call()
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("in the second pass")
        return result

    for play_round in (game.backward, game.loss):
        runs.clear()
        with pytest.raises(RuntimeError, match="in the second pass") as caught:
            play_round(failing)
        assert not hooks(model), caught


# With the weights frozen, a checkpoint before the head has no input that requires grad.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("site", "where"), [(None, "reentrant"), ("head", "hidden layer")])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("loss")
def test_reentrant_checkpoints_and_a_loss_to_differentiate_work_or_say_so(
    name: str, site: str | None, where: str
) -> None:
    expected = Encoder("none")
    wrapped(expected, name, site).game.backward(closure(expected))
    model = Encoder("reentrant")
    game = wrapped(model, name, site).game
    passes = game.explain().passes
    if passes.theta_backwards > passes.steps:  # differentiated pass by pass
        with pytest.raises(mixadv.GameError, match=r"use_reentrant=False, or use game\.backward"):
            game.loss(closure(model))
        assert not hooks(model)
    else:
        game.loss(closure(model)).backward()
        assert_same_rounds(gradients_of(model), gradients_of(expected))
