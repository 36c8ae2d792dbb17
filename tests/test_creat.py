"""CreAT's adversary: drives the loss up and the encoder's representation away."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from tests.worlds import added, gradients, hidden_at, played
from tests.zoo import player, small


@pytest.mark.parametrize("deviation", [0.0, 1.0, 50.0])
def test_it_is_projected_ascent_and_half_of_each_loss(deviation):
    """Written out for an encoder, with dropout on; from zero, where the distance is flat."""
    one = player("bert", rows=5)
    model, batch = one.model.double(), one.batch
    mask = batch["attention_mask"][..., None].double()
    radius, step_size, steps = 0.3, 0.2, 3
    words = {"radius": radius, "step_size": step_size, "steps": steps, "start": "zero"}
    solver = mixadv.CreAT(deviation_weight=deviation, unit="absolute", **words)
    torch.manual_seed(3)
    outcome = mixadv.Game(model, solver).backward(one.closure())
    found = gradients(model)

    def run(delta: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        words = model.bert.embeddings.word_embeddings
        with added((words, delta)):
            out = model(**batch, output_hidden_states=True)
        losses = F.cross_entropy(out.logits, batch["labels"], reduction="none")
        return losses, out.hidden_states[-1][:, 0]

    delta = torch.zeros(*batch["input_ids"].shape, 16, dtype=torch.float64)
    clean, h = run(delta)
    for _ in range(steps):
        delta.requires_grad_()
        losses, moved = run(delta)
        lengths = moved.norm(dim=1) * h.norm(dim=1).detach()
        payoff = losses + deviation * (1 - (moved * h.detach()).sum(1) / lengths)
        (g,) = torch.autograd.grad(payoff.sum(), delta)
        g = g * mask
        delta = delta.detach() + step_size * g / g.flatten(1).norm(dim=1)[:, None, None]
        shrink = (radius / delta.flatten(1).norm(dim=1)).clamp(max=1)
        delta = delta * shrink[:, None, None]
    objective = (clean.mean() + run(delta)[0].mean()) / 2
    objective.backward()
    torch.testing.assert_close(outcome.objective, objective.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, gradients(model), rtol=1e-8, atol=1e-10)


def test_the_more_it_weighs_the_further_the_representation_moves():
    one = small(rows=12)
    one.model.eval()
    distances = []
    for deviation in (0.0, 1.0, 1e3):
        solver = mixadv.CreAT(deviation_weight=deviation, source="hidden", radius=0.5, steps=5)
        game = mixadv.Game(one.model, solver)
        game.backward(one.closure())
        seen = hidden_at(one, 0, game.unit * played(game))
        distances.append(float(1 - F.cosine_similarity(*seen).mean().detach()))
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.filterwarnings("ignore:.* starts below the noise floor")
@pytest.mark.parametrize("size", [1e-1, 1e-2])
def test_the_distance_of_half_precision_representations_is_more_than_rounding(size):
    """Near 1, a cosine in bf16 is 1 or 0.996, and its gradient as coarse."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 64, bias=False).bfloat16(), torch.randn(6, 8).bfloat16()
    solver = mixadv.CreAT(radius=size, start_size=size, unit="absolute")
    game = mixadv.Game(model, solver)
    with game.rounds.open(lambda: model(x).float().square().mean()) as update:
        (stage,) = update.stages
        q = stage.start(solver)
        _, _, (found,) = stage.payoffs(q, "loss", solver, deviation_weight=1e6)  # all that counts
        delta = q.points[0][0].detach().requires_grad_()
    perturbed = model((x.float() + delta).bfloat16()).double()
    distance = 1 - F.cosine_similarity(perturbed, model(x).detach().double())
    (expected,) = torch.autograd.grad(distance.sum(), delta)
    assert (F.cosine_similarity(found[0], expected) > 0.99).all()
