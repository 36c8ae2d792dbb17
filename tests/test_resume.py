"""Training that is saved and resumed is the training that was never interrupted, bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import mixadv
from tests.zoo import (
    CANNOT,
    MOVING,
    USUAL,
    WAYS,
    Player,
    assert_same,
    or_refused,
    play,
    player,
    small,
)

ROUNDS = 7
MAT = {"particles": 2, "temperature": 0.01, "learner_temperature": 1e-4, "samples": 2}

SOLVERS: dict[str, mixadv.Solver] = {name: mixadv.make_solver(name) for name in mixadv.SOLVERS} | {
    **MOVING,
    "raw Langevin with fresh dropout": mixadv.PGD(
        payoff="js", normalize="none", temperature=0.01, fresh_dropout=True
    ),
    "noise on a frozen set": mixadv.UniformNoise(radius=1.0, unit="absolute"),
    "proximal point of the last iterate": mixadv.SMART(ema_decay=0.0, teacher_every=2),
    "mixed, played as its mean": mixadv.MAT(**MAT, learner_steps=3, play_as="mean"),
    "mixed, played by draws": mixadv.MAT(
        **MAT, learner_steps=3, play_as="sample", points="path", steps=2
    ),
    "mixed, played as an ensemble": mixadv.MAT(
        **MAT, learner_steps=3, play_as="ensemble", damping="uniform", average=0.9
    ),
    "tokens that add up": mixadv.TextAT(write="accumulate", exclude=(3,)),
    "with a projection head": mixadv.CAT(head=torch.nn.Linear(3, 2).double()),
    "undamped samples": mixadv.MAT(**MAT, damping=0.0, round_damping=0.0, average=None),
}


class Run:
    """A training run whose batches, dropout and draws all come from torch's random state.

    `seed` changes the initial weights and the seed of the game, but not the data.
    """

    def __init__(
        self,
        solver: mixadv.Solver,
        seed: int,
        build: Callable[..., Player] = small,
        schedule: mixadv.Schedule | None = None,
    ):
        self.player = build()._replace(model=build(seed=seed).model)
        torch.manual_seed(seed)
        solver = copy.deepcopy(solver)
        for head in solver.modules().values():
            head.reset_parameters()
        base = AdamW(self.player.model.parameters(), lr=0.01)
        self.optimizer = mixadv.wrap(base, self.player.model, solver, seed=seed, schedule=schedule)
        self.trace: list[Any] = []

    def rounds(self, count: int, how: str = "step") -> "Run":
        for _ in range(count):
            rows = torch.randperm(len(self.player.batch["labels"]))[:4]
            batch = {key: value[rows] for key, value in self.player.batch.items()}
            play(self.optimizer, self.player.closure(**batch), how)
            fields = self.optimizer.game.outcome.as_dict().values()
            self.trace.append([x for x in fields if not isinstance(x, str)])
        return self

    def save(self, path: Path) -> None:
        state = {
            "model": self.player.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, path)

    def load(self, path: Path) -> "Run":
        state = torch.load(path, weights_only=True)
        self.player.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return self

    def state(self) -> list[Any]:
        state = [self.player.model.state_dict(), self.optimizer.state_dict()]
        return [*copy.deepcopy(state), torch.get_rng_state()]


# A way matters to what is kept from round to round: by a learner, in a table, in a head.
KEEPING = [n for n, s in SOLVERS.items() if s.learner() is not None]
KEEPING += ["freelb", "textat", "creat", "tokens that add up", "with a projection head"]


@pytest.mark.parametrize(
    ("name", "how"), [(n, h) for n in SOLVERS for h in WAYS if h == "step" or n in KEEPING]
)
@or_refused()
def test_resumed_is_uninterrupted(name: str, how: str, tmp_path: Path):
    learns = SOLVERS[name].learner() is not None
    for saved_after in (3, 4) if learns else (3,):  # a round of the learner ends at one of them
        whole = Run(SOLVERS[name], seed=0).rounds(saved_after, how)
        whole.save(tmp_path / "checkpoint")
        saved = whole.state()
        whole.rounds(ROUNDS - saved_after, how)
        resumed = Run(SOLVERS[name], seed=5).load(tmp_path / "checkpoint")
        assert_same(resumed.state(), saved)
        resumed.rounds(ROUNDS - saved_after, how)
        assert_same(resumed.trace, whole.trace[saved_after:])
        assert_same(resumed.state(), whole.state())


@pytest.mark.parametrize("how", ["backward", "loss"])
def test_a_learner_round_is_resumed_in_its_middle(how: str, tmp_path: Path):
    solver = SOLVERS["mixed, played as its mean"]
    part = Run(solver, seed=0).rounds(5, how)
    part.save(tmp_path / "checkpoint")
    learner = part.optimizer.state_dict()["mixadv"]["learner"]
    assert (learner["rounds"], learner["position"]) == (1, 2)
    resumed = Run(solver, seed=1).load(tmp_path / "checkpoint").rounds(2, how)
    assert_same(resumed.state(), Run(solver, seed=0).rounds(7, how).state())
    forgetful = Run(solver, seed=1).load(tmp_path / "checkpoint")
    forgetful.optimizer.game.learner.abandon()
    forgetful.rounds(2, how)
    weights = [run.player.model.head.weight for run in (forgetful, resumed)]
    assert not torch.allclose(*weights)


# Every solver resumes above; here those that keep something of the model, or of its tokens.
@pytest.mark.parametrize("name", [*USUAL, "freeat", "textat", "cat", "creat"])
def test_transformers_resume(name: str, tmp_path: Path):
    def build(seed: int = 0) -> Player:
        return player("t5", rows=6, seed=seed)

    whole = Run(SOLVERS[name], 0, build).rounds(2)
    whole.save(tmp_path / "checkpoint")
    whole.rounds(2)
    resumed = Run(SOLVERS[name], 1, build).load(tmp_path / "checkpoint").rounds(2)
    assert_same(resumed.state(), whole.state())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_checkpoint_loaded_back_into_its_run_changes_nothing(name: str):
    """Frameworks load an optimizer's own live state into it while preparing it."""
    how = "step" if (name, "loss") in CANNOT else "loss"
    run = Run(SOLVERS[name], seed=0).rounds(3, how)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.rounds(3, how)
    untouched = Run(SOLVERS[name], seed=0).rounds(6, how)
    assert_same(run.state(), untouched.state())


@pytest.mark.parametrize("name", [n for n in mixadv.SOLVERS if SOLVERS[n].learner() is None])
def test_a_game_alone_resumes(name: str, tmp_path: Path):
    """Any optimizer beside it: the game's own state is its share of a checkpoint."""

    def rounds(game: mixadv.Game, p: Player, base: AdamW, count: int) -> None:
        for _ in range(count):
            base.zero_grad()
            game.backward(p.closure())
            base.step()

    def fresh(seed: int) -> tuple[mixadv.Game, Player, AdamW]:
        run = Run(SOLVERS[name], seed)
        game = mixadv.Game(run.player.model, SOLVERS[name], seed=seed)
        return game, run.player, AdamW(run.player.model.parameters())

    game, p, base = fresh(0)
    rounds(game, p, base, 2)
    parts = [game.state_dict(), p.model.state_dict(), base.state_dict(), torch.get_rng_state()]
    torch.save(parts, tmp_path / "checkpoint")
    rounds(game, p, base, 2)
    other, q, second = fresh(3)
    *states, random = torch.load(tmp_path / "checkpoint", weights_only=True)
    for target, state in zip((other, q.model, second), states, strict=True):
        target.load_state_dict(state)
    torch.set_rng_state(random)
    rounds(other, q, second, 2)
    assert_same(q.model.state_dict(), p.model.state_dict())
    assert_same(other.state_dict(), game.state_dict())
    assert_same(other.strategy.state_dict(), game.strategy.state_dict())


@pytest.mark.parametrize("how", ["step", "backward"])
@pytest.mark.parametrize("name", SOLVERS)
@or_refused()
def test_everything_that_is_saved_loads_without_running_code(name: str, how: str, tmp_path: Path):
    """`weights_only=True` refuses all but tensors, numbers, names and containers of these."""
    run = Run(SOLVERS[name], seed=0, schedule=mixadv.Schedule(start=1, every=2)).rounds(4, how)
    game = run.optimizer.game
    saved = {
        "optimizer": run.optimizer.state_dict(),
        "game": game.state_dict(),
        "strategy": game.strategy.state_dict(),
        "outcome": game.outcome.as_dict(),
        "learner": None if game.learner is None else game.learner.state_dict(),
        "samples": game.learner_samples if game.learner and game.learner.samples else [],
    }
    if how == "backward" and game.learner is not None and game.learner.steps == 3:
        assert game.learner.position == 1  # in the middle of a round of the learner
    torch.save(saved, tmp_path / "saved")
    loaded = torch.load(tmp_path / "saved", weights_only=True)
    assert loaded["outcome"].pop("weights") == saved["outcome"].pop("weights")
    assert_same(loaded, saved)
    again = mixadv.Strategy.from_state_dict(loaded["strategy"])
    assert_same(again.mean().points, game.strategy.mean().points)


def test_the_unit_of_lengths_stays_that_of_the_first_round():
    run = Run(mixadv.PGD(), seed=0).rounds(1)
    unit = run.optimizer.game.unit
    resumed = Run(mixadv.PGD(), seed=0)
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    with torch.no_grad():
        resumed.player.model.embedding.weight.mul_(10)
    assert resumed.rounds(1).optimizer.game.unit == unit


def test_a_table_of_another_vocabulary_is_refused():
    run = Run(mixadv.TextAT(), seed=0).rounds(1)
    state = copy.deepcopy(run.optimizer.state_dict())
    state["mixadv"]["game"]["memory"]["table"] = torch.zeros(3, 6)
    run.optimizer.load_state_dict(state)
    with pytest.raises(mixadv.GameError, match=r"table is \[3, 6\].*\[12, 6\].*same model"):
        run.rounds(1)


@pytest.mark.parametrize(
    ("why", "words"),
    [("another solver", "PGD"), ("another model", "holds"), ("another head", "head has other")],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(why: str, words: str):
    head = why == "another head"
    solver = mixadv.CAT(head=nn.Linear(3, 3)) if head else mixadv.MAT(samples=1)
    state = copy.deepcopy(Run(solver, seed=0).rounds(2).optimizer.state_dict())
    if why == "another model":
        state["mixadv"]["learner"]["average"][0] = torch.zeros(3)
    if head:
        solver = mixadv.CAT(head=nn.Linear(3, 4))
    run = Run(mixadv.PGD() if why == "another solver" else solver, seed=1).rounds(1)
    before = run.state()
    with pytest.raises(ValueError, match=f"checkpoint.*{words}"):
        run.optimizer.load_state_dict(state)
    assert_same(run.state(), before)
