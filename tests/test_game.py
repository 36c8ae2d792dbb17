"""What a game means to the loop around it: gradients, losses, outcomes, evaluation, registry."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mixadv
from mixadv import MAT, PGD, Game, Step, Strategy
from mixadv.equilibrium import best_response
from tests.processes import one_process
from tests.zoo import (
    AROUND,
    MOVING,
    WAYS,
    BrokenError,
    Player,
    assert_same,
    fingerprint,
    or_refused,
    play,
    small,
    stepwise,
    varied,
    without_dropout,
    wrapped,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
# One optimizer step per round, so that a step and a backward play the same.
SOLVERS: dict[str, mixadv.Solver] = {name: mixadv.make_solver(name) for name in mixadv.SOLVERS} | {
    **MOVING,
    "mat": MAT(learner_steps=1),
    "ensemble": MAT(learner_steps=1, particles=3, play_as="ensemble", temperature=0.01),
    "divergence": PGD(payoff="js", steps=2),
    "leap": mixadv.ALUM(direction="gauss_newton"),
    "turned": mixadv.ALUM(sign="boundary", steps=2),
    "recomputed": MAT(learner_steps=1, particles=3, play_as="ensemble", recompute=True),
    "recomputed views": mixadv.CAT(recompute=True),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def start(solver: mixadv.Solver, **settings: Any) -> tuple[mixadv.GameOptimizer, Player]:
    player = small(**settings)
    return wrapped(player, solver, lr=1.0), player


def masked(name: str, fresh: bool) -> mixadv.Solver:
    """Return a solver with new dropout masks in each pass, or with one for all."""
    again = SOLVERS[name].recompute and not fresh  # refused together
    return varied(SOLVERS[name], fresh_dropout=fresh, recompute=again)


def gradients(player: Player) -> dict[str, Tensor | None]:
    return fingerprint(player.model)["gradients"]


# Three ways to one gradient ------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("reduction", ["mean", "none"])
@or_refused("backward")
def test_step_backward_and_loss_deliver_the_same_gradient(name: str, reduction: str):
    """A step of SGD at rate 1 shows its gradient as θ_t − θ_{t+1}."""
    results: dict[str, dict[str, Tensor | None]] = {}
    objectives, states = [], []
    for how in ("backward", "loss", "step"):
        optimizer, player = start(SOLVERS[name], reduction=reduction)
        game, caught = optimizer.game, {}
        optimizer.base.register_step_pre_hook(
            lambda *_, p=player, into=caught: into.update(gradients(p))
        )
        if how == "backward":
            objectives.append(game.backward(player.closure()).objective)
        elif how == "loss":
            loss = game.loss(player.closure())
            assert_same(game.outcome.objective, loss.detach())
            loss.backward()
            objectives.append(loss.detach())
        else:
            for parameter in player.model.parameters():
                parameter.grad = torch.ones_like(parameter)  # of an earlier batch: not this step's
            objectives.append(optimizer.step(player.closure()))
        results[how] = caught or gradients(player)
        states.append([fingerprint(player.model)["buffers"], torch.get_rng_state(), game.round])
    for how in ("loss", "step"):
        torch.testing.assert_close(results[how], results["backward"], **CLOSE)
    torch.testing.assert_close(objectives, [objectives[0]] * 3, **CLOSE)
    assert_same(states, [states[0]] * 3)
    assert states[0][-1] == 1
    assert results["loss"]["unused.weight"] is results["backward"]["unused.weight"] is None
    assert all(results["loss"][f"{layer}.weight"].any() for layer in ("embedding", "head"))


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loss and logits": lambda loss, logits: (loss, logits),
    "loss and output": lambda loss, logits: (loss, {"logits": logits}),
    "more outputs": lambda loss, logits: (loss, logits, logits.detach()),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "output": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
}


@each_solver
def test_a_closure_may_return_what_models_return(name: str):
    alone = {} if SOLVERS[name].compares else {"loss alone": lambda loss, logits: loss}
    results = []
    for form in (FORMS | alone).values():
        optimizer, player = start(SOLVERS[name])
        taken = stepwise(optimizer)
        objective = optimizer.step(lambda f=form, p=player: f(*p.closure()()))
        results.append([taken, objective])
    assert_same(results, results[:1] * len(results))


@each_solver
@or_refused("loss")
def test_micro_batches_accumulate(name: str):
    """Earlier gradients stay; each micro-batch adds its own, scaled as the loop scales its loss."""
    parts = []
    for how in ("loss", "backward", "alone"):
        optimizer, player = start(SOLVERS[name])
        game, batch, alone = optimizer.game, player.batch, []
        for rows in (slice(0, 4), slice(2, 6), slice(1, 5)):
            closure = player.closure(ids=batch["ids"][rows], labels=batch["labels"][rows])
            if how == "loss":
                (game.loss(closure) / 3).backward()
            elif how == "backward":
                game.backward(closure, backward=lambda loss: (loss / 3).backward())
            else:
                game.backward(closure)
                alone.append(gradients(player))
                optimizer.zero_grad()
        parts.append(gradients(player))
    mean = {k: None if v is None else sum(a[k] for a in alone) / 3 for k, v in alone[0].items()}
    torch.testing.assert_close(parts[:2], [mean, mean], **CLOSE)


@pytest.mark.parametrize("name", ["freelb", "fgm", "pgd"])
def test_a_raw_ascent_does_not_see_the_scale_of_the_backward(name: str):
    """δ's gradient is that of each sample's loss, whatever the loop multiplies the loss with."""
    solver = mixadv.make_solver(name, normalize="none", step_size=3.0)
    plain, player = start(solver, reduction="none")
    plain.game.backward(player.closure())
    once = gradients(player)
    scaled, player = start(solver, reduction="none")
    scaled.game.backward(player.closure(), backward=lambda loss: (1024 * loss).backward())
    assert_same(scaled.game.strategy.points, plain.game.strategy.points)
    assert_same(gradients(player), {k: None if g is None else 1024 * g for k, g in once.items()})


@each_solver
def test_without_gradients_the_loss_is_plain_and_nobody_plays(name: str):
    """In evaluation and generation the model never sees the adversary."""
    optimizer, player = start(SOLVERS[name])
    optimizer.step(player.closure())
    player.model.eval()
    found = fingerprint(player.model, optimizer)
    with torch.no_grad():
        loss, logits = optimizer.game.loss(player.closure()), player.closure()()[1]
        plain = copy.deepcopy(player.model)(player.batch["ids"])
    assert_same(logits, plain)
    assert_same(loss, F.cross_entropy(plain, player.batch["labels"]).mean())
    assert_same(fingerprint(player.model, optimizer), found)


@pytest.mark.parametrize("fresh", [False, True])
@each_solver
def test_a_round_leaves_what_one_forward_leaves(name: str, fresh: bool):
    """Random state and BatchNorm statistics move as by one plain forward per optimizer step."""
    solver = varied(masked(name, fresh), radius=0.0)  # every pass a plain one
    if name in AROUND:
        solver = replace(solver, radius=0.0)
    for rounds in (1, 2, 4):
        optimizer, player = start(solver)
        optimizer.base.param_groups[0]["lr"] = 0.0
        plain = player._replace(model=copy.deepcopy(player.model))
        found = torch.get_rng_state()
        for r in range(rounds):
            player.model.train(r != 2)  # evaluation mode in the third
            optimizer.step(player.closure())
        left = torch.get_rng_state()
        torch.set_rng_state(found)
        for r in range(rounds):
            plain.model.train(r != 2)
            for _ in range(optimizer.outcome.steps):
                plain.closure()()
        assert_same(left, torch.get_rng_state())
        assert_same(dict(player.model.named_buffers()), dict(plain.model.named_buffers()))


class Emptied(nn.Module):
    """Sets a buffer to None in each forward, as a cache that is out of date."""

    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.register_buffer("cache", torch.ones(2))

    def forward(self, ids: Tensor) -> Tensor:
        self.cache = None
        return self.head(self.words(ids).mean(1))


def test_a_buffer_that_a_forward_sets_to_none_is_replayed_and_put_back():
    model, ids = Emptied(), torch.arange(12).view(4, 3)
    game, found = Game(model, PGD(steps=2)), model.cache

    def closure(fails: bool = False) -> tuple[Tensor, Tensor]:
        logits = model(ids)
        if fails:
            raise BrokenError
        return F.cross_entropy(logits, torch.arange(4) % 3), logits

    with pytest.raises(BrokenError):
        game.backward(partial(closure, fails=True))
    assert model.cache is found
    assert found is not None
    assert found.eq(1).all()
    for _ in range(2):
        game.backward(closure)
        assert model.cache is None


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[None]:
    with one_process(tmp_path):
        yield


@each_solver
@or_refused("loss")
def test_a_loss_costs_one_all_reduce(name: str, processes: None):
    """Under DistributedDataParallel, however many passes a round has."""
    player, reduced = small(), []
    del player.model.unused
    model = nn.parallel.DistributedDataParallel(player.model)

    def count(_, bucket):
        reduced.append(bucket)
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, count)
    parallel = player._replace(model=model)
    optimizer = wrapped(parallel, SOLVERS[name], lr=1.0)
    for _ in range(2):
        reduced.clear()
        optimizer.game.loss(parallel.closure()).backward()
        assert len(reduced) == 1
    alone, other = start(SOLVERS[name])
    for _ in range(2):
        alone.game.loss(other.closure()).backward()
    expected = {k: v for k, v in gradients(other).items() if not k.startswith("unused")}
    torch.testing.assert_close(gradients(player), expected, **CLOSE)


# Outcomes ------------------------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("how", WAYS)
@or_refused()
def test_outcomes_hold_detached_numbers_and_counts(name: str, how: str):
    optimizer, player = start(SOLVERS[name])
    getattr(optimizer if how == "step" else optimizer.game, how)(player.closure())
    outcome = optimizer.game.outcome
    passes = optimizer.game.explain().passes
    for field in ("forwards", "delta_backwards", "theta_backwards", "steps"):
        assert type(getattr(outcome, field)) is int
        assert getattr(outcome, field) == getattr(passes, field)
    for field in ("objective", "clean_loss", "payoff", "radius", "entropy", "nonfinite"):
        value = getattr(outcome, field)
        assert value is None or (value.dim() == 0 and not value.requires_grad)
    assert 0 < float(outcome.radius) <= optimizer.game.solver.on_inputs.radius * (1 + 1e-9)
    assert list(outcome.as_dict()) == [*outcome.__dataclass_fields__]


@each_solver
def test_the_clean_loss_is_that_of_the_model_or_none(name: str):
    optimizer, player = start(SOLVERS[name])
    without_dropout(player.model)
    expected = player.closure()()[0].mean().item()
    optimizer.step(player.closure())
    found = optimizer.outcome.clean_loss
    assert (found is None) == (name in {"noise", "pgd", "freeat", "freelb", "textat", *MOVING})
    assert found is None or float(found) == pytest.approx(expected, rel=1e-12)


class HostReads(TorchDispatchMode):
    """Notes every operation that hands a tensor's value to Python."""

    KNOWN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name.startswith(self.KNOWN):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where the host reads a tensor, by a method of it or by an operation."""
    with HostReads() as reads:
        float(torch.tensor(1.0))
        torch.ones(2).nonzero()
        assert reads.seen == ["_local_scalar_dense", "nonzero"]

    def read(*_: Any) -> None:
        raise AssertionError("the host read a tensor")

    for method in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, method, read)
    with HostReads() as reads:
        yield
    assert reads.seen == []


@pytest.mark.parametrize("how", ["step", "loss"])
@each_solver
@or_refused()
def test_later_rounds_read_nothing_from_the_device(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
):
    optimizer, player = start(SOLVERS[name])
    optimizer.base.param_groups[0]["foreach"] = True
    optimizer.step(player.closure())
    with no_reads(monkeypatch):
        for _ in range(2):
            play(optimizer, player.closure(), how)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["step", "loss"])
@each_solver
@or_refused()
def test_later_rounds_never_wait_for_the_gpu(name: str, how: str):
    player = small()
    batch = {k: v.cuda() for k, v in player.batch.items()}
    player = player._replace(model=player.model.cuda(), batch=batch)
    optimizer = wrapped(player, SOLVERS[name], partial(torch.optim.AdamW, fused=True), lr=1e-3)
    optimizer.step(player.closure())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            play(optimizer, player.closure(), how)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gradient_that_is_not_finite_falls_back_to_no_perturbation():
    """For that sample alone; it is counted, and training goes on."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.sqrt())  # the slope at 0 is infinite

    x = torch.rand(4, 3).add(0.5)
    x[2] = 0.0
    model, labels = Root(), torch.tensor([0, 1, 0, 1])
    game = Game(model, PGD(start="zero", steps=1, step_size=0.1, radius=0.1, unit="absolute"))
    outcome = game.backward(lambda: F.cross_entropy(model(x), labels))
    lengths = game.strategy.norms()[0].flatten()
    torch.testing.assert_close(lengths, torch.tensor([0.1, 0.1, 0.0, 0.1]))
    assert int(outcome.nonfinite) == 1
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_step_returns_the_objective_averaged_over_its_learner_steps():
    def step(learner_steps: int) -> mixadv.Outcome:
        optimizer, player = start(MAT(learner_steps=learner_steps, play_as="ensemble"))
        optimizer.base.param_groups[0]["lr"] = 0.0
        player.model.dropout.eval()
        loss = optimizer.step(player.closure())
        assert loss is optimizer.outcome.objective
        return optimizer.outcome

    one, three = step(1), step(3)
    torch.testing.assert_close(three.objective, one.objective)
    assert (one.steps, three.steps) == (1, 3)


# Before and after training -------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("measured", [False, True])
def test_explain_tells_what_a_round_will_do_and_changes_nothing(name: str, measured: bool):
    optimizer, player = start(SOLVERS[name])
    game, solver = optimizer.game, SOLVERS[name].on_inputs
    found = fingerprint(player.model, optimizer)
    explanation = game.explain(player.closure() if measured else None)
    assert_same(fingerprint(player.model, optimizer), found)
    rows = player.model.embedding.weight.detach().norm(dim=1)
    ids = player.batch["ids"]
    unit = rows[ids[ids != 0]].mean() if measured else rows.mean()
    text = str(explanation)
    assert explanation.unit == pytest.approx(float(unit), rel=1e-6)
    assert explanation.radius == pytest.approx(solver.radius * float(unit), rel=1e-6)
    passes = explanation.passes
    for part in (
        f"{type(solver).__name__} ({solver.paper})",
        "embedding",
        "(measured)" if measured else "(estimated from the embedding's rows)",
        f"{solver.radius:g} of the unit = {explanation.radius:.4g}",
        str(passes),
        f"{passes.plain_steps:.1f} plain steps",
    ):
        assert part in text
    optimizer.step(player.closure())
    assert (game.outcome.forwards, game.outcome.delta_backwards) == (
        passes.forwards,
        passes.delta_backwards,
    )
    if measured:
        assert game.unit == pytest.approx(float(unit), rel=1e-6)


def test_a_best_response_raises_the_loss_and_leaves_the_learner_alone():
    player = small()
    player.model.eval()
    optimizer = wrapped(player, "pgd", steps=5, radius=1.0, step_size=0.4)
    clean, logits = player.closure()()
    found = fingerprint(player.model)
    response = best_response(optimizer.game, player.closure())
    assert_same(fingerprint(player.model), found)
    assert response.loss > clean
    assert not response.loss.requires_grad
    assert response.predictions.shape == logits.shape
    assert (response.strategy.norms()[0] <= 1 + 1e-9).all()
    delta = response.strategy.unit * response.strategy.points[0][0]
    handle = player.model.embedding.register_forward_hook(lambda m, args, out: out + delta)
    torch.testing.assert_close(player.closure()(), (response.loss, response.predictions))
    handle.remove()


def test_a_best_response_changes_no_later_round():
    paths = []
    for attacked in (False, True):
        optimizer, player = start(PGD())
        optimizer.step(player.closure())
        outcome = optimizer.outcome
        if attacked:
            player.model.eval()
            first, again = (best_response(optimizer.game, player.closure()) for _ in range(2))
            assert_same(first.loss, again.loss)
            assert optimizer.outcome is outcome
            player.model.train()
        optimizer.step(player.closure())
        paths.append(gradients(player) | dict(player.model.named_parameters()))
    assert_same(*paths)


def test_a_closed_game_leaves_model_and_optimizer_alone():
    optimizer, player = start(MAT(average=None, round_damping=0.5))
    found = fingerprint(player.model)["hooks"]
    optimizer.game.backward(player.closure())
    optimizer.game.close()
    assert fingerprint(player.model)["hooks"] == found
    before, slope = player.model.head.weight.detach().clone(), player.model.head.weight.grad
    optimizer.base.step()
    torch.testing.assert_close(player.model.head.weight.detach(), before - slope)


def test_averages_and_samples_of_the_learner_serve_for_evaluation():
    solver = MAT(learner_steps=1, samples=2, round_damping=0.0, damping=0.0)
    optimizer, player = start(solver)
    optimizer.base.param_groups[0]["lr"] = 0.1
    model, path, predictions = player.model, [], []
    for _ in range(3):
        optimizer.step(player.closure())
        path.append(model.head.weight.detach().clone())
    model.eval()
    with optimizer.game.averaged():
        torch.testing.assert_close(model.head.weight, torch.stack(path).mean(0))
    assert_same(model.head.weight, path[-1])
    assert_same([s["head.weight"] for s in optimizer.game.learner_samples], path[-2:])
    twin = copy.deepcopy(model)
    for sample in optimizer.game.learner_samples:
        twin.load_state_dict(sample, strict=False)
        predictions.append(twin(player.batch["ids"]).softmax(-1))
    mixture = optimizer.game.mixture(lambda: model(player.batch["ids"])).exp()
    expected = (predictions[0] + predictions[1]) / 2
    torch.testing.assert_close(mixture.double(), expected, rtol=1e-5, atol=1e-6)
    with_loss = lambda: (torch.zeros(()), model(player.batch["ids"]))  # noqa: E731
    assert_same(optimizer.game.mixture(with_loss).exp(), mixture)
    assert_same(model.head.weight, path[-1])


# Strategies ----------------------------------------------------------------------------------


@pytest.fixture
def strategy() -> Strategy:
    points = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    mask = torch.ones(4, 5, 1, dtype=torch.float64)
    log_weights = torch.randn(3, 4, dtype=torch.float64).log_softmax(0)
    return Strategy([points], [mask], log_weights, unit=2.5)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_a_mean_lies_among_its_particles_and_a_sample_is_one_of_them(m: int, b: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(m, b, 2, 3, generator=draw)
    q = Strategy([points], log_weights=torch.randn(m, b, generator=draw).log_softmax(0))
    mean, sample = q.mean(), q.sample(draw)
    assert mean.size == sample.size == 1
    assert (mean.points[0] <= points.amax(0) + 1e-6).all()
    assert (mean.points[0] >= points.amin(0) - 1e-6).all()
    assert (sample.points[0] == points).flatten(2).all(2).any(0).all()
    assert (q.entropy() <= torch.tensor(float(m)).log() + 1e-6).all()


def test_samples_follow_the_weights_of_each_row():
    weights = torch.tensor([[1.0, 0.2], [0.0, 0.8]])
    points = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 2, 1)
    q = Strategy([points], log_weights=weights.log())
    draw = torch.Generator().manual_seed(0)
    drawn = torch.stack([q.sample(draw).points[0][0, :, 0] for _ in range(500)])
    assert not drawn[:, 0].any()
    assert abs(float(drawn[:, 1].mean()) - 0.8) < 4 * (0.16 / 500) ** 0.5


def test_a_strategy_is_saved_and_loaded(strategy: Strategy, tmp_path: Path):
    torch.save(strategy.state_dict(), tmp_path / "strategy")
    loaded = Strategy.from_state_dict(torch.load(tmp_path / "strategy", weights_only=True))
    assert_same(loaded.state_dict(), strategy.state_dict())
    assert_same(loaded.mean().points, strategy.mean().points)
    assert_same(loaded.weights.sum(0), torch.ones(4, dtype=torch.float64))


@pytest.fixture
def axes() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt.figure().add_subplot()
    plt.close("all")


def test_a_strategy_is_plotted(strategy: Strategy, axes: Any):
    assert strategy.plot(sample=1, axes=axes) is axes
    assert axes.get_title()
    fresh = strategy.mean().plot()
    assert fresh is not axes
    assert len(fresh.collections[0].get_offsets()) == 1


# Names ---------------------------------------------------------------------------------------


def test_public_names_exist():
    assert mixadv.__all__ == sorted(
        mixadv.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n)
    )
    assert all(hasattr(mixadv, name) for name in mixadv.__all__)
    assert len(set(mixadv.__all__)) == len(mixadv.__all__)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_the_registry_tells_name_paper_and_summary(name: str):
    cls = mixadv.SOLVERS[name]
    built = mixadv.make_solver(name, radius=0.125)
    assert type(built) is cls
    assert cls.name == name == name.lower()
    assert built.radius == 0.125
    assert "arXiv:" in cls.paper or "openreview" in cls.paper
    assert 10 < len(cls.summary) < 80
    assert "\n" not in cls.summary
    assert cls.__name__ in mixadv.__all__
    assert eval(repr(built), vars(mixadv).copy()) == built
    with pytest.raises(AttributeError):
        built.radius = 1.0


@dataclass(frozen=True, kw_only=True)
class Halfway(mixadv.Solver):
    """A new method, whole: half the clean loss and half that at a random point."""

    name: ClassVar[str] = "halfway"
    paper: ClassVar[str] = "this file"
    share: float = 0.5

    def play(self, stage: mixadv.Stage) -> Any:
        delta = stage.start(self).detach()
        yield (1 - self.share) * stage.loss()
        yield Step(self.share * stage.loss(delta))


@pytest.mark.parametrize("how", WAYS)
def test_a_new_solver_is_one_dataclass(how: str):
    """Its gradient is that of the two losses, by hand."""
    player = small()
    optimizer, twin = wrapped(player, Halfway(share=0.25), lr=0.0), copy.deepcopy(player.model)
    game, found, taken = optimizer.game, torch.get_rng_state(), stepwise(optimizer)
    objective = play(optimizer, player.closure(), how)
    total = torch.zeros((), dtype=torch.float64)
    for share, delta in ((0.75, 0.0), (0.25, game.unit * game.strategy.points[0][0])):
        hook = twin.embedding.register_forward_hook(lambda m, args, out, d=delta: out + d)
        torch.set_rng_state(found)
        total = total + share * player._replace(model=twin).closure()()[0]
        hook.remove()
    total.backward()
    torch.testing.assert_close(objective, total, check_dtype=False, rtol=1e-9, atol=0)
    expected = {n: g for n, g in gradients(player._replace(model=twin)).items() if g is not None}
    torch.testing.assert_close({n: taken[0][n] for n in expected}, expected, **CLOSE)
    assert len(taken) == 1
    assert "this file" in str(game.explain())
    assert game.explain().passes.theta_backwards == game.outcome.theta_backwards == 2


class Branches(nn.Module):
    """Two branches of which a pass takes one, each with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, branch: str) -> Tensor:
        return self.out(self.get_submodule(branch)(self.embedding(input_ids).mean(1)))

    def counts(self) -> tuple[int, int]:
        return int(self.a.num_batches_tracked), int(self.b.num_batches_tracked)


def branching() -> tuple[Branches, Any, Callable[[str], Callable[[], Tensor]]]:
    torch.manual_seed(0)
    model, ids, labels = Branches(), torch.randint(0, 9, (6, 5)), torch.arange(6) % 2
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mixadv.wrap(base, model, mixadv.PGD(steps=3))
    return model, optimizer, lambda name: lambda: F.cross_entropy(model(ids, name), labels)


def test_statistics_that_only_what_is_retained_moves_are_put_back_in_later_rounds():
    model, optimizer, closure = branching()
    for count in (1, 2, 3):
        optimizer.step(closure("a"), retain=closure("b"))
        assert model.counts() == (count, 0)


def test_statistics_of_a_branch_that_the_first_round_did_not_take_move_once_a_round():
    model, optimizer, closure = branching()
    for name in "abab":
        optimizer.step(closure(name))
    assert model.counts() == (2, 2)


def test_statistics_of_a_layer_that_is_new_move_once_a_round():
    model, optimizer, closure = branching()
    optimizer.step(closure("a"))
    model.a = nn.BatchNorm1d(4)
    optimizer.step(closure("a"))
    assert model.counts() == (1, 0)
