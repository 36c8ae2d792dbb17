"""VAT, ALUM and R3F to leading order: quadratic forms of the Fisher matrix Jᵀ(diag p − ppᵀ)J."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import mixadv
from mixadv.maths.divergence import symmetric_kl
from mixadv.model.noise import Noise
from tests.worlds import added, gradients
from tests.zoo import small, text_batch, without_dropout

WIDTH = 5
seeds = st.integers(0, 999)


class Softmax:
    """A linear softmax model on a batch of rows; its Fisher matrices are exact."""

    def __init__(self, rows=4, classes=3, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Linear(WIDTH, classes).double()
        self.x = torch.randn(rows, WIDTH).double()
        self.labels = torch.arange(rows) % classes

    def closure(self):
        logits = self.model(self.x)
        return F.cross_entropy(logits, self.labels), logits

    def fisher(self) -> Tensor:
        W = self.model.weight.detach()
        p = self.model(self.x).detach().softmax(-1)
        return W.T @ (p.diag_embed() - p[:, :, None] * p[:, None]) @ W


class Turned(Noise):
    """The opposite draws."""

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        return -super().__call__(kind, like)


def played(player, solver, noise=Noise) -> tuple[mixadv.Game, Tensor]:
    """Play a round; return the game and its δ, one row per sample."""
    game = mixadv.Game(player.model, solver)
    game.rounds.arena.noise = noise(0)
    game.backward(player.closure)
    return game, game.strategy.points[0][0].flatten(1) * game.strategy.unit


def gained(game: mixadv.Game) -> float:
    """What the divergence adds to the clean loss."""
    return float(game.outcome.objective - game.outcome.clean_loss)


def form(fisher: Tensor, delta: Tensor) -> Tensor:
    """The quadratic forms δᵀHδ, `[B]`."""
    return (delta[:, None] @ fisher @ delta[:, :, None]).flatten()


def vat(steps, **words) -> mixadv.VAT:
    """Its step size has no say: a step from the start would hardly leave it."""
    options = {"radius": 0.7, "start_size": 1e-4, "step_size": 1e-5, "unit": "absolute"} | words
    return mixadv.VAT(steps=steps, **options)


# VAT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_power_iteration_converges_to_the_top_eigenvector(classes):
    player = Softmax(rows=50, classes=classes)
    fisher = player.fisher()
    values, vectors = torch.linalg.eigh(fisher)
    ends = [played(player, vat(steps))[1] / 0.7 for steps in (1, 3, 30, 300)]
    quotients = torch.stack([form(fisher, r) / values[:, -1] for r in ends])
    assert (quotients.diff(dim=0) > -1e-6).all()  # each step turns towards it
    assert (quotients[-1] > 0.999).all()
    apart = values[:, -2] < 0.95 * values[:, -1]
    assert apart.sum() > 30
    assert ((vectors[:, :, -1] * ends[-1]).sum(1).abs()[apart] > 0.999).all()


@given(seed=seeds)
def test_one_iteration_is_the_hessian_times_the_start(seed):
    player = Softmax(seed=seed)
    _, start = played(player, mixadv.UniformNoise(radius=1.0, start="normal", unit="absolute"))
    _, r = played(player, vat(1))
    expected = (player.fisher() @ start[:, :, None])[:, :, 0]
    assert (F.cosine_similarity(r, expected) > 1 - 1e-6).all()


@given(seed=seeds, steps=st.integers(1, 5))
def test_a_start_in_the_opposite_direction_ends_on_the_same_line(seed, steps):
    player = Softmax(seed=seed)
    (_, one), (_, other) = (played(player, vat(steps), noise) for noise in (Noise, Turned))
    assert (F.cosine_similarity(one, -other) > 1 - 1e-6).all()


@given(
    seed=seeds,
    steps=st.integers(1, 3),
    radius=st.floats(1e-3, 50.0),
    norm=st.sampled_from(["l1", "l2", "linf"]),
)
def test_the_perturbation_has_exactly_the_radius(seed, steps, radius, norm):
    game, _ = played(Softmax(seed=seed), vat(steps, radius=radius, norm=norm))
    for length in game.strategy.norms(norm):
        torch.testing.assert_close(length, torch.full_like(length, radius))


def test_in_an_encoder_it_is_the_eigenvector_over_real_tokens():
    """J by automatic differentiation of the model behind its embedding."""
    player = small(rows=5)
    model = without_dropout(player.model).eval()
    embedded = model.embedding(player.batch["ids"]).detach()
    real = (player.batch["ids"] != 0)[..., None]

    def behind(words: Tensor, real: Tensor) -> Tensor:
        hidden = model.hidden((words * real).sum(0) / real.sum(0))
        return model.head(model.normalise(torch.tanh(hidden)[None]))[0]

    jacobians = torch.func.vmap(torch.func.jacrev(behind))(embedded, real).flatten(2).detach()
    p = model(player.batch["ids"]).detach().softmax(-1)
    middle = p.diag_embed() - p[:, :, None] * p[:, None]
    values, vectors = torch.linalg.eigh(jacobians.mT @ middle @ jacobians)
    assert (values[:, -2] < 0.9 * values[:, -1]).all()
    game = mixadv.Game(model, vat(200, radius=0.1))
    game.backward(player.closure())
    r = game.strategy.points[0][0]
    assert not (r * ~real).any()
    assert ((vectors[:, :, -1] * r.flatten(1)).sum(1).abs() / 0.1 > 0.999).all()


@pytest.mark.parametrize("smoothness", [0.5, 3.0])
def test_the_divergence_there_is_half_the_top_eigenvalue(smoothness):
    """KL(p ‖ X + r) = ½ ε² λ_max to leading order, and twice that symmetrically."""
    player = Softmax()
    top = torch.linalg.eigvalsh(player.fisher())[:, -1].mean()
    for kind, share in [("kl", 0.5), ("symmetric_kl", 1.0), ("js", 0.125)]:
        solver = vat(300, radius=1e-3, smoothness_weight=smoothness, divergence=kind)
        game, _ = played(player, solver)
        assert gained(game) == pytest.approx(float(smoothness * share * 1e-6 * top), rel=2e-3)


@given(seed=seeds)
def test_in_regression_the_slope_is_found_in_one_iteration(seed):
    torch.manual_seed(seed)
    model = nn.Linear(WIDTH, 1).double()
    x, y = torch.randn(2, 4, WIDTH).double()

    def closure():
        return (model(x)[:, 0] - y[:, 0]).square().mean(), model(x)

    game = mixadv.Game(model, vat(1, divergence="squared_error"))
    game.backward(closure)
    assert gained(game) == pytest.approx(0.49 * float(model.weight.detach().square().sum()))


# R3F and ALUM -----------------------------------------------------------------------------------


@given(seed=seeds, size=st.floats(1e-4, 1e-3))
def test_noise_is_punished_by_its_quadratic_form(seed, size):
    """A symmetric KL is δᵀHδ to leading order, whatever the noise."""
    player = Softmax(seed=seed)
    solver = mixadv.R3F(radius=size, norm="linf", unit="absolute", smoothness_weight=2.0)
    game, noise = played(player, solver)
    expected = 2.0 * form(player.fisher(), noise).mean()
    assert gained(game) == pytest.approx(float(expected), rel=0.02)


def cube(s: float) -> mixadv.R3F:
    """U(−σ, σ) of each coordinate: of variance σ²/3."""
    return mixadv.R3F(radius=s, norm="linf", unit="absolute")


def ball(s: float) -> mixadv.R3F:
    """U(−σ, σ)/√N of each coordinate."""
    return mixadv.R3F(radius=s, unit="absolute")


def bell(s: float) -> mixadv.R3F:
    """N(0, σ²/N) of each coordinate."""
    return mixadv.R3F(radius=9 * s, start_size=s, start="normal", unit="absolute")


VARIANCES = {cube: 1 / 3, ball: 1 / (3 * WIDTH), bell: 1 / WIDTH}


@pytest.mark.parametrize("noise", VARIANCES, ids=[f.__name__ for f in VARIANCES])
def test_the_mean_over_noise_is_its_variance_times_the_trace(noise):
    """One sample in 40 000 rows: as many draws. E zᵀHz = σ²·tr H; five standard errors."""
    player, size = Softmax(rows=1), 1e-3
    trace = float(player.fisher()[0].trace()) * size**2 * VARIANCES[noise]
    player.x, player.labels = player.x.expand(40_000, -1), player.labels.expand(40_000)
    game, z = played(player, noise(size))
    spread = form(player.fisher(), z).std() / math.sqrt(len(z))
    assert spread < 0.01 * trace
    assert abs(gained(game) - trace) < 5 * float(spread)


def test_the_worst_case_is_punished_by_the_top_eigenvalue():
    """ALUM's maximum of δᵀHδ over the ball is ε²·λ_max."""
    player = Softmax(rows=50)
    words = {"radius": 1e-3, "start_size": 1e-3, "step_size": 1e3, "unit": "absolute"}
    game, _ = played(player, mixadv.ALUM(steps=100, normalize="none", projection="sphere", **words))
    top = torch.linalg.eigvalsh(player.fisher())[:, -1].mean()
    assert gained(game) == pytest.approx(1e-6 * float(top), rel=0.01)


@pytest.mark.parametrize("name", ["vat", "alum", "r3f"])
def test_in_pre_training_predictions_are_those_at_masked_places(name):
    """Several predictions per row, as many as places are masked."""
    torch.manual_seed(0)
    size = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1}
    model = without_dropout(BertForMaskedLM(BertConfig(**size, **layers)).double())
    batch = text_batch(4)
    masked = (torch.rand(batch["input_ids"].shape) < 0.3) & (batch["attention_mask"] > 0)
    labels, ids = batch["input_ids"][masked], batch["input_ids"].masked_fill(masked, 4)

    def closure():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[masked]
        return F.cross_entropy(logits, labels), logits

    solver = mixadv.make_solver(name, smoothness_weight=10.0, divergence="symmetric_kl")
    game = mixadv.Game(model, solver)
    game.backward(closure)
    delta = game.unit * game.strategy.points[0][0]
    assert delta.any()
    found = gradients(model)
    loss, clean = closure()
    with added((model.bert.embeddings.word_embeddings, delta)):
        perturbed = closure()[1]
    fixed = clean.detach() if name == "vat" else clean
    (loss + 10.0 * symmetric_kl(perturbed, fixed).mean()).backward()
    torch.testing.assert_close(found, gradients(model))
