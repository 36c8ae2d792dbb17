"""MAT: damping, mirror weights, temperature, and the weights that it must leave alone."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.model.noise import Noise
from mixadv.players.learner import Learner
from tests.worlds import classified
from tests.zoo import player, wrapped

PLAIN = {"learner_steps": 1, "damping": 0.0, "round_damping": 0.0, "average": None}
COLD = {"learner_temperature": 0.0}
STILL = {"steps": 0, "smoothness_weight": 0.0, "divergence": "squared_error", "temperature": 0.0}
X = torch.ones(2, 3, dtype=torch.float64)


class Potential(nn.Module):
    """A loss that is a given function of θ; the input only gives the adversary something to do."""

    def __init__(self, energy, size: int = 1) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.energy = energy

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.energy(self.theta) + x.sum(), x


class Ones:
    """Noise that is known."""

    def begin(self, player: str, round: int, rank: int | None = None) -> None: ...

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        return torch.ones_like(like)


def linear(seed: int = 0):
    """A linear classifier with a closure on a batch of 5."""
    torch.manual_seed(seed)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    return model, x, classified(model, x, labels=y)


# Damping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_damping", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("damping", "mean"), [(0.3, -0.2583), ("uniform", -0.2), (0.0, -0.3)])
def test_damping_pulls_to_a_true_copy_of_the_weights(damping, mean, round_damping):
    model = Potential(torch.sum)  # θ goes 0, −0.1, −0.2, −0.3
    damped = {"learner_steps": 3, "damping": damping, "round_damping": round_damping}
    wrapped(model, mixadv.MAT(**STILL, **COLD, **damped)).step(lambda: model(X))
    assert model.theta.item() == pytest.approx((1 - round_damping) * mean, abs=1e-14)


beta = st.floats(0, 0.99) | st.just("uniform")


@given(beta, st.floats(0, 1), st.integers(1, 6), st.integers(0, 9999))
def test_damping_has_its_closed_form(damping, round_damping, steps, seed):
    torch.manual_seed(seed)
    theta = nn.Parameter(torch.randn(4, dtype=torch.float64))
    base = torch.optim.SGD([theta], lr=0.5)
    learner = Learner(steps=steps, damping=damping, round_damping=round_damping)
    learner.bind(base, 0)  # which holds it weakly
    for _ in range(2):
        start = theta.detach().clone()
        gradients = torch.randn(steps, 4, dtype=torch.float64)
        samples = start - 0.5 * gradients.cumsum(0)
        for theta.grad in gradients:
            base.step()
        if damping == "uniform":
            mean = samples.mean(0)
        else:
            powers = damping ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
            mean = damping**steps * start + (1 - damping) * powers @ samples
        expected = round_damping * start + (1 - round_damping) * mean
        torch.testing.assert_close(theta.detach(), expected, rtol=0, atol=1e-12)


WAYS = ["mean", "ensemble", "sample"]


@pytest.mark.parametrize("play_as", WAYS)
@pytest.mark.parametrize("steps", [1, 3])
def test_one_particle_without_noise_and_damping_is_smart_bit_for_bit(steps, play_as):
    def trained(solver: mixadv.Solver) -> list[Tensor]:
        bert = player("bert", rows=4)
        optimizer = wrapped(bert.model, solver, torch.optim.AdamW, lr=1e-3)
        objectives = [optimizer.step(bert.closure()) for _ in range(3)]
        return [*objectives, *bert.model.parameters()]

    pure = {"particles": 1, "temperature": 0.0, "play_as": play_as}
    smart = trained(mixadv.SMART(steps=steps, step_size=0.1, proximal_weight=0.0))
    mat = trained(mixadv.MAT(**PLAIN, **COLD, **pure, steps=steps, step_size=0.1))
    assert all(torch.equal(a, b) for a, b in zip(smart, mat, strict=True))


# The mixed strategy ------------------------------------------------------------------------------


def ensemble(solver: mixadv.MAT, seed: int = 0):
    """Play a round; return its strategy, outcome, and each particle's payoffs from the formula."""
    model, x, closure = linear(seed)
    weight, bias = (p.detach().clone() for p in model.parameters())
    optimizer = wrapped(model, solver)
    optimizer.step(closure)
    (points,) = optimizer.game.strategy.points
    p = ((x + points) @ weight.T + bias).log_softmax(-1)
    q = (x @ weight.T + bias).log_softmax(-1)
    return optimizer.game.strategy, optimizer.outcome, ((p.exp() - q.exp()) * (p - q)).sum(-1)


FIXED = mixadv.MAT(step_size=0.0, temperature=0.0, start_size=2.0, play_as="ensemble")
FIXED = replace(FIXED, radius=3.0, unit="absolute")


def in_unit(payoffs: Tensor, unit: str) -> Tensor:
    """Payoffs `[M, B]` as they stand, or less their mean and over their spread, by numpy."""
    if unit == "absolute" or len(payoffs) == 1:
        return payoffs
    u = payoffs.numpy()
    return torch.from_numpy((u - u.mean(0)) / u.std(0))


units = st.sampled_from(["relative", "absolute"])


@given(st.integers(1, 5), st.integers(1, 3), st.floats(0, 1e3), units, st.integers(0, 99))
def test_weights_are_exponential_in_each_samples_payoff(particles, steps, mirror_step, unit, seed):
    solver = replace(FIXED, particles=particles, steps=steps, mirror_step=mirror_step)
    q, outcome, payoffs = ensemble(replace(solver, mirror_unit=unit), seed)
    torch.testing.assert_close(q.weights.sum(0), torch.ones(q.weights.shape[1]).double())
    expected = (mirror_step * steps * in_unit(payoffs, unit)).softmax(0)
    torch.testing.assert_close(q.weights.expand_as(expected), expected, rtol=1e-9, atol=1e-12)
    assert outcome.entropy <= math.log(particles) + 1e-12


def test_weights_favour_the_particle_that_gains_most():
    q, _, payoffs = ensemble(replace(FIXED, particles=4, steps=1, mirror_step=5.0))
    assert torch.equal(q.weights.argmax(0), payoffs.argmax(0))
    assert (q.weights.max(0).values > 1 / 4).all()


def test_weights_stay_equal_without_a_mirror_step():
    q, outcome, _ = ensemble(replace(FIXED, particles=4, step_size=0.5, mirror_step=0.0))
    torch.testing.assert_close(q.weights, torch.full_like(q.weights, 0.25))
    assert outcome.entropy.item() == pytest.approx(math.log(4))


def test_ensemble_pays_the_mean_and_the_spread_around_it():
    """E‖Wδ‖² = ‖W·Eδ‖² + E‖W(δ − Eδ)‖² for a linear model and squared errors."""
    solver = mixadv.MAT(**PLAIN, particles=4, divergence="squared_error", mirror_step=0.5)
    solver = replace(solver, radius=2.0, step_size=0.5, unit="absolute", smoothness_weight=0.7)
    rounds = {}
    for play_as in ("mean", "ensemble"):
        model, _, closure = linear()
        weight = model.weight.detach().clone()
        optimizer = wrapped(model, replace(solver, play_as=play_as))
        rounds[play_as] = optimizer.step(closure), optimizer.game.strategy
    (low, pure), (high, q) = rounds.values()
    mean = (q.weights[..., None] * q.points[0]).sum(0)
    torch.testing.assert_close(pure.points[0], mean[None])
    spread = ((q.points[0] - mean) @ weight.T).square().sum(-1)
    expected = 0.7 * (q.weights * spread).sum(0).mean()
    torch.testing.assert_close(high - low, expected)
    assert expected > 1e-3


@pytest.mark.parametrize(
    ("play_as", "points"), [("mean", "last"), ("ensemble", "last"), ("sample", "path")]
)
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_hot_noise_neither_leaves_the_ball_nor_enters_padding(norm, per, play_as, points):
    bert = player("bert", rows=4)
    hot = {"temperature": 100.0, "particles": 2, "radius": 0.1, "norm": norm, "per": per}
    optimizer = wrapped(bert.model, mixadv.MAT(**hot, play_as=play_as, points=points))
    optimizer.step(bert.closure())
    q = optimizer.game.strategy
    assert 0 < q.norms(norm, per)[0].max() <= 0.1 * (1 + 1e-5)
    assert not q.points[0][:, bert.batch["attention_mask"] == 0].any()


# A draw for each sample ---------------------------------------------------------------------------


class Levels(Noise):
    """The draws of a seed, but for the levels by which each sample picks its particle."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__(0)
        self.levels = levels

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        return 2 * self.levels - 1 if like.dim() == 1 else super().__call__(kind, like)


SPREAD = {"radius": 2.0, "step_size": 0.5, "unit": "absolute", "start_size": 1.0, "steps": 1}


def gradient(solver: mixadv.MAT, levels: Tensor | None = None):
    """The gradient of a round on three samples, and the weights of its strategy."""
    torch.manual_seed(1)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(3, 4).double(), torch.tensor([0, 2, 1])
    optimizer = wrapped(model, solver)
    if levels is not None:
        optimizer.game.rounds.arena.noise = Levels(levels)
    optimizer.game.backward(classified(model, x, labels=y))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), optimizer.game.strategy


@pytest.mark.parametrize("points", ["last", "path"])
def test_a_draw_for_each_sample_has_the_ensembles_gradient_on_average(points):
    """Of all the draws there are, each with its probability; any one of them is another."""
    particles = 3 if points == "last" else 1
    solver = mixadv.MAT(**PLAIN, **SPREAD, particles=particles, points=points, mirror_step=0.7)
    solver = replace(solver, steps=2, divergence="symmetric_kl")
    expected, q = gradient(replace(solver, play_as="ensemble"))
    assert q.weights.shape == (3, 3)
    below = q.weights.cumsum(0) - q.weights / 2
    found, furthest = torch.zeros_like(expected), 0.0
    for choice in itertools.product(range(q.size), repeat=3):
        rows = torch.tensor(choice), torch.arange(3)
        one, mixed = gradient(replace(solver, play_as="sample"), below[rows])
        torch.testing.assert_close(mixed.weights, q.weights)
        found += q.weights[rows].prod() * one
        furthest = max(furthest, float((one - expected).norm() / expected.norm()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert furthest > 0.01


def test_draws_pick_each_particle_as_often_as_it_weighs():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(1, 4).double().expand(20_000, 4)
    closure = classified(model, x, labels=torch.zeros(20_000).long())
    payoffs = {}
    for play_as in ("ensemble", "sample"):
        solver = mixadv.MAT(**PLAIN, **SPREAD, particles=3, play_as=play_as)
        optimizer = wrapped(model, solver, lr=0.0)
        optimizer.step(closure)
        payoffs[play_as] = optimizer.outcome.payoff
        assert optimizer.outcome.entropy > 0.5
    assert payoffs["sample"] == pytest.approx(float(payoffs["ensemble"]), rel=0.02)
    assert payoffs["sample"] != payoffs["ensemble"]


def test_each_learner_step_draws_anew_and_a_seed_repeats_the_draws(monkeypatch):
    seen, pick = [], mixadv.Strategy.pick
    monkeypatch.setattr(mixadv.Strategy, "pick", lambda q, u: seen.append(u) or pick(q, u))

    def levels(seed: int) -> Tensor:
        seen.clear()
        model, _, closure = linear()
        solver = mixadv.MAT(learner_steps=2, particles=2, play_as="sample")
        optimizer = mixadv.wrap(torch.optim.SGD(model.parameters()), model, solver, seed=seed)
        for _ in range(2):
            optimizer.step(closure)
        assert [u.shape for u in seen] == 4 * [(5,)]
        return torch.cat(seen)

    first = levels(3)
    assert len(first.unique()) == 20
    assert torch.equal(levels(3), first)
    assert not torch.isin(levels(4), first).any()


# The points of a chain ----------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["relative", "absolute"])
@pytest.mark.parametrize("particles", [1, 2])
def test_a_path_is_every_point_of_its_chains_weighed_by_what_they_were_paid(particles, unit):
    model, x, closure = linear()
    weight, bias = (p.detach() for p in model.parameters())
    chain = {"normalize": "none", "radius": None, "unit": "absolute", "step_size": 0.3}
    chain |= {"temperature": 0.0}
    solver = mixadv.MAT(**PLAIN, **chain, particles=particles, start_size=1.0, play_as="ensemble")

    def played(**changes) -> mixadv.Strategy:
        optimizer = wrapped(model, replace(solver, **changes), lr=0.0)
        optimizer.step(closure)
        return optimizer.game.strategy

    def paid(delta: Tensor) -> Tensor:
        p, q = ((x + d) @ weight.T + bias for d in (delta, 0 * delta))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return ((p.exp() - q.exp()) * (p - q)).sum(-1)

    (delta,) = played(steps=0).points
    points, payoffs = [delta], []
    for _ in range(3):
        delta = delta.detach().requires_grad_()
        payoffs.append(paid(delta))
        (slope,) = torch.autograd.grad(payoffs[-1].sum(), delta)
        delta = delta + 0.3 * slope
        points.append(delta)
    gained = in_unit(torch.cat([*payoffs, payoffs[-1]]).detach(), unit)
    q = played(steps=3, points="path", mirror_step=2.0, mirror_unit=unit)
    torch.testing.assert_close(q.points[0], torch.cat(points).detach())
    torch.testing.assert_close(q.weights, (2.0 * gained).softmax(0))
    mean = played(steps=3, points="path", mirror_step=2.0, mirror_unit=unit, play_as="mean")
    torch.testing.assert_close(mean.points[0][0], (q.weights[..., None] * q.points[0]).sum(0))


def test_confident_predictions_stay_finite():
    model, _, closure = linear()
    with torch.no_grad():
        model.weight.mul_(1e4)
    objective = wrapped(model, mixadv.MAT(particles=2, temperature=0.1)).step(closure)
    assert objective.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


# The learner's temperature -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_learner_of_a_quadratic_loss_has_the_law_of_its_langevin_chain(size):
    """Mean at the minimum, variance τ/(a·(1 − lr·a/2)) for curvature a."""
    curvatures, lr, temperature = [0.5, 2.0], 0.4, 0.3
    a = torch.tensor(curvatures).repeat_interleave(size)
    model = Potential(lambda theta: (0.5 * a * (theta - 1).square()).sum(), 2 * size)
    solver = mixadv.MAT(**{**PLAIN, **STILL, "learner_steps": 2}, learner_temperature=temperature)
    optimizer = wrapped(model, solver, lr=lr)
    for _ in range(40):
        optimizer.step(lambda: model(X))
    for a, theta in zip(curvatures, model.theta.detach().view(2, -1), strict=True):
        variance = temperature / (a * (1 - lr * a / 2))
        assert abs(theta.mean() - 1) < 4 * math.sqrt(variance / size)
        assert abs(theta.var() - variance) < 4 * variance * math.sqrt(2 / size)


@pytest.mark.filterwarnings("ignore:The optimizer steps before its game")
@pytest.mark.parametrize("as_lr", [float, torch.tensor])
def test_noise_has_the_scale_of_each_groups_learning_rate_at_that_moment(as_lr):
    model, _, _ = linear()
    rates = {model.weight: 0.1, model.bias: 0.4}
    base = torch.optim.SGD([{"params": [p], "lr": as_lr(lr)} for p, lr in rates.items()])
    optimizer = mixadv.wrap(base, model, mixadv.MAT(**PLAIN, learner_temperature=0.5))
    optimizer.game.learner.noise = Ones()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    for k in range(3):
        before = {p: p.detach().clone() for p in rates}
        optimizer.step()  # no gradients: the noise alone
        for p, lr in rates.items():
            step = torch.full_like(p, math.sqrt(2 * lr * 0.5**k * 0.5))
            torch.testing.assert_close(p - before[p], step, rtol=1e-6, atol=0)
        scheduler.step()


def test_learning_rate_zero_moves_nothing():
    model, _, closure = linear()
    before = [p.detach().clone() for p in model.parameters()]
    wrapped(model, mixadv.MAT(learner_temperature=1.0), lr=0.0).step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# What is left alone ------------------------------------------------------------------------------


class Odd(nn.Module):
    """Tied weights, a frozen layer, buffers of integers and of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("positions", torch.arange(514))
        self.register_buffer("scale", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(self.first(x).tanh())) * self.scale


def test_buffers_and_frozen_parameters_are_untouched_and_ties_hold():
    model, x, y = Odd(), torch.randn(5, 4), torch.randint(0, 3, (5,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    damped = {"damping": 0.9, "round_damping": 0.9, "samples": 2, "learner_temperature": 1e-3}
    optimizer = wrapped(model, mixadv.MAT(**damped))
    for _ in range(2):
        optimizer.step(classified(model, x, labels=y))
    with optimizer.game.averaged():
        optimizer.game.mixture(lambda: model(x))
    assert model.second.weight is model.first.weight
    for name, tensor in model.state_dict().items():
        trained = name.startswith(("first", "second"))
        assert tensor.dtype == before[name].dtype
        assert tensor.data_ptr() == places[name]
        assert torch.equal(tensor, before[name]) is not trained


def test_a_failed_round_leaves_the_weights_where_it_began():
    model, _, closure = linear()
    optimizer = wrapped(model, mixadv.MAT(**STILL, **COLD))
    optimizer.step(closure)
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == 3:  # after the first of two steps
            raise KeyboardInterrupt
        return closure()

    before = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert torch.equal(model.weight, before)
    fresh, _, closure_of_fresh = linear()
    fresh.load_state_dict(model.state_dict())
    wrapped(fresh, mixadv.MAT(**STILL, **COLD)).step(closure_of_fresh)
    optimizer.step(closure)
    assert torch.equal(model.weight, fresh.weight)
