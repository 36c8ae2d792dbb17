"""Divergences between predictions against the textbook formulas, and their small-noise limit."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.func import jacrev

import mixadv
from mixadv.maths.divergence import DIVERGENCES, fixed_symmetric_kl, js, kl, symmetric_kl
from mixadv.maths.likelihood import label_losses, label_margins
from mixadv.model.closure import Reading, parse_output

SOFTMAX = [name for name in DIVERGENCES if name not in ("squared_error", "bernoulli")]
SYMMETRIC = [name for name in DIVERGENCES if name != "kl"]
# What δᵀHδ is multiplied by, with H the Fisher matrix of the logits (for squared error, JᵀJ).
CURVATURE = {"kl": 1 / 2, "symmetric_kl": 1.0, "js": 1 / 8, "squared_error": 1.0, "bernoulli": 1.0}
CURVATURE["fixed_symmetric_kl"] = 1.0  # of its value
EXACT = [name for name in DIVERGENCES if not name.startswith("fixed")]  # the value's own gradient

divergences = pytest.mark.parametrize("name", DIVERGENCES)
entries = {"elements": st.floats(-20, 20), "fill": st.nothing()}
logits = st.sampled_from([(1, 2), (3, 2), (2, 3, 4), (2, 5)]).flatmap(
    lambda shape: st.tuples(*2 * [arrays(np.float64, shape, **entries)])
)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def relative_entropy(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def formula(name, perturbed, clean):
    if name == "squared_error":
        return ((perturbed - clean) ** 2).sum(-1)
    if name == "bernoulli":  # two classes for each label, of which the second has the logit 0
        pairs = [np.stack([x, np.zeros_like(x)], -1) for x in (perturbed, clean)]
        return formula("symmetric_kl", *pairs).sum(-1)
    q, p = log_softmax(perturbed), log_softmax(clean)
    if name == "js":
        middle = np.logaddexp(p, q) - np.log(2)
        return 0.5 * relative_entropy(p, middle) + 0.5 * relative_entropy(q, middle)
    forward = relative_entropy(p, q)
    return forward if name == "kl" else forward + relative_entropy(q, p)


@divergences
@given(pair=logits)
def test_values_are_those_of_the_formula(name, pair):
    perturbed, clean = pair
    result = DIVERGENCES[name](*map(torch.tensor, pair))
    np.testing.assert_allclose(result, formula(name, perturbed, clean), rtol=1e-9, atol=1e-12)


@divergences
@given(pair=logits)
def test_never_negative_and_zero_only_where_predictions_agree(name, pair):
    perturbed, clean = map(torch.tensor, pair)
    values = DIVERGENCES[name](perturbed, clean)
    assert (values > -1e-12).all()
    links = {"squared_error": lambda x: x, "bernoulli": torch.sigmoid}
    read = links.get(name, lambda x: x.softmax(-1))
    apart = (read(perturbed) - read(clean)).abs().sum(-1)
    assert (values[apart > 1e-4] > 1e-10).all()
    assert DIVERGENCES[name](clean, clean.clone()).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["kl", "js"])
def test_a_class_that_one_rules_out_counts_for_the_other_alone(name):
    """p = (½, ½, 0), q = (¼, ¼, ½): KL(p ‖ q) = log 2, and the mean of both is no 0."""
    clean = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    perturbed = torch.tensor([0.0, 0.0, math.log(2)], requires_grad=True)
    value = DIVERGENCES[name](perturbed, clean)
    p, q = (torch.tensor(x) for x in ([0.5, 0.5], [0.25, 0.25]))
    m = (p + q) / 2
    js = 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum() + 0.5 * math.log(2))
    assert value.item() == pytest.approx({"kl": math.log(2), "js": float(js)}[name])
    gradients = torch.autograd.grad(value, [clean, perturbed])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", SOFTMAX)
@given(pair=logits, out=st.sets(st.integers(0, 4)))
def test_classes_that_both_rule_out_count_nothing(name, pair, out):
    """As if they were not there: value and gradients, in single precision."""
    size = pair[0].shape[-1]
    kept = [c for c in range(size) if c not in out] or [0]
    rest = [c for c in range(size) if c not in kept]
    both = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in pair]
    masked = [x.index_fill(-1, torch.tensor(rest, dtype=torch.long), -torch.inf) for x in both]
    exact = [torch.tensor(x[..., kept], requires_grad=True) for x in pair]
    values, expected = DIVERGENCES[name](*masked), DIVERGENCES[name](*exact)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(values.sum(), both)
    targets = torch.autograd.grad(expected.sum(), exact)
    for gradient, target in zip(gradients, targets, strict=True):
        assert not gradient[..., rest].any()
        torch.testing.assert_close(gradient[..., kept].double(), target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SYMMETRIC)
@given(pair=logits)
def test_symmetric_in_its_arguments(name, pair):
    one, other = map(torch.tensor, pair)
    measure = DIVERGENCES[name]
    torch.testing.assert_close(measure(one, other), measure(other, one), rtol=1e-12, atol=1e-14)


@given(pair=logits)
def test_js_is_at_most_log_two(pair):
    assert (js(*map(torch.tensor, pair)) <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize("name", SOFTMAX)
@given(pair=logits, shifts=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
def test_adding_a_constant_to_logits_changes_nothing(name, pair, shifts):
    one, other = map(torch.tensor, pair)
    measure = DIVERGENCES[name]
    shifted = measure(one + shifts[0], other + shifts[1])
    torch.testing.assert_close(shifted, measure(one, other), rtol=1e-9, atol=1e-12)


@divergences
@pytest.mark.parametrize("size", [200.0, 1e4])
@pytest.mark.parametrize("autocast", [False, True])
def test_confident_logits_have_finite_value_and_gradient(name, size, autocast):
    signs = torch.tensor(list(itertools.product([-size, 0.0, size], repeat=3)))
    pairs = list(itertools.product(signs, repeat=2))
    one, other = (torch.stack(side).requires_grad_() for side in zip(*pairs, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        dtype = torch.bfloat16 if autocast else torch.float32
        values = DIVERGENCES[name](one.to(dtype), other.to(dtype))
    assert values.dtype == torch.float32
    expected = formula(name, *(x.detach().to(dtype).double().numpy() for x in (one, other)))
    np.testing.assert_allclose(values.detach(), expected, rtol=1e-5, atol=1e-6)
    values.sum().backward()
    assert one.grad.isfinite().all()
    assert other.grad.isfinite().all()


@pytest.mark.parametrize("name", EXACT)
def test_gradients_of_both_arguments(name):
    pair = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(DIVERGENCES[name], pair)


def test_fixed_targets_have_the_gradient_of_released_code():
    """That of `F.kl_div` both ways, its targets detached: a difference of probabilities."""
    one, other = torch.randn(2, 5, 3, dtype=torch.float64)
    one.requires_grad_()
    other.requires_grad_()
    fixed_symmetric_kl(one, other).sum().backward()
    apart = (one.softmax(-1) - other.softmax(-1)).detach()
    torch.testing.assert_close(one.grad, apart, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other.grad, -apart, rtol=1e-12, atol=1e-14)


def test_gradient_against_a_fixed_target_is_the_difference_of_probabilities():
    one, other = torch.randn(2, 5, 3, dtype=torch.float64)
    one.requires_grad_()
    kl(one, other.detach()).mean().backward()
    expected = (one.detach().softmax(-1) - other.softmax(-1)) / 5
    torch.testing.assert_close(one.grad, expected, rtol=1e-12, atol=1e-14)


def test_equal_predictions_have_exactly_no_smoothness_loss_and_no_gradient():
    one = torch.randn(5, 3, requires_grad=True)
    other = one.detach().clone().requires_grad_()
    value = symmetric_kl(one, other)
    value.sum().backward()
    assert not value.any()
    assert not one.grad.any()
    assert not other.grad.any()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def fisher():
    """A network, an input, and the matrix H of the quadratic form of each divergence."""
    f, x = Network().requires_grad_(False), torch.randn(3, dtype=torch.float64)
    jacobian, p = jacrev(f)(x), f(x).softmax(-1)
    fisher = jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
    forms = {**dict.fromkeys(SOFTMAX, fisher), "squared_error": jacobian.T @ jacobian}
    yes = f(x).sigmoid()
    forms["bernoulli"] = jacobian.T @ (yes * (1 - yes)).diag() @ jacobian
    return f, x, forms


@pytest.mark.parametrize("name", EXACT)
def test_small_perturbations_see_the_fisher_matrix(name, fisher):
    f, x, forms = fisher
    clean, expected = f(x), CURVATURE[name] * forms[name]

    def value(delta):
        return DIVERGENCES[name](f(x + delta), clean)

    curvature = jacrev(jacrev(value))(torch.zeros_like(x))
    torch.testing.assert_close(curvature / 2, expected, rtol=1e-9, atol=1e-12)
    direction = torch.randn_like(x)
    errors = [
        float(value(h * direction) - h**2 * direction @ expected @ direction) for h in (1e-2, 5e-3)
    ]
    assert abs(errors[1]) < 0.2 * abs(errors[0])  # third order: an eighth


@divergences
def test_mean_under_small_uniform_noise_is_the_trace(name, fisher):
    f, x, forms = fisher
    clean, sigma = f(x), 1e-3
    nodes, weights = np.polynomial.legendre.leggauss(3)
    mean = 0.0
    for where in itertools.product(range(3), repeat=3):
        delta = sigma * torch.tensor(nodes[list(where)])
        share = float((weights[list(where)] / 2).prod())
        mean += share * float(DIVERGENCES[name](f(x + delta), clean))
    expected = CURVATURE[name] * sigma**2 / 3 * float(forms[name].trace())
    assert mean == pytest.approx(expected, rel=1e-4)


@divergences
def test_predictions_per_token_are_averaged_over_real_tokens(name):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    perturbed, clean = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    perturbed[mask == 0] = torch.tensor([200.0, -200.0, 1e4, 0.0, 0.0], dtype=torch.float64)
    perturbed.requires_grad_()
    values = Reading(torch.zeros(()), perturbed, mask > 0).diverge(clean, DIVERGENCES[name])
    each = formula(name, perturbed.detach().numpy(), clean.numpy())
    expected = [each[0, :3].mean(), each[1, 0], 0.0]
    np.testing.assert_allclose(values.detach(), expected, rtol=1e-9)
    values.sum().backward()
    assert not perturbed.grad[mask == 0].any()


@divergences
def test_over_tokens_the_mean_of_the_values_is_that_over_all_real_tokens(name):
    clean, perturbed = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    reading = Reading(torch.zeros(()), perturbed, mask)
    each = DIVERGENCES[name](perturbed, clean)[mask.bool()]
    found = reading.diverge(clean, DIVERGENCES[name], "tokens")
    assert found.mean() == pytest.approx(each.mean().item(), rel=1e-5)
    one = Reading(torch.zeros(()), perturbed[:, 0])
    own = one.diverge(clean[:, 0], DIVERGENCES[name])
    assert torch.equal(one.diverge(clean[:, 0], DIVERGENCES[name], "tokens"), own)


@divergences
def test_predictions_per_token_in_low_precision_give_single_precision(name):
    perturbed, clean = torch.randn(2, 3, 4, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = Reading(torch.zeros(()), perturbed).diverge(clean, DIVERGENCES[name])
    assert values.dtype == torch.float32
    expected = formula(name, perturbed.double().numpy(), clean.double().numpy()).mean(-1)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def of_kind(decoded: bool = False, **kind: Any) -> Any:
    """Stand for a model of the transformers library, of a kind of loss."""
    return SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=decoded), **kind)


def test_real_tokens_are_those_of_the_side_that_predicts():
    mask, other = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    result = torch.zeros(()), torch.zeros(1, 3, 4)
    context = {"attention_mask": mask, "decoder_attention_mask": other}
    assert parse_output(result, [context]).mask.tolist() == [[True, True, False]]
    assert parse_output(result, [context], of_kind(True)).mask.tolist() == [[True, False, False]]
    labels = {"attention_mask": mask, "labels": torch.tensor([[5, 0, -100]])}
    assert parse_output(result, [labels], of_kind(True)).mask.tolist() == [[True, True, False]]
    assert parse_output(result).mask is None


def test_masks_and_labels_are_those_that_fit_the_predictions():
    """Prompt tuning puts tokens in front, and only the model within knows of them."""
    result = torch.zeros(()), torch.zeros(1, 4, 5)
    outer = {"attention_mask": torch.ones(1, 3), "labels": torch.tensor([[1, 2, -100]])}
    inner = {
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 1, 2, 3]]),
    }
    assert parse_output(result, [outer, inner]).mask.tolist() == [[False, True, True, False]]
    assert parse_output(result, [outer]).mask is None


def test_labels_in_a_result_tell_where_predictions_count():
    output = {"loss": torch.zeros(()), "logits": torch.zeros(1, 3, 4)}
    labels = torch.tensor([[-100, 2, -100]])
    assert parse_output({**output, "labels": labels}).mask.tolist() == [[False, True, False]]


TOKENS = torch.tensor([[-100, -100, 5, 6, -100], [7, 8, 9, -100, 5], [-100] * 5])
REAL = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (of_kind(loss_type="ForTokenClassification"), ["00110", "11101", "11100"]),
        (of_kind(loss_type="ForMaskedLM"), ["00110", "11101", "11100"]),
        (object(), ["00110", "11101", "11100"]),
        # The logits of a token foretell the next: those of the last one nothing.
        (of_kind(loss_type="ForCausalLM"), ["01100", "11010", "11100"]),
        (of_kind(loss_type=None, can_generate=lambda: True), ["01100", "11010", "11100"]),
        (of_kind(loss_type=None, can_generate=lambda: False), ["00110", "11101", "11100"]),
    ],
)
def test_predictions_count_where_the_loss_is_computed(kind, expected):
    """In samples without a label, which a divergence does not need, all real tokens count."""
    result = torch.zeros(()), torch.zeros(3, 5, 4)
    counting = parse_output(result, [{"attention_mask": REAL, "labels": TOKENS}], kind).mask
    assert ["".join(str(int(i)) for i in row) for row in counting] == expected
    assert parse_output(result, [{"labels": TOKENS}], kind).mask[2].all()


def test_two_heads_that_point_at_tokens_are_two_predictions():
    start, end = torch.randn(2, 3, 7)
    output = {"loss": torch.zeros(()), "start_logits": start, "end_logits": end}
    context = {"attention_mask": torch.ones(3, 7)}
    for result in (output, SimpleNamespace(**output), (output["loss"], output)):
        found = parse_output(result, [context])
        torch.testing.assert_close(found.predictions, torch.stack([start, end], 1))
        assert found.mask is None


def test_own_function_serves_as_payoff():
    def own(perturbed, clean):
        return (perturbed - clean).square().sum(-1)

    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 3])
    model, played = Network(), []
    for payoff in (own, "squared_error"):
        game = mixadv.Game(model, mixadv.PGD(payoff=payoff, steps=2))
        game.backward(lambda: (nn.functional.cross_entropy(model(x), y), model(x)))
        played.append(game.strategy.points[0])
    assert torch.equal(*played)


LOW = [-3e4, -1e6, 1e6]


@pytest.mark.parametrize("shift", LOW)
@pytest.mark.parametrize("name", SOFTMAX)
def test_low_logits_beside_classes_that_are_ruled_out(name: str, shift: float):
    """Distances to prototypes are such logits: what stands for −∞ must be lower still."""
    pair = torch.tensor([[0.0, -1.0, -torch.inf]]).double(), torch.tensor([[-1.0, 0, -torch.inf]])
    expected = DIVERGENCES[name](pair[0][:, :2], pair[1][:, :2].double())
    found = DIVERGENCES[name](*(x.double() + shift for x in pair))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shift", LOW)
def test_heads_of_different_width_are_joined_at_any_level(shift: float):
    """Classes that the narrow one lacks have no probability, whatever its logits are."""
    narrow = torch.tensor([[0.0, -1.0]]).double(), torch.tensor([[-1.0, 0.0]]).double()
    wide = torch.zeros(1, 3).double()
    one, two = (parse_output((torch.tensor(0.0), (x + shift, wide))) for x in narrow)
    assert one.predictions is not None
    assert two.diverge(one.predictions, kl).item() == pytest.approx(kl(*narrow).item())


@pytest.mark.parametrize("shift", [*LOW, 0.0])
def test_losses_and_margins_of_labels_do_not_depend_on_the_level(shift: float):
    logits = 5 * torch.randn(6, 4).double()
    labels = torch.arange(6) % 4
    found = (logits + shift).requires_grad_()
    losses = label_losses(found, labels)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    (slope,) = torch.autograd.grad(label_margins(found, labels).sum(), found)
    rivals = logits.scatter(1, labels[:, None], -torch.inf).softmax(1)
    torch.testing.assert_close(slope, rivals - F.one_hot(labels, 4))
