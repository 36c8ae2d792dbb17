"""Adversaries of weights: the definition by hand, where nothing may be left, many micro-batches."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.equilibrium import best_response
from mixadv.maths import mirror
from mixadv.maths.divergence import divergence
from mixadv.model.noise import Noise
from tests.processes import Net, batches, one_process
from tests.worlds import assert_resumes
from tests.zoo import (
    BrokenError,
    Fault,
    assert_same,
    copies,
    fingerprint,
    hooks,
    play,
    player,
    small,
    without_dropout,
    wrapped,
)
from theory import bounds

ROWS, LENGTH, WORDS, WIDTH, CLASSES = 4, 3, 7, 5, 3
SIZE = 0.3  # of the steps of δ
PURE: dict[str, Any] = {"start": "zero", "radius": None, "unit": "absolute", "step_size": SIZE}
KL = divergence("symmetric_kl")


class Words(nn.Module):
    """Words, a tanh and a head, in float64 and without dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids)).mean(1))


def batch(rows: int = ROWS, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (rows, LENGTH), generator=draw)
    return ids, torch.randint(CLASSES, (rows,), generator=draw)


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids)
    return F.cross_entropy(logits, labels), logits


class Drawn(Noise):
    """The same numbers for every row, whoever draws."""

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        numbers = torch.linspace(-1, 1, like[0].numel(), dtype=like.dtype).view(like.shape[1:])
        return torch.stack([numbers.roll(i // ROWS, -1) for i in range(len(like))])


# The definition, by hand -----------------------------------------------------------------------


class Hand:
    """The game on `Words` written down: θ are plain tensors, δ is an argument."""

    def __init__(self) -> None:
        self.theta = copies(Words().parameters())
        self.ids, self.labels = batch()

    def logits(self, theta: list[Tensor], delta: Tensor | float = 0.0) -> Tensor:
        words, weight, bias = theta
        return torch.tanh(words[self.ids] + delta).mean(1) @ weight.T + bias

    def losses(self, theta: list[Tensor], delta: Tensor | float = 0.0) -> Tensor:
        return F.cross_entropy(self.logits(theta, delta), self.labels, reduction="none")

    def climb(self, delta: Tensor, payoff: Callable[[Tensor], Tensor]) -> Tensor:
        delta = delta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(payoff(delta).sum(), delta)
        return (delta + SIZE * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1)).detach()

    def start(self, particle: int = 0) -> Tensor:
        """The start of size 0.1 that `Drawn` gives a particle."""
        like = torch.empty((particle + 1) * ROWS, LENGTH, WIDTH, dtype=torch.float64)
        return 0.1 * Drawn(0)("normal", like)[-ROWS:] / (LENGTH * WIDTH) ** 0.5

    # What each inner solver minimises in a step, given the weights where its adversary played.

    def plain(self, at: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        return lambda theta: self.losses(theta).mean()

    def pgd(self, at: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        delta = torch.zeros(ROWS, LENGTH, WIDTH, dtype=torch.float64)
        for _ in range(2):
            delta = self.climb(delta, lambda d: self.losses(at, d))
        return lambda theta: self.losses(theta, delta).mean()

    def freelb(self, at: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        deltas = [torch.zeros(ROWS, LENGTH, WIDTH, dtype=torch.float64)]
        for _ in range(2):
            deltas.append(self.climb(deltas[-1], lambda d: self.losses(at, d)))
        return lambda theta: sum(self.losses(theta, d).mean() for d in deltas) / 3

    def smart(self, at: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        clean = self.logits(at)
        delta = self.climb(self.start(), lambda d: KL(self.logits(at, d), clean))

        def objective(theta: list[Tensor]) -> Tensor:
            away = KL(self.logits(theta, delta), self.logits(theta)).mean()
            return self.losses(theta).mean() + 2.0 * away

        return objective

    def mat(self, at: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        clean = self.logits(at)
        starts = [self.start(particle) for particle in range(2)]
        payoffs = torch.stack([KL(self.logits(at, d), clean) for d in starts])
        even = mirror.uniform(2, dtype=torch.float64, device=clean.device)[:, None]
        weights = mirror.step(even.expand(2, ROWS), payoffs, 40.0).exp()
        deltas = [self.climb(d, lambda d: KL(self.logits(at, d), clean)) for d in starts]

        def objective(theta: list[Tensor]) -> Tensor:
            away = [KL(self.logits(theta, d), self.logits(theta)) for d in deltas]
            return self.losses(theta).mean() + (weights * torch.stack(away)).sum(0).mean()

        return objective


def slope(objective: Callable[[list[Tensor]], Tensor], theta: list[Tensor]) -> list[Tensor]:
    leaves = [p.clone().requires_grad_() for p in theta]
    return [*torch.autograd.grad(objective(leaves), leaves)]


def sam(theta: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    total = torch.cat([x.flatten() for x in g]).norm()
    return [0.4 * x / total for x in g]


def asam(theta: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    t = [p.abs() + 0.02 for p in theta]
    total = torch.cat([(a * x).flatten() for a, x in zip(t, g, strict=True)]).norm()
    return [0.7 * a * a * x / total for a, x in zip(t, g, strict=True)]


def awp(theta: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [
        0.3 * p.norm() * x / x.norm() if p.dim() > 1 else torch.zeros_like(p)
        for p, x in zip(theta, g, strict=True)
    ]


RULES = {
    "sam": (sam, partial(mixadv.SAM, radius=0.4)),
    "asam": (asam, partial(mixadv.ASAM, radius=0.7, stabilizer=0.02)),
    "awp": (awp, partial(mixadv.AWP, radius=0.3)),
}
SMOOTH: dict[str, Any] = {**PURE, "start": "normal", "start_size": 0.1}
INNER: dict[str, mixadv.Solver | None] = {
    "plain": None,
    "pgd": mixadv.PGD(steps=2, **PURE),
    "freelb": mixadv.FreeLB(steps=3, **PURE),
    "smart": mixadv.SMART(proximal_weight=0.0, smoothness_weight=2.0, **SMOOTH),
    "mat": mixadv.MAT(
        **{**SMOOTH, "temperature": 0.0},
        mirror_step=40.0,
        mirror_unit="absolute",
        play_as="ensemble",
        learner_temperature=0.0,
        damping=0.0,
        round_damping=0.0,
        average=None,
    ),
}
PAIRS = [
    ("sam", "plain"),
    ("asam", "plain"),
    ("awp", "plain"),
    ("awp", "pgd"),
    ("awp", "smart"),
    ("sam", "freelb"),
    ("sam", "mat"),
    ("asam", "mat"),
]


@pytest.mark.parametrize(("rule", "inner"), PAIRS)
@pytest.mark.parametrize("how", ["step", "backward", "loss"])
def test_rounds_are_those_of_the_definition_written_down(rule: str, inner: str, how: str):
    displacements, solver = RULES[rule]
    hand, model = Hand(), Words()
    optimizer = wrapped(model, solver(solver=INNER[inner]), lr=0.5)
    optimizer.game.rounds.arena.noise = Drawn(0)
    made = getattr(hand, inner)
    for _ in range(3):
        play(optimizer, partial(loss_of, model, hand.ids, hand.labels), how)
        objective, outcome = made(hand.theta), optimizer.outcome
        for _ in range(2 if inner == "mat" and how == "step" else 1):
            v = displacements(hand.theta, slope(objective, hand.theta))
            moved = [p + x for p, x in zip(hand.theta, v, strict=True)]
            last = objective(moved)
            g = slope(objective, moved)
            hand.theta = [p - 0.5 * x for p, x in zip(hand.theta, g, strict=True)]
        torch.testing.assert_close(list(model.parameters()), hand.theta, rtol=1e-10, atol=1e-12)
        length = torch.cat([x.flatten() for x in v]).norm()
        torch.testing.assert_close(outcome.displacement, length, rtol=1e-9, atol=0)
        if outcome.steps == 1:
            torch.testing.assert_close(outcome.objective, last, rtol=1e-10, atol=1e-12)


class Quadratic:
    """½·θᵀAθ, as a linear regression to 0."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(4, 1, bias=False).double()
        self.x = torch.randn(9, 4, dtype=torch.float64)
        self.matrix = self.x.T @ self.x / len(self.x)

    def closure(self) -> tuple[Tensor, Tensor]:
        scores = self.model(self.x)
        return scores.square().mean() / 2, scores


@given(st.integers(0, 9), st.just(0.0) | st.floats(1e-6, 3.0))
def test_on_a_quadratic_the_step_is_known(seed: int, radius: float):
    for solver, size in [
        (mixadv.SAM(radius=radius), lambda w: radius),
        (mixadv.AWP(solver=None, radius=radius), lambda w: radius * w.norm()),
    ]:
        game = Quadratic(seed)
        w = game.model.weight.detach()[0].clone()
        optimizer = wrapped(game.model, solver, lr=0.1)
        optimizer.step(game.closure)
        g = game.matrix @ w
        expected = w - 0.1 * game.matrix @ (w + size(w) * g / g.norm())
        torch.testing.assert_close(game.model.weight[0], expected, rtol=1e-10, atol=1e-12)
        displacement = torch.as_tensor(size(w), dtype=torch.float64)
        torch.testing.assert_close(
            optimizer.outcome.displacement, displacement, rtol=1e-9, atol=1e-12
        )


@given(st.integers(0, 99), st.sampled_from([*RULES]), st.floats(0.01, 3.0))
def test_a_step_is_the_worst_of_its_ball_to_first_order(seed: int, rule: str, radius: float):
    """On a quadratic in two matrices, against the best of many points and ascents from them."""
    draw = torch.Generator().manual_seed(seed)
    theta, g = (list(torch.randn(2, 2, 3, generator=draw).double()) for _ in range(2))
    bend = torch.randn(12, 12, generator=draw).double()
    bend = (bend + bend.T) / 2
    solver: Any = RULES[rule][1](radius=radius)
    step = torch.cat([v.flatten() for v in solver.displacements(theta, copies(g))])
    slope, sizes = torch.cat([x.flatten() for x in g]), torch.cat([p.flatten() for p in theta])
    # The ball in coordinates in which it is round, or one for each matrix.
    scale = sizes.abs() + solver.stabilizer if rule == "asam" else torch.ones(12).double()
    length = radius * sizes.norm() if rule == "awp" else torch.tensor(radius).double()

    def into_the_ball(u: Tensor) -> Tensor:
        parts = u.view(-1, 2, 6) if rule == "awp" else u.view(-1, 1, 12)
        each = torch.stack([p.norm() for p in theta]) if rule == "awp" else torch.ones(1).double()
        most = (radius * each)[:, None]
        return (parts * (most / parts.norm(dim=-1, keepdim=True)).clamp(max=1)).flatten(1)

    def values(v: Tensor) -> Tensor:
        return v @ slope + ((v @ bend) * v).sum(-1) / 2

    u = into_the_ball(3 * length * torch.randn(200, 12, generator=draw).double())
    for _ in range(50):
        v = u * scale
        assert (v @ slope).max() <= (step @ slope) * (1 + 1e-9)
        u = into_the_ball(u + length * F.normalize((slope + v @ bend) * scale, dim=-1) / 4)
    curved = torch.linalg.eigvalsh(scale[:, None] * bend * scale).abs().max()
    below = float(values(u * scale).max() - values(step))
    assert below <= bounds.first_order(float(curved), float(length)) * (1 + 1e-9)


@given(st.integers(0, 9), st.just(0.0) | st.floats(1e-6, 0.5), st.floats(0.01, 1.0))
def test_awp_on_a_linear_model_is_known(seed: int, gamma: float, radius: float):
    """Scores y·wᵀx under the logistic loss: both adversaries push them down, δ along w."""
    torch.manual_seed(seed)
    model, x = nn.Linear(3, 1, bias=False).double(), torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, 1, dtype=torch.float64).sign()
    w = model.weight.detach()[0].clone()

    def closure() -> tuple[Tensor, Tensor]:
        scores = model(x)
        return F.softplus(-y * scores).squeeze(1), scores

    def gradient(w: Tensor, moved: Tensor) -> Tensor:
        pull = -y * torch.sigmoid(-y * (moved @ w)[:, None])
        return (pull * moved).mean(0)

    pgd = mixadv.PGD(steps=1, start="zero", unit="absolute", radius=radius, step_size=radius)
    optimizer = wrapped(model, mixadv.AWP(solver=pgd, radius=gamma), lr=1.0)
    optimizer.step(closure)
    moved = x - y * radius * w / w.norm()
    g = gradient(w, moved)
    expected = w - gradient(w + gamma * w.norm() * g / g.norm(), moved)
    torch.testing.assert_close(model.weight[0], expected, rtol=1e-9, atol=1e-12)


# Nothing is left behind ------------------------------------------------------------------------

MIXED = mixadv.MAT(particles=2, learner_temperature=1e-3)
BROKEN = [
    mixadv.SAM(),
    mixadv.AWP(),
    mixadv.ASAM(solver=mixadv.FreeLB()),
    mixadv.SAM(solver=MIXED),
]


@pytest.mark.parametrize("solver", BROKEN, ids=repr)
@pytest.mark.parametrize("how", ["backward", "loss"])
def test_weights_come_back_bit_for_bit_after_an_error_in_any_pass(solver: Any, how: str):
    one = small()
    optimizer = wrapped(one, solver)
    optimizer.game.explain(one.closure())
    play(optimizer, one.closure(), how)
    before = copies(one.model.parameters())
    for breaks_in in ("forward", "backward"):
        for number in range(1, 20):
            fault = Fault(number)

            def broken(fault: Fault = fault, breaks_in: str = breaks_in) -> Any:
                loss, logits = one.closure()()
                if breaks_in == "forward":
                    fault()
                elif logits.requires_grad:
                    logits.register_hook(lambda _: fault())
                return loss, logits

            try:
                result = getattr(optimizer.game, how)(broken)
                if how == "loss":
                    result.backward()
            except BrokenError:
                assert_same(copies(one.model.parameters()), before)
                one.model.zero_grad()
                continue
            break
        assert 2 < number < 19
        one.model.zero_grad()


def test_no_radius_is_the_inner_solver_bit_for_bit():
    for inner in [mixadv.PGD(), MIXED, mixadv.FreeLB(steps=1), mixadv.R3F()]:
        one, other = small(), small()
        plain = wrapped(one, inner)
        around = wrapped(other, mixadv.SAM(solver=inner, radius=0.0))
        for seed in range(2):
            torch.manual_seed(seed)
            plain.step(one.closure())
            torch.manual_seed(seed)
            around.step(other.closure())
            assert_same(one.model.state_dict(), other.model.state_dict())
            assert_same(plain.outcome.radius, around.outcome.radius)
            assert_same(plain.outcome.objective, around.outcome.objective)


def test_what_is_retained_is_ascended_and_minimised_with_the_rest():
    """J = ℓ + r: both are differentiated at θ + v, and v is that of their sum."""
    hand, model = Hand(), Words()
    optimizer = wrapped(model, mixadv.SAM(radius=0.4), lr=0.5)

    def keep() -> Tensor:
        return model.head.weight.square().sum()

    optimizer.step(partial(loss_of, model, hand.ids, hand.labels), retain=keep)

    def objective(theta: list[Tensor]) -> Tensor:
        return hand.plain(hand.theta)(theta) + theta[1].square().sum()

    v = sam(hand.theta, slope(objective, hand.theta))
    g = slope(objective, [p + x for p, x in zip(hand.theta, v, strict=True)])
    expected = [p - 0.5 * x for p, x in zip(hand.theta, g, strict=True)]
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-10, atol=1e-12)


def test_a_gradient_that_is_not_finite_displaces_nothing():
    one = small()
    optimizer = wrapped(one, mixadv.SAM())
    optimizer.step(one.closure())
    before = fingerprint(one.model)["weights"]
    game = optimizer.game
    outcome = game.backward(lambda: one.closure()()[0] * torch.nan)
    assert float(outcome.displacement) == 0
    assert_same(fingerprint(one.model)["weights"], before)


# Micro-batches of one update -------------------------------------------------------------------

PARTS: list[mixadv.Solver] = [
    *(solver for solver in INNER.values() if solver is not None),
    mixadv.SAM(radius=0.4),
    mixadv.ASAM(),
    mixadv.AWP(solver=INNER["pgd"]),
    mixadv.SAM(solver=INNER["freelb"]),
    mixadv.SAM(solver=INNER["mat"]),
]


@pytest.mark.parametrize("solver", PARTS, ids=repr)
def test_micro_batches_of_an_update_are_one_large_batch(solver: mixadv.Solver):
    ids, labels = batch(3 * ROWS)

    def trained(split: bool, how: str) -> list[Tensor]:
        model = Words()
        optimizer = wrapped(model, solver, lr=0.5)
        optimizer.game.rounds.arena.noise = Same(0)
        parts = [slice(i, i + ROWS) for i in range(0, 3 * ROWS, ROWS)]
        closures = [partial(loss_of, model, ids[rows], labels[rows]) for rows in parts]
        whole = partial(loss_of, model, ids, labels)
        for _ in range(2):
            if how == "step":
                optimizer.step(closures if split else whole)
            else:
                optimizer.game.backward(closures if split else whole)
                optimizer.step()
                optimizer.zero_grad()
        return copies(model.parameters())

    for how in ("step", "backward"):
        pair = trained(True, how), trained(False, how)
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


class Same(Noise):
    """The same numbers for every row and particle."""

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        numbers = torch.linspace(-1, 1, like[0].numel(), dtype=like.dtype)
        return numbers.view(like.shape[1:]).expand_as(like).clone()


@pytest.mark.parametrize("name", ["pgd", "freelb", "smart", "textat", "cat", "r3f"])
def test_micro_batches_given_at_once_are_those_accumulated_bit_for_bit(name: str):
    """With dropout, batch statistics and draws: the same rounds, in the same order."""
    one, other = small(), small()
    batches = [small(seed=seed).batch for seed in range(2)]
    at_once, apart = wrapped(one, name), wrapped(other, name)
    for _ in range(2):
        torch.manual_seed(5)
        at_once.step([one.closure(**b) for b in batches])
        torch.manual_seed(5)
        outcomes = [
            apart.game.backward(other.closure(**b), backward=lambda loss: (loss / 2).backward())
            for b in batches
        ]
        apart.step()
        apart.zero_grad()
        assert_same(one.model.state_dict(), other.model.state_dict())
        assert at_once.outcome.forwards == sum(o.forwards for o in outcomes)
        assert_same(at_once.outcome.positions, sum(o.positions for o in outcomes))
    assert_same(at_once.state_dict(), apart.state_dict())


@pytest.mark.parametrize("solver", [mixadv.SAM(), mixadv.SAM(solver=MIXED)], ids=repr)
def test_an_update_leaves_what_plain_accumulation_leaves(solver: mixadv.Solver):
    """Random state and batch statistics, of as many forwards as micro-batches and steps."""
    one, plain = small(), small()
    batches = [small(seed=seed).batch for seed in range(3)]
    optimizer = wrapped(one, solver, lr=0.0)
    torch.manual_seed(3)
    optimizer.step([one.closure(**b) for b in batches])
    left = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(optimizer.outcome.steps):
        for b in batches:
            plain.closure(**b)()
    assert_same(left, torch.get_rng_state())
    if solver.learner() is None:  # else θ moves by its noise
        assert_same(dict(one.model.named_buffers()), dict(plain.model.named_buffers()))


def test_a_displacement_belongs_to_the_update_or_to_each_micro_batch():
    ids, labels = batch(2 * ROWS)
    parts = [(ids[:ROWS], labels[:ROWS]), (ids[ROWS:], labels[ROWS:])]

    def gradient(model: nn.Module) -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def at(model: nn.Module, *batches: Any) -> Tensor:
        """The gradient of SAM on batches that share a displacement, by hand."""
        model.zero_grad()
        (sum(loss_of(model, *b)[0] for b in batches) / len(batches)).backward()
        g = [p.grad.clone() for p in model.parameters()]
        length, found = torch.cat([x.flatten() for x in g]).norm(), copies(model.parameters())
        with torch.no_grad():
            for p, x in zip(model.parameters(), g, strict=True):
                p.add_(0.4 * x / length)
        model.zero_grad()
        (sum(loss_of(model, *b)[0] for b in batches) / len(batches)).backward()
        with torch.no_grad():
            for p, x in zip(model.parameters(), found, strict=True):
                p.copy_(x)
        return gradient(model).clone()

    model = Words()
    together, each = at(model, *parts), sum(at(model, b) for b in parts) / 2
    assert (together - each).abs().max() > 1e-3
    for shared in (True, False):
        model = Words()
        game = mixadv.Game(model, mixadv.SAM(radius=0.4))
        closures = [partial(loss_of, model, *b) for b in parts]
        if shared:
            game.backward(closures)
        else:
            for closure in closures:
                game.backward(closure, backward=lambda loss: (loss / 2).backward())
        expected = together if shared else each
        torch.testing.assert_close(gradient(model), expected, rtol=1e-10, atol=1e-12)


def test_closures_that_the_loop_binds_late_are_refused():
    model = Words()
    game = mixadv.Game(model, mixadv.SAM())
    closures = [lambda: loss_of(model, *b) for b in [batch(seed=1), batch(seed=2)]]  # noqa: B023
    with pytest.raises(mixadv.GameError, match=r"one and the same function.*functools\.partial"):
        game.backward(closures)
    own = [lambda b=b: loss_of(model, *b) for b in [batch(seed=1), batch(seed=2)]]
    assert game.backward(own).forwards == 4


def test_lists_that_do_not_fit_are_refused():
    model = Words()
    optimizer = wrapped(model, mixadv.SAM(solver=mixadv.PGD()))
    closures = [partial(loss_of, model, *batch(seed=seed)) for seed in range(2)]
    with pytest.raises(mixadv.GameError, match="list of them is empty"):
        optimizer.step([])
    with pytest.raises(mixadv.GameError, match=r"where= must be a list of 2, one for each"):
        optimizer.step(closures, where=torch.ones(ROWS, LENGTH))
    with pytest.raises(mixadv.GameError, match=r"game\.loss takes one closure"):
        optimizer.game.loss(closures)
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.step([None, None])
    optimizer.step(closures, where=[torch.ones(ROWS, LENGTH), torch.ones(ROWS, LENGTH)])


# Ways of training ------------------------------------------------------------------------------

SMALL = [mixadv.SAM(), mixadv.AWP(), mixadv.SAM(solver=mixadv.FreeLB())]


@pytest.mark.parametrize("solver", SMALL, ids=repr)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_rounds_are_plain_ones(solver: mixadv.Solver, reentrant: bool):
    def trained(reentrant: bool | None) -> list[Tensor]:
        model = Net(reentrant=reentrant)
        optimizer = wrapped(model, solver)
        torch.manual_seed(2)
        for ids, labels in batches(0, 2):
            optimizer.step(partial(loss_of, model, ids, labels))
        return copies(model.parameters())

    torch.testing.assert_close(trained(reentrant), trained(None), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", SMALL, ids=repr)
def test_rounds_of_fp16_with_a_scaler_are_those_of_full_precision_within_rounding(solver: Any):
    def trained(low: bool) -> list[Tensor]:
        one = player("bert", rows=6)
        without_dropout(one.model)
        optimizer = wrapped(one, solver)
        scaler = torch.amp.GradScaler("cpu", enabled=low, init_scale=2.0**8)
        for _ in range(2):
            with torch.autocast("cpu", torch.float16, enabled=low):
                optimizer.game.backward(one.closure(), lambda loss: scaler.scale(loss).backward())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return copies(one.model.parameters())

    before = copies(player("bert", rows=6).model.parameters())
    low, full = trained(low=True), trained(low=False)
    moved = [
        torch.cat([(a - b).flatten() for a, b in zip(x, before, strict=True)]) for x in (low, full)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99


def test_a_state_that_is_saved_resumes_bit_for_bit(tmp_path: Any):
    def build(seed: int) -> tuple[Any, Any]:
        one = small()._replace(model=small(seed=seed).model)
        base = torch.optim.AdamW(one.model.parameters(), lr=0.01)
        return one, mixadv.wrap(base, one.model, mixadv.SAM(solver=MIXED), seed=seed)

    assert_resumes(build, tmp_path, 2, 2)


# Parameters, formats, words --------------------------------------------------------------------


def test_only_what_is_trained_and_chosen_moves():
    for solver, moves in {
        mixadv.SAM(radius=0.4): {"words.weight", "head.weight", "head.bias"},
        mixadv.AWP(): {"words.weight", "head.weight"},
        mixadv.SAM(which=of_the_head): {"head.weight", "head.bias"},
        mixadv.AWP(which=of_the_head): {"head.weight", "head.bias"},
    }.items():
        for frozen in (False, True):
            model, seen = Words(), []
            model.words.requires_grad_(not frozen)
            game = mixadv.Game(model, solver)
            found = fingerprint(model)["weights"]
            closure = partial(loss_of, model, *batch())

            def looking(closure: Any = closure, model: nn.Module = model, seen: Any = seen) -> Any:
                seen.append(fingerprint(model)["weights"])
                return closure()

            game.backward(looking)
            away = {n for n, w in seen[-1].items() if not torch.equal(w, found[n])}
            assert away == {n for n in moves if not (frozen and "words" in n)}


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "compiled", "both"])
def test_a_rule_on_names_meets_those_of_the_bare_model(kind: str, tmp_path: Any):
    """Wrappers prefix them, and a rule such as `startswith` would silently choose others."""
    model, met = Words(), []

    def rule(name: str, parameter: Tensor) -> bool:
        met.append(name)
        return name.startswith("head")

    with one_process(tmp_path):
        wrapping: Any = model
        if kind != "compiled":
            wrapping = nn.parallel.DistributedDataParallel(wrapping)
        if kind != "DistributedDataParallel":
            wrapping = torch.compile(wrapping, backend="eager")
        game = mixadv.Game(wrapping, mixadv.SAM(which=rule))
        game.backward(partial(loss_of, wrapping, *batch()))
        moved = set(game.rounds.arena.away.copies)
    assert set(met) == {"words.weight", "head.weight", "head.bias"}
    assert moved == {model.head.weight, model.head.bias}


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (mixadv.SAM(which=lambda name, weight: "haed" in name), "which= chooses none"),
        (mixadv.AWP(solver=mixadv.PGD()), "its own rule chooses none"),
    ],
)
def test_an_adversary_that_may_move_no_weight_is_refused(solver: mixadv.Solver, words: str):
    model = Words()
    model.words.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    found = fingerprint(model)
    optimizer = wrapped(model, solver)
    who = type(solver).__name__
    wanted = rf"{who} has no weight to move: of the 1 .* {words}.*{who}\(which=lambda .*head.bias"
    with pytest.raises(mixadv.GameError, match=wanted):
        optimizer.step(partial(loss_of, model, *batch()))
    assert_same(fingerprint(model), found)


def test_the_memory_of_the_copy_is_held_and_follows_the_weights():
    model = Words()
    game = mixadv.Game(model, mixadv.SAM(radius=0.4))
    closure = partial(loss_of, model, *batch())
    held = []
    for _ in range(2):
        game.backward(closure)
        held.append({id(w): c.data_ptr() for w, c in game.rounds.arena.away.copies.items()})
    assert held[0] == held[1]
    assert not pickle.loads(pickle.dumps(game)).rounds.arena.away.copies
    model.zero_grad()
    model.head = nn.Linear(WIDTH, CLASSES).double()  # others there now, of the same shapes
    with torch.no_grad():
        model.words.weight.data = model.words.weight.data.repeat(2, 1)
    found = fingerprint(model)["weights"]
    game.backward(closure)
    assert_same(fingerprint(model)["weights"], found)
    assert {id(w) for w in game.rounds.arena.away.copies} == set(map(id, model.parameters()))


def of_the_head(name: str, parameter: Tensor) -> bool:
    return "head" in name


def test_weights_of_few_digits_warn_where_they_swallow_the_displacement():
    model = Words().bfloat16()
    closure = partial(loss_of, model, *batch())
    for radius in (1e-3, 1.0):
        game = mixadv.Game(model, mixadv.SAM(radius=radius))
        if radius < 1:
            with pytest.warns(UserWarning, match=r"SAM moves the weights by less .*radius=0\.001"):
                game.backward(closure)
        else:
            assert float(game.backward(closure).displacement) == pytest.approx(1.0, rel=0.1)


def test_a_schedule_rests_the_adversary_of_weights_and_sets_its_radius():
    model = Words()
    schedule = mixadv.Schedule(start=1, every=2, radius=lambda update: 0.1 * (1 + update))
    optimizer = wrapped(model, mixadv.SAM(solver=mixadv.PGD()), schedule=schedule)
    closure = partial(loss_of, model, *batch())
    lengths = []
    for _ in range(4):
        optimizer.step(closure)
        lengths.append(optimizer.outcome.displacement)
    assert [x is None for x in lengths] == [True, False, True, False]
    assert [float(x) for x in lengths[1::2]] == pytest.approx([0.1, 0.3])


def test_a_schedule_has_the_inputs_move_before_the_weights_do():
    """The weights' warm-up of the released AWP: adversarial training from the first update on."""
    one, other = Words(), Words()
    schedule = mixadv.Schedule(radius=lambda update: 0.0 if update < 2 else 0.01)
    scheduled = wrapped(one, mixadv.AWP(), schedule=schedule)
    inner = wrapped(other, mixadv.PGD())
    for update in range(3):
        scheduled.step(partial(loss_of, one, *batch()))
        inner.step(partial(loss_of, other, *batch()))
        same = [
            torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True)
        ]
        assert all(same) == (update < 2)
        assert (scheduled.outcome.forwards == inner.outcome.forwards) == (update < 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mixadv.SAM(radius=None), "radius=None would let the weights go anywhere"),
        (lambda: mixadv.SAM(solver=mixadv.AWP()), r"solver=AWP\(\) moves the weights too"),
        (lambda: mixadv.SAM(solver="pgd"), r"solver must be a solver such as mixadv\.PGD\(\)"),
        (lambda: mixadv.AWP(which="head"), "which must be a function of a parameter's name"),
        (lambda: mixadv.SAM(rho=0.1), "no hyper-parameter 'rho'. Here it is 'radius'"),
        (lambda: mixadv.AWP(gamma=0.1), "no hyper-parameter 'gamma'. Here it is 'radius'"),
        (lambda: mixadv.SAM(radius=-1.0), "radius"),
        (lambda: mixadv.ASAM(stabilizer=-1.0), "stabilizer"),
        (lambda: mixadv.SAM(shared=1), "shared"),
    ],
)
def test_words_that_cannot_be_are_refused(build: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


class Towers(nn.Module):
    """Several embeddings, none of which is the site by default; called with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pair: list[Tensor]) -> Tensor:
        left, right = pair
        return self.head(torch.tanh(self.left(left) * self.right(right)).mean(1))


def towers() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    ids, labels = batch()
    return Towers(), lambda model: F.cross_entropy(model([ids, ids.flip(1)]), labels)


def perceptron() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x, labels = torch.randn(ROWS, 5), batch()[1]
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
    return model, lambda model: F.cross_entropy(model(x), labels)


def convolutions() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    one = player("vision", rows=ROWS)
    return one.model, lambda model: one.forward(model, one.batch)[0]


def parts_of_a_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The closure calls what is inside of the model, never the model."""
    x, labels = torch.randn(ROWS, 5), batch()[1]
    model = nn.ModuleDict({"body": nn.Linear(5, 6), "head": nn.Linear(6, CLASSES)})
    return model, lambda m: F.cross_entropy(m["head"](m["body"](x).relu()), labels).view(1)


@pytest.mark.parametrize("made", [towers, perceptron, convolutions, parts_of_a_model])
@pytest.mark.parametrize("how", ["step", "backward", "loss"])
def test_without_an_adversary_on_inputs_any_model_will_do(made: Any, how: str):
    """As the two steps of a loop by hand, and without a hook on the model."""
    torch.manual_seed(0)
    model, loss = made()
    other = copy.deepcopy(model)
    optimizer = wrapped(model, mixadv.SAM(radius=0.1), lr=0.5)
    torch.manual_seed(1)
    play(optimizer, partial(loss, model), how)
    torch.manual_seed(1)
    loss(other).sum().backward()
    found, g = copies(other.parameters()), [p.grad.clone() for p in other.parameters()]
    length = torch.cat([x.flatten() for x in g]).norm()
    buffers = copies(other.buffers())
    other.zero_grad()
    with torch.no_grad():
        for p, x in zip(other.parameters(), g, strict=True):
            p.add_(0.1 * x / length)
    torch.manual_seed(1)
    loss(other).sum().backward()
    expected = [p - 0.5 * q.grad for p, q in zip(found, other.parameters(), strict=True)]
    torch.testing.assert_close(list(model.parameters()), expected)
    assert_same(copies(model.buffers()), buffers)
    assert not hooks(model)
    assert optimizer.game.site.names == []


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_and_without_an_adversary_on_inputs_rounds_are_plain_ones(in_place: bool):
    """Compiled in place too, which hides the inputs from hooks that δ would need."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, loss = perceptron()
        if compiled and in_place:
            model.compile(backend="eager")
        elif compiled:
            model = torch.compile(model, backend="eager")
        optimizer = wrapped(model, mixadv.SAM(radius=0.1))
        for _ in range(3):
            optimizer.step(partial(loss, model))
        found.append(copies(optimizer.game.model.parameters()))
    torch.testing.assert_close(*found)


def test_of_a_model_with_adapters_they_alone_are_displaced():
    peft = pytest.importorskip("peft")
    one = player("bert", rows=4)
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(one.model, config)
    found, away = fingerprint(model)["weights"], set()

    def looking() -> Any:
        now = fingerprint(model)["weights"]
        away.update(n for n, w in now.items() if not torch.equal(w, found[n]))
        return one.forward(model, one.batch)

    mixadv.Game(model, mixadv.SAM(solver=mixadv.PGD())).backward(looking)
    assert away == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_same(fingerprint(model)["weights"], found)


def test_what_is_for_an_adversary_on_inputs_is_refused_without_one():
    model = Words()
    closure = partial(loss_of, model, *batch())
    with pytest.raises(
        ValueError, match=r"site= says where inputs .* SAM\(solver=mixadv\.PGD\(\)\)"
    ):
        wrapped(model, mixadv.SAM(), site="words")
    optimizer = wrapped(model, mixadv.SAM())
    for word, goal in {"where": torch.ones(ROWS, LENGTH), "adversary": closure}.items():
        with pytest.raises(mixadv.GameError, match=f"{word}= is for an adversary on inputs"):
            optimizer.step(closure, **{word: goal})
    with pytest.raises(ValueError, match=r"no adversary on inputs .*mixadv\.Game\(model, mixadv"):
        best_response(optimizer.game, closure)
    around = wrapped(model, mixadv.SAM(solver=mixadv.PGD()), site="words")
    around.step(closure, where=torch.ones(ROWS, LENGTH))


@pytest.mark.parametrize("inner", [mixadv.GroupDRO(), mixadv.CVaR(), mixadv.ChiSquare()], ids=repr)
def test_solvers_that_weigh_rows_are_refused_with_the_line_to_write(inner: mixadv.Solver):
    for solver in (mixadv.SAM, mixadv.ASAM, mixadv.AWP):
        with pytest.raises(ValueError, match=rf"{type(inner).__name__}\(\) weighs rows.*\n?.*PGD"):
            solver(solver=inner)


def test_explain_and_outcome_say_what_the_adversary_of_weights_does():
    model = Words()
    optimizer = wrapped(model, mixadv.SAM())
    said = str(optimizer.game.explain())
    assert "weights" in said
    assert "no δ" in said
    optimizer.step(partial(loss_of, model, *batch()))
    outcome = optimizer.outcome
    assert outcome.radius is None
    assert optimizer.game.strategy is None
    assert (outcome.forwards, outcome.delta_backwards, outcome.theta_backwards) == (2, 0, 2)
    around = wrapped(Words(), mixadv.AWP(solver=mixadv.PGD(radius=0.1)))
    explained = around.game.explain()
    assert explained.radius == pytest.approx(0.1 * explained.unit)
    assert "PGD" in str(explained)
    assert replace(mixadv.AWP(), radius=0.02).radius == 0.02
