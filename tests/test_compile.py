"""Compiled models: the same rounds, no graph made anew, and never a silent loss of δ."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mixadv
from tests.zoo import Vision, player


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.layer = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.layer(self.words(ids)).tanh())
        return self.head(self.layer(x).mean(1))


def ids(rows: int = 4, length: int = 5, seed: int = 0) -> Tensor:
    made = torch.randint(1, 20, (rows, length), generator=torch.Generator().manual_seed(seed))
    made[::2, -2:] = 0
    return made


def classify(model: nn.Module, *inputs: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    labels = torch.arange(len(inputs[0])) % 3
    return lambda: (F.cross_entropy(logits := model(*inputs), labels), logits)


def compiled(model: nn.Module, backend: str = "eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def wrapped(model: nn.Module, name: str, **more: Any) -> mixadv.GameOptimizer:
    torch.manual_seed(2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return mixadv.wrap(base, model, mixadv.solver(name), **more)


def rounds(optimizer: mixadv.GameOptimizer, closures: list[Callable[[], Any]]) -> list[Tensor]:
    """Play rounds and return their outcomes, strategies and the weights they end with."""
    seen: list[Tensor] = []
    for closure in closures:
        seen.append(optimizer.step(closure))
        seen += [points.clone() for points in optimizer.game.strategy.points]
    return seen + [p.detach().clone() for p in optimizer.game.model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def hooks(model: nn.Module) -> list[Any]:
    held = [{**m._forward_hooks, **m._forward_pre_hooks}.values() for m in model.modules()]
    return [hook for group in held for hook in group]


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_compiled_rounds_equal_plain_ones_and_compile_no_more(name: str) -> None:
    plain = Tiny()
    expected = rounds(wrapped(plain, name), [classify(plain, ids())] * 3)
    model = compiled(Tiny())
    optimizer = wrapped(model, name)
    seen = [optimizer.step(classify(model, ids()))]
    seen += optimizer.game.strategy.points
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        seen += rounds(optimizer, [classify(model, ids())] * 2)
    assert counters["stats"]["unique_graphs"] == graphs
    same(seen, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"), [("bert", "mat"), ("llama", "freelb"), ("vision", "smart")]
)
def test_compiled_models_of_a_family_play_the_same_rounds(family: str, name: str) -> None:
    seen = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        p = player(family, rows=4, side="left")
        p = p._replace(model=wrap(p.model))
        optimizer = wrapped(p.model, name)
        seen.append(rounds(optimizer, [p.closure()] * 2))
        points = optimizer.game.strategy.points[0]
        assert family == "vision" or not points[:, p.batch["attention_mask"] == 0].any()
    same(*seen)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_other_compilers_play_the_same_rounds(name: str, backend: str) -> None:
    """Without dropout, of which inductor draws other masks."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    seen = []
    for wrap in (lambda model: model, partial(compiled, backend=backend)):
        plain = Tiny().double()
        plain.dropout.p = 0.0
        model = wrap(plain)
        seen.append(rounds(wrapped(model, name), [classify(model, ids())] * 2))
    same(*seen)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_batches_of_other_shapes_play_the_same_rounds(name: str) -> None:
    shapes = [(4, 5), (4, 7), (6, 5)]
    seen = []
    for wrap in (lambda model: model, compiled):
        model = wrap(Tiny())
        batches = [classify(model, ids(*shape)) for shape in shapes]
        seen.append(rounds(wrapped(model, name), batches))
    same(*seen)


def test_the_unit_of_a_compiled_model_is_explained_before_its_first_round() -> None:
    model = compiled(Tiny())
    game = mixadv.Game(model, mixadv.PGD())
    unit = game.explain(classify(model, ids())).unit
    real = ids()[ids() != 0]
    assert unit == pytest.approx(model.words(real).norm(dim=-1).mean().item(), rel=1e-6)
    assert game.backward(classify(model, ids())).radius > 0
    assert game.unit == unit


def test_outside_a_round_the_hook_does_nothing_and_close_removes_it() -> None:
    reference = Tiny().eval()
    model = compiled(Tiny())
    optimizer = wrapped(model, "freelb")
    assert hooks(model)
    optimizer.step(classify(model, ids()))
    reference.load_state_dict(model._orig_mod.state_dict())
    model.eval()
    other = ids(seed=1)
    with torch.no_grad():
        assert torch.equal(model(other), reference(other))
    assert torch.equal(model(other), reference(other))
    optimizer.game.close()
    assert not hooks(model)
    assert torch.equal(model(other), reference(other))


@pytest.mark.parametrize(
    ("name", "earlier"),
    [
        *((name, "called") for name in mixadv.SOLVERS),
        ("freelb", "evaluated"),
        ("freelb", "played"),
        ("freelb", "played and closed"),
    ],
)
def test_a_model_that_ran_before_its_game_never_trains_without_delta(
    name: str, earlier: str
) -> None:
    """Compiled code ignores hooks that come after its first call: that works, or is said."""
    plain = Tiny()
    expected = rounds(wrapped(plain, name), [classify(plain, ids())] * 2)
    model = compiled(Tiny())
    if earlier == "called":
        classify(model, ids())()[0].backward()
        model.zero_grad()
    elif earlier == "evaluated":
        with torch.no_grad():
            model(ids())
    else:
        first = mixadv.Game(model, mixadv.PGD())
        first.backward(classify(model, ids()))
        model.zero_grad()
        if "closed" in earlier:
            first.close()
    try:
        seen = rounds(wrapped(model, name), [classify(model, ids())] * 2)
    except mixadv.GameError as error:
        assert "compiled" in str(error)  # noqa: PT017
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    else:
        same(seen, expected)


def test_a_model_compiled_in_place_is_refused_with_the_reason() -> None:
    model = Tiny()
    model.compile(backend="eager")
    with pytest.raises(TypeError, match=r"model\.compile\(\).*torch\.compile\(model\)"):
        mixadv.Game(model, mixadv.PGD())
    inside = nn.Sequential(Tiny())
    inside[0].compile(backend="eager")
    with pytest.raises(TypeError, match=r"model\.compile\(\)"):
        mixadv.Game(inside, mixadv.PGD())


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


SITES = {
    "own input": (Vision, images, None),
    "hidden layer": (Tiny, ids, "dropout"),
    "called twice": (Tiny, ids, "layer"),
    "several": (Tiny, ids, ["words", "dropout"]),
}


@pytest.mark.parametrize("case", SITES)
def test_other_sites_of_a_compiled_model_are_right_or_refused(case: str) -> None:
    make, batch, site = SITES[case]
    seen = []
    for wrap in (lambda model: model, compiled):
        torch.manual_seed(1)
        model = wrap(make())
        closure = classify(model, batch())
        try:
            seen.append(rounds(wrapped(model, "freelb", site=site), [closure] * 2))
        except (mixadv.GameError, TypeError, ValueError) as error:
            assert "compile" in str(error)  # noqa: PT017
            return
    same(*seen)
