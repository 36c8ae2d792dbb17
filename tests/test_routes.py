"""Routes to the payoffs of many particles agree wherever each is allowed, and weights are right."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixadv
from mixadv import MAT, GameError
from mixadv.maths import mirror
from mixadv.round import routes
from tests.zoo import Player, assert_same, fingerprint, player, small, without_dropout, wrapped

FAMILIES = ["bert", "distilbert", "gpt2", "t5", "bart"]
# torch has no batching rule for this kernel yet, and goes through it one by one.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def double(family: str, dropout: bool = True) -> Player:
    p = player(family, rows=4)
    p.model.double().train()
    if family == "vision":
        p.batch["images"] = p.batch["images"].double()
    return p if dropout else p._replace(model=without_dropout(p.model))


def sharpness(p: Player, loss: Callable[[Tensor], Tensor] | None = None) -> Callable[[], Any]:
    """Return a closure of one loss per sample; its own needs no labels, and takes any rows."""
    batch = {key: value for key, value in p.batch.items() if key != "labels"}

    def closure() -> tuple[Tensor, Tensor]:
        output = p.model(*batch.values()) if len(batch) == 1 else p.model(**batch)
        logits = getattr(output, "logits", output)
        return loss(logits) if loss else -logits.logsumexp(-1), logits

    return closure


def per_sample(p: Player) -> Callable[[], Any]:
    """Return a closure that computes the cross-entropy of each sample itself."""
    return sharpness(p, lambda x: F.cross_entropy(x, p.batch["labels"], reduction="none"))


def auto(p: Player, rounds: int) -> mixadv.GameOptimizer:
    """Return the optimizer after rounds of two particles, whose route the library chooses."""
    optimizer = wrapped(p, MAT(particles=2, particle_batching="auto"))
    for _ in range(rounds):
        optimizer.step(sharpness(p))
    return optimizer


def evaluate(p: Player, closure: Any, payoff: str, route: str) -> tuple[Tensor, list[Tensor]]:
    """Return payoffs and δ-gradients of three particles in the round after the first."""
    torch.manual_seed(1)
    solver = MAT(particles=3, start="uniform", start_size=None)
    game = wrapped(p, solver).game
    with game.rounds.open(closure) as update:
        (stage,) = update.stages
        stage.clean()
        q = stage.start(solver)
        return stage.payoffs(q, payoff, replace(solver, particle_batching=route))[1:]


def trained(p: Player, closure: Any, **settings: Any) -> list[Any]:
    torch.manual_seed(1)
    solver = MAT(particles=3, steps=2, temperature=0.01, start_size=0.1, **settings)
    optimizer = wrapped(p, solver)
    losses = [optimizer.step(closure) for _ in range(2)]
    strategy, outcome = optimizer.game.strategy, optimizer.outcome
    counts = [outcome.forwards, outcome.delta_backwards, outcome.theta_backwards]
    return [counts, losses, list(p.model.parameters()), strategy.log_weights, strategy.points]


@pytest.mark.parametrize("payoff", ["loss", "symmetric_kl", "js"])
@pytest.mark.parametrize("losses", ["by the model", "by the closure"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vmap_is_one_after_another_under_dropout(family: str, losses: str, payoff: str):
    p = double(family)
    closure = p.closure() if losses == "by the model" else per_sample(p)
    one = evaluate(p, closure, payoff, "loop")
    torch.testing.assert_close(evaluate(p, closure, payoff, "vmap"), one, **CLOSE)
    samples = 1 if payoff == "loss" and losses == "by the model" else 4
    assert one[0].shape == (3, samples)
    assert len(set(one[0].flatten().tolist())) == 3 * samples


@pytest.mark.parametrize("payoff", ["loss", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stack_is_one_after_another_without_dropout(family: str, payoff: str):
    """Stacked, the model's own mean over the batch is no sample's loss: one per sample, or none."""
    p = double(family, dropout=False)
    if payoff == "loss":
        with pytest.raises(GameError, match=r"stack.*one loss per sample"):
            evaluate(p, p.closure(), payoff, "stack")
        return
    one = evaluate(p, p.closure(), payoff, "loop")
    torch.testing.assert_close(evaluate(p, p.closure(), payoff, "stack"), one, **CLOSE)


PLAYS = ("mean", "ensemble", "sample")
BY = (("vmap", True), ("vmap", False), ("stack", False))
# All of BERT; of the others each route with each way to play once, in turn.
ROUNDS = [("bert", route, dropout, play) for (route, dropout) in BY for play in PLAYS]
ROUNDS += [
    (family, *BY[k], PLAYS[(k + shift) % 3])
    for shift, family in enumerate(("t5", "vision"))
    for k in range(3)
]


@pytest.mark.parametrize(("family", "route", "dropout", "play_as"), ROUNDS)
def test_whole_rounds_agree(family: str, route: str, dropout: bool, play_as: str):
    def run(route: str) -> list[Any]:
        p = double(family, dropout)
        if family == "vision":
            p.model.normalise.eval()  # statistics of a batch know nothing of particles
        closure = sharpness(p) if family == "vision" else p.closure()
        return trained(p, closure, particle_batching=route, play_as=play_as)

    torch.testing.assert_close(run(route), run("loop"), **CLOSE)


@dataclass(frozen=True, kw_only=True)
class Away(mixadv.CreAT):
    """Drives many particles away from the representation."""

    particles: int = 3


@pytest.mark.parametrize("route", ["vmap", "stack"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_routes_agree_on_the_way_of_a_representation(family: str, route: str):
    p = double(family, dropout=False)

    def payoffs(deviation: float, route: str) -> tuple[Tensor, list[Tensor]]:
        with wrapped(p, Away()).game.rounds.open(sharpness(p)) as update:
            (stage,) = update.stages
            stage.clean()
            q = stage.start(stage.arena.solver)
            ascent = Away(particle_batching=route)
            return stage.payoffs(q, "loss", ascent, deviation)[1:]

    one = payoffs(2.0, "loop")
    torch.testing.assert_close(payoffs(2.0, route), one, **CLOSE)
    away = one[0] - payoffs(0.0, "loop")[0]
    assert away.shape == (3, 4)
    assert (away > 0).all()


@pytest.mark.parametrize("route", ["vmap", "stack"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_one_particle_is_played_alike_by_every_route(name: str, route: str):
    """Also under dropout, and where the closure gives one loss for the batch."""

    def rounds(route: str) -> list[Any]:
        p = small()
        one = {"particles": 1} if name == "mat" else {}
        optimizer = wrapped(p, name, particle_batching=route, **one)
        losses = [optimizer.step(p.closure()) for _ in range(2)]
        return [losses, optimizer.game.strategy.points, list(p.model.parameters())]

    assert_same(rounds(route), rounds("loop"))


@pytest.mark.parametrize("family", ["bert", "t5", "vision"])
def test_stack_refuses_what_it_cannot_replay(family: str):
    """Dropout differs between the copies, and BatchNorm mixes them."""
    p = double(family)
    optimizer = wrapped(p, MAT(particles=2, particle_batching="stack"))
    found = fingerprint(p.model, optimizer)
    why = r"particle_batching='stack' (cannot replay|disagrees.*batch stat)"
    with pytest.raises(GameError, match=why):
        optimizer.step(sharpness(p))
    assert_same(fingerprint(p.model, optimizer), found)


def test_stack_refuses_a_loss_that_the_closure_computes_for_the_batch():
    p = small()
    p.model.eval()
    why = r"particle_batching='stack' failed.*particle_batching='loop'"
    with pytest.raises(GameError, match=why):
        wrapped(p, MAT(particles=2, particle_batching="stack")).step(p.closure())


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each pass over a stack."""
    passes, stacked = [], routes._stacked_pass
    note = lambda *args: (passes.append(1), stacked(*args))[1]  # noqa: E731
    monkeypatch.setattr(routes, "_stacked_pass", note)
    return passes


@pytest.mark.parametrize("play_as", ["mean", "ensemble"])
def test_auto_stacks_a_small_batch(play_as: str, stacks: list[int]):
    def run(route: str) -> list[Any]:
        p = double("bert", dropout=False)
        return trained(p, sharpness(p), particle_batching=route, play_as=play_as)

    expected = run("loop")
    assert not stacks
    torch.testing.assert_close(run("auto"), expected, **CLOSE)
    assert len(stacks) > 4


def test_auto_leaves_large_batches_apart(monkeypatch: pytest.MonkeyPatch, stacks: list[int]):
    monkeypatch.setattr(routes, "FEW", 3)
    p = double("bert", dropout=False)
    optimizer = auto(p, 1)
    stacks.clear()  # of the check
    optimizer.step(sharpness(p))
    assert not stacks


def test_auto_never_stacks_under_dropout(stacks: list[int]):
    """Nor where the first round saw none, since the model was in evaluation mode."""
    p = double("bert")
    p.model.eval()
    optimizer = auto(p, 1)
    stacks.clear()
    optimizer.step(sharpness(p))
    assert stacks
    stacks.clear()
    p.model.train()
    optimizer.step(sharpness(p))
    assert not stacks
    auto(double("bert"), 1)
    assert len(stacks) == 1  # the check alone


def test_auto_is_not_misled_by_a_head_of_zeros(stacks: list[int]):
    """All payoffs are zero then, stacked or not, and dropout would tell them apart later."""
    p = double("bert")
    for parameter in list(p.model.parameters())[-2:]:
        nn.init.zeros_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = auto(p, 1)
    stacks.clear()
    for _ in range(2):
        optimizer.step(sharpness(p))
    assert not stacks


def test_auto_never_stacks_on_several_processes(monkeypatch: pytest.MonkeyPatch, stacks: list[int]):
    """Their batches differ in tokens: they would run forwards of different numbers, and wait."""
    monkeypatch.setattr(routes, "world_size", lambda: 2)
    auto(double("bert", dropout=False), 2)
    assert not stacks


def test_auto_does_without_stacks_that_do_not_fit(stacks: list[int]):
    p = double("bert", dropout=False)
    rows = len(p.batch["input_ids"])

    def narrow(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(args[0] if args else kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("more rows than fit")

    # After the hook that repeats the rows, which goes before others.
    p.model.bert.register_forward_pre_hook(narrow, with_kwargs=True)
    auto(p, 2)
    assert len(stacks) <= 1


class Named(nn.Module):
    """Compares texts with embeddings of classes, `[C, d]`, which it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, names: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.out(self.words(input_ids).mean(1)) @ names.mT
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels, reduction="none"), "logits": logits}


def test_auto_does_not_repeat_what_has_as_many_rows_as_the_batch_by_chance(stacks: list[int]):
    def run(batching: str) -> list[Tensor]:
        model, rows = Named(), torch.Generator().manual_seed(0)
        names = torch.randn(3, 8, generator=rows)
        solver = MAT(particles=2, particle_batching=batching)
        optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver)
        for size in (5, 4, 3):
            stacks.clear()
            ids = torch.randint(50, (size, 6), generator=rows)
            labels = torch.arange(size) % 3
            optimizer.step(lambda ids=ids, labels=labels: model(ids, names, labels=labels))
        return list(model.parameters())

    found = run("auto")
    assert stacks  # though there are as many classes as rows
    torch.testing.assert_close(found, run("loop"), rtol=1e-4, atol=1e-6)


def test_auto_plays_one_after_another_a_closure_that_no_longer_stacks(stacks: list[int]):
    """The first round knows one closure alone; later ones need not be as it was."""

    def run(batching: str) -> list[Any]:
        model, rows = Named(), torch.Generator().manual_seed(0)
        names, labels = torch.randn(3, 8, generator=rows), torch.arange(5) % 3
        ids = torch.randint(50, (5, 6), generator=rows)
        solver = MAT(particles=2, particle_batching=batching)
        optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver)

        def outside() -> Any:
            logits = model(ids, names)
            return F.cross_entropy(logits, labels), logits

        optimizer.step(lambda: model(ids, names, labels=labels))
        counts = []
        for round in range(2):
            stacks.clear()
            tries = batching == "auto" and round == 0
            with pytest.warns(match="one after another") if tries else nullcontext():
                optimizer.step(outside)
            counts.append((optimizer.outcome.forwards, optimizer.outcome.delta_backwards))
        assert not stacks  # once is enough
        return [counts, *model.parameters()]

    torch.testing.assert_close(run("auto"), run("loop"), rtol=1e-4, atol=1e-6)


def test_auto_raises_what_the_closure_itself_raises(stacks: list[int]):
    p = double("bert", dropout=False)
    optimizer, run, calls = auto(p, 1), sharpness(p), []

    def closure() -> Any:
        calls.append(1)
        if len(calls) > 1:  # the first is the clean pass
            raise ValueError("of the user")
        return run()

    stacks.clear()
    with pytest.raises(ValueError, match="of the user") as caught:
        optimizer.step(closure)
    assert stacks
    assert caught.value.__context__ is None


@pytest.mark.parametrize("route", ["vmap", "stack"])
def test_routes_agree_where_points_are_turned(route: str):
    def run(route: str) -> list[Any]:
        p = double("bert", dropout=False)
        return trained(p, sharpness(p), particle_batching=route, sign="boundary", radius=0.2)

    torch.testing.assert_close(run(route), run("loop"), **CLOSE)


def test_auto_plays_losses_of_a_batch_one_after_another():
    p = double("bert", dropout=False)

    def closure() -> Any:
        out = p.model(**p.batch)
        return out.loss, out.logits

    wrapped(p, Losses(particles=2, particle_batching="auto")).step(closure)


def test_auto_does_without_stacks_where_a_loss_is_one_number(stacks: list[int]):
    p = small()
    p.model.eval()
    wrapped(p, MAT(particles=2, particle_batching="auto")).step(p.closure())


# By hand -------------------------------------------------------------------------------------


class Choice(nn.Module):
    """Scores rows, of which three belong to a sample `[B, 3, n]`, and chooses among them."""

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids.flatten(0, 1))[:, 0].view(-1, 3)


def still(choice: bool) -> Player:
    """Return a small model that maps rows independently, without randomness."""
    p = small(rows=6)
    p.model.eval()
    if choice:
        batch = {"ids": p.batch["ids"].unflatten(0, (2, 3)), "labels": p.batch["labels"][:2]}
        p = p._replace(model=Choice(p.model), batch=batch)
    return p


def perturbed(p: Player, delta: Tensor) -> Tensor:
    """Return the logits with δ added to the embeddings."""
    embedding = next(m for m in p.model.modules() if isinstance(m, nn.Embedding))
    handle = embedding.register_forward_hook(lambda module, args, output: output + delta)
    with torch.no_grad():
        logits = p.model(p.batch["ids"])
    handle.remove()
    return logits


def symmetric_kl(p: Player, delta: Tensor) -> Tensor:
    a, b = (perturbed(p, d).softmax(-1) for d in (delta, torch.zeros_like(delta)))
    return (a * (a / b).log()).sum(-1) + (b * (b / a).log()).sum(-1)


ETA = 2e4
RULE = {"particles": 3, "mirror_step": ETA, "mirror_unit": "absolute", "points": "last"}
RULE |= {"damping": 0.0, "learner_steps": 1}


@pytest.mark.parametrize("route", ["loop", "vmap"])
@pytest.mark.parametrize("choice", [False, True], ids=["one row each", "three rows each"])
def test_each_sample_has_weights_of_its_own(choice: bool, route: str):
    """w ∝ exp(η·u) over the particles of each sample; played as their mean, or in expectation."""
    settings = {**RULE, "start_size": 0.1, "particle_batching": route}

    def played(**changes: Any) -> mixadv.Game:
        p = still(choice)
        game = wrapped(p, MAT(**{**settings, **changes})).game
        game.backward(p.closure())
        return game

    p = still(choice)
    start, mixed = played(steps=0, play_as="ensemble"), played(steps=1, play_as="ensemble")
    unit, samples = start.unit, len(p.batch["labels"])
    gains = torch.stack([symmetric_kl(p, unit * d) for d in start.strategy.points[0].detach()])
    weights = (ETA * gains).softmax(0)
    assert weights.shape == (3, samples)
    assert (weights.max(0).values > 0.4).any()
    torch.testing.assert_close(mixed.strategy.weights, weights)
    assert mixed.outcome.weights == "sample"

    points = mixed.strategy.points[0]
    gains = torch.stack([symmetric_kl(p, unit * d) for d in points])
    loss = F.cross_entropy(perturbed(p, torch.zeros(1)), p.batch["labels"])
    torch.testing.assert_close(
        mixed.outcome.objective, loss + (weights * gains).sum(0).mean(), check_dtype=False
    )
    entropy = -(weights * weights.log()).sum(0).mean()
    torch.testing.assert_close(mixed.outcome.entropy, entropy)

    rows = weights.repeat_interleave(6 // samples, 1)
    mean = torch.einsum("mb,mbtd->btd", rows, points)
    torch.testing.assert_close(played(steps=1, play_as="mean").strategy.points[0][0], mean)


@dataclass(frozen=True, kw_only=True)
class Hedge(mixadv.Solver):
    """Weighs random particles by the task loss."""

    name: ClassVar[str] = "hedge"
    particles: int = 3

    def play(self, stage: mixadv.Stage) -> Any:
        q = stage.start(self)
        q, values, _ = stage.payoffs(q, "loss", self)
        q = q.reweight(mirror.step(q.log_weights, values, 20.0))
        yield mixadv.Step(stage.loss(q.detach()))


@dataclass(frozen=True, kw_only=True)
class Losses(mixadv.Solver):
    """Ascends a divergence, and lets the learner answer by the task loss."""

    name: ClassVar[str] = "losses"
    particles: int = 2
    start: Any = "normal"

    @property
    def gain(self) -> str:
        return "kl"

    def play(self, stage: mixadv.Stage) -> Any:
        yield mixadv.Step(stage.loss(stage.ascend("kl", self)))


@pytest.mark.parametrize("route", ["loop", "vmap"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scalar_loss_gives_one_weight_per_batch(reduction: str, route: str):
    """The loss of a batch counts B times, as the sum of its samples' payoffs."""
    p = small(reduction=reduction)
    p.model.eval()
    game = mixadv.Game(p.model, Hedge(particle_batching=route))
    game.backward(p.closure())
    labels = p.batch["labels"]
    points = [game.unit * d for d in game.strategy.points[0]]
    losses = [F.cross_entropy(perturbed(p, d), labels, reduction="none") for d in points]
    losses = torch.stack(losses)
    gains = losses if reduction == "none" else losses.sum(1, keepdim=True)
    weights = (20.0 * gains).softmax(0)
    torch.testing.assert_close(game.strategy.weights, weights)
    assert game.outcome.weights == {"none": "sample", "mean": "batch"}[reduction]
    torch.testing.assert_close(game.outcome.objective, (weights * losses).sum(0).mean())


def test_routes_agree_where_a_prediction_has_several_rows():
    def run(route: str) -> list[Any]:
        p = still(choice=True)
        return trained(p, sharpness(p), particle_batching=route, play_as="ensemble")

    one = run("loop")
    for route in ("vmap", "stack"):
        torch.testing.assert_close(run(route), one, **CLOSE)
    assert one[3].shape == (3, 2)
