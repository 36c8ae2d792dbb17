"""Games on linear models, whose best responses are known, and special cases that coincide."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mixadv
from mixadv.equilibrium import best_response
from tests.worlds import added, classified, gradients, played
from tests.zoo import small, wrapped

ORDER = {"l1": 1, "l2": 2, "linf": math.inf}
DUAL = {"l1": math.inf, "l2": 2, "linf": 1}
ROWS, WIDTH = 5, 4

norms = pytest.mark.parametrize("norm", ORDER)


class Affine:
    """The model wᵀx + b on a batch, with labels ±1 (logistic loss) or real targets (squared)."""

    def __init__(self, kind):
        self.model = nn.Linear(WIDTH, 1).double()
        self.x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        self.y = torch.randn(ROWS, 1, dtype=torch.float64)
        self.y = self.y.sign() if kind == "logistic" else self.y
        self.kind = kind

    def loss(self, scores, gain=0.0):
        """Loss per sample, where an adversary moves each score by up to `gain`."""
        if self.kind == "logistic":
            return F.softplus(gain - self.y * scores).squeeze(1)
        return ((self.y - scores).abs() + gain).square().squeeze(1)

    def closure(self):
        scores = self.model(self.x)
        return self.loss(scores), scores

    def robust(self, radius, norm):
        """The loss against the exact best response: Hölder's inequality is attained."""
        dual = torch.linalg.vector_norm(self.model.weight, DUAL[norm])
        return self.loss(self.model(self.x), radius * dual)


def assert_same(one, other, tolerance=1e-12):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_plays(game, solver, objective):
    """Assert that a round has this objective and its gradients."""
    outcome = mixadv.Game(game.model, solver).backward(game.closure)
    delivered = gradients(game.model)
    objective.backward()
    assert_same(outcome.objective, objective.detach())
    assert_same(delivered, gradients(game.model))


@norms
@pytest.mark.parametrize("kind", ["logistic", "squared"])
@given(radius=st.floats(0.01, 2.0), steps=st.integers(1, 3))
def test_ascent_from_zero_is_the_exact_attack_on_an_affine_model(kind, norm, radius, steps):
    game = Affine(kind)
    words = {"steps": steps, "norm": norm, "radius": radius, "step_size": radius, "start": "zero"}
    played = mixadv.Game(game.model, mixadv.PGD(unit="absolute", **words))
    response = best_response(played, game.closure)
    assert_same(response.loss, game.robust(radius, norm).detach())
    if kind == "logistic" and norm != "l1":
        w = game.model.weight.detach()
        direction = w / w.norm() if norm == "l2" else w.sign()
        assert_same(response.strategy.points[0][0], -game.y * radius * direction)


@norms
@pytest.mark.parametrize("kind", ["logistic", "squared"])
def test_gradient_at_the_worst_point_is_that_of_the_robust_loss(kind, norm):
    game = Affine(kind)
    words = {"norm": norm, "radius": 0.3, "start": "zero", "step_size": 0.3, "unit": "absolute"}
    assert_plays(game, mixadv.PGD(steps=1, **words), game.robust(0.3, norm).mean())


@norms
def test_fast_gradient_adds_the_robust_loss_to_the_clean_one(norm):
    game = Affine("logistic")
    solver = mixadv.FGM(norm=norm, radius=0.3, unit="absolute")
    outcome = mixadv.Game(game.model, solver).backward(game.closure)
    clean = game.loss(game.model(game.x))
    assert_same(outcome.objective, (clean + game.robust(0.3, norm)).mean().detach())


HALVES = {
    "CreAT": lambda **words: mixadv.CreAT(
        deviation_weight=0.0, start="zero", step_size=0.3, projection="sphere", **words
    ),
    "CAT": lambda **words: mixadv.CAT(contrast_weight=0.0, shared=False, **words),
}


@norms
@pytest.mark.parametrize("build", HALVES.values(), ids=HALVES)
def test_half_the_robust_loss_is_added_to_half_the_clean_one(build, norm):
    game = Affine("logistic")
    objective = (game.loss(game.model(game.x)) + game.robust(0.3, norm)).mean() / 2
    assert_plays(game, build(norm=norm, radius=0.3, unit="absolute"), objective)


@norms
def test_replays_train_on_the_clean_loss_and_then_on_the_robust_one(norm):
    """From zero, one move against an affine model is the exact best response to its new weights.

    In logistic regression every step is along −y·w, whatever the weights' length.
    """
    game = Affine("logistic")
    words = {"norm": norm, "radius": 0.3, "step_size": 0.3, "start": "zero", "unit": "absolute"}
    optimizer = wrapped(game.model, mixadv.FreeAT(steps=2, **words), lr=0.0)
    clean = game.loss(game.model(game.x))
    expected = (clean + game.robust(0.3, norm)).mean() / 2
    assert_same(optimizer.step(game.closure), expected.detach())
    assert_same(optimizer.step(game.closure), game.robust(0.3, norm).mean().detach())


@given(st.floats(0.05, 1.0), st.integers(0, 100))
def test_sign_steps_reach_the_corner_from_any_start_in_the_box(step_size, seed):
    game, radius = Affine("logistic"), 0.4
    words = {"norm": "linf", "radius": radius, "step_size": step_size, "unit": "absolute"}
    solver = mixadv.PGD(steps=math.ceil(2 * radius / step_size), start="uniform", **words)
    response = best_response(mixadv.Game(game.model, solver, seed=seed), game.closure)
    assert_same(response.loss, game.robust(radius, "linf").detach())


@given(st.floats(0.02, 0.6), st.integers(0, 6))
def test_normalised_steps_turn_towards_the_worst_direction_at_the_known_rate(step_size, steps):
    """The part across w only shrinks by the projection: tan∠ ← ‖δ⊥‖ / (δ∥ + α)."""
    game, radius = Affine("logistic"), 0.3
    words = {"radius": radius, "step_size": step_size, "unit": "absolute"}
    ends = []
    for k in (0, steps):
        played = mixadv.Game(game.model, mixadv.PGD(steps=k, start="uniform", **words))
        ends.append(best_response(played, game.closure).strategy.points[0][0])
    w = game.model.weight.detach()
    worst = -game.y * w / w.norm()
    along = (ends[0] * worst).sum(1)
    across = (ends[0] - along[:, None] * worst).norm(dim=1)
    for _ in range(steps):
        along = along + step_size
        shrink = (radius / torch.hypot(along, across)).clamp(max=1)
        along, across = along * shrink, across * shrink
    found = (ends[1] * worst).sum(1)
    assert_same(found, along)
    assert_same((ends[1] - found[:, None] * worst).norm(dim=1), across)


SMOOTH = {
    "SMART": lambda **words: mixadv.SMART(proximal_weight=0.0, **words),
    "ALUM": mixadv.ALUM,
}


@norms
@pytest.mark.parametrize("build", SMOOTH.values(), ids=SMOOTH)
def test_smoothness_of_an_affine_model_is_its_squared_dual_norm(build, norm):
    game = Affine("squared")
    words = {"norm": norm, "radius": 0.3, "steps": 8, "step_size": 30.0, "unit": "absolute"}
    solver = build(**words, smoothness_weight=2.0, divergence="squared_error")
    slope = 0.3 * torch.linalg.vector_norm(game.model.weight, DUAL[norm])
    assert_plays(game, solver, game.loss(game.model(game.x)).mean() + 2.0 * slope**2)


@pytest.mark.parametrize(("radius", "weight", "value"), [(0.5, 1.0, 0.25), (1.5, 0.0, 1.0)])
def test_training_reaches_the_robust_minimum(radius, weight, value):
    """min_w (|1 − w| + ε|w|)²: w = 1 and value ε² for ε < 1, w = 0 and value 1 beyond."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    one = torch.ones(1, 1, dtype=torch.float64)
    words = {"radius": radius, "step_size": radius, "start": "zero", "unit": "absolute"}
    optimizer = wrapped(model, mixadv.PGD(steps=1, **words))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    for _ in range(300):
        optimizer.step(lambda: (one - model(one)).square().mean())
        decay.step()
    w = float(model.weight.detach())
    assert w == pytest.approx(weight, abs=0.01)
    assert (abs(1 - w) + radius * abs(w)) ** 2 == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize("kind", ["kl", "symmetric_kl", "js"])
def test_power_iteration_finds_the_top_eigenvector_of_the_fisher_matrix(kind):
    model = nn.Linear(WIDTH, 3).double()
    x, y = torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.arange(ROWS) % 3
    solver = mixadv.SMART(
        divergence=kind,
        projection="sphere",
        normalize="none",
        radius=1e-4,
        start_size=1e-4,
        step_size=1e3,
        steps=100,
        proximal_weight=0.0,
        unit="absolute",
    )
    game = mixadv.Game(model, solver)
    game.backward(classified(model, x, labels=y))
    jacobian = model.weight.detach()
    for p, delta in zip(model(x).detach().softmax(-1), game.strategy.points[0][0], strict=True):
        fisher = jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
        values, vectors = torch.linalg.eigh(fisher)
        assert values[-2] < 0.9 * values[-1]
        assert float(abs(vectors[:, -1] @ delta)) == pytest.approx(1e-4, rel=1e-6)


# Special cases that coincide ---------------------------------------------------------------------

PLAIN_STEP = {"learner_steps": 1, "damping": 0.0, "round_damping": 0.0, "average": None}
PLAIN_STEP |= {"learner_temperature": 0.0}
PLAIN = {
    "FreeLB that never moves": mixadv.FreeLB(start="zero", step_size=0.0, steps=3),
    "PGD without steps": mixadv.PGD(start="zero", steps=0),
    "SMART without smoothness": mixadv.SMART(smoothness_weight=0.0, proximal_weight=0.0),
    "MAT without smoothness": mixadv.MAT(smoothness_weight=0.0, **PLAIN_STEP),
    "MAT without ascent": mixadv.MAT(start="zero", steps=0, **PLAIN_STEP),
}
AT_START = {
    "FreeLB of one pass": mixadv.FreeLB(steps=1),
    "PGD without steps": mixadv.PGD(steps=0),
    "uniform noise": mixadv.UniformNoise(),
}


def play(solver, player):
    """Play one round after a first one; return the game and the gradients."""
    game = mixadv.Game(player.model, solver)
    game.backward(player.closure())
    player.model.zero_grad()
    torch.manual_seed(1)
    game.backward(player.closure())
    return game, gradients(player.model)


def plain(player, delta=0):
    """The gradients of one backward, with δ added to the embedding's output."""
    torch.manual_seed(1)
    with added((player.model.embedding, delta)):
        player.closure()()[0].backward()
    return gradients(player.model)


@pytest.mark.parametrize("solver", PLAIN.values(), ids=PLAIN)
def test_without_an_adversary_the_gradient_is_the_plain_one(solver):
    player = small()
    assert_same(play(solver, player)[1], plain(player), 1e-13)


@pytest.mark.parametrize("solver", AT_START.values(), ids=AT_START)
def test_without_an_ascent_the_gradient_is_that_at_the_random_start(solver):
    player = small()
    game, found = play(solver, player)
    delta = game.unit * played(game)
    assert delta.flatten(1).any(1).all()
    assert_same(found, plain(player, delta), 1e-13)
