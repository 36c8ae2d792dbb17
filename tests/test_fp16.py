"""fp16: payoffs are scaled, so that gradients neither vanish nor overflow; scalers are obeyed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.maths.divergence import symmetric_kl
from tests.test_game import no_reads
from tests.zoo import assert_same, or_refused, overflow, play, player, wrapped

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def fp16(enabled: bool = True, device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, torch.float16, enabled=enabled)


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


class Bag(nn.Module):
    """Embedding, layer and head, with statistics over the batch or without."""

    def __init__(self, coupled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(20, 8)
        self.layer = nn.Linear(8, 8)
        self.normalise = nn.BatchNorm1d(8) if coupled else nn.Identity()
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.normalise(self.layer(self.words(ids)).tanh().mean(1)))


IDS = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4) % 3


def classify(
    model: nn.Module, weight: Any = 1.0, reduction: str = "mean"
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a closure; autocast ends within it, as that of Accelerate within the model."""

    def closure() -> tuple[Tensor, Tensor]:
        device = model.words.weight.device
        logits = model(IDS.to(device))
        labels = LABELS.to(device).repeat(len(logits) // 4)  # a stack of copies
        loss = F.cross_entropy(logits.float(), labels, reduction=reduction)
        return weight * loss, logits

    return closure


def gradients(
    half: bool | str,
    solver: mixadv.Solver,
    *,
    coupled: bool = False,
    weight: Any = 1.0,
    reduction: str = "mean",
    device: str = "cpu",
) -> Tensor:
    """Return the payoffs' gradients at the solver's start, `[M, B, n, d]`."""
    model = Bag(coupled).to(device)
    if half == "weights":
        model.half()
    game = mixadv.Game(model, solver)
    closure = classify(model, weight, reduction)
    with fp16(half == "autocast", device), game.rounds.rehearse(closure) as stage:
        stage.clean()
        _, _, slopes = stage.payoffs(stage.start(solver), solver.gain, solver)
    scaling = game.rounds.arena.calibration.scaling
    assert scaling == (None if not half else "batch" if coupled else "sample")
    assert slopes[0].dtype == torch.float32
    return slopes[0]


def assert_alike(low: Tensor, full: Tensor, tolerance: float = 0.05) -> None:
    """Assert that each sample's gradient is that of full precision within rounding."""
    error = (low - full).flatten(2).norm(dim=2) / full.flatten(2).norm(dim=2)
    assert (error < tolerance).all(), error


# The adversary's gradients -----------------------------------------------------------------------


def weighted(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a divergence with a weight for each sample."""

    def divergence(perturbed: Tensor, clean: Tensor) -> Tensor:
        values = symmetric_kl(perturbed, clean)
        return values * weights.to(values).repeat(len(values) // len(weights))

    return divergence


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", ["autocast", "weights"])
@pytest.mark.parametrize("route", ["loop", "vmap", "stack"])
@settings(max_examples=settings.default.max_examples // 3)  # of four sizes each
@given(exponents=st.lists(st.integers(-60, 60), min_size=4, max_size=4))
@example([-30, 0, 10, 30])
def test_each_samples_divergence_has_its_gradient_whatever_its_size(
    route: Any, half: str, device: str, exponents: list[int]
) -> None:
    weights = 2.0 ** torch.tensor(exponents)
    settings = {"particles": 2, "particle_batching": route, "start_size": 0.5}
    settings |= {"learner_steps": 1, "learner_temperature": 0.0}
    settings |= {"damping": 0.0, "round_damping": 0.0, "average": None}
    solver = mixadv.MAT(divergence=weighted(weights), **settings)
    low, full = (gradients(h, solver, device=device) for h in (half, False))
    # fp16 weights change the predictions too, and by more than the sums of a backward pass do.
    assert_alike(low, full, 0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@given(exponent=st.integers(-36, 24))
def test_a_loss_has_its_gradient_whatever_its_size(
    reduction: str, device: str, exponent: int
) -> None:
    settings = {"weight": 2.0**exponent, "reduction": reduction, "device": device}
    low, full = (gradients(h, mixadv.PGD(), **settings) for h in ("autocast", False))
    assert_alike(low, full)


@pytest.mark.parametrize("payoff", ["loss", "symmetric_kl"])
def test_samples_that_share_statistics_share_a_scale(payoff: str) -> None:
    """A scale of its own would weigh what a sample does to the payoffs of others."""
    solver = mixadv.PGD(payoff=payoff, start_size=0.5)
    low, full = (gradients(half, solver, coupled=True) for half in ("autocast", False))
    assert_alike(low, full)


def test_the_scale_of_a_loss_follows_its_gradient() -> None:
    model, weight = Bag(), torch.ones(())
    game = mixadv.Game(model, mixadv.PGD(steps=1, start="zero"))
    closure = classify(model, weight)
    with fp16():
        for size, patience in [(1.0, 0), (1e-6, 1), (1e-9, 1), (1e-6, 0), (1.0, 2), (1e3, 1)]:
            weight.fill_(size)
            for _ in range(patience):
                game.backward(closure, backward=lambda loss: loss)
            outcome = game.backward(closure, backward=lambda loss: loss)
            assert outcome.nonfinite == 0
            assert outcome.radius == pytest.approx(game.solver.step_size, rel=1e-4)


LONG = torch.randint(0, 20, (64, 4096), generator=torch.Generator().manual_seed(0))


def long(model: nn.Module, rows: int, weight: float = 1.0) -> Callable[[], Tensor]:
    """Return a closure on long texts: gradients shrink on their way to δ by their length."""
    labels = torch.arange(rows) % 3
    return lambda: weight * F.cross_entropy(model(LONG[:rows]).float(), labels)


@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weight", [1.0, 1e-4])
@pytest.mark.parametrize("rows", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_a_gradient_that_shrinks_on_its_way_to_delta_neither_vanishes_nor_overflows(
    rows: int, weight: float, steps: int
) -> None:
    model = Bag()
    game = mixadv.Game(model, mixadv.PGD(steps=steps, start="zero"))
    with fp16():
        for _ in range(6):
            outcome = game.backward(long(model, rows, weight), backward=lambda loss: loss)
            assert outcome.nonfinite == 0
            assert outcome.radius > 0.99 * game.solver.step_size


@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("name", ["plain", "fgm", "freelb", "textat"])
def test_on_long_texts_a_scaler_skips_no_step_more_than_in_plain_training(name: str) -> None:
    model, scales = Bag(), []
    base: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = base if name == "plain" else wrapped(model, name, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for _ in range(3):
        with fp16():
            closure = long(model, 4)
            loss = closure() if name == "plain" else optimizer.game.loss(closure)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10] * 3


def test_a_batch_that_is_broken_whatever_its_scale_costs_itself_alone() -> None:
    model, weight = Bag(), torch.ones(())
    game = mixadv.Game(model, mixadv.PGD(steps=1, start="zero"))
    with fp16():
        game.backward(classify(model, weight), backward=lambda loss: loss)
        for broken in [True] * 5 + [False] * 3:
            weight.fill_(torch.nan if broken else 1.0)
            outcome = game.backward(classify(model, weight), backward=lambda loss: loss)
            assert outcome.nonfinite == 4 * broken
        assert outcome.radius == pytest.approx(game.solver.step_size, rel=1e-4)


def test_a_sample_that_overflows_does_not_shrink_the_scale_of_others() -> None:
    model = Bag()
    game = mixadv.Game(model, mixadv.PGD(steps=1, start="zero"))

    closure = classify(model)
    with fp16():
        game.backward(closure, backward=lambda loss: loss)
        found = game.rounds.memory["scale"]
        model.layer.register_forward_pre_hook(overflow)
        for _ in range(8):
            outcome = game.backward(closure, backward=lambda loss: loss)
            assert outcome.nonfinite == 1
    assert game.rounds.memory["scale"][0] == found[0]


def test_scales_are_measured_where_autocast_begins_within_the_model() -> None:
    """As Accelerate does it; hooks on the model itself run before."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with fp16():
                return self.layer(x)

    model, x = Inner(), torch.randn(3, 6)
    game = mixadv.Game(model, mixadv.PGD(start="zero", steps=1))
    game.backward(lambda: 1e-9 * F.cross_entropy(model(x).float(), torch.arange(3)))
    assert game.rounds.arena.calibration.scaling == "batch"  # the predictions are not known
    assert game.outcome.radius == pytest.approx(game.solver.step_size, rel=1e-4)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_wider_formats_are_not_scaled(name: str) -> None:
    model = Bag()
    optimizer = wrapped(model, name, radius=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(classify(model))
    assert optimizer.game.rounds.arena.calibration.scaling is None
    assert "scale" not in optimizer.game.rounds.memory


@pytest.mark.parametrize("name", ["pgd", "mat", "freelb"])
def test_resuming_in_fp16_is_not_interrupting(name: str) -> None:
    def go(optimizer: mixadv.GameOptimizer) -> None:
        for size in (1.0, 1e-3, 1e-5):
            with fp16():
                play(optimizer, classify(optimizer.game.model, size), "loss")

    model, other = Bag(), Bag()
    optimizer, resumed = wrapped(model, name), wrapped(other, name)
    go(optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(optimizer)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go(resumed)
    assert_same(dict(other.named_parameters()), dict(model.named_parameters()))
    assert_same(resumed.game.rounds.memory, optimizer.game.rounds.memory)


def test_an_evaluation_in_fp16_leaves_no_scale_behind() -> None:
    model = Bag().eval()
    game = mixadv.Game(model, mixadv.PGD())
    with fp16():
        mixadv.equilibrium.exploitability(game, classify(model), steps=2, restarts=1)
    assert (game.rounds.arena.calibration.scaling, game.rounds.memory) == (None, {})


@pytest.mark.parametrize("name", ["pgd", "smart", "freelb", "cat"])
def test_rounds_in_fp16_read_nothing_from_the_device(name: str, monkeypatch: Any) -> None:
    model = Bag()
    game = wrapped(model, name).game
    with fp16():
        game.loss(classify(model)).backward()
        with no_reads(monkeypatch):
            game.loss(classify(model)).backward()


# Under a gradient scaler -------------------------------------------------------------------------


def train(
    name: str,
    way: str,
    half: bool,
    *,
    device: str = "cpu",
    size: float = 1.0,
    broken: tuple[int, ...] = (),
    left_out: tuple[int, ...] = (),
    growth: int = 2,
    start: int = 0,
    steps: int = 4,
) -> dict[str, Any]:
    """Train in fp16 under a scaler, or without; return everything that moved."""
    model = Bag().to(device)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = mixadv.Schedule(start=start)
    optimizer = mixadv.wrap(base, model, mixadv.make_solver(name), schedule=schedule)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=growth)
    game, scales, first = optimizer.game, [], []

    def backward(loss: Tensor) -> None:
        scaler.scale(loss).backward()

    for number in range(steps):
        with fp16(half, device):
            if way == "loss":
                backward(game.loss(classify(model, size)))
            else:
                game.backward(classify(model, size), backward=backward)
        if number in left_out:
            optimizer.zero_grad()
            scaler.update(scaler.get_scale() / 2)
            continue
        if number in broken:
            model.head.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        if not first:
            first = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    state = optimizer.state_dict()
    memory = {k: v for k, v in game.rounds.memory.items() if k != "scale"}
    return {
        "model": model.state_dict(),
        "base": {k: v for k, v in state.items() if k != "mixadv"},
        "learner": state["mixadv"]["learner"],
        "memory": memory,
        "updates": game.rounds.updates,
        "scales": scales,
        "gradients": first,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["loss", "backward"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused()
def test_a_scaled_gradient_is_that_of_full_precision_within_rounding(
    name: str, way: str, device: str
) -> None:
    for size in (1.0, 1e-5):
        runs = [train(name, way, half, size=size, device=device, steps=1) for half in (True, False)]
        low, full = (torch.cat([g.flatten() for g in run["gradients"]]) for run in runs)
        assert F.cosine_similarity(low, full, dim=0) > 0.99
        assert low.norm() == pytest.approx(float(full.norm()), rel=0.05)


@pytest.mark.parametrize("name", ["freelb", "textat"])
def test_passes_before_the_last_do_not_vanish_from_a_loss_to_be_scaled(name: str) -> None:
    """A scaler multiplies what the loss delivers, not what it was computed from."""
    low, full = (train(name, "loss", half, size=1e-6, steps=1) for half in (True, False))
    for one, other in zip(low["gradients"], full["gradients"], strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("way", ["loss", "backward"])
def test_a_raw_gradient_of_delta_is_taken_out_of_the_scaled_loss(way: str) -> None:
    lengths = []
    for half in (True, False):
        model, scaler = Bag(), torch.amp.GradScaler("cpu", enabled=half)
        game = mixadv.Game(model, mixadv.FreeLB(normalize="none", radius=None, start="zero"))
        closure = classify(model, 1e-3, "none")
        with fp16(half):
            if way == "loss":
                scaler.scale(game.loss(closure)).backward()
            else:
                game.backward(closure, backward=lambda loss, s=scaler: s.scale(loss).backward())
        lengths.append(game.strategy.norms()[0])
    torch.testing.assert_close(*lengths, rtol=0.02, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["loss", "backward"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused()
def test_a_step_that_overflows_is_left_out_and_nothing_else(
    name: str, way: str, device: str
) -> None:
    settings = {"device": device, "steps": 5, "growth": 99, "start": 2}
    one = train(name, way, True, broken=(1, 3), **settings)
    other = train(name, way, True, left_out=(1, 3), **settings)
    assert one.pop("scales") == [2.0**12, 2.0**11, 2.0**11, 2.0**10, 2.0**10]
    assert other.pop("scales") == [2.0**12, 2.0**11, 2.0**10]
    assert one["updates"] == 3
    assert_same(one, other)


@pytest.mark.parametrize("way", ["loss", "backward"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused()
def test_the_scale_grows_as_in_plain_training(name: str, way: str) -> None:
    run = train(name, way, True, steps=4)
    assert run["scales"] == [2.0**12, 2.0**13, 2.0**13, 2.0**14]
    assert run["updates"] == 4


def test_weights_in_fp16_are_refused_by_the_scaler_not_by_the_game() -> None:
    model = Bag().half()
    game = mixadv.Game(model, mixadv.FreeLB())
    game.loss(classify(model)).backward()
    assert all(p.grad.dtype == torch.float16 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vision"])
def test_transformers_play_in_fp16(family: str) -> None:
    for name in ("pgd", "smart", "freelb"):
        p = player(family, rows=4)
        game = wrapped(p, name).game
        with fp16():
            outcome = game.backward(p.closure())
        assert outcome.nonfinite == 0
        scaling = game.rounds.arena.calibration.scaling
        assert scaling == ("batch" if family == "vision" else "sample")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stack_that_cannot_replay_dropout_is_refused_in_low_formats_too(
    dtype: torch.dtype,
) -> None:
    model = Bag()
    model.normalise = nn.Dropout(0.5)
    solver = mixadv.MAT(particles=3, particle_batching="stack", start_size=0.5)
    refused = pytest.raises(mixadv.GameError, match="cannot replay dropout")
    with torch.autocast("cpu", dtype), refused:
        wrapped(model, solver).step(classify(model, reduction="none"))
