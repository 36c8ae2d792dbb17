"""The mirror and Langevin steps on games and chains whose answers are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import mixadv
from mixadv.equilibrium import best_response
from mixadv.maths import langevin, mirror
from mixadv.model.noise import Noise
from mixadv.players.ascent import Ascent

matrices = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-1, 1), fill=st.nothing())
)


def hedge(matrix, step_size, rounds, start=None):
    """Yield both players' strategies; the row player minimises xᵀAy, both move at once."""
    matrix = torch.as_tensor(matrix)
    uniform = [mirror.uniform(size, dtype=torch.float64) for size in matrix.shape]
    x, y = uniform if start is None else start.log()
    for _ in range(rounds):
        yield x.exp(), y.exp()
        x, y = (
            mirror.step(x, -matrix @ y.exp(), step_size),
            mirror.step(y, matrix.T @ x.exp(), step_size),
        )


def bound(matrix, step_size, rounds):
    """log(mn)/(ηT) + η·range²/4 on the duality gap of the mean strategies, by Hoeffding's lemma."""
    matrix = np.asarray(matrix)
    spread = float(np.ptp(matrix))
    return math.log(matrix.size) / (step_size * rounds) + step_size * spread**2 / 4


def means(played):
    return [torch.stack(side).mean(0).numpy() for side in zip(*played, strict=True)]


@given(matrices, st.floats(0.3, 3), st.integers(1, 200), st.sampled_from([1.0, 1e-3, 1e3]))
def test_regret_bound_of_hedge_holds_on_every_matrix_game(matrix, multiple, rounds, scale):
    matrix = scale * matrix
    best = 2 * math.sqrt(math.log(max(matrix.size, 2)) / rounds) / max(np.ptp(matrix), scale * 1e-3)
    x, y = means(hedge(matrix, multiple * best, rounds))
    gap = (matrix.T @ x).max() - (matrix @ y).min()
    assert -1e-9 * scale <= gap <= bound(matrix, multiple * best, rounds) + 1e-9 * scale


@given(matrices, st.floats(0.01, 10), st.integers(1, 60))
def test_iterates_are_the_gibbs_measures_of_the_summed_payoffs(matrix, step_size, rounds):
    paid = np.zeros(matrix.shape[1])
    for x, y in hedge(matrix, step_size, rounds):
        expected = np.exp(step_size * paid - (step_size * paid).max())
        np.testing.assert_allclose(y, expected / expected.sum(), rtol=1e-9, atol=1e-14)
        assert float(y.sum()) == pytest.approx(1, abs=1e-12)
        assert (x >= 0).all()
        paid += matrix.T @ x.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_any_size_neither_overflow_nor_are_forgotten(dtype):
    payoffs = torch.tensor([1.0, 0.0, -1.0], dtype=dtype)
    start = log_weights = mirror.uniform(3, dtype=dtype)
    for _ in range(1000):
        log_weights = mirror.step(log_weights, payoffs, 1000.0)
    assert log_weights.tolist() == [0.0, -1e6, -2e6]
    for _ in range(1000):
        log_weights = mirror.step(log_weights, -payoffs, 1000.0)
    torch.testing.assert_close(log_weights, start, rtol=0.1, atol=0.0)


@given(matrices, st.floats(0.1, 10), st.floats(-5, 5))
def test_units_of_the_payoff_do_not_matter(matrix, unit, shift):
    """One strategy per column; scaling and shifting its payoffs with the step keeps it."""
    payoffs, start = torch.tensor(matrix), torch.tensor(matrix[::-1].copy()).log_softmax(0)
    expected = mirror.step(start, payoffs, 0.7)
    torch.testing.assert_close(mirror.step(start, unit * payoffs + shift, 0.7 / unit), expected)
    columns = [mirror.step(s, p, 0.7) for s, p in zip(start.T, payoffs.T, strict=True)]
    torch.testing.assert_close(torch.stack(columns, 1), expected)
    assert torch.equal(mirror.step(start, payoffs, 0.0), start)


WORDS = {"start": "zero", "unit": "absolute"}


class Finite:
    """A model with finitely many weights to choose from, against finitely many perturbations."""

    def __init__(self, weights, points, x, loss):
        self.weights, self.points, self.x, self.loss = weights, points, x, loss
        self.model = nn.Linear(x.shape[1], 1, bias=False).double()
        self.game = mixadv.Game(self.model, mixadv.PGD(steps=1, step_size=1.0, radius=1.0, **WORDS))

    def closure(self):
        scores = self.model(self.x)
        return self.loss(scores).squeeze(1), scores

    def choose(self, row):
        with torch.no_grad():
            self.model.weight.copy_(self.weights[row])

    def matrix(self):
        rows = [[self.loss((self.x + d) @ w.T).mean() for d in self.points] for w in self.weights]
        return torch.tensor(rows, dtype=torch.float64)

    def pays(self, row, log_weights):
        """What the adversary's points earn against one model, and the model's expected loss."""
        self.choose(row)
        q = mixadv.Strategy([self.points], log_weights=log_weights[:, None])
        with self.game.rounds.open(self.closure) as update:
            (stage,) = update.stages
            _, payoffs, _ = stage.payoffs(q, "loss", self.game.solver)
            return payoffs.mean(1), stage.loss(q).detach()


def test_mirror_descent_on_enumerated_weights_and_perturbations_is_hedge():
    draw = torch.Generator().manual_seed(0)
    sizes = [(3, 1, 2), (4, 5, 2), (5, 2)]  # three models, four perturbations of five samples
    numbers = [torch.randn(s, generator=draw, dtype=torch.float64) for s in sizes]
    finite = Finite(*numbers, loss=lambda scores: nn.functional.softplus(-scores))
    x, y = (mirror.uniform(size, dtype=torch.float64) for size in (3, 4))
    played = []
    for _ in range(20):
        played.append((x.exp(), y.exp()))
        payoffs, losses = zip(*(finite.pays(row, y) for row in range(3)), strict=True)
        y = mirror.step(y, x.exp() @ torch.stack(payoffs), 0.5)
        x = mirror.step(x, -torch.stack(losses), 0.5)
    matrix = finite.matrix()
    for one, other in zip(played, hedge(matrix, 0.5, 20), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    mean_x, mean_y = means(played)
    gap = (matrix.T.numpy() @ mean_x).max() - (matrix.numpy() @ mean_y).min()
    assert gap <= bound(matrix, 0.5, 20)


def test_best_responses_cycle_where_a_mixture_halves_the_risk():
    """Two thresholds around a clean point, each wrong on one side of it only."""
    finite = Finite(
        weights=torch.tensor([[[1.0]], [[-1.0]]]).double(),
        points=torch.tensor([[[1.0]], [[-1.0]]]).double(),
        x=torch.zeros(1, 1).double(),
        loss=lambda scores: torch.sigmoid(40 * (scores - 0.5)),
    )
    row, risks, rows = 0, [], []
    for _ in range(6):
        finite.choose(row)
        response = best_response(finite.game, finite.closure)
        risks.append(float(response.loss.detach()))
        rows.append(row)
        point = response.strategy.points[0][0]
        row = int(torch.stack([finite.loss(point @ w.T) for w in finite.weights]).argmin())
    assert rows == [0, 1, 0, 1, 0, 1]
    assert risks == pytest.approx(6 * [1.0], abs=1e-6)
    matrix = finite.matrix().numpy()
    start = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    x, y = means(hedge(matrix, 0.05, 2000, start))
    tolerance = math.log(10 * 5) / (0.05 * 2000) + 0.05 / 4  # the bound from that start
    for mixed in (matrix.T @ x, matrix @ y):
        assert mixed == pytest.approx(0.5, abs=tolerance)


# Langevin ----------------------------------------------------------------------------------------

CURVATURE = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]]).double()
STEP, TEMPERATURE = 0.3, 0.4


def law(curvature):
    """Covariance τ·(A − γA²/2)⁻¹ of the chain x ← (I − γA)x + √(2γτ)ξ."""
    return TEMPERATURE * torch.linalg.inv(curvature - STEP / 2 * curvature @ curvature)


def test_chain_on_a_quadratic_leaves_its_exact_law_unchanged():
    unit, none = torch.eye(3).double(), torch.zeros(3, 3).double()

    def step(x, noise):
        drift = -x @ CURVATURE
        return langevin.step(x, drift, STEP, TEMPERATURE, lambda like: noise)

    transition, spread = step(unit, none), step(none, unit)
    covariance = law(CURVATURE)
    moved = transition.T @ covariance @ transition + spread.T @ spread
    torch.testing.assert_close(moved, covariance, rtol=1e-12, atol=1e-14)


def second_moments(chains, steps):
    """Moments of independent chains of the adversary's move, each row one chain."""
    ascent = Ascent(
        step_size=STEP, temperature=TEMPERATURE, normalize="none", radius=None, unit="absolute"
    )
    noise = Noise(0)
    noise.begin("adversary", 0)
    x = torch.full((chains, 3), 3.0, dtype=torch.float64)
    for _ in range(steps):
        x = ascent.move(x, -x @ CURVATURE, None, noise)
    return x.T @ x / chains


@pytest.mark.parametrize(
    ("chains", "steps"), [(4000, 60), pytest.param(200_000, 100, marks=pytest.mark.slow)]
)
def test_second_moments_of_the_adversary_follow_the_law_of_the_discrete_chain(chains, steps):
    expected = law(CURVATURE)
    variances = expected.diag()
    errors = ((variances[:, None] * variances + expected**2) / chains).sqrt()
    assert (abs(second_moments(chains, steps) - expected) < 4.5 * errors).all()
    continuous = TEMPERATURE * torch.linalg.inv(CURVATURE)
    assert abs(expected - continuous)[0, 0] > 10 * errors[0, 0]  # finer than the step's own bias


@given(st.floats(0, 5), st.floats(0, 5), st.sampled_from(["l1", "l2", "linf"]))
def test_projection_comes_after_the_noise(step_size, temperature, norm):
    ascent = Ascent(step_size=step_size, temperature=temperature, norm=norm, normalize="none")
    x = torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(5):
        drift, noise = torch.randn(2, 4, 6, dtype=torch.float64)
        free = x + step_size * drift + math.sqrt(2 * step_size * temperature) * noise
        x = langevin.step(x, drift, step_size, temperature, lambda like: noise, ascent.project)  # noqa: B023
        torch.testing.assert_close(x, ascent.project(free), rtol=1e-9, atol=1e-12)


def test_temperature_zero_draws_nothing():
    def refuse(kind, like):
        raise AssertionError("noise was drawn")

    x, drift = torch.randn(2, 3, 4)
    ascent = Ascent(normalize="none", radius=None, step_size=0.5)
    assert torch.equal(ascent.move(x, drift, None, refuse), x + 0.5 * drift)
    assert torch.equal(langevin.step(x, drift, 0.5), x + 0.5 * drift)


def test_scale_of_the_noise_reads_a_learning_rate_kept_on_the_device():
    assert float(langevin.noise_scale(torch.tensor(0.5), 4.0)) == langevin.noise_scale(0.5, 4.0)
    assert langevin.noise_scale(0.5, 4.0) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="temperature"):
        langevin.step(torch.zeros(1), torch.zeros(1), 0.1, 1.0)
