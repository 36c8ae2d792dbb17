"""Mixtures of members: what is in play, what is predicted, and that nothing is left behind."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.errors import GameError
from mixadv.mixtures import Dropout, Mean, Mixture, mixture_of


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def three(kind: str) -> Mixture:
    if kind == "models":
        return Mixture([Net(1), Net(2), Net(3)], [1, 2, 3])
    if kind == "masks":
        return Mixture([Dropout(seed) for seed in range(3)], [1, 2, 3], model=Net().train())
    return Mixture([Net(seed).state_dict() for seed in (1, 2, 3)], [1, 2, 3], model=Net().train())


MEDIAN: Any = "median"
KINDS = ("models", "weights", "masks")


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_plays_alone_and_leaves_no_trace(kind: str):
    mixture = three(kind)
    weights = {name: value.clone() for name, value in mixture.state_dict().items()}
    modes, state = [m.training for m in mixture.modules()], torch.get_rng_state()
    played: list[Tensor] = []
    with contextlib.suppress(KeyError), mixture.member(1) as module:
        played = [mixture(X), module(X), mixture(X)]
        raise KeyError
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in mixture.modules()]
    assert all(torch.equal(played[0], other) for other in played[1:])
    if kind != "masks":
        torch.testing.assert_close(played[0], Net(2).eval()(X), rtol=0, atol=0)
    assert all(torch.equal(weights[n], v) for n, v in mixture.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mixture.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_members(kind: str):
    mixture = three(kind)
    each = mixture.each(lambda: mixture(X)).double()
    shares = torch.tensor([1.0, 2.0, 3.0]).double() / 6
    mean = sum(s * e for s, e in zip(shares, each, strict=True))
    torch.testing.assert_close(mixture.predict(lambda: mixture(X)).double(), mean)
    votes = torch.zeros(5, 4).double()
    for share, own in zip(shares, each, strict=True):
        votes[torch.arange(5), own.argmax(-1)] += share
    torch.testing.assert_close(mixture.predict(lambda: mixture(X), "vote").double(), votes)
    drawn = mixture.predict(lambda: mixture(X), "draw", seed=3).double()
    assert torch.equal(drawn, mixture.predict(lambda: mixture(X), "draw", seed=3).double())
    assert all(any(torch.equal(row, e[i]) for e in each) for i, row in enumerate(drawn))


@pytest.mark.parametrize("how", ["mean", "vote", "draw"])
def test_predictions_per_token_are_those_of_each_token(how: Any):
    """As many rows as members: weights must not be taken for those of rows."""
    mixture, x = three("models"), torch.randn(3, 2, 3)
    found = mixture.predict(lambda: mixture(x), how)
    if how == "draw":  # a row's tokens have one member
        each = mixture.each(lambda: mixture(x))
        assert all(any(torch.equal(row, e[i]) for e in each) for i, row in enumerate(found))
        return
    flat = mixture.predict(lambda: mixture(x.flatten(0, 1)), how)
    torch.testing.assert_close(found.flatten(0, 1), flat)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_what_is_no_classifier_has_no_prediction(shape: tuple[int, ...]):
    mixture = three("models")
    with pytest.raises(ValueError, match=r"logits \[B, C\] of two or more, got \[5"):
        mixture.predict(lambda: mixture(X).mean(-1).view(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_as_a_classifier_is_the_mean_of_the_predictions(kind: str):
    mixture = three(kind)
    found = Mean(mixture)(X)
    torch.testing.assert_close(found.exp(), mixture.predict(lambda: mixture(X)))
    assert not found.requires_grad


def test_the_mean_of_predictions_per_token_weighs_members_and_not_rows():
    members = [nn.Linear(2, 4), nn.Linear(2, 4)]
    mixture = Mixture(members, [0.9, 0.1])
    x = torch.randn(2, 3, 2)  # as many rows as members
    mean = sum(p * m(x).softmax(-1) for p, m in zip((0.9, 0.1), members, strict=True))
    torch.testing.assert_close(Mean(mixture)(x).exp(), mean)


def test_the_loss_of_the_mean_is_finite_where_all_members_are_sure_and_wrong():
    sure = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        sure.weight.copy_(torch.tensor([[500.0], [-500.0]]))
    logits = Mean(Mixture([sure, sure]))(torch.ones(1, 1))
    assert nn.functional.cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(1000)


def test_a_draw_is_by_the_probabilities():
    mixture = three("models")
    rows = X[:1].expand(4000, 3)
    each = mixture.each(lambda: mixture(rows))[:, 0]
    drawn = mixture.predict(lambda: mixture(rows), "draw", seed=0)
    found = torch.stack([(drawn == e).all(-1).double().mean() for e in each])
    torch.testing.assert_close(found, mixture.probabilities, atol=0.03, rtol=0)


def test_rows_that_come_one_by_one_do_not_all_meet_the_same_member():
    """As served requests do: a fixed seed would play a pure strategy."""
    mixture, row = three("models"), X[:1]
    state = torch.get_rng_state()
    found = [mixture.predict(lambda: mixture(row), "draw") for _ in range(60)]
    assert torch.equal(state, torch.get_rng_state())
    met = {int((mixture.each(lambda: mixture(row)) == f).all(-1).nonzero()[0, 0]) for f in found}
    assert met == {0, 1, 2}  # one is missed with a probability of (5/6)^60, 2e-5


def test_members_of_different_classes_are_refused_in_words():
    mixture = Mixture([nn.Linear(3, 2), nn.Linear(3, 4)])
    with pytest.raises(GameError, match=r"in one shape, got \(5, 2\), \(5, 4\)"):
        mixture.predict(lambda: mixture(X))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_all_members_does_not_predict_by_the_first(kind: str):
    """Its casts of the weights outlive a swap of their values."""
    mixture = three(kind)
    plain = mixture.each(lambda: mixture(X))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixture.each(lambda: mixture(X)), plain, atol=0.02, rtol=0)
        torch.testing.assert_close(Mean(mixture)(X).exp(), mixture.predict(lambda: mixture(X)))


def test_autocast_around_an_average_does_not_predict_by_the_live_weights():
    model = Net().eval()
    base = torch.optim.SGD(model.parameters(), lr=5.0)
    optimizer = mixadv.wrap(base, model, mixadv.MAT(average="uniform"))

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(X)
        return nn.functional.cross_entropy(logits, torch.arange(5) % 4), logits

    for _ in range(3):
        optimizer.step(closure)
    with torch.no_grad(), optimizer.game.averaged():
        average = model(X)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        live = model(X)
        with optimizer.game.averaged():
            torch.testing.assert_close(model(X).float(), average, atol=0.05, rtol=0.05)
        assert torch.equal(model(X), live)
    assert not torch.allclose(live.float(), average, atol=0.5)


def test_masks_seed_no_generator_whose_state_does_not_come_back(monkeypatch: pytest.MonkeyPatch):
    """`torch.manual_seed` seeds every accelerator, and that of the model alone is put back."""
    mixture, seeded = three("masks"), []
    drawn = mixture.each(lambda: mixture(X))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    assert torch.equal(mixture.each(lambda: mixture(X)), drawn)
    assert not seeded


RETURNED: dict[str, Any] = {
    "a pair": lambda logits: (torch.zeros(()), logits),
    "a dict": lambda logits: {"logits": logits},
    "a dict with a loss": lambda logits: {"loss": torch.zeros(()), "logits": logits},
    "an output": lambda logits: SimpleNamespace(loss=None, logits=logits),
    "a pair with an output": lambda logits: (torch.zeros(()), SimpleNamespace(logits=logits)),
}


@pytest.mark.parametrize("what", RETURNED)
def test_what_closures_return_is_read_by_mixtures_too(what: str):
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = Net(seed)

        def forward(self, x: Tensor) -> Any:
            return RETURNED[what](self.net(x))

    mixture, told = three("models"), Mixture([Wrapped(s) for s in (1, 2, 3)], [1, 2, 3])
    expected = mixture.predict(lambda: mixture(X))
    found = mixture.predict(lambda: RETURNED[what](mixture(X)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(Mean(told)(X).exp(), expected)


@pytest.mark.parametrize("result", [torch.zeros(()), {"loss": torch.zeros(())}, (X,), None])
def test_what_holds_no_logits_is_refused_in_words(result: Any):
    mixture = three("models")
    with pytest.raises(
        (ValueError, mixadv.GameError), match=r"\(loss, logits\)|loss and logits|\[B"
    ):
        mixture.predict(lambda: result)


def test_probabilities_lie_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        found = Mixture([{}, {}], model=nn.Linear(1, 1)), Mixture([{}, {}], [1, 3], model=Net())
    assert [m.probabilities.tolist() for m in found] == [[0.5, 0.5], [0.25, 0.75]]


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda values: sum(values) > 1e-3))
def test_probabilities_are_numbers_divided_by_their_sum(values: list[float]):
    mixture = Mixture([{}, {}, {}], values, model=nn.Linear(1, 1))
    assert abs(float(mixture.probabilities.sum()) - 1) < 1e-12
    assert (mixture.probabilities >= 0).all()


def test_large_numbers_are_probabilities_too():
    assert Mixture([Net(), Net()], [1e308, 1e308]).probabilities.tolist() == [0.5, 0.5]


def test_masks_drawn_anew_are_others():
    mixture = three("masks")
    assert isinstance(mixture.members[0], Dropout)
    again = [member.drawn_anew(5) for member in mixture.members]
    fresh = Mixture(again, model=mixture.model)
    old, new = mixture.each(lambda: mixture(X)), fresh.each(lambda: fresh(X))
    assert all(not torch.equal(a, b) for a in old for b in new)
    assert three("weights").members[0].drawn_anew(5)


def test_the_mixture_of_a_game_is_that_of_its_samples():
    model = Net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, model, mixadv.MAT(samples=3))

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(X)
        return nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 0])), logits

    for _ in range(3):
        optimizer.step(closure)
    mixture = mixture_of(optimizer.game)
    model.eval()
    expected = optimizer.game.mixture(lambda: model(X)).exp()
    torch.testing.assert_close(mixture.predict(lambda: mixture(X)), expected)
    optimizer.step(closure)  # the mixture's samples are its own
    torch.testing.assert_close(mixture.predict(lambda: mixture(X)), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture([]), "at least one member"),
        (lambda: Mixture([{}]), r"Mixture\(…, model=model\)"),
        (lambda: Mixture([{"x": X}], model=Net()), "no tensor of this name"),
        (lambda: Mixture([{"layers.0.bias": X}], model=Net()), "differ in shape"),
        (lambda: Mixture([Net(), Net()], [1, -1]), "not negative"),
        (lambda: Mixture([Net(), Net()], [1]), "2 numbers"),
        (lambda: Mixture([Dropout(0)], model=nn.Linear(1, 1)), "no dropout"),
        (lambda: three("models").predict(lambda: X, MEDIAN), "'mean', 'draw', 'vote'"),
    ],
)
def test_what_is_no_mixture_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_mixture_of_a_game_stays_as_it_is_while_training_goes_on():
    """Running means of batch norm are no parameters, and what a sample predicts depends on them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = mixadv.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), model, mixadv.MAT(samples=2)
    )

    def step(x: torch.Tensor) -> None:
        def closure() -> Any:
            logits = model(x)
            return nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1, 1])), logits

        optimizer.step(closure)

    step(X)
    mixture = mixture_of(optimizer.game)
    before = mixture.predict(lambda: mixture(X))
    step(X + 3)
    assert torch.equal(before, mixture.predict(lambda: mixture(X)))


def test_a_mixture_has_no_output_of_its_own():
    mixture = three("models")
    with pytest.raises(mixadv.GameError, match="only while one of its members is in play"):
        mixture(X)
    with pytest.raises(mixadv.GameError, match="leave it"), mixture.member(0), mixture.member(1):
        pass
    with pytest.raises(TypeError, match="A member is weights by name"):
        Mixture([3], model=Net())  # pyright: ignore[reportArgumentType]
