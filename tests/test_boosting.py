"""A mixture that is grown by boosting: each member learns where those before it are broken."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from mixadv.errors import GameError
from mixadv.mixtures import Mixture
from mixadv.robustness import Batch, attack_mixture, boost
from tests.test_mixture_attacks import EPSILON, World, batch_of, linear
from tests.test_mixtures import X, three
from tests.zoo import assert_same, fingerprint

HOW: dict[str, Any] = {"radius": EPSILON, "unit": 1.0}
BALL: dict[str, Any] = {"radius": 1.0, "unit": 1.0}
LABELS = torch.tensor([0, 1, 2, 3, 0])


def made_of(x: Tensor, y: Tensor, parts: int = 1) -> Callable[[Mixture], Iterator[Batch]]:
    """Return what makes batches of rows, so many of one size, anew in each call."""

    def batches(mixture: Mixture) -> Iterator[Batch]:
        for own, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            yield batch_of(mixture, own, labels)

    return batches


def by_sgd(epochs: int, rate: float = 0.1, seen: list[Any] | None = None) -> Any:
    """Return a plain loop; what the member is after each step is added to `seen`."""

    def train(member: nn.Module, losses: Any) -> None:
        optimizer = torch.optim.SGD(member.parameters(), lr=rate)
        for _ in range(epochs):
            for loss in losses:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if seen is not None:
                    seen.append([p.detach().clone() for p in member.parameters()])

    return train


class Window(nn.Module):
    """Says class 1 outside of a window of half width 0.4 around tanh(u), and 0 within."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([at], dtype=torch.double).atanh())

    def forward(self, x: Tensor) -> Tensor:
        score = 8 * ((x - self.u.tanh()).square() - 0.4**2)
        return torch.cat([torch.zeros_like(score), score], 1)


def worst_error(mixture: Mixture, points: Tensor, label: int) -> float:
    """Return the largest expected error at any of the points, by brute force."""
    wrong = [mixture.each(lambda: mixture(points)).argmax(-1) != label]
    return float((mixture.probabilities @ wrong[0].double()).max())


@pytest.mark.parametrize("at", [0.1, -0.3])
def test_a_second_member_halves_a_risk_that_no_single_one_can_lower(at: float):
    """One row at 0 with label 1, δ in [−1, 1]: every window lies within reach, none in two.

    Wherever tanh(u) is, δ = tanh(u) breaks that member. Members whose windows are apart are never
    broken both: the worst expected error is ½, and with two members it cannot be less.
    """
    grid = torch.linspace(-1, 1, 401, dtype=torch.double)[:, None]
    assert all(worst_error(Mixture([Window(t)]), grid, 1) == 1 for t in (-0.99, -0.5, 0.0, 0.99))
    batches = made_of(torch.zeros(1, 1, dtype=torch.double), torch.tensor([1]))
    start = Mixture([Window(at)])
    grown, weighing = boost(start, batches, by_sgd(30, 0.05), "ARC", **BALL)
    assert worst_error(start, grid, 1) == 1
    assert worst_error(grown, grid, 1) == 0.5
    assert grown.probabilities.tolist() == [0.5, 0.5]
    assert weighing.error == 0.5  # ARC broke one


@pytest.mark.parametrize("attack", ["PGD of the mean", "EoT-PGD", "ARC", "transfer"])
def test_what_breaks_all_members_but_the_new_one_loses_its_weight(attack: str):
    """The first member reads the second number, which δ turns around; the new one learns not to."""
    x, y = torch.tensor([[1.0, 0.2], [-1.0, -0.2]]).double(), torch.tensor([0, 1])
    axis = torch.linspace(-0.5, 0.5, 41, dtype=torch.double)
    grids = [row + torch.cartesian_prod(axis, axis) for row in x]

    def risk(mixture: Mixture) -> float:
        return sum(worst_error(mixture, g, int(c)) for g, c in zip(grids, y, strict=True)) / 2

    first = Mixture([linear(torch.tensor([[0, 4.0], [0, -4.0]]), torch.zeros(2))])
    how: dict[str, Any] = {"radius": 0.5, "norm": "linf", "unit": 1.0, "steps": 3}
    batches = made_of(x, y)
    equal, measured = boost(first, batches, by_sgd(20, 0.5), attack, **how)
    assert risk(first) == 1
    assert risk(equal) == 0.5 == measured.error
    assert measured.guaranteed == 0  # the new member does not err under the attack
    weighed, found = boost(first, batches, by_sgd(20, 0.5), attack, rounds=5, **how)
    assert risk(weighed) == 0 == found.error == found.gap
    assert len(weighed) == 1
    assert found.probabilities.tolist() == [0, 1]


def test_the_error_reported_is_that_of_brute_force():
    """ARC is exact for two linear members: each one alone, and both."""
    for seed in range(4):
        world = World(seed, 1)
        batches = made_of(world.x, world.y, parts=2)
        grown, weighing = boost(world.mixture, batches, by_sgd(3), **HOW, classes=2)
        first, second = (m.module for m in grown.members)  # pyright: ignore
        world.w = torch.stack([first.weight, second.weight]).detach()
        world.b = torch.stack([first.bias, second.bias]).detach()
        world.mixture = grown
        assert 1 - weighing.error == pytest.approx(world.lowest("l2").mean().item())


def test_a_first_member_is_trained_as_by_the_solver_of_adversarial_training():
    """One step of PGD from δ = 0, as long as the radius: the same weights after each update."""
    seen: list[Any] = []
    world, other = World(3, 1), World(3, 1)
    model = other.mixture.members[0].module  # pyright: ignore
    batches = made_of(world.x, world.y, parts=2)
    start = world.mixture.members[0].module  # pyright: ignore
    how: dict[str, Any] = {**HOW, "steps": 1, "restarts": 0}
    grown, _ = boost(start, batches, by_sgd(4, seen=seen), "EoT-PGD", **how)
    solver = mixadv.PGD(
        steps=1, step_size=EPSILON, radius=EPSILON, start="zero", start_size=0.0, unit="absolute"
    )
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver)
    for step, (x, y) in enumerate(4 * [*zip(world.x.chunk(2), world.y.chunk(2), strict=True)]):
        optimizer.step(lambda x=x, y=y: (F.cross_entropy(model(x), y), model(x)))
        assert_same(seen[step], [p.detach() for p in model.parameters()])
    assert len(grown) == 1
    assert len(seen) == 8


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_first_member_is_trained_as_by_hand(norm: str):
    """K steps of lengths ε·(1 − t/K); the end is played unless it is right where 0 is not."""
    seen: list[Any] = []
    world, steps = World(5, 1, classes=3), 4
    w, b = world.w[0].clone(), world.b[0].clone()
    how: dict[str, Any] = {**HOW, "norm": norm, "steps": steps, "restarts": 0}
    batches, start = made_of(world.x, world.y), world.mixture.members[0].module  # pyright: ignore
    boost(start, batches, by_sgd(5, seen=seen), "EoT-PGD", **how)
    for weight, bias in seen:

        def slope(x: Tensor, w: Tensor = w, b: Tensor = b) -> Tensor:
            return (x @ w.T + b).softmax(-1) - F.one_hot(world.y, 3)

        delta = torch.zeros_like(world.x)
        for step in range(steps):
            g = slope(world.x + delta) @ w
            g = g.sign() if norm == "linf" else F.normalize(g)
            delta = delta + EPSILON * (1 - step / steps) * g
            if norm == "linf":
                delta = delta.clamp(-EPSILON, EPSILON)
            else:
                delta = delta / (delta.norm(dim=1, keepdim=True) / EPSILON).clamp(min=1)
        right = [((world.x + d) @ w.T + b).argmax(-1) == world.y for d in (0 * delta, delta)]
        delta = torch.where((right[1] & ~right[0])[:, None], 0, delta)
        x = world.x + delta
        g = slope(x) / len(x)
        w, b = w - 0.1 * g.T @ x, b - 0.1 * g.sum(0)
        torch.testing.assert_close((weight, bias), (w, b))


def test_the_new_member_is_trained_on_attacks_of_all_members_as_they_stand():
    """By hand: the attack is of equal probabilities, and moves with the member."""
    seen: list[Any] = []
    world = World(1, 2)
    before = [m.module for m in world.mixture.members]  # pyright: ignore
    boost(world.mixture, made_of(world.x, world.y), by_sgd(4, seen=seen), **HOW)
    new = linear(world.w[1], world.b[1])
    mixture, deltas = Mixture([*before, new]), []
    for step in seen:
        batch = batch_of(mixture, world.x, world.y)
        deltas.append(attack_mixture(mixture, batch, "PGD of the mean", **HOW).strategy.points[0])
        new.zero_grad()
        F.cross_entropy(new(world.x + deltas[-1][0]), world.y).backward()
        with torch.no_grad():
            for parameter in new.parameters():
                parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(step, [p.detach() for p in new.parameters()])
    assert any(not torch.equal(*pair) for pair in itertools.pairwise(deltas))


@pytest.mark.parametrize("kind", ["models", "weights"])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_mixture_given_is_left_as_it_is(kind: str, breaks: bool):
    mixture = three(kind)
    before, members = fingerprint(mixture), [*mixture.members]
    if kind == "weights":
        values = [{n: v.clone() for n, v in m.values.items()} for m in members]  # pyright: ignore

    def train(member: nn.Module, losses: Any) -> None:
        by_sgd(1)(member.eval(), losses)  # without dropout, which draws
        if breaks:
            raise KeyError

    found = None
    with contextlib.suppress(KeyError):
        found = boost(mixture, made_of(X, LABELS), train, **BALL, steps=2)
    assert breaks == (found is None)
    assert_same(fingerprint(mixture), before)
    assert mixture.members == members
    assert mixture.probabilities.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    if kind == "weights":
        assert_same([m.values for m in members], values)  # pyright: ignore
    if found is not None:
        assert found.mixture.members[:3] == members
        assert found.mixture.probabilities.tolist() == [0.25] * 4


@pytest.mark.parametrize("kind", ["models", "weights"])
def test_a_new_member_begins_as_the_last_one(kind: str):
    mixture, found = three(kind), []

    def train(member: nn.Module, losses: Any) -> None:
        found.append(member.eval()(X))
        next(iter(losses))

    boost(mixture, made_of(X, LABELS), train, **BALL)
    with mixture.member(2) as module:
        assert torch.equal(found[0], module(X))


def test_a_member_is_attacked_evaluating_and_trained_in_its_own_modes():
    modes: dict[bool, set[bool]] = {True: set(), False: set()}
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    def train(member: nn.Module, losses: Any) -> None:
        for training in (True, False):
            member.train(training)
            handle = member[1].register_forward_hook(  # pyright: ignore
                lambda module, *_, t=training: modes[t].add(module.training)
            )
            for loss in losses:
                loss.backward()
                assert member.training == training
            handle.remove()

    boost(Mixture([model.eval()]), made_of(X, LABELS), train, **BALL, steps=2)
    assert modes == {True: {True, False}, False: {False}}


def test_going_on_from_what_was_saved_is_going_on(tmp_path: Path):
    world = World(2, 1)
    batches = made_of(world.x, world.y, parts=2)
    how: dict[str, Any] = {"train": by_sgd(3), "rounds": 2, **HOW}
    once, _ = boost(world.mixture, batches, **how)
    once.save_pretrained(tmp_path)
    models = [linear(0 * w, 0 * b) for w, b in zip(world.w[[0] * len(once)], world.b, strict=False)]
    models += [linear(0 * world.w[0], 0 * world.b[0]) for _ in range(len(once) - len(models))]
    loaded = Mixture.from_pretrained(tmp_path, models=models)
    (one, first), (other, second) = (boost(m, batches, **how) for m in (once, loaded))
    assert_same(one.state_dict(), other.state_dict())
    assert_same(first._asdict(), second._asdict())


def refused(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "mixture": nn.Linear(3, 4),
        "batches": made_of(X, LABELS),
        "train": by_sgd(1),
        **BALL,
    }
    arguments.update(changes)
    return lambda: boost(**arguments)


def frozen() -> nn.Module:
    return nn.Linear(3, 4).requires_grad_(False)


def used_up() -> Any:
    batches: list[Any] = []

    def once(mixture: Mixture) -> Any:
        if not batches:
            batches.append(made_of(X, LABELS)(mixture))
        return batches[0]

    return once


def of_another(mixture: Mixture) -> Any:
    return made_of(X, LABELS)(Mixture([nn.Linear(3, 4)]))


def of_a_model(mixture: Mixture) -> Any:
    return made_of(X, LABELS)(nn.Linear(3, 4))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (refused(mixture="model"), TypeError, "grows a Mixture, or a model"),
        (refused(batches=[1]), TypeError, "lambda mixture: text_batches"),
        (refused(train=None), TypeError, r"train\(member, losses\), got None"),
        (refused(unit=None), TypeError, r"needs unit=.*token_norm"),
        (refused(radius=None), TypeError, "needs radius="),
        (refused(attack="EOT-PGD"), ValueError, "Did you mean 'EoT-PGD'"),
        (refused(attack="PGD of member 2"), ValueError, "is not one of"),
        (refused(rounds=0), ValueError, "rounds"),
        (refused(restarts=-1), ValueError, "restarts"),
        (refused(mixture=frozen()), ValueError, r"requires_grad_\(True\)"),
        (refused(train=lambda member, losses: None), ValueError, "took no loss"),
        (refused(batches=lambda mixture: []), ValueError, "must make them anew"),
        (refused(batches=used_up()), ValueError, "must make them anew"),
        (refused(mixture=three("masks")), TypeError, "kind Dropout"),
        (refused(batches=of_another), GameError, "only while one of its members"),
        (refused(batches=of_a_model), GameError, "was not called"),
        (refused(batches=lambda mixture: [X]), TypeError, "make Batches"),
    ],
)
def test_what_cannot_be_boosted_is_refused_in_words(
    made: Callable[[], Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        made()
