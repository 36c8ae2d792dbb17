"""The δ that an attack of a mixture returns is the one by which accuracy is measured."""

import contextlib
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.maths import geometry
from mixadv.mixtures import Mixture
from mixadv.robustness import Batch, MixtureResponse, attack_mixture, mixture_accuracy
from tests.test_mixture_attacks import EPSILON, LABELS, ROWS, Tokens, World, batch_of, planted
from tests.test_mixtures import KINDS, X, three
from tests.zoo import assert_same, fingerprint

NAMES = ("EoT-PGD", "ARC", "PGD of the mean", "ARC of the vote", "transfer", "PGD of member 2")


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", ["drowned", "cancelled"])
def test_what_eot_believes_arc_breaks(kind: str, norm: str):
    mixture, batch = planted(kind)
    how = {"radius": 1.0, "unit": 1.0, "norm": norm, "restarts": int(kind == "drowned")}
    right = {
        attack: (attack_mixture(mixture, batch, attack, **how).predictions.argmax(-1) == 0)
        for attack in ("EoT-PGD", "ARC")
    }
    assert right["EoT-PGD"].all()
    assert (right["ARC"].double().mean(0) == 0.5).all()


@functools.cache
def measured_world(seed: int, norm: str) -> tuple[World, dict[str, Any], Any]:
    """Return members, how they are attacked, and their accuracy under all attacks."""
    world = World(seed, 3, classes=3)
    how = {"radius": EPSILON, "norm": norm, "steps": 4, "unit": 1.0}
    return world, how, mixture_accuracy(world.mixture, [world.batch], **how)


@pytest.mark.parametrize("attack", NAMES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_each_attack_is_the_one_that_accuracy_is_measured_by(attack: str, norm: str):
    for seed in range(3):
        world, how, measured = measured_world(seed, norm)
        found = attack_mixture(world.mixture, world.batch, attack, **how)
        [delta] = found.strategy.points[0]
        assert (geometry.norms(delta, norm) <= EPSILON * (1 + 1e-9)).all()
        by_hand = world.logits(world.x + delta)
        torch.testing.assert_close(found.predictions, by_hand)
        right = {**dict(zip(measured.attacks, measured.right.swapaxes(0, 1), strict=True))}
        under = measured.under().get(attack)
        expected = world.expected(world.x + delta, world.y).numpy()
        if under is None:  # of a member alone
            under = (right[attack] @ world.mixture.probabilities.numpy())[:, None]
        assert expected == pytest.approx(under[:, 0])


def test_a_single_model_is_a_mixture_of_one():
    world = World(0, 1)
    how = {"radius": EPSILON, "unit": 1.0}
    found = {a: attack_mixture(world.mixture, world.batch, a, **how) for a in ("ARC", "transfer")}
    reached = [world.expected(world.x + f.strategy.points[0][0], world.y) for f in found.values()]
    exact = (world.distances("l2")[0] > EPSILON).double()
    assert all(torch.equal(right, exact) for right in reached)


def test_at_an_embedding_the_perturbed_batch_is_what_the_members_saw():
    ids = torch.randint(1, 20, (ROWS, 5), generator=torch.Generator().manual_seed(0))
    mixture, mask, y = Mixture([Tokens(1), Tokens(2)]), torch.ones_like(ids), torch.arange(ROWS) % 3

    def closure() -> tuple[Tensor, Tensor]:
        logits = mixture(input_ids=ids, attention_mask=mask)
        return F.cross_entropy(logits, y, reduction="none"), logits

    found = attack_mixture(mixture, Batch(closure, y, [*range(ROWS)]), radius=1.0, steps=3)
    [delta] = found.strategy.points[0]
    assert delta.abs().max() > 0
    for number, logits in enumerate(found.predictions):
        with mixture.member(number) as module:
            hidden = (2 * module.hidden(module.embedding(ids) + delta)).tanh()
            torch.testing.assert_close(logits, module.head(hidden.sum(1) / 5).detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("breaks", [False, True])
def test_an_attack_leaves_no_trace(kind: str, breaks: bool):
    mixture = three(kind)
    before, members, calls = fingerprint(mixture), [*mixture.members], 0
    batch = batch_of(mixture, X, LABELS)

    def closure() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if breaks and calls == 20:
            raise KeyError
        return batch.closure()

    found = None
    with contextlib.suppress(KeyError):
        found = attack_mixture(
            mixture, batch._replace(closure=closure), radius=1.0, steps=3, draws=2, unit=1.0
        )
    assert breaks == (found is None)
    assert_same(fingerprint(mixture), before)
    assert mixture.members == members
    if isinstance(found, MixtureResponse):
        assert len(found.predictions) == (6 if kind == "masks" else 3)
        assert not found.predictions.requires_grad
        assert not found.strategy.points[0].requires_grad


def test_a_member_trained_on_what_is_found_survives_what_broke_the_others():
    """Boosting: the second member starts as the first one, and learns where that is broken."""
    torch.manual_seed(0)
    x, y = torch.tensor([[1.0, 0.2], [-1.0, -0.2]]), torch.tensor([0, 1])
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():  # it reads the second number, which the attack can turn around
        first.weight.copy_(torch.tensor([[0.0, 4.0], [0.0, -4.0]]))
        first.bias.zero_()
    second.load_state_dict(first.state_dict())
    mixture = Mixture([first, second])
    batch, how = batch_of(mixture, x, y), {"radius": 0.5, "norm": "linf", "unit": 1.0, "steps": 3}
    optimizer = torch.optim.SGD(second.parameters(), lr=0.5)

    def right() -> list[float]:
        found = attack_mixture(mixture, batch, "EoT-PGD", **how)
        return (found.predictions.argmax(-1) == y).double().mean(1).tolist()

    assert right() == [0.0, 0.0]
    for _ in range(30):
        perturbed = x + attack_mixture(mixture, batch, **how).strategy.points[0][0]
        F.cross_entropy(second(perturbed), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert right() == [0.0, 1.0]


def test_what_cannot_be_attacked_is_refused_in_words():
    mixture = three("models")
    batch = batch_of(mixture, X, LABELS)
    how = {"radius": 1.0, "unit": 1.0}
    with pytest.raises(ValueError, match=r"'ARC'.*'transfer'\. Did you mean 'EoT-PGD'"):
        attack_mixture(mixture, batch, "EOT-PGD", **how)
    with pytest.raises(ValueError, match="is not one of"):
        attack_mixture(mixture, batch, "PGD of member 4", **how)
    with pytest.raises(TypeError, match=r"Mixture\(\[model\]\)"):
        attack_mixture(nn.Linear(3, 4), batch, **how)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="radius"):
        attack_mixture(mixture, batch, radius=-1.0)
    still = Mixture([nn.Linear(3, 4)])
    nn.init.zeros_(still.model.weight)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack_mixture(still, batch_of(still, X, LABELS), **how)
    assert [w.filename for w in caught if "exactly zero" in str(w.message)] == [__file__]


def test_what_is_no_batch_and_no_ball_is_said_to_be():
    world = World(0, 2)
    with pytest.raises(TypeError, match="one Batch at a time"):
        attack_mixture(world.mixture, [world.batch], radius=1.0, unit=1.0)  # pyright: ignore
    with pytest.raises(TypeError, match="needs the radius"):
        attack_mixture(world.mixture, world.batch, unit=1.0)
    with pytest.raises(ValueError, match="MixtureAttacks: restarts"):
        attack_mixture(world.mixture, world.batch, radius=1.0, unit=1.0, restarts=-1)
