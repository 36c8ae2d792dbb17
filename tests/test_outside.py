"""A head that is trained outside of the game's model gets the gradient of a whole model's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixadv

Loss = tuple[Tensor, Tensor]


class Encoder(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.layer = nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        block = lambda x: self.layer(x).tanh()  # noqa: E731
        return (checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)).mean(1)


class Whole(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = Encoder(reentrant)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids)) * self.scale


def micro_batch(forward: Callable[[Tensor], Tensor], seed: int) -> Callable[[], Loss]:
    draw = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(20, (4, 5), generator=draw), torch.arange(4) % 3

    def closure() -> Loss:
        logits = forward(ids)
        return F.cross_entropy(logits, labels), logits

    return closure


def gradients(
    solver: mixadv.Solver, how: str, outside: bool, reentrant: bool = False
) -> dict[str, Tensor]:
    """Return what two rounds add to gradients that are there already."""
    whole = Whole(reentrant)
    encoder, head = whole.encoder, whole.head
    # A plain tensor: no module holds it at all.
    scale = whole.scale.detach().clone().requires_grad_() if outside else whole.scale
    game = mixadv.Game(encoder if outside else whole, solver)
    trained: dict[str, Tensor] = {**dict(whole.named_parameters()), "scale": scale}
    for tensor in trained.values():
        tensor.grad = torch.ones_like(tensor)
    forward = (lambda ids: head(encoder(ids)) * scale) if outside else whole
    closures: list[Any] = [micro_batch(forward, seed) for seed in (0, 1)]
    for _ in range(2):
        if how == "micro-batches":
            game.backward(closures)
        elif how == "backward":
            game.backward(closures[0])
        else:
            game.loss(closures[0]).backward()
    found = {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}
    assert found.keys() == trained.keys()
    return found


def of_the_encoder(name: str, weight: Tensor) -> bool:
    return not name.startswith(("head", "scale"))


SOLVERS: dict[str, mixadv.Solver] = {
    "pgd": mixadv.PGD(steps=2),
    "freelb": mixadv.FreeLB(steps=3),
    "trades": mixadv.TRADES(),
    "recomputed": mixadv.TRADES(recompute=True),
    "weights alone": mixadv.SAM(which=of_the_encoder),
    "weights around freelb": mixadv.SAM(solver=mixadv.FreeLB(), which=of_the_encoder),
    "weights around recomputed": mixadv.AWP(
        solver=mixadv.TRADES(recompute=True), which=of_the_encoder
    ),
}


@pytest.mark.parametrize("how", ["backward", "loss", "micro-batches"])
@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_trained_outside_of_the_model_gets_the_gradient_of_each_pass_once(
    name: str, how: str
):
    one, other = (gradients(SOLVERS[name], how, outside) for outside in (False, True))
    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("name", ["pgd", "weights alone", "weights around freelb"])
def test_reentrant_checkpoints_leave_no_gradient_of_an_ascent_on_a_head_outside(name: str):
    """In the first round's checks either, which differentiate a few passes more."""
    one, other = (gradients(SOLVERS[name], "backward", outside, True) for outside in (False, True))
    torch.testing.assert_close(other, one)


def test_a_head_that_a_later_closure_calls_first_is_found():
    torch.manual_seed(0)
    encoder, head = Encoder(), nn.Linear(8, 3)
    game, fresh = (mixadv.Game(encoder, mixadv.FreeLB(radius=0.0)) for _ in range(2))
    game.loss(micro_batch(lambda ids: encoder(ids)[:, :3], 0)).backward()
    found = []
    for each in (game, fresh):
        head.weight.grad = None
        each.loss(micro_batch(lambda ids: head(encoder(ids)), 1)).backward()
        assert head.weight.grad is not None
        found.append(head.weight.grad)
    torch.testing.assert_close(*found)


def test_a_frozen_head_outside_stays_without_a_gradient():
    torch.manual_seed(0)
    encoder, head = Encoder(), nn.Linear(8, 3).requires_grad_(False)
    game = mixadv.Game(encoder, mixadv.FreeLB())
    game.loss(micro_batch(lambda ids: head(encoder(ids)), 0)).backward()
    assert head.weight.grad is None
    assert encoder.words.weight.grad is not None
