"""Compiled models: the same rounds, no graph made anew, and never a silent loss of δ."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import mixadv
from tests.test_checkpointing import wrapped
from tests.test_site import classify
from tests.zoo import USUAL, Vision, copies, hooks, player, slow_but, without_dropout


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


def compiled(model: nn.Module, backend: str = "eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def rounds(optimizer: mixadv.GameOptimizer, closures: list[Callable[[], Any]]) -> list[Tensor]:
    """Play rounds and return their outcomes, strategies and the weights they end with."""
    seen: list[Tensor] = []
    for closure in closures:
        seen.append(optimizer.step(closure))
        seen += copies(optimizer.game.strategy.points)
    return seen + copies(optimizer.game.model.parameters())


def same(one: list[Tensor], other: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def plays_alike(
    name: str,
    make: Callable[[], nn.Module],
    closures: Callable[[Any], list[Callable[[], Any]]],
    wrap: Callable[[nn.Module], Any] = compiled,
    site: Any = None,
) -> None:
    """Compare the rounds on a model with those on its wrapped twin."""
    models = [make(), wrap(make())]
    same(*(rounds(wrapped(model, name, site=site), closures(model)) for model in models))


def twice(model: Any) -> list[Callable[[], Any]]:
    return [classify(model, ids())] * 2


def called(batch: Tensor) -> Any:
    """Return a compiled model whose first call came before any game."""
    model = compiled(Tiny())
    classify(model, batch)()[0].mean().backward()
    model.zero_grad()
    return model


@contextmanager
def or_told(words: str = "compiled", errors: Any = mixadv.GameError) -> Iterator[None]:
    """Let pass what is refused for being compiled."""
    try:
        yield
    except errors as error:
        assert words in str(error)  # noqa: PT017


def still() -> nn.Module:
    """Without dropout, of which inductor draws other masks."""
    return without_dropout(Tiny())


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_compiled_rounds_equal_plain_ones_and_compile_no_more(name: str) -> None:
    plays_as_compiled(name)


@pytest.mark.parametrize(
    "words",
    [{"direction": "gauss_newton"}, {"sign": "boundary", "steps": 2}, {"recompute": True}],
    ids=["leap", "sign", "recompute"],
)
def test_other_ways_to_ascend_play_the_same_compiled(words: dict[str, Any]) -> None:
    plays_as_compiled("smart", **words)


@pytest.mark.parametrize("source", ["dropout", "head"])
@pytest.mark.parametrize("name", ["creat", "cat"])
def test_a_representation_leaves_the_graph_it_is_computed_in(name: str, source: str) -> None:
    plays_as_compiled(name, source=source)


def plays_as_compiled(name: str, **settings: Any) -> None:
    plain = Tiny()
    expected = rounds(wrapped(plain, name, **settings), [classify(plain, ids())] * 3)
    model = compiled(Tiny())
    optimizer = wrapped(model, name, **settings)
    seen = [optimizer.step(classify(model, ids()))]
    seen += optimizer.game.strategy.points
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        seen += rounds(optimizer, twice(model))
    assert counters["stats"]["unique_graphs"] == graphs
    same(seen, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "mat"),
        ("llama", "freelb"),
        ("vision", "smart"),
        ("bert", "cat"),
        ("llama", "creat"),
    ],
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
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    plays_alike(name, lambda: still().double(), twice, partial(compiled, backend=backend))


@pytest.mark.parametrize("name", slow_but(USUAL, mixadv.SOLVERS))
def test_batches_of_other_shapes_play_the_same_rounds(name: str) -> None:
    shapes = [(4, 5), (4, 7), (6, 5)]
    plays_alike(name, Tiny, lambda model: [classify(model, ids(*shape)) for shape in shapes])


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
        *((name, "called") for name in (*USUAL, "freeat", "textat", "cat", "creat")),
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
    expected = rounds(wrapped(plain, name), twice(plain))
    model = called(ids()) if earlier == "called" else compiled(Tiny())
    if earlier == "evaluated":
        with torch.no_grad():
            model(ids())
    elif earlier != "called":
        first = mixadv.Game(model, mixadv.PGD())
        first.backward(classify(model, ids()))
        model.zero_grad()
        if "closed" in earlier:
            first.close()
    try:
        seen = rounds(wrapped(model, name), twice(model))
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

    def seeded() -> nn.Module:
        torch.manual_seed(1)
        return make()

    with or_told("compile", (mixadv.GameError, TypeError, ValueError)):
        plays_alike("freelb", seeded, lambda m: [classify(m, batch())] * 2, site=site)


def right_or_refused(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], Any]) -> bool:
    """Return whether FreeLB plays what it plays on the plain model; else it must be refused."""
    with or_told():
        plays_alike("freelb", make, twice, wrap)
        return True
    return False


def part(name: str, in_place: bool) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        if in_place:
            model.get_submodule(name).compile(backend="eager")
        else:
            setattr(model, name, compiled(model.get_submodule(name)))
        return model

    return wrap


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, without a game too
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_that_does_not_hold_the_site_changes_nothing(in_place: bool) -> None:
    assert right_or_refused(Tiny, part("layer", in_place))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Tiny()
        self.tail = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tail(self.body(ids))


def test_a_compiled_part_that_holds_the_site_gets_its_delta() -> None:
    assert right_or_refused(Holder, part("body", in_place=False))


class Checkpointed(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        embed = lambda ids: self.dropout(self.layer(self.words(ids)).tanh())  # noqa: E731
        return self.head(checkpoint(embed, ids, use_reentrant=False).mean(1))


def test_a_site_that_a_compiled_model_recomputes_is_refused() -> None:
    assert not right_or_refused(Checkpointed, compiled)


class Peeking(Tiny):
    """Embeds its words a second time, under no_grad."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.words(ids).mean((1, 2))[:, None]
        return super().forward(ids) + seen


def test_a_site_that_a_compiled_model_calls_under_no_grad_too_is_refused_in_words() -> None:
    model = compiled(Peeking())
    with pytest.raises(mixadv.GameError, match=r"\['words'\] under no_grad too.* do not compile"):
        wrapped(model, "pgd").step(classify(model, ids()))


class Flipped(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.flip(1))


def test_padding_that_no_input_of_a_compiled_model_tells_is_refused() -> None:
    assert not right_or_refused(Flipped, compiled)


class Typed(Tiny):
    def forward(self, types: Tensor, ids: Tensor) -> Tensor:
        return super().forward(ids) + 0 * types.sum()


def test_padding_is_that_of_the_input_the_embedding_is_called_with() -> None:
    inputs = torch.zeros_like(ids()), ids()
    plays_alike("freelb", Typed, lambda model: [classify(model, *inputs)] * 2)


def test_a_model_called_twice_in_a_closure_gets_both_deltas() -> None:
    def closures(model: Any) -> list[Callable[[], Tensor]]:
        targets = torch.arange(4) % 3
        return [lambda: F.cross_entropy(model(ids()) + model(ids(length=3)), targets)] * 2

    plays_alike("freelb", still, closures)


def test_a_shape_that_ran_before_the_game_is_right_or_refused_when_it_comes_again() -> None:
    plain = Tiny()
    batches = [ids(4), ids(6)]
    expected = rounds(wrapped(plain, "freelb"), [classify(plain, batch) for batch in batches])
    model = called(batches[1])
    with or_told():
        seen = rounds(wrapped(model, "freelb"), [classify(model, batch) for batch in batches])
        same(seen, expected)


def test_resetting_the_compiler_lets_a_model_that_ran_before_play() -> None:
    plain = Tiny()
    expected = rounds(wrapped(plain, "freelb"), twice(plain))
    model = called(ids())
    optimizer = wrapped(model, "freelb")
    with pytest.raises(mixadv.GameError, match=r"torch\.compiler\.reset\(\)"):
        optimizer.step(classify(model, ids()))
    torch.compiler.reset()
    same(rounds(optimizer, twice(model)), expected)
