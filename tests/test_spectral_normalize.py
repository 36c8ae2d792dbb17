"""R4F's head: 1-Lipschitz by power iteration, whose buffers every round replays."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import AdamW

import mixadv
from mixadv.solvers.r3f import spectral_normalize
from tests.worlds import assert_resumes, breaking
from tests.zoo import Player, assert_same, fingerprint, player, small, wrapped

SOLVERS = {
    "r3f": mixadv.R3F(),
    "freelb": mixadv.FreeLB(),
    "pgd": mixadv.PGD(),
    "vat": mixadv.VAT(),
    "smart": mixadv.SMART(steps=2),
    "mat": mixadv.MAT(steps=2, particles=2, learner_steps=2, learner_temperature=1e-4),
    "freeat": mixadv.FreeAT(steps=3),
    "cat": mixadv.CAT(source="hidden"),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
sides = st.integers(1, 6)


def normalised(seed: int = 0) -> Player:
    """A model whose head is normalised, its power iteration still far from its end."""
    one = small(seed=seed)
    head = spectral_normalize(one.model.head).parametrizations.weight[0]
    for buffer in (head._u, head._v):
        buffer.copy_(nn.functional.normalize(torch.randn(len(buffer)), dim=0))
    return one


def largest(layer: nn.Linear) -> float:
    return float(torch.linalg.svdvals(layer.weight.detach())[0])


# The norm -----------------------------------------------------------------------------------------


@given(rows=sides, columns=sides, size=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99))
def test_the_largest_singular_value_becomes_one(rows, columns, size, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows).double()
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    expected = u @ (0.8 ** torch.arange(len(s)).double()).diag() @ v
    layer.weight.data.copy_(size * expected)
    spectral_normalize(layer)
    for _ in range(100):
        layer(torch.zeros(1, columns).double())
    assert largest(layer) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_a_head_of_several_layers_is_no_expansion():
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    for layer in head[::2]:
        layer.weight.data.mul_(30)
    spectral_normalize(head.double())
    for _ in range(500):
        head(torch.zeros(1, 8).double())
    head.eval()
    one, other = torch.randn(2, 500, 8).double()
    for scale in (1e-4, 1.0, 100.0):
        apart = (head(one) - head(one + scale * other)).norm(dim=1)
        assert (apart <= scale * other.norm(dim=1) * (1 + 1e-6)).all()


def test_evaluation_iterates_no_further():
    one = normalised()
    one.model.eval()
    before = fingerprint(one.model)["buffers"]
    one.model(one.batch["ids"])
    assert_same(fingerprint(one.model)["buffers"], before)


def test_normalising_twice_is_normalising_once():
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    assert spectral_normalize(head) is head
    state, parameters = copy.deepcopy(head.state_dict()), list(head.parameters())
    spectral_normalize(head)
    assert_same(head.state_dict(), state)
    assert [id(p) for p in head.parameters()] == [id(p) for p in parameters]


def test_a_layer_parametrized_otherwise_is_normalised_too():
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(9)
    spectral_normalize(layer)
    for _ in range(100):
        layer(torch.zeros(1, 4))
    assert largest(layer) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("head", [nn.Embedding(3, 2), nn.Sequential(nn.Conv2d(1, 1, 1))])
def test_a_head_without_a_linear_layer_is_refused(head):
    with pytest.raises(ValueError, match=rf"{type(head).__name__} holds no nn\.Linear.*classifier"):
        spectral_normalize(head)


# In a round ---------------------------------------------------------------------------------------


@each_solver
def test_a_step_moves_the_power_iteration_as_one_forward_does(solver):
    """A twin of the head runs once per optimizer step, at the weights of that step."""
    one = normalised()
    twin = copy.deepcopy(one.model.head)
    optimizer, steps = wrapped(one.model, solver, lr=0.5), []

    def forward(*_):
        steps.append(1)
        twin.load_state_dict(dict(twin.named_buffers()) | dict(one.model.head.named_parameters()))
        twin(torch.zeros(1, 5).double())

    optimizer.base.register_step_pre_hook(forward)
    for _ in range(3):
        optimizer.step(one.closure())
        assert_same(dict(one.model.head.named_buffers()), dict(twin.named_buffers()))
    assert len(steps) == 3 * optimizer.outcome.steps


@pytest.mark.parametrize(
    ("solver", "words"),
    [(mixadv.R3F, {}), (mixadv.ALUM, {}), (mixadv.MAT, {"learner_steps": 3, "average": None})],
)
def test_passes_of_a_step_see_the_same_weights_while_the_norm_is_being_found(solver, words):
    """A divergence at δ = 0 would be that of two power iterations, and whatever weight it has."""
    weights = []
    for smoothness in (0.0, 1e3):
        one = normalised()
        played = solver(radius=0.0, smoothness_weight=smoothness, **words)
        optimizer = wrapped(one.model, played, lr=2.0)
        for _ in range(4):
            optimizer.step(one.closure())
        weights.append(one.model.state_dict())
    assert_same(*weights)


@each_solver
def test_a_broken_round_leaves_the_power_iteration_where_it_was(solver):
    one = normalised()
    optimizer = wrapped(one.model, solver, lr=0.5)
    optimizer.step(one.closure())
    before = fingerprint(one.model)["buffers"]
    with pytest.raises(MemoryError):
        optimizer.step(breaking(one.closure(), optimizer.outcome.forwards))
    assert_same(fingerprint(one.model)["buffers"], before)


@each_solver
def test_resumed_is_uninterrupted(solver, tmp_path):
    def build(seed):
        one = normalised(seed)
        return one, wrapped(one.model, solver, AdamW, lr=0.05)

    assert_resumes(build, tmp_path, before=2, after=2)


def test_an_encoder_learns_with_its_head_normalised():
    one = player("bert", rows=12)
    spectral_normalize(one.model.classifier)
    optimizer = wrapped(one.model, mixadv.R3F(), AdamW, lr=2e-2)
    first = optimizer.step(one.closure())
    for _ in range(12):
        last = optimizer.step(one.closure())
    assert last < 0.8 * first
    assert largest(one.model.classifier) < 1.05
