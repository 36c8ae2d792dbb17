"""Solvers that coincide: whole training runs, dropout and running statistics on, bit for bit."""

import pytest
import torch
from torch.optim import SGD, AdamW

import mixadv
from tests.zoo import VOCABULARY, Player, assert_same, player, small, wrapped

ROUNDS = 3
OPEN = {"radius": 2.0, "start_size": 0.05, "step_size": 0.1}  # no projection: it may round

COINCIDE = {
    "FreeAT of one replay is noise": (
        mixadv.FreeAT(steps=1, carry=False, radius=0.5),
        mixadv.UniformNoise(radius=0.5),
    ),
    "TextAT without tokens is FreeLB": (
        mixadv.TextAT(**OPEN, exclude=tuple(range(VOCABULARY))),
        mixadv.FreeLB(**OPEN),
    ),
    "ALUM is SMART without a teacher": (
        mixadv.ALUM(steps=2, smoothness_weight=3.0),
        mixadv.SMART(steps=2, smoothness_weight=3.0, proximal_weight=0.0),
    ),
    "R3F is ALUM without steps": (
        mixadv.R3F(radius=0.3, start="normal", start_size=0.2),
        mixadv.ALUM(steps=0, radius=0.3, start_size=0.2),
    ),
}
PLAIN = {
    "FreeAT without radius": mixadv.FreeAT(steps=1, radius=0.0),
    "FreeAT without radius, replayed": mixadv.FreeAT(steps=3, radius=0.0),
    "FreeAT that never moves": mixadv.FreeAT(steps=2, start="zero", step_size=0.0),
    "ALUM without smoothness": mixadv.ALUM(smoothness_weight=0.0),
    "VAT without smoothness": mixadv.VAT(smoothness_weight=0.0),
    "R3F without smoothness": mixadv.R3F(smoothness_weight=0.0),
    "R3F without noise": mixadv.R3F(radius=0.0, smoothness_weight=2.0),
}
bases = pytest.mark.parametrize("base", [SGD, AdamW])


def models() -> list[Player]:
    wide = small()
    narrow = small()
    narrow.model.float()
    return [wide, narrow, player("bert", rows=6)]


def batches(one: Player):
    """Halves of the batch in turn, so that a carried δ or table would be seen."""
    rows = len(one.batch["labels"]) // 2
    for turn in range(ROUNDS):
        part = slice((turn % 2) * rows, (turn % 2 + 1) * rows)
        yield one.closure(**{name: value[part] for name, value in one.batch.items()})


def trained(one: Player, base: type, solver: mixadv.Solver | None, replays: int = 1) -> dict:
    """What is left of a run: weights, buffers, random state; plain where there is no solver."""
    torch.manual_seed(3)
    if solver is None:
        optimizer = base(one.model.parameters(), lr=0.01)
    else:
        optimizer = wrapped(one.model, solver, base, lr=0.01)
    for closure in batches(one):
        if solver is not None:
            optimizer.step(closure)
            continue
        for _ in range(replays):
            optimizer.zero_grad()
            loss = closure()
            (loss[0] if isinstance(loss, tuple) else loss.loss).backward()
            optimizer.step()
    return {"model": one.model.state_dict(), "random": torch.get_rng_state()}


@bases
@pytest.mark.parametrize("pair", COINCIDE.values(), ids=COINCIDE)
def test_one_solver_is_a_special_case_of_another(pair, base):
    for one, other in zip(models(), models(), strict=True):
        start = [p.clone() for p in one.model.parameters()]
        assert_same(trained(one, base, pair[0]), trained(other, base, pair[1]))
        pairs = zip(start, one.model.parameters(), strict=True)
        assert any(not torch.equal(before, after) for before, after in pairs)


@bases
@pytest.mark.parametrize("solver", PLAIN.values(), ids=PLAIN)
def test_without_an_adversary_a_run_is_the_plain_one(solver, base):
    replays = solver.steps if solver.name == "freeat" else 1
    for one, other in zip(models(), models(), strict=True):
        assert_same(trained(one, base, solver), trained(other, base, None, replays))


def gradients(one: Player, solver: mixadv.Solver) -> list:
    torch.manual_seed(3)
    mixadv.Game(one.model, solver).backward(one.closure())
    return [p.grad for p in one.model.parameters()]


@pytest.mark.parametrize("radius", [0.01, 0.3])
def test_contrastive_training_without_contrast_is_half_of_sign_gradient_training(radius):
    words = {"radius": radius, "norm": "linf"}
    solver = mixadv.CAT(contrast_weight=0.0, shared=False, source="hidden", **words)
    for one, other in zip(models()[:2], models()[:2], strict=True):
        twice = [None if g is None else 2 * g for g in gradients(one, solver)]
        torch.testing.assert_close(twice, gradients(other, mixadv.FGM(**words)))


def test_a_contrastive_loss_alone_leaves_the_head_of_the_task_untrained():
    one = small()
    gradients(one, mixadv.CAT(contrast_weight=1.0, source="hidden"))
    assert not any(p.grad.any() for p in one.model.head.parameters())
    assert one.model.hidden.weight.grad.any()


@pytest.mark.parametrize("per", ["sample", "token"])
def test_tokens_that_are_excluded_leave_the_sample_its_own_perturbation(per):
    """Where steps are projected too, within rounding: a sum is scaled in another order."""
    words = {"radius": 0.05, "step_size": 0.04, "per": per}
    solver = mixadv.TextAT(**words, exclude=tuple(range(12)))
    found, expected = gradients(small(), solver), gradients(small(), mixadv.FreeLB(**words))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
