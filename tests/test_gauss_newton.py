"""The Gauss–Newton ascent against the exact Hessian, and the sign towards the boundary."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.maths import gauss_newton
from mixadv.maths.divergence import DIVERGENCES
from tests.worlds import classified, gradients, played
from tests.zoo import WAYS, fingerprint, play, player, small, stepwise, wrapped

FACTOR = {"kl": 1.0, "symmetric_kl": 2.0, "js": 0.25}  # of the Hessian in diag(p) − ppᵀ
seeds = st.integers(0, 9999)


class Net(nn.Module):
    """From D inputs to C outputs, linear or with a layer between, in float64."""

    def __init__(self, inputs: int, outputs: int, seed: int, deep: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        parts = [nn.Linear(inputs, 7), nn.Tanh()] if deep else []
        self.outputs = outputs
        self.layers = nn.Sequential(*parts, nn.Linear(7 if deep else inputs, outputs)).double()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layers(x)


def solver(kind: Any = mixadv.ALUM, **words: Any) -> Any:
    return kind(direction="gauss_newton", radius=1e-4, unit="absolute", **words)


def found(model: nn.Module, x: Tensor, game_solver: mixadv.Solver) -> Tensor:
    """Return the δ that is played, `[B, D]`."""
    labels = torch.zeros(len(x), dtype=torch.long)

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(x)
        return (F.cross_entropy(logits, labels) if model.outputs > 1 else logits.sum()), logits

    game = mixadv.Game(model, game_solver, "input")
    game.backward(closure)
    return played(game)


def hessian(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return the divergence's Hessian in δ at 0, by differentiating it twice."""

    def gained(delta: Tensor) -> Tensor:
        return DIVERGENCES[name]((model((x + delta)[None])), model(x[None])).sum()

    return torch.autograd.functional.hessian(gained, torch.zeros_like(x))


@given(st.sampled_from([*FACTOR, "squared_error"]), st.booleans(), seeds)
def test_of_two_classes_or_one_output_it_is_the_first_eigenvector_of_the_exact_hessian(
    name: str, deep: bool, seed: int
):
    model = Net(6, 1 if name == "squared_error" else 2, seed, deep)
    x = torch.randn(3, 6, dtype=torch.float64)
    delta = found(model, x, solver(divergence=name))
    for row, point in zip(x, delta, strict=True):
        values, vectors = torch.linalg.eigh(hessian(model, row, name))
        unit = point / point.norm()
        quotient = unit @ (vectors * values) @ vectors.T @ unit
        assert quotient == pytest.approx(float(values[-1]), rel=1e-6)


@given(st.integers(2, 7), st.sampled_from([*FACTOR]), seeds)
def test_two_merged_labels_only_lower_the_quadratic_form(classes: int, name: str, seed: int):
    model, x = Net(6, classes, seed), torch.randn(1, 6, dtype=torch.float64)
    logits = model(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x[0])
    b = -gauss_newton.cotangent(logits, name)[0] @ jacobian
    pi = logits.softmax(-1).max()
    lower = FACTOR[name] * pi * (1 - pi) * torch.outer(b, b)
    gap = torch.linalg.eigvalsh(hessian(model, x[0], name) - lower)
    assert gap.min() >= -1e-9
    assert classes > 2 or gap.max() <= 1e-9


@given(st.integers(2, 6), seeds)
def test_towards_the_boundary_the_likeliest_label_gets_less_likely(classes: int, seed: int):
    model, x = Net(6, classes, seed, deep=True), torch.randn(4, 6, dtype=torch.float64)
    delta = found(model, x, solver())
    before, after = model(x).log_softmax(-1), model(x + delta).log_softmax(-1)
    label = before.argmax(-1, keepdim=True)
    assert (after.gather(1, label) < before.gather(1, label)).all()


def test_without_a_sign_half_of_the_samples_go_each_way():
    model, x = Net(6, 2, 0), torch.randn(2000, 6, dtype=torch.float64)
    delta = found(model, x, solver(sign="any"))
    before, after = model(x).log_softmax(-1), model(x + delta).log_softmax(-1)
    label = before.argmax(-1, keepdim=True)
    away = (after.gather(1, label) > before.gather(1, label)).double().mean()
    assert abs(float(away) - 0.5) < 4 * 0.5 / 2000**0.5


@given(seeds, st.sampled_from([1e-3, 1.0]), st.sampled_from([*FACTOR]))
def test_of_two_classes_it_reaches_what_a_long_ascent_reaches(seed: int, radius: float, name: str):
    """On a linear model the divergence grows along one line, and more towards the boundary."""
    model, x = Net(6, 2, seed), torch.randn(5, 6, dtype=torch.float64)
    words = {"radius": radius, "unit": "absolute", "divergence": name, "sign": "boundary"}
    leap = mixadv.ALUM(direction="gauss_newton", **words)
    long = mixadv.ALUM(steps=30, step_size=radius, start_size=radius / 10, **words)
    reached = [
        DIVERGENCES[name](model(x + found(model, x, s)), model(x)).detach() for s in (leap, long)
    ]
    torch.testing.assert_close(reached[0], reached[1], rtol=1e-6, atol=0)
    away = DIVERGENCES[name](model(x - found(model, x, leap)), model(x)).detach()
    assert (reached[0] >= away * (1 - 1e-9)).all()


def test_of_sure_predictions_the_direction_is_still_that_of_the_log_odds():
    logits = torch.tensor([[200.0, 0.0, -3.0], [-90.0, 90.0, 90.0 - 1e-3]])
    weights = gauss_newton.cotangent(logits, "kl")
    assert weights.isfinite().all()
    odds = torch.tensor([0.0, -3.0]).softmax(0)
    torch.testing.assert_close(weights[0], torch.tensor([-1.0, *odds.tolist()]))
    torch.testing.assert_close(weights[1], torch.tensor([0.0, -1.0, 1.0]))


@pytest.mark.parametrize(("name", "passes"), [("alum", 2), ("smart", 3), ("vat", 2), ("mat", 4)])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_step_costs_a_backward_and_no_forward(name: str, passes: int, steps: int):
    p = small()
    one = {"particles": 1} if name == "mat" else {}
    game_solver = mixadv.make_solver(name, direction="gauss_newton", steps=steps, **one)
    optimizer = wrapped(p.model, game_solver)
    optimizer.step(p.closure())
    outcome, expected = optimizer.outcome, optimizer.game.explain().passes
    assert (outcome.forwards, outcome.delta_backwards) == (passes + steps - 1, steps)
    assert (expected.forwards, expected.delta_backwards) == (passes + steps - 1, steps)


@given(st.integers(2, 5), seeds)
def test_later_steps_follow_the_gradient(classes: int, seed: int):
    model, x = Net(6, classes, seed, deep=True), torch.randn(4, 6, dtype=torch.float64)
    words = {"radius": 0.5, "unit": "absolute", "step_size": 0.2, "sign": "boundary"}
    one, three = (
        found(model, x, mixadv.ALUM(direction="gauss_newton", steps=k, **words)) for k in (1, 3)
    )
    by_hand = one.clone().requires_grad_()
    for _ in range(2):
        reached = DIVERGENCES["symmetric_kl"](model(x + by_hand), model(x).detach())
        (slope,) = torch.autograd.grad(reached.sum(), by_hand)
        after, before = model(x + by_hand).log_softmax(-1), model(x).log_softmax(-1)
        label = before.argmax(-1, keepdim=True)
        turn = torch.where(after.gather(1, label) > before.gather(1, label), -1.0, 1.0)
        moved = turn * (by_hand + 0.2 * F.normalize(slope, dim=1))
        moved = moved * (0.5 / moved.norm(dim=1, keepdim=True)).clamp(max=1)
        by_hand = moved.detach().requires_grad_()
    torch.testing.assert_close(three, by_hand.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("family", ["bert", "llama-causal", "gpt2", "t5", "vision"])
def test_a_leap_goes_as_far_as_the_ball_and_off_padding(family: str, per: Any, norm: Any):
    p = player(family, rows=4)
    game_solver = mixadv.ALUM(direction="gauss_newton", norm=norm, per=per, radius=0.3)
    game = mixadv.Game(p.model, game_solver)
    before = fingerprint(p.model)
    outcome = game.backward(p.closure())
    if family != "llama-causal" or per == "sample":  # whose last tokens move no prediction
        assert outcome.radius == pytest.approx(0.3, rel=1e-3)
    assert 0 < outcome.radius < 0.3001
    assert outcome.payoff > 0
    assert outcome.nonfinite == 0
    assert fingerprint(p.model)["hooks"] == before["hooks"]
    if family in ("bert", "llama-causal", "gpt2"):
        pads = p.batch["attention_mask"] == 0
        assert not game.strategy.points[0][0][pads].any()


@pytest.mark.parametrize("route", ["loop", "vmap", "stack"])
@pytest.mark.parametrize("name", ["pgd", "mat"])
def test_an_ascent_turns_towards_the_boundary(name: str, route: Any):
    model, x = Net(6, 3, 0, deep=True), torch.randn(50, 6, dtype=torch.float64)

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(x)
        labels = torch.zeros(len(logits), dtype=torch.long)
        return F.cross_entropy(logits, labels, reduction="none"), logits

    more = {"payoff": "kl"} if name == "pgd" else {"particles": 3, "play_as": "ensemble"}
    words = {"sign": "boundary", "start_size": 1e-3, "unit": "absolute", "particle_batching": route}
    game_solver = mixadv.make_solver(name, **words, **more)
    game = wrapped(model, game_solver, lr=0.0, site="input").game
    with game.rounds.rehearse(closure) as stage:
        logits = stage.clean().predictions.detach()
        label = logits.argmax(-1, keepdim=True)
        q = stage.start(game_solver)
        for turned in (True, False):  # once, for they lie there then
            found = [p.clone() for p in q.points]
            q, _, (slopes,) = stage.payoffs(q, game_solver.gain, game_solver)
            assert torch.equal(q.points[0], found[0]) != turned
            if turned:
                first = slopes
        assert (F.cosine_similarity(first, slopes, dim=-1) > 0.99).all()
        clean = logits.log_softmax(-1).gather(1, label)
        for m in range(q.size):
            moved = stage.passes.run(stage.passes.at(q, m)).predictions
            moved = moved.log_softmax(-1).gather(1, label)
            assert (moved <= clean).all()


REFUSED: dict[str, tuple[Any, str]] = {
    "a loss": (lambda: mixadv.PGD(direction="gauss_newton"), "takes a divergence.*got 'loss'"),
    "FreeLB": (
        lambda: mixadv.make_solver("freelb", direction="gauss_newton"),
        "FreeLB has no hyper-parameter 'direction'",
    ),
    "a function": (
        lambda: mixadv.ALUM(direction="gauss_newton", divergence=lambda a, b: a),
        "takes a divergence",
    ),
    "particles": (
        lambda: mixadv.MAT(direction="gauss_newton", particles=2),
        "starts with one step.*particles=2",
    ),
    "raw": (
        lambda: mixadv.ALUM(direction="gauss_newton", normalize="none"),
        "normalize other than",
    ),
    "no steps": (lambda: mixadv.ALUM(direction="gauss_newton", steps=0), "steps=1 or more"),
    "boundary of a loss": (lambda: mixadv.PGD(sign="boundary"), "makes a label less likely"),
    "boundary of a score": (
        lambda: mixadv.ALUM(sign="boundary", divergence="squared_error"),
        "makes a label less likely",
    ),
    "unknown": (lambda: mixadv.ALUM(direction="newton"), "Did you mean 'gauss_newton'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_such_direction_is_refused(case: str):
    build, why = REFUSED[case]
    with pytest.raises(ValueError, match=why):
        build()


def test_the_squared_error_of_several_outputs_has_no_such_direction():
    p = player("vision", rows=4)
    game_solver = mixadv.ALUM(direction="gauss_newton", divergence="squared_error")
    with pytest.raises(mixadv.GameError, match=r"for one output.*have 3: use direction='gradient'"):
        mixadv.Game(p.model, game_solver).backward(p.closure())


def test_checkpointed_rounds_equal_plain_ones_or_are_refused():
    expected = None
    for reentrant in (None, False, True):
        p = player("bert", rows=4)
        if reentrant is not None:
            words = {"use_reentrant": reentrant}
            p.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)
        game = mixadv.Game(p.model, mixadv.ALUM(direction="gauss_newton"))
        if reentrant:
            with pytest.raises(mixadv.GameError, match="use_reentrant=False"):
                game.backward(p.closure())
            continue
        game.backward(p.closure())
        found = gradients(p.model)
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_every_way_to_play_delivers_the_same_gradients():
    found = []
    for way in WAYS:
        p = small()
        optimizer = wrapped(p.model, mixadv.ALUM(direction="gauss_newton"))
        taken = stepwise(optimizer)
        torch.manual_seed(0)
        play(optimizer, p.closure(), way)
        found.append(taken[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-12)


class OneRow(nn.Module):
    """A row of tokens at the site, and a prediction for each of them: `[1, n]` to `[n, C]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids).tanh())[0]


@pytest.mark.parametrize("steps", [1, 2])
def test_where_rows_and_predictions_do_not_match_one_sign_is_drawn_for_all(steps: int):
    model, ids, labels = OneRow(), torch.randint(0, 20, (1, 7)), torch.randint(0, 3, (7,))
    closure = classified(model, ids, labels=labels)
    words = {"direction": "gauss_newton", "steps": steps}
    assert mixadv.Game(model, mixadv.ALUM(sign="any", **words)).backward(closure).payoff > 0
    game = mixadv.Game(model, mixadv.ALUM(sign="boundary", **words))
    if steps == 1:
        game.backward(closure)
        return
    with pytest.raises(
        mixadv.GameError, match=r"7 predictions and 1 rows.*leave out what needs it.*sign='any'"
    ):
        game.backward(closure)


def test_a_weight_does_not_vanish_where_a_label_is_sure():
    """√(π(1 − π)) at a gap of 20, in fp32, where π rounds to 1."""
    logits = torch.tensor([[[20.0, 0.0], [0.0, 1.0]]])
    found = gauss_newton.cotangent(logits, "kl")
    exact = gauss_newton.cotangent(logits.double(), "kl")
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=0)
    assert found[0, 0].abs().min() > 0


def test_it_is_no_direction_for_the_task_loss():
    model, ids = OneRow(), torch.zeros(1, 3, dtype=torch.long)
    ascent = mixadv.Ascent(direction="gauss_newton")
    game = mixadv.Game(model, mixadv.PGD())
    with game.rounds.rehearse(lambda: model(ids).sum()) as stage:  # noqa: SIM117
        with pytest.raises(mixadv.GameError, match="for divergences, and not for 'loss'"):
            stage.ascend("loss", ascent)


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3)])
def test_where_one_class_is_left_nothing_moves(shape: tuple[int, ...]):
    """Such as a token that a grammar leaves no choice: its neighbours are not to suffer."""
    logits = torch.tensor([3.0, -torch.inf, -torch.inf]).expand(shape)
    assert not gauss_newton.cotangent(logits, "kl").any()
