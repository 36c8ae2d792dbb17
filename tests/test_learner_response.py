"""The learner's side of the certificate: below the exact gain, near it, and without a trace."""

import copy
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.equilibrium import exploitability
from mixadv.learner_response import LearnerGain, learner_exploitability
from mixadv.players.strategy import Strategy
from mixadv.round.in_play import in_play, standing
from mixadv.solvers.play import Moves, Play, Step
from tests.zoo import (
    AROUND,
    MOVING,
    BrokenError,
    Fault,
    Player,
    assert_same,
    fingerprint,
    small,
    wrapped,
)

NAMES = [*mixadv.SOLVERS]
SQUARED: dict[str, mixadv.Solver] = {
    "alum": mixadv.ALUM(divergence="squared_error"),
    "smart": mixadv.SMART(divergence="squared_error", ema_decay=0.5),
    "trades": mixadv.TRADES(divergence="squared_error"),
    "vat": mixadv.VAT(divergence="squared_error"),
    "r3f": mixadv.R3F(divergence="squared_error"),
    "pgd": mixadv.PGD(payoff="squared_error", start="normal"),
    "mean": mixadv.MAT(divergence="squared_error", play_as="mean"),
    "ensemble": mixadv.MAT(divergence="squared_error", play_as="ensemble", temperature=0.1),
    "mat": mixadv.MAT(divergence="squared_error", particles=3, mirror_step=3.0, temperature=0.1),
}
"""Solvers whose payoff is a divergence, one that is quadratic in a linear model's weights."""


@dataclass(frozen=True, kw_only=True)
class Path(mixadv.FreeLB):
    """Several passes, and a δ that moves by what the backward of each of them leaves."""

    @property
    def gain(self) -> str:
        return "js"


@dataclass(frozen=True, kw_only=True)
class Curved(mixadv.ALUM):
    """An objective that is made of more than means over samples."""

    def play(self, stage: Moves) -> Play:
        delta = stage.ascend(self.divergence, self)
        yield Step((stage.loss() + self.smoothness(stage, delta)).square())


@dataclass(frozen=True, kw_only=True)
class Replaying(mixadv.ALUM):
    replays_batch: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Weighing(mixadv.ALUM):
    @property
    def weighs(self) -> str:
        return "the rows of a batch"


MIXED = mixadv.MAT(play_as="ensemble", temperature=1e-3)  # nothing is drawn for each sample
PAID_APART: dict[str, mixadv.Solver] = {
    **{n: s for n in NAMES if (s := mixadv.make_solver(n)).gain != "loss"},
    "mixed": MIXED,
    "pgd": mixadv.PGD(payoff="js"),
    "path": Path(),
    "gauss_newton": mixadv.SMART(direction="gauss_newton"),
    "boundary": mixadv.ALUM(sign="boundary", divergence="kl"),
    "fresh": mixadv.R3F(radius=0.0, fresh_dropout=True),
    "recomputed": mixadv.SMART(recompute=True),
}
"""Solvers whose payoff is a divergence."""
each_paid_apart = pytest.mark.parametrize("name", PAID_APART)


class Regression:
    """Squared error of a linear model, of which the best weights against any δ are known."""

    def __init__(self, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(12, 2, generator=source, dtype=torch.float64)
        self.y = torch.randn(12, generator=source, dtype=torch.float64)
        torch.manual_seed(seed)
        self.model = nn.Linear(2, 1).double()

    def closure(self) -> Tensor:
        return (self.model(self.x).squeeze(1) - self.y).square()

    def exact(self, delta: Tensor) -> float:
        """What the best weights gain against δ, by least squares."""
        moved = torch.cat([self.x + delta, torch.ones(12, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(moved, self.y[:, None]).solution
        own = self.model(self.x + delta).squeeze(1).detach() - self.y
        return (own.square().mean() - (moved @ best).squeeze(1).sub(self.y).square().mean()).item()

    def both(self) -> tuple[Tensor, Tensor]:
        predictions = self.model(self.x)
        return (predictions.squeeze(1) - self.y).square(), predictions

    def least(
        self, q: Strategy, solver: mixadv.Solver, teacher: dict[str, Tensor] | None
    ) -> tuple[float, float]:
        """What a solver of `SQUARED` minimises against q: at the weights, and its least value.

        Each term is the mean of squares of what is linear in (w, b), so rows of a regression.
        """
        one = torch.ones(12, 1, dtype=torch.float64)
        clean, (points,) = torch.cat([self.x, one], 1), q.points
        weight = getattr(solver, "smoothness_weight", 0.0)
        if not weight:  # the loss at δ
            rows, targets = [torch.cat([self.x + points[0], one], 1)], [self.y]
        else:
            moves = [torch.cat([delta, 0 * one], 1) for delta in points]
            sizes = [(weight * w).sqrt()[:, None] for w in q.weights]
            rows = [clean, *(size * move for size, move in zip(sizes, moves, strict=True))]
            targets = [self.y, *(0 * self.y for _ in moves)]
        if teacher is not None:
            target = self.x @ teacher["weight"][0] + teacher["bias"]
            rows, targets = [*rows, clean], [*targets, target]
        a, b = torch.cat(rows), torch.cat(targets)
        own = torch.cat([self.model.weight[0], self.model.bias]).detach()
        best = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        here, there = ((a @ x - b).square().sum().item() / 12 for x in (own, best))
        return here, there


def sensed(player: Regression, solver: mixadv.Solver) -> mixadv.GameOptimizer:
    """A few steps of training, so that a teacher is not the learner."""
    solver = replace(solver, radius=0.5, unit="absolute")
    optimizer = wrapped(player.model, solver, lr=0.05)
    for _ in range(3):
        optimizer.step(player.both)
    return optimizer


def strategy(game: mixadv.Game, closure: Any) -> Strategy:
    with standing(game.rounds, closure) as stage:
        return in_play(stage)


# Against the exact best response -------------------------------------------------------------


@pytest.mark.parametrize("name", SQUARED)
def test_in_the_objective_of_a_solver_the_bound_is_below_the_exact_gain_and_near_it(name: str):
    r, solver = Regression(), SQUARED[name]
    game = sensed(r, solver).game
    teacher = game.teacher() if name == "smart" else None
    own, least = r.least(strategy(game, r.both), solver, teacher)
    few, many = (
        learner_exploitability(game, [r.both] * 2, steps=steps, rate=0.1) for steps in (3, 150)
    )
    torch.testing.assert_close(many.played.mean().item(), own)
    assert few.gain < many.gain <= own - least + 1e-12
    assert many.gain > 0.98 * (own - least)
    assert (
        many.response == f"Adam, 150 steps of rate 0.1, in the objective of {type(solver).__name__}"
    )


@pytest.mark.parametrize("name", ["alum", "smart", "trades", "ensemble", "mat"])
def test_weighed_gains_add_up_to_the_duality_gap_of_the_game_that_pays_the_objective(name: str):
    """The worst δ of a linear model is known; a teacher's term has none."""
    r = Regression()
    game = sensed(r, SQUARED[name]).game
    teacher = game.teacher() if name == "smart" else None
    weight, q = cast(Any, game.solver).smoothness_weight, strategy(game, r.both)
    own, least = r.least(q, game.solver, teacher)
    w = r.model.weight[0].detach()
    moved = (q.weights * (q.points[0] @ w).square()).sum(0).mean()
    gap = own + weight * float(0.5**2 * w.square().sum() - moved) - least
    theirs = exploitability(game, r.both).gain
    ours = learner_exploitability(game, [r.both] * 2, steps=150, rate=0.1).gain
    assert 0.97 * gap < weight * theirs + ours <= gap + 1e-12


@pytest.mark.parametrize("radius", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_below_the_exact_gain_and_near_it(radius: float, seed: int):
    """Where the batch that the response sees is the one it is judged on."""
    r = Regression(seed)
    game = mixadv.Game(r.model, mixadv.FGM(radius=radius, unit="absolute"))
    game.backward(r.closure)
    exact = r.exact(game.strategy.points[0][0])  # pyright: ignore
    few, many = (
        float(learner_exploitability(game, [r.closure] * 2, steps=steps, rate=0.05).gain)
        for steps in (3, 150)
    )
    assert few < many <= exact + 1e-12
    assert many > 0.98 * exact


def test_no_gain_is_found_where_the_learner_plays_best():
    r = Regression()
    moved = torch.cat([r.x, torch.ones(12, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(moved, r.y[:, None]).solution[:, 0]
    r.model.weight.data[0], r.model.bias.data[0] = best[:2], best[2]
    game = mixadv.Game(r.model, mixadv.FGM(radius=0.0, unit="absolute"))
    found = learner_exploitability(game, [r.closure] * 2, rate=0.01)
    assert found.gain == 0
    assert float(found.interval[0]) == 0  # pyright: ignore[reportOptionalSubscript]


def test_what_is_learnt_by_heart_is_no_gain():
    """A judge that saw the rows would report the noise in their labels as a gain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2)).double()
    x, y = torch.randn(2, 40, 3).double(), torch.randint(0, 2, (2, 40))

    def closure(half: int) -> Any:
        return lambda: nn.functional.cross_entropy(model(x[half]), y[half], reduction="none")

    game = mixadv.Game(model, mixadv.PGD(radius=0.1, unit="absolute"), model[0])
    options = {"steps": 150, "rate": 0.02}
    judged = learner_exploitability(game, [closure(0), closure(1)], **options)
    by_heart = learner_exploitability(game, [closure(0), closure(0)], **options)
    assert by_heart.gain > 0.2
    assert judged.gain < 0.05


@pytest.mark.parametrize("first", [False, True], ids=["trained", "fresh"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_changed(name: str, first: bool):
    player = small(reduction="none")
    optimizer = wrapped(player, mixadv.make_solver(name))
    if not first:
        optimizer.step(player.closure())
    weight = next(player.model.parameters())
    weight.grad = torch.ones_like(weight)
    before = fingerprint(player.model, optimizer)
    found = learner_exploitability(optimizer.game, [player.closure()] * 2, steps=2)
    assert_same(fingerprint(player.model, optimizer), before)
    again = learner_exploitability(optimizer.game, [player.closure()] * 2, steps=2)
    assert_same((again.played, again.reached), (found.played, found.reached))
    assert exploitability(optimizer.game, [player.closure()] * 2, steps=2).gain.isfinite()
    optimizer.step(player.closure())  # training goes on


@pytest.mark.parametrize("name", ["mat", "smart", "freelb"])
def test_weights_that_are_not_trained_stay_where_they_are(name: str):
    """Else the next round of what keeps weights would say that something else trains them."""
    player = small(reduction="none")
    trained = [*player.model.parameters()][-2:]
    sgd = torch.optim.SGD(trained, lr=0.1)
    optimizer = mixadv.wrap(sgd, player.model, mixadv.make_solver(name))
    optimizer.step(player.closure())
    before = [p._version for p in player.model.parameters()][:-2]
    learner_exploitability(optimizer.game, [player.closure()] * 2, steps=2)
    assert [p._version for p in player.model.parameters()][:-2] == before
    optimizer.step(player.closure())


def test_a_term_that_is_nothing_at_first_is_judged_by_the_batch():
    """Apart by samples at the weights in play alone: parts of one would be taken from the whole."""
    player = evaluated()
    begun = [p.detach().clone() for p in player.model.parameters()]

    def away() -> Tensor:
        pairs = zip(player.model.parameters(), begun, strict=True)
        return torch.stack([(p - b).square().sum() for p, b in pairs]).sum()

    @dataclass(frozen=True, kw_only=True)
    class Anchored(mixadv.ALUM):
        def play(self, stage: Moves) -> Play:
            delta = stage.ascend(self.divergence, self)
            yield Step(stage.loss() + self.smoothness(stage, delta) + away())

    game = mixadv.Game(player.model, Anchored())
    found = learner_exploitability(game, [player.closure()] * 2, steps=3, rate=0.01)
    assert found.played.shape == found.reached.shape == (1,)
    assert found.interval is None


@pytest.mark.parametrize("name", ["pgd", "smart", "mat"])
def test_nothing_is_left_changed_where_it_breaks(name: str):
    player = small(reduction="none")
    optimizer = wrapped(player, name)
    optimizer.step(player.closure())
    before = fingerprint(player.model, optimizer)

    def counting(fault: Fault) -> Any:
        def failing() -> Any:
            fault()
            return player.closure()()

        return failing

    fault = Fault()
    learner_exploitability(optimizer.game, [counting(fault)] * 2, steps=2)
    for at in range(1, fault.calls + 1):
        with pytest.raises(BrokenError):
            learner_exploitability(optimizer.game, [counting(Fault(at))] * 2, steps=2)
        assert_same(fingerprint(player.model, optimizer), before)


def test_the_interval_is_of_the_mean_gain():
    """Gains of one response may be negative for some samples: cutting each at 0 would add up."""
    found = LearnerGain(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), "a guess", 0.95)
    assert found.gain == 0
    assert "lower bound 0, 95% interval 0 to " in str(found)
    assert LearnerGain(torch.ones(1), torch.zeros(1), "a guess", 0.95).interval is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g, c: learner_exploitability(g, [c]), ValueError, "two batches"),
        (lambda g, c: learner_exploitability(g, [c, c], steps=0), ValueError, "steps"),
        (lambda g, c: learner_exploitability(g, [c, c], level=1.0), ValueError, "level"),
        (lambda g, c: learner_exploitability(g, [c, cast(Any, 3)]), TypeError, "takes a closure"),
        (lambda g, c: learner_exploitability(3, [c, c]), TypeError, r"mixadv\.Game"),  # pyright: ignore
    ],
)
def test_what_cannot_be_measured_is_refused(make: Any, error: Any, message: str):
    r = Regression()
    game = mixadv.Game(r.model, mixadv.FGM(radius=0.1, unit="absolute"))
    with pytest.raises(error, match=message):
        make(game, r.closure)


# The objective of a solver whose payoff is a divergence ---------------------------------------


def evaluated(reduction: str = "none", **changes: Any) -> Player:
    player = small(reduction=reduction, **changes)
    player.model.eval()
    return player


@each_paid_apart
def test_what_is_judged_is_what_training_minimises(name: str):
    """Of a draw for each sample, its expectation over draws: the ensemble's."""
    player, solver = evaluated(), PAID_APART[name]
    optimizer = wrapped(player, solver)
    optimizer.step(player.closure())
    found = learner_exploitability(optimizer.game, [player.closure()] * 2, steps=1)
    assert found.played.shape == (6,)
    if name == "mat":
        q = strategy(optimizer.game, player.closure())
        assert q.size == 2
        logits = player.model(player.batch["ids"]).detach()
        assert float(found.played.mean()) > float(
            nn.functional.cross_entropy(logits, player.batch["labels"])
        )
        return
    minimised = optimizer.game.backward(player.closure()).objective
    torch.testing.assert_close(found.played.mean(), minimised)


@each_paid_apart
@pytest.mark.parametrize("training", [False, True])
def test_a_learner_that_stays_gains_nothing(name: str, training: bool):
    """Points, weights, masks and buffers are those that there were, bit for bit."""
    player = small(reduction="none")
    player.model.train(training)
    optimizer = wrapped(player, PAID_APART[name])
    optimizer.step(player.closure())
    found = learner_exploitability(optimizer.game, [player.closure()] * 2, steps=2, rate=0.0)
    assert_same(found.reached, found.played)
    if name == "fresh":  # the divergence between two masks
        plain = mixadv.Game(player.model, mixadv.PGD(radius=0.0))
        other = learner_exploitability(plain, [player.closure()] * 2, steps=1)
        assert (float(found.played.mean() - other.played.mean()) > 1e-3) == training


@settings(max_examples=20)
@given(
    name=st.sampled_from([n for n in PAID_APART if n not in ("fresh", "path")]),
    training=st.booleans(),
    reduction=st.sampled_from(["none", "mean"]),
    seed=st.integers(0, 99),
    steps=st.integers(1, 4),
)
def test_gains_without_a_ball_are_those_of_plain_training(name, training, reduction, seed, steps):
    player = small(seed=seed, reduction=reduction)
    player.model.train(training)
    closures = [player.closure(), player.closure(**small(seed=seed + 1).batch)]
    how = {"steps": steps, "rate": 0.01}
    solver = PAID_APART[name]
    met = learner_exploitability(wrapped(player, solver).game, closures, **how)
    assert met.played.isfinite().all()
    assert met.reached.isfinite().all()
    words = {"proximal_weight": 0.0} if isinstance(solver, mixadv.SMART) else {}
    game = wrapped(player, replace(solver, radius=0.0, **words)).game
    found = learner_exploitability(game, closures, **how)
    plain = learner_exploitability(
        mixadv.Game(player.model, mixadv.PGD(radius=0.0)), closures, **how
    )
    assert_near((found.played, found.reached), (plain.played, plain.reached))


def assert_near(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@each_paid_apart
def test_samples_and_batches_have_the_same_mean_gain(name: str):
    player, alike = evaluated(), evaluated("mean")
    game = wrapped(player, PAID_APART[name]).game
    each = learner_exploitability(game, [player.closure()] * 2, steps=3)
    game = wrapped(alike, PAID_APART[name]).game
    batch = learner_exploitability(game, [alike.closure()] * 2, steps=3)
    assert each.interval is not None
    assert batch.played.shape == (1,)
    assert batch.interval is None
    assert_near(each.played.mean(), batch.played[0])
    assert_near(each.reached.mean(), batch.reached[0])


@pytest.mark.parametrize("name", SQUARED)
def test_each_sample_has_its_own_part_of_the_objective(name: str):
    r, solver = Regression(), SQUARED[name]
    game = sensed(r, solver).game
    found = learner_exploitability(game, [r.both] * 2, steps=1)
    q = strategy(game, r.both)
    delta, w = q.points[0], r.model.weight[0].detach()
    if isinstance(solver, mixadv.PGD):
        expected = (r.model(r.x + delta[0]).squeeze(1) - r.y).square()
    else:
        moved = (q.weights * (delta @ w).square()).sum(0)
        expected = r.closure() + cast(Any, solver).smoothness_weight * moved
    if name == "smart":
        then = r.x @ game.teacher()["weight"][0] + game.teacher()["bias"]
        expected = expected + (r.model(r.x).squeeze(1) - then).square()
    torch.testing.assert_close(found.played, expected.detach())


def test_an_objective_that_is_no_sum_of_means_is_judged_by_batches():
    """Where squares of means are taken, no sample has a part of its own."""
    player = evaluated()
    game = mixadv.Game(player.model, Curved())
    found = learner_exploitability(game, [player.closure()] * 2, steps=2)
    assert found.played.shape == (1,)
    torch.testing.assert_close(found.played[0], game.backward(player.closure()).objective)
    assert found.gain > 0


def test_the_adversary_does_not_answer_the_learner():
    """An adversary that found its point anew at θ' would take back what the learner gained."""
    player = evaluated()
    solver = mixadv.ALUM(radius=1.0, smoothness_weight=20.0)
    seen: list[Tensor] = []

    @dataclass(frozen=True, kw_only=True)
    class Counted(mixadv.ALUM):
        def play(self, stage: Moves) -> Play:
            q = stage.ascend(self.divergence, self)
            seen.append(q.points[0].clone())
            yield Step(stage.loss() + self.smoothness(stage, q))

    words = {"radius": solver.radius, "smoothness_weight": solver.smoothness_weight}
    game = mixadv.Game(player.model, Counted(**words))
    learner_exploitability(game, [player.closure()] * 2, steps=5, rate=0.1)
    assert len(seen) == 2 + 5 + 2  # found for both batches, in each step, judged twice
    for points in seen[1:]:
        assert_same(points, seen[0])


def test_a_strategy_is_played_whole_where_a_particle_would_be_drawn():
    """One draw for each row would be learnt by heart, for it is the same in every step."""
    player, words = evaluated(), {"temperature": 0.1, "radius": 1.0}
    found = [
        learner_exploitability(
            wrapped(player, mixadv.MAT(play_as=how, **words)).game, [player.closure()] * 2, rate=0.1
        )
        for how in ("sample", "ensemble")
    ]
    assert_same((found[0].played, found[0].reached), (found[1].played, found[1].reached))


@pytest.mark.parametrize("trained", [False, True])
def test_a_teacher_stays_where_it_is(trained: bool):
    """One that began with the response would follow it, and the term would vanish."""
    player = evaluated()
    optimizer = wrapped(player, mixadv.SMART(radius=0.0, proximal_weight=1e3), lr=1e-4)
    if trained:
        optimizer.step(player.closure())
    before = copy.deepcopy(optimizer.state_dict()["mixadv"]["learner"]["teacher"])
    found = learner_exploitability(optimizer.game, [player.closure()] * 2, rate=0.05)
    assert_same(optimizer.state_dict()["mixadv"]["learner"]["teacher"], before)
    free = wrapped(player, mixadv.SMART(radius=0.0, proximal_weight=0.0))
    loose = learner_exploitability(free.game, [player.closure()] * 2, rate=0.05)
    assert found.gain < 0.5 * loose.gain


def test_a_head_of_the_closure_moves_with_its_optimizer_and_keeps_its_gradient():
    """Its gradient would be added to by every step of the response."""
    torch.manual_seed(0)
    model, head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x, y = torch.randn(8, 3).double(), torch.randint(0, 2, (8,))

    def closure() -> tuple[Tensor, Tensor]:
        logits = head(torch.tanh(model(x)))
        return nn.functional.cross_entropy(logits, y, reduction="none"), logits

    game = mixadv.Game(model, mixadv.ALUM())
    head.weight.grad = torch.ones_like(head.weight)
    before = fingerprint(head)
    alone = learner_exploitability(game, [closure] * 2, rate=0.1)
    assert_same(fingerprint(head), before)
    both = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    game = mixadv.wrap(both, model, mixadv.ALUM()).game
    together = learner_exploitability(game, [closure] * 2, rate=0.1)
    assert_same(fingerprint(head), before)
    assert together.gain > alone.gain > 0


@pytest.mark.parametrize("name", [n for n in PAID_APART if n not in ("fresh", "pgd", "path")])
def test_one_graph_at_a_time_has_the_same_gain(name: str):
    player, solver = evaluated(), PAID_APART[name]
    found = [
        learner_exploitability(
            wrapped(player, replace(solver, recompute=again)).game,
            [player.closure()] * 2,
            steps=3,
            rate=0.01,
        )
        for again in (False, True)
    ]
    assert_near((found[1].played, found[1].reached), (found[0].played, found[0].reached))


@pytest.mark.parametrize("inner", [mixadv.TRADES(), mixadv.SMART(), mixadv.MAT()])
@pytest.mark.parametrize("name", AROUND)
def test_what_moves_the_weights_is_refused_with_a_line_that_plays(name: str, inner: Any):
    player = evaluated()
    model = player.model
    optimizer = wrapped(player, replace(cast(Any, MOVING[name]), solver=inner))
    with pytest.raises(ValueError, match="moves the weights") as caught:
        learner_exploitability(optimizer.game, [player.closure()] * 2)
    (line,) = re.findall(r"mixadv\.Game\(.*\)", str(caught.value))
    game = eval(line, {"mixadv": mixadv, "model": model, "optimizer": optimizer, "torch": torch})
    assert learner_exploitability(game, [player.closure()] * 2, steps=1).played.isfinite().all()


@pytest.mark.parametrize(
    ("solver", "why"), [(Replaying(), "moves on before each step"), (Weighing(), "weighs rows")]
)
def test_a_round_without_one_strategy_is_refused(solver: mixadv.Solver, why: str):
    player = evaluated()
    game = wrapped(player, solver).game
    with pytest.raises(ValueError, match=why):
        learner_exploitability(game, [player.closure()] * 2)
