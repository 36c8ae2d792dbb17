"""SMART against the `smart-pytorch` package: same model, same noise, its normalisation."""

import pytest
import torch
from smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss
from torch import Tensor

import mixadv
from tests.zoo import player, without_dropout

START, STEP = 1e-2, 1000.0  # gradients of 1e-5: start and step weigh about the same


def symmetric_kl(input: Tensor, target: Tensor) -> Tensor:
    """Both arguments differentiable: the package's own detaches one in each term."""
    return kl_loss(input, target) + kl_loss(target, input)


LOSSES = {"kl": (kl_loss, kl_loss), "symmetric_kl": (symmetric_kl, sym_kl_loss)}


@pytest.fixture
def bert():
    bert = player("bert", rows=6)
    without_dropout(bert.model.double())
    return bert


def peer(bert, name: str, steps: int) -> Tensor:
    """The package's regulariser: a step of `STEP` up the batch's mean, then norm 1 per token."""
    mask = bert.batch["attention_mask"]
    embed = bert.model.get_input_embeddings()(bert.batch["input_ids"])
    loss, last = LOSSES[name]
    regulariser = SMARTLoss(
        lambda embed: bert.model(inputs_embeds=embed, attention_mask=mask).logits,
        loss_fn=loss,
        loss_last_fn=lambda *logits: last(*logits, reduction="batchmean"),
        num_steps=steps,
        step_size=STEP,
        epsilon=1e-15,
        noise_var=START,
    )
    return regulariser(embed, bert.model(**bert.batch).logits)


class Drawn:
    """What the package draws after the same seed."""

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        torch.manual_seed(3)

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        return torch.randn_like(like)


def round_of(bert, divergence: str, steps: int) -> tuple[mixadv.Game, mixadv.Outcome]:
    solver = mixadv.SMART(
        steps=steps,
        step_size=STEP / len(bert.batch["labels"]),  # ours climbs each sample's own payoff
        radius=1.0,
        start_size=START,
        divergence=divergence,
        proximal_weight=0.0,
        normalize="none",
        projection="sphere",
        norm="linf",
        per="token",
        unit="absolute",
    )
    game = mixadv.Game(bert.model, solver)
    game.rounds.arena.noise = Drawn()
    return game, game.backward(bert.closure())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("divergence", LOSSES)
def test_regulariser_equals_that_of_smart_pytorch(bert, divergence, steps):
    torch.manual_seed(3)
    theirs = peer(bert, divergence, steps).item()
    _, outcome = round_of(bert, divergence, steps)
    assert (outcome.objective - outcome.clean_loss).item() == pytest.approx(theirs, rel=1e-6)


def test_every_real_token_is_moved_by_one_and_no_other(bert):
    game, outcome = round_of(bert, "kl", steps=2)
    (largest,) = game.strategy.norms("linf", "token")
    torch.testing.assert_close(largest[0, ..., 0], bert.batch["attention_mask"].double())
    assert float(outcome.radius) == pytest.approx(1.0)
