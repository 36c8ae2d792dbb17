"""Every solver on every model family: it learns, δ is real, δ = 0 is plain, padding is inert."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from tests.worlds import classified
from tests.zoo import (
    FAMILIES,
    PAD,
    ROWS,
    USUAL,
    Player,
    or_refused,
    pairs,
    player,
    stepwise,
    without_dropout,
    wrapped,
)

TEXT = [family for family in FAMILIES if family != "vision"]
MIXED = {"mat": {"particles": 2, "learner_temperature": 1e-8}}


def build(p: Player, name: str, **settings: Any) -> mixadv.GameOptimizer:
    return wrapped(p.model, mixadv.make_solver(name, **settings), torch.optim.AdamW, lr=1e-2)


def loss_of(result: Any) -> Tensor:
    return (result[0] if isinstance(result, tuple) else result.loss).mean()


def logits_of(result: Any) -> Tensor:
    return result[1] if isinstance(result, tuple) else result.logits


@torch.no_grad()
def evaluate(p: Player) -> float:
    p.model.eval()
    value = loss_of(p.forward(p.model, p.batch)).item()
    p.model.train()
    return value


@pytest.mark.parametrize(("family", "name"), pairs(FAMILIES))
@or_refused()
def test_every_solver_halves_the_loss_and_perturbs_every_sample(family: str, name: str) -> None:
    p = player(family)
    # VAT's δ is 0 where its probe moves no prediction, as some of a tiny BART are not by 0.05.
    optimizer = build(p, name, **({"start_size": 0.2} if name == "vat" else {}))
    goal = evaluate(p) / 2
    for _ in range(60):
        optimizer.step(p.closure())
        strategy = optimizer.game.strategy
        assert all((length > 0).all() for length in strategy.norms())
        assert optimizer.outcome.radius > 0
        assert optimizer.outcome.nonfinite is None or optimizer.outcome.nonfinite == 0
        if evaluate(p) <= goal:
            return
    pytest.fail(f"the loss is {evaluate(p):.3f}, the goal was {goal:.3f}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_perturbation_leaves_the_logits_bit_identical(
    family: str, side: str, training: bool
) -> None:
    """Compared with the unhooked model, its weights frozen as they are in a δ-only pass.

    Whether weights require grad chooses the attention kernel of T5, and with it the last bits.
    """
    p = player(family, rows=6, side=side)
    p.model.train(training)
    seen: list[tuple[bool, Tensor]] = []

    def closure() -> Any:
        result = p.forward(p.model, p.batch)
        live = next(p.model.parameters()).requires_grad
        seen.append((live, logits_of(result).detach().clone()))
        return result

    unhooked = {}
    for live in (True, False):
        p.model.requires_grad_(live)
        torch.manual_seed(5)
        unhooked[live] = logits_of(p.forward(p.model, p.batch)).detach()
    p.model.requires_grad_(True)
    game = mixadv.Game(p.model, mixadv.PGD(steps=1, radius=0.0))
    torch.manual_seed(5)
    game.backward(closure)
    assert all(not length.any() for length in game.strategy.norms())
    assert {live for live, _ in seen} == {True, False}
    assert all(torch.equal(logits, unhooked[live]) for live, logits in seen)


class GivenNoise:
    """Draws that depend on row, position and coordinate alone, not on how long the batch is."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.table = torch.randn(16, 40, 40, generator=draw, dtype=torch.float64).clamp(-1, 1)

    def begin(self, *_: Any) -> None:
        pass

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        if like.dim() == 1:  # of each sample
            return self.table[: len(like), 0, 0].to(like.dtype)
        rows, length, width = like.shape
        return self.table[:rows, :length, :width].to(like.dtype)


def padded(batch: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {k: F.pad(v, (0, extra), value=fill[k]) if v.dim() == 2 else v for k, v in batch.items()}


ONE_LOSS = {("llama-causal", name) for name in ROWS}  # of the model, for all rows


@pytest.mark.parametrize(
    ("family", "name"), [p for p in pairs(TEXT) if tuple(p.values) not in ONE_LOSS]
)
def test_more_padding_on_the_right_changes_nothing(family: str, name: str) -> None:
    rounds = []
    for extra in (0, 4):
        p = player(family, rows=6)
        without_dropout(p.model).double()
        optimizer = build(p, name, **MIXED.get(name, {}))
        optimizer.param_groups[0]["lr"] = 0.0
        game, taken = optimizer.game, stepwise(optimizer)
        game.rounds.arena.noise = GivenNoise()
        batch = padded(p.batch, extra)
        optimizer.step(lambda p=p, batch=batch: p.forward(p.model, batch))
        length = p.batch["input_ids"].shape[1]
        rounds.append((game.outcome, game.strategy.points[0], length, taken))
    (short, delta, length, grad), (long, longer, _, other) = rounds
    for value in ("objective", "clean_loss", "payoff", "radius"):
        a, b = getattr(short, value), getattr(long, value)
        assert (a is None and b is None) or a.item() == pytest.approx(b.item(), rel=1e-6)
    torch.testing.assert_close(longer[:, :, :length], delta, rtol=1e-5, atol=1e-8)
    assert not longer[:, :, length:].any()
    assert [step.keys() for step in grad] == [step.keys() for step in other]
    torch.testing.assert_close(other, grad, rtol=1e-5, atol=1e-8)


RETURNS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "tuple": lambda model, batch: model(**batch, return_dict=False),
    "dict": lambda model, batch: dict(model(**batch)),
    "loss and logits": lambda model, batch: ((output := model(**batch)).loss, output.logits),
    "loss and output": lambda model, batch: ((output := model(**batch)).loss, output),
    "loss": lambda model, batch: model(**batch).loss,
}


# A loss alone is refused by what compares predictions, so every solver meets it; other outputs are
# those of other families, of which each form is read once.
FORMS = [("bert", n, r) for n in USUAL for r in RETURNS]
FORMS += [(f, n, r) for f in ("bart", "llama-causal") for n, r in zip(cycle(USUAL), RETURNS)]
FORMS += [("bert", n, "loss") for n in mixadv.SOLVERS if n not in USUAL]


@pytest.mark.parametrize(("family", "name", "returns"), FORMS)
def test_the_form_in_which_a_model_returns_its_loss_does_not_matter(
    family: str, name: str, returns: str
) -> None:
    seen = []
    for forward in (lambda model, batch: model(**batch), RETURNS[returns]):
        p = player(family, rows=4)._replace(forward=forward)
        p.model.double()
        optimizer = build(p, name)
        optimizer.param_groups[0]["lr"] = 0.0
        taken = stepwise(optimizer)
        if returns == "loss" and seen and optimizer.game.solver.compares is not None:
            with pytest.raises(mixadv.GameError, match="loss alone"):
                optimizer.step(p.closure())
            assert not taken
            return
        optimizer.step(p.closure())
        seen.append(taken)
    assert seen[0]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-12)


class Twice(nn.Module):
    """One layer registered under two names, as shared encoders and stacks are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)] * 2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x.mean(1))


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_layer_registered_twice_keeps_its_weights_and_learns(name: str) -> None:
    model, ids, labels = Twice(), torch.randint(0, 20, (4, 5)), torch.arange(4) % 3
    settings = {"samples": 2} if name == "mat" else {}
    optimizer = build(Player(model, {}, lambda *_: None), name, **settings)
    held, before = model.layers[0].weight, model.layers[0].weight.clone()
    for _ in range(2):
        optimizer.step(classified(model, ids, labels=labels))
    if name == "mat":
        optimizer.game.mixture(lambda: model(ids))
    assert model.layers[0].weight is model.layers[1].weight is held
    assert held.requires_grad
    assert not torch.equal(held, before)
