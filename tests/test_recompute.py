"""One graph at a time: the same gradients, in the memory of one pass."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixadv
from mixadv import MAT, Game, Step
from tests.zoo import WAYS, Player, fingerprint, small, wrapped

KEEPS_SEVERAL: dict[str, mixadv.Solver] = {
    "smart": mixadv.SMART(),
    "alum": mixadv.ALUM(steps=2),
    "leap": mixadv.ALUM(direction="gauss_newton"),
    "vat": mixadv.VAT(),
    "r3f": mixadv.R3F(),
    "cat": mixadv.CAT(),
    "creat": mixadv.CreAT(),
    "mat": MAT(steps=2, learner_steps=2),
    "ensemble": MAT(particles=3, play_as="ensemble"),
    "draws": MAT(particles=3, play_as="sample"),
}
KEEPS_ONE = ("noise", "pgd", "fgm", "freelb", "freeat", "textat")
each = pytest.mark.parametrize("name", KEEPS_SEVERAL)


def double(solver: mixadv.Solver, how: str, player: Player, rounds: int = 2) -> dict[str, Any]:
    """Return what a player is after rounds in float64."""
    optimizer = wrapped(player, solver)
    for _ in range(rounds):
        if how == "step":
            optimizer.step(player.closure())
            continue
        optimizer.zero_grad()
        if how == "loss":
            (optimizer.game.loss(player.closure()) / 3).backward()
        else:
            optimizer.game.backward(player.closure(), lambda loss: (loss / 3).backward())
        optimizer.step()
    return {**without_identities(player.model), "objective": optimizer.game.outcome.objective}


def without_identities(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in fingerprint(model).items() if name != "identities"}


@each
@pytest.mark.parametrize("how", WAYS)
def test_recomputed_passes_give_the_same_rounds_under_dropout(name: str, how: str):
    """Weights, gradients, buffers, objective and random state."""
    ends = []
    for recompute in (False, True):
        player = small()
        torch.manual_seed(7)
        ends.append(double(replace(KEEPS_SEVERAL[name], recompute=recompute), how, player))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-14)


class Tall(nn.Module):
    """Each layer keeps a large activation, so that graphs weigh more than anything else."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            x = x.tanh()
        logits = self.head(x.mean(1))
        return logits.logsumexp(-1).mean(), logits


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the most numbers that graphs hold at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        super().__init__(self.pack, lambda kept: kept.tensor)

    def __enter__(self) -> "Held":
        super().__enter__()
        return self

    def pack(self, tensor: Tensor) -> "Kept":
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        return Kept(self, tensor)


class Kept:
    def __init__(self, counter: Held, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor

    def __del__(self) -> None:
        self.counter.now -= self.tensor.numel()


def most_held(solver: mixadv.Solver | None) -> int:
    model, x = Tall(), torch.randn(4, 9, 64)
    run = lambda: model(x)[0].backward()  # noqa: E731
    if solver is not None:
        optimizer = wrapped(model, solver, site="layers.0")
        run = lambda: optimizer.step(lambda: model(x))  # noqa: E731
        run()
    with Held() as held:
        run()
    return held.most


@each
def test_no_more_is_held_than_by_one_pass(name: str):
    solver = KEEPS_SEVERAL[name]
    if solver.reads is not None:
        solver = replace(solver, source="layers.11")
    plain, keeps = most_held(None), most_held(solver)
    assert keeps >= 1.9 * plain
    assert most_held(replace(solver, recompute=True)) <= 1.1 * plain


@each
def test_the_passes_are_those_that_were_explained(name: str):
    player = small()
    optimizer = wrapped(player, replace(KEEPS_SEVERAL[name], recompute=True))
    for _ in range(2):
        optimizer.step(player.closure())
    said, seen = optimizer.game.explain().passes, optimizer.game.outcome
    assert (said.forwards, said.delta_backwards) == (seen.forwards, seen.delta_backwards)
    assert said.theta_backwards == seen.theta_backwards == said.branches


def test_rounds_of_a_schedule_that_are_not_played_cost_one_forward():
    player = small()
    optimizer = wrapped(player, "alum", schedule=mixadv.Schedule(start=5), recompute=True)
    for _ in range(2):
        optimizer.step(player.closure())
    assert optimizer.game.outcome.forwards == 1


def test_checkpointed_layers_are_recomputed_within_what_is_run_again():
    x, ends = torch.randn(4, 9, 64), []
    for checkpointed, recompute in [(False, False), (True, False), (True, True)]:
        model = Tall(checkpointed)
        optimizer = wrapped(model, "smart", site="layers.0", recompute=recompute)
        for _ in range(2):
            optimizer.step(lambda m=model: m(x))
        ends.append(dict(model.named_parameters()))
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_a_backward_that_reaches_nothing_is_told():
    player = small()
    game = Game(player.model, mixadv.ALUM(recompute=True))
    before = copy.deepcopy(without_identities(player.model))
    with pytest.raises(mixadv.GameError, match="left no gradient"):
        game.backward(player.closure(), lambda loss: None)
    torch.testing.assert_close(without_identities(player.model), before)
    game.backward(player.closure())


@pytest.mark.parametrize("name", KEEPS_ONE)
def test_where_nothing_is_to_be_gained_it_is_refused(name: str):
    with pytest.raises(ValueError, match="one pass at a time as it is"):
        wrapped(small(), name, recompute=True)


def test_a_stack_keeps_all_graphs_and_is_refused():
    with pytest.raises(ValueError, match="particle_batching='stack'"):
        MAT(particles=3, play_as="ensemble", particle_batching="stack", recompute=True)


# Solvers of a user's own ---------------------------------------------------------------------


@dataclass(frozen=True)
class Own(mixadv.Solver):
    """Plays what a function yields."""

    name: ClassVar[str] = "own"
    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "for tests"

    moves: Callable[[Any, Any], Iterator[Any]] = lambda stage, q: iter(())

    @property
    def gain(self) -> str:
        return "kl"

    def play(self, stage: Any) -> Iterator[Any]:
        yield from self.moves(stage, stage.ascend("kl", self))


def own_gradient(moves: Any, recompute: bool) -> dict[str, Any]:
    player = small()
    solver = Own(start="normal", start_size=0.05, moves=moves, recompute=recompute)
    torch.manual_seed(3)
    Game(player.model, solver).backward(player.closure())
    return fingerprint(player.model)["gradients"]


def test_a_clean_pass_may_belong_to_several_objectives():
    def whole(stage: Any, q: Any) -> Iterator[Any]:
        yield Step(stage.loss() / 2 + stage.loss(q) / 4 + stage.divergence(q, "kl"))

    def apart(stage: Any, q: Any) -> Iterator[Any]:
        yield stage.loss() / 2
        yield Step(stage.loss(q) / 4 + stage.divergence(q, "kl"))

    found = own_gradient(apart, recompute=True)
    torch.testing.assert_close(found, own_gradient(whole, recompute=False))


def test_a_clean_pass_that_no_objective_needs_adds_nothing():
    def moves(stage: Any, q: Any) -> Iterator[Any]:
        yield Step(stage.loss(q) + stage.divergence(q, "kl", fixed=True))

    found = own_gradient(moves, recompute=True)
    torch.testing.assert_close(found, own_gradient(moves, recompute=False))


@pytest.mark.parametrize("junk", [3.0, torch.ones(2), torch.tensor(1.0)])
def test_junk_is_refused_as_ever(junk: Any):
    def moves(stage: Any, q: Any) -> Iterator[Any]:
        stage.loss() + stage.divergence(q, "kl")
        yield Step(junk)

    with pytest.raises(mixadv.GameError, match=r"not a 0-d tensor|does not depend"):
        own_gradient(moves, recompute=True)


def test_a_weight_of_zero_gives_gradients_of_zero():
    player = small()
    game = Game(player.model, mixadv.ALUM(recompute=True))
    game.backward(player.closure(), lambda loss: (loss * 0).backward())
    gradients = [p.grad for p in player.model.parameters() if p.grad is not None]
    assert gradients
    assert all((g == 0).all() for g in gradients)


def test_a_backward_to_chosen_inputs_is_told():
    player = small()
    game = Game(player.model, mixadv.ALUM(recompute=True))
    weights = list(player.model.parameters())[-1:]
    with pytest.raises(mixadv.GameError, match="left no gradient on passes that are run again"):
        game.backward(player.closure(), lambda loss: loss.backward(inputs=weights))


@pytest.mark.filterwarnings("ignore:CAT starts below the noise floor")
def test_predictions_that_are_no_numbers_to_differentiate_stay_as_they_are():
    player = small()

    def closure() -> Any:
        loss, logits = player.closure()()
        return loss, logits.argmax(-1, keepdim=True)

    Game(player.model, mixadv.CAT(recompute=True)).backward(closure)


def test_a_new_dropout_mask_in_each_pass_cannot_be_run_again():
    with pytest.raises(ValueError, match=r"fresh_dropout=True draws another in each"):
        mixadv.R3F(recompute=True, fresh_dropout=True)


class Tagger(nn.Module):
    """Predicts for each token; labels stay outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 5)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).tanh())


@pytest.mark.parametrize("solver", [mixadv.SMART(), mixadv.TRADES(), mixadv.R3F()], ids=repr)
def test_tokens_that_count_are_known_without_a_graph(solver: mixadv.Solver):
    """Of labels outside of the model the loss alone tells, by its gradient."""
    ids = torch.arange(12).view(2, 6)
    labels = ids % 5
    labels[:, :4] = -100
    played = []
    for recompute in (False, True):
        model = Tagger()
        optimizer = wrapped(model, replace(solver, recompute=recompute))

        def closure(model: nn.Module = model) -> tuple[Tensor, Tensor]:
            logits = model(ids)
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

        objectives = [optimizer.step(closure) for _ in range(3)]
        played.append([*objectives, *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(*played, rtol=1e-12, atol=1e-14)
