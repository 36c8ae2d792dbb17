"""A round that breaks, wherever it breaks, leaves nothing behind, and the next one plays."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import mixadv
from mixadv.equilibrium import best_response, exploitability
from mixadv.maths.divergence import js
from tests.zoo import (
    CANNOT,
    USUAL,
    WAYS,
    BrokenError,
    Fault,
    assert_same,
    fingerprint,
    or_refused,
    small,
    uncollected,
    wrapped,
)

MIXED = mixadv.MAT(particles=2, samples=2)
COMPARISON = {"pgd": "payoff"} | dict.fromkeys(
    ["vat", "r3f", "alum", "smart", "trades", "mat"], "divergence"
)
STILL = ("noise", "r3f")  # make no move


class Run:
    """A model in training with a fault that waits at one place of a round."""

    def __init__(self, name: str, place: str, how: str, rounds: int, fault: Fault) -> None:
        self.place, self.how, self.fault = place, how, Fault()
        self.steps = self.delivered = 0
        self.player = small()
        run = self

        class Base(SGD):
            def step(self, closure: Any = None) -> Any:
                run.at("optimizer")
                run.steps += 1
                return super().step(closure)

        def divergence(perturbed: Tensor, clean: Tensor) -> Tensor:
            run.at("divergence")
            return js(perturbed, clean)

        chosen: dict[str, Any] = {COMPARISON[name]: divergence} if name in COMPARISON else {}
        if name == "cat":
            chosen["head"] = nn.Linear(3, 2).double()
        base = functools.partial(Base, momentum=0.5)
        self.optimizer = wrapped(self.player, name, base, **chosen)
        self.player.model.dropout.eval()  # a mode of its own
        self.player.model.head.bias.requires_grad_(False)
        for _ in range(rounds):
            self.play()
        self.optimizer.game.backward(self.closure) if rounds and how != "step" else None
        self.fault, self.steps, self.delivered = fault, 0, 0

    def at(self, place: str) -> None:
        if self.place == place:
            self.fault()

    def closure(self) -> tuple[Tensor, Tensor]:
        self.at("before the forward")
        loss, logits = self.player.closure()()
        self.at("after the forward")
        if logits.requires_grad:
            logits.register_hook(lambda _: self.at("within a backward"))
        return loss, logits

    def backward(self, loss: Tensor) -> None:
        self.at("before backward=")
        self.delivered += 1
        loss.backward()
        self.at("after backward=")

    def play(self) -> Tensor:
        """Play what is protected: the whole of a round."""
        if self.how == "step":
            return self.optimizer.step(self.closure)
        if self.how == "backward":
            return self.optimizer.game.backward(self.closure, self.backward).objective
        return self.optimizer.game.loss(self.closure)

    def train(self) -> list[Any]:
        """Play a round and step, and return all that is known afterwards."""
        self.optimizer.zero_grad()
        loss = self.play()
        if self.how == "loss":
            loss.backward()
        if self.how != "step":
            self.optimizer.step()
        model = self.player.model
        return [loss.detach(), [p.grad for p in model.parameters()], fingerprint(model)["buffers"]]

    def state(self) -> list[Any]:
        """Return all but what a first round measures: the unit, the teacher's first copy."""
        found = fingerprint(self.player.model, self.optimizer)
        state = found["optimizer"]
        learner = state["mixadv"]["learner"] or {"count": 0, "position": 0, "rounds": 0}
        counters = [learner[key] for key in ("count", "position", "rounds")]
        game = state["mixadv"]["game"]
        kept = [game["round"], game["memory"], game["modules"]]
        return [found["weights"], found["random"], state["state"], kept, counters]


@functools.cache
def undisturbed(name: str, how: str, rounds: int) -> list[Any]:
    run = Run(name, "nowhere", how, rounds, Fault())
    return [run.train(), run.state()]


RESTORED = ("identities", "requires_grad", "modes", "buffers", "hooks", "random", "grad mode")
PLACES = {
    **dict.fromkeys(["before the forward", "after the forward"], lambda name, how: True),
    "within a backward": lambda name, how: how != "loss" or name not in STILL,
    "divergence": lambda name, how: name in COMPARISON,
    "ascent": lambda name, how: name not in STILL,
    **dict.fromkeys(["before backward=", "after backward="], lambda name, how: how == "backward"),
    "optimizer": lambda name, how: how == "step",
}
WHEN = {("step", 1): (), ("loss", 1): ()} | dict.fromkeys(
    [("step", 0), ("backward", 1)], pytest.mark.slow
)
# The passes to break are the solver's, so every one steps; what `game.loss` holds on the way to its
# backward is told by one of each kind, and by one that remembers.
CASES = [
    pytest.param(name, place, how, rounds, marks=marks)
    for name in mixadv.SOLVERS
    for place, reached in PLACES.items()
    for (how, rounds), marks in WHEN.items()
    if (name, how) not in CANNOT and reached(name, how)
    if how != "loss" or name in (*USUAL, "textat")
]


@pytest.mark.parametrize(("name", "place", "how", "rounds"), CASES)
def test_an_interrupted_round_leaves_no_trace(
    name: str, place: str, how: str, rounds: int, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted at each call of a place in turn, in the first round and in a later one."""
    run, move = Run(name, place, how, rounds, Fault()), mixadv.Ascent.move

    def interrupted_move(*arguments: Any) -> Tensor:
        run.at("ascent")
        return move(*arguments)

    monkeypatch.setattr(mixadv.Ascent, "move", interrupted_move)
    run.play()
    assert run.fault.calls
    for at in range(1, run.fault.calls + 1):
        error = KeyboardInterrupt if (at + (how == "backward")) % 2 else BrokenError
        run = Run(name, place, how, rounds, Fault(at, error))
        model = run.player.model
        found, state = fingerprint(model), run.state()
        with pytest.raises(error):
            run.play()
        left = fingerprint(model)
        assert_same([left[key] for key in RESTORED], [found[key] for key in RESTORED])
        gradients = [g for g in left["gradients"].values() if g is not None]
        assert all(t.isfinite().all() for t in (*model.parameters(), *gradients))
        if how != "step" and not run.delivered:
            assert_same(left["gradients"], found["gradients"])
        if run.steps:  # the learner has moved: back to its copy of θ_t, and a round from there
            left, whole = run.state(), run.steps == run.optimizer.game.learner.steps
            assert_same(left[3], state[3])
            if whole:  # FreeAT's last move of δ comes after its last step, which stands
                assert (name, place) == ("freeat", "ascent")
                assert left[4][1:] == [0, state[4][2] + 1]
            else:
                assert_same(left[0], state[0])
                assert left[4] == state[4]
            assert run.train()[0].isfinite()
            learner = run.optimizer.state_dict()["mixadv"]["learner"]
            assert learner is None or learner["position"] == 0
        else:
            assert_same(run.state(), state)
            assert_same([run.train(), run.state()], undisturbed(name, how, rounds))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("broken", ["play", "backward", "nothing"])
def test_a_solvers_play_is_closed_wherever_its_round_ends(how: str, broken: str):
    """Its `finally` runs when it fails, when the loop around it fails, and at the step."""
    ended = []

    @dataclass(frozen=True, kw_only=True)
    class Own(mixadv.Solver):
        name: ClassVar[str] = "own"

        def play(self, stage: mixadv.Stage) -> Any:
            try:
                loss = stage.loss()
                loss.register_hook(Fault(1 if broken == "backward" else None))
                yield loss
                Fault(1 if broken == "play" else None)()
                yield mixadv.Step(stage.loss(stage.start(self)))
                yield mixadv.Step(stage.loss())
            finally:
                ended.append(True)

    player = small()
    optimizer = wrapped(player, Own())
    play = optimizer.step if how == "step" else getattr(optimizer.game, how)
    found = fingerprint(player.model)
    if broken == "nothing":
        play(player.closure())
        assert ended == [True]
        return
    with pytest.raises(BrokenError) as caught:
        play(player.closure())
    assert ended == [True], caught.tb  # which holds on to the frames
    left = fingerprint(player.model)
    assert_same([left[key] for key in RESTORED], [found[key] for key in RESTORED])


class Checkpointed(nn.Module):
    """Recomputes its embedding, where δ is added, in backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return checkpoint(self.inner, ids, use_reentrant=False)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@pytest.mark.parametrize("interrupted", ["round", "backward"])
@or_refused("loss")
def test_a_waiting_loss_survives_an_interruption(name: str, interrupted: str):
    """The backward of a checkpointed loss still finds its δ, and takes the hooks with it."""

    def gradients(disturbed: bool) -> list[Any]:
        player, fault = small(), Fault(2)
        model = Checkpointed(player.model).train()
        player = player._replace(model=model)
        game = wrapped(player, name).game
        found = fingerprint(model)["hooks"]
        game.loss(player.closure()).backward()
        waiting = game.loss(player.closure())
        if disturbed and interrupted == "round":
            with pytest.raises(BrokenError):
                game.loss(lambda: (fault(), fault(), player.closure()())[-1])
        if disturbed and interrupted == "backward":
            broken = game.loss(player.closure())
            broken.register_hook(Fault(1))
            with pytest.raises(BrokenError):
                broken.backward()
            del broken
            game.loss(player.closure())
        waiting.backward()
        del waiting
        assert fingerprint(model)["hooks"] == found
        return [p.grad for p in model.parameters()]

    assert_same(gradients(disturbed=True), gradients(disturbed=False))


USES: dict[str, Callable[[mixadv.Game, Any], Any]] = {
    "explain": lambda game, closure: mixadv.Game(game.model, mixadv.PGD()).explain(closure),
    "attack": lambda game, closure: best_response(mixadv.Game(game.model, mixadv.PGD()), closure),
    "certificate": lambda game, closure: exploitability(game, closure, steps=1, restarts=2),
    "mixture": lambda game, closure: game.mixture(lambda: closure()[1]),
    "plain loss": lambda game, closure: torch.no_grad()(game.loss)(closure),
}


@pytest.mark.parametrize("use", USES)
def test_evaluation_leaves_no_trace(use: str):
    player = small()
    optimizer = wrapped(player, MIXED)
    optimizer.step(player.closure())
    player.model.eval()
    found, count = fingerprint(player.model, optimizer), Fault()
    USES[use](optimizer.game, lambda: (count(), player.closure()())[1])
    assert_same(fingerprint(player.model, optimizer), found)
    for at in range(1, count.calls + 1):
        fault = Fault(at)
        with pytest.raises(BrokenError):
            USES[use](optimizer.game, lambda f=fault: (f(), player.closure()())[1])
        assert_same(fingerprint(player.model, optimizer), found)


def test_weights_return_when_an_evaluation_of_their_average_fails():
    player = small()
    optimizer = wrapped(player, MIXED)
    for _ in range(3):
        optimizer.step(player.closure())
    found = fingerprint(player.model, optimizer)
    fault = Fault(1)
    with pytest.raises(BrokenError), optimizer.game.averaged():
        fault(average := player.model.head.weight.clone())
    assert not torch.equal(average, found["weights"]["head.weight"])
    assert_same(fingerprint(player.model, optimizer), found)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_model_and_its_rounds_are_freed_without_the_garbage_collector(name: str):
    player = small()
    optimizer = wrapped(player, name)
    with uncollected():
        optimizer.step(player.closure())
        alive = [weakref.ref(x) for x in (player.model, *player.model.parameters())]
        del player, optimizer
        assert [x() for x in alive] == [None] * len(alive)
