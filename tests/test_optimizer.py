"""The wrapped optimizer is what torch, schedulers, scalers and frameworks take it for."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, lr_scheduler

import mixadv
from tests import zoo
from tests.zoo import (
    Player,
    assert_same,
    copies,
    fingerprint,
    or_refused,
    play,
    player,
    small,
    without_dropout,
)

PLAIN = mixadv.PGD(radius=0.0)  # plays δ = 0: the very gradients of plain training
MIXED = mixadv.MAT(particles=2, learner_temperature=1e-3, samples=9)


def wrapped(
    solver: mixadv.Solver = PLAIN, base: Callable[..., Any] = SGD, **settings: Any
) -> tuple[mixadv.GameOptimizer, Player]:
    player = small()
    solver = copy.deepcopy(solver)  # with a projection head of its own
    return zoo.wrapped(player, solver, partial(base, **settings)), player


def weights(player: Player) -> list[Tensor]:
    return copies(player.model.parameters())


def gradients(player: Player) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in player.model.parameters()]


@pytest.fixture(params=list(mixadv.SOLVERS))
def solver(request: pytest.FixtureRequest) -> mixadv.Solver:
    head = torch.nn.Linear(3, 2).double()
    return mixadv.CAT(head=head) if request.param == "cat" else mixadv.make_solver(request.param)


# A torch optimizer ---------------------------------------------------------------------------


def test_everything_but_the_step_is_the_bases_also_after_it_loads_a_checkpoint():
    optimizer, player = wrapped(base=AdamW)
    optimizer.step(player.closure())
    base = optimizer.base
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(2):
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        assert optimizer.state
        assert optimizer.defaults is base.defaults
        base.load_state_dict(copy.deepcopy(base.state_dict()))  # rebinds groups and state
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(player)
    optimizer.step(player.closure())
    assert_same(weights(player), before)


def test_an_added_group_is_trained():
    optimizer, player = wrapped()
    extra = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(optimizer.base.param_groups) == 2
    optimizer.step(lambda: player.closure()()[0] + 2 * extra)
    assert float(extra.detach()) == 0.0  # 1 − 0.5 · 2


@pytest.mark.parametrize("how", ["unfrozen", "added"])
def test_layers_may_join_during_training(solver: mixadv.Solver, how: str):
    """Gradual unfreezing: averages, backups and teachers know the layer from then on."""
    player = small()
    hidden, head = player.model.hidden, player.model.head
    rest = [p for p in player.model.parameters() if all(p is not h for h in hidden.parameters())]
    base = SGD(rest if how == "added" else player.model.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, player.model, solver)
    hidden.requires_grad_(how == "added")
    before = hidden.weight.detach().clone()
    optimizer.step(player.closure())
    assert_same(hidden.weight.detach(), before)
    if how == "added":
        optimizer.add_param_group({"params": list(hidden.parameters())})
    hidden.requires_grad_(True)
    for _ in range(2):
        moved = [hidden.weight.detach().clone(), head.weight.detach().clone()]
        optimizer.step(player.closure())
        assert not torch.equal(hidden.weight, moved[0])
        assert not torch.equal(head.weight, moved[1])
    assert all(w.isfinite().all() for w in weights(player))


def test_gradients_are_zeroed_as_by_torch():
    optimizer, player = wrapped()
    optimizer.game.backward(player.closure())
    optimizer.zero_grad(set_to_none=False)
    assert all(g is None or not g.any() for g in gradients(player))
    assert player.model.head.weight.grad is not None
    optimizer.zero_grad()
    assert gradients(player) == [None] * len(gradients(player))


def test_repr_names_solver_and_base():
    text = repr(wrapped(mixadv.FreeLB(steps=5), AdamW)[0])
    assert "FreeLB(steps=5" in text
    assert "AdamW" in text


def test_hooks_run_once_per_call_of_the_step_they_were_registered_on():
    optimizer, player = wrapped(mixadv.MAT(learner_steps=3))
    calls = []
    for name, target in {"outer": optimizer, "base": optimizer.base}.items():
        target.register_step_pre_hook(lambda *_, n=name: calls.append(f"before {n}"))
        target.register_step_post_hook(lambda *_, n=name: calls.append(f"after {n}"))
    optimizer.step(player.closure())
    assert calls == ["before outer", *["before base", "after base"] * 3, "after outer"]


def test_state_dict_hooks_see_and_change_the_state():
    optimizer, _ = wrapped()
    calls: list[str] = []

    def add(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "note": 1}

    def remove(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append(f"load {state['note']}")
        return {key: value for key, value in state.items() if key != "note"}

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(remove)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load 1", "loaded"]


def test_methods_of_a_particular_base_are_reached():
    class ScheduleFree(SGD):
        mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    optimizer, _ = wrapped(base=ScheduleFree)
    optimizer.eval()
    assert optimizer.base.mode == optimizer.mode == "eval"
    assert not hasattr(optimizer, "no_such_method")


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=8),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "loop": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_move_the_base(schedule: str):
    """Plain training and the game at radius 0 go through the same rates and weights."""

    def train(plain: bool) -> list[Any]:
        optimizer, player = wrapped(momentum=0.5)
        if plain:
            optimizer = optimizer.base
        scheduler = SCHEDULERS[schedule](optimizer)
        path = []
        for _ in range(5):
            if plain:
                optimizer.zero_grad()
                player.closure()()[0].backward()
                optimizer.step()
            else:
                optimizer.step(player.closure())
            scheduler.step(*[1.0] * (schedule == "plateau"))
            path += [optimizer.param_groups[0]["lr"], weights(player)]
        return path

    game = train(plain=False)
    assert_same(game, train(plain=True))
    assert len(set(game[::2])) > 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_train_on_by_themselves(solver: mixadv.Solver, copied: Callable[[Any], Any]):
    optimizer, player = wrapped(solver, AdamW)
    for _ in range(2):
        optimizer.step(player.closure())
    model, twin = copied((player.model, optimizer))
    other = player._replace(model=model)
    found = fingerprint(player.model, optimizer)
    losses = [twin.step(other.closure()) for _ in range(3)]
    torch.set_rng_state(found["random"])
    assert_same(fingerprint(player.model, optimizer), found)
    assert_same([optimizer.step(player.closure()) for _ in range(3)], losses)
    assert_same(weights(player), weights(other))
    assert_same(optimizer.state_dict(), twin.state_dict())


def test_a_plain_checkpoint_continues_with_a_fresh_adversary(solver: mixadv.Solver):
    old, player = wrapped(solver, AdamW)
    for _ in range(2):
        old.step(player.closure())
    optimizer, other = wrapped(solver, AdamW)
    optimizer.load_state_dict(copy.deepcopy(old.base.state_dict()))
    assert_same(optimizer.base.state_dict(), old.base.state_dict())
    assert (optimizer.game.round, optimizer.game.rounds.memory) == (0, {})
    optimizer.step(other.closure())
    # and the other way round: the game's checkpoint is one of the base with one key more
    state = optimizer.state_dict()
    assert set(state) == {*optimizer.base.state_dict(), "mixadv"}
    old.base.load_state_dict(state)
    assert_same(old.base.state_dict(), optimizer.base.state_dict())


def test_bases_that_need_a_closure_are_refused():
    with pytest.raises(TypeError, match=r"LBFGS .*closure several times.*first-order"):
        wrapped(base=torch.optim.LBFGS)


def test_what_belongs_to_a_round_is_not_ignored_where_step_plays_none():
    optimizer, player = wrapped(mixadv.FGM())
    optimizer.game.backward(player.closure())
    for given in ({"where": torch.ones(2)}, {"check": True}, {"adversary": player.closure()}):
        with pytest.raises(mixadv.GameError, match=rf"plays no round of {next(iter(given))}="):
            optimizer.step(**given)

    def closure() -> Tensor:
        loss = optimizer.game.loss(player.closure())
        loss.backward()
        return loss

    with pytest.raises(mixadv.GameError, match=r"plays its round itself.*give retain= there"):
        optimizer.step(closure, retain=player.closure())


def test_a_step_without_closure_is_the_bases_with_the_learners_moves():
    """Damping β' leaves the share 1 − β' of the base's step: θ − (1 − β')·lr·g."""
    solver = mixadv.MAT(
        learner_steps=1, learner_temperature=0.0, damping=0.0, round_damping=0.25, average=None
    )
    optimizer, player = wrapped(solver)
    before = weights(player)
    optimizer.game.backward(player.closure())
    slopes = gradients(player)
    assert optimizer.step() is None
    for now, was, slope in zip(weights(player), before, slopes, strict=True):
        step = torch.zeros_like(was) if slope is None else 0.1 * slope
        torch.testing.assert_close(now, was - 0.75 * step)


# Loops that own the backward -----------------------------------------------------------------


@or_refused("loss")
def test_loss_scaling_changes_nothing(solver: mixadv.Solver):
    def train(scaled: bool) -> list[Tensor]:
        optimizer, player = wrapped(solver, AdamW)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, growth_interval=2)
        for _ in range(4):
            scaler.scale(optimizer.game.loss(player.closure())).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return weights(player)

    torch.testing.assert_close(train(scaled=True), train(scaled=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", ["wrapper", "fused base"])
def test_a_step_that_overflows_moves_nothing(target: str):
    """A fused base is stepped on overflow too, and skips on the device."""
    optimizer, player = wrapped(MIXED, AdamW, fused=True)
    assert optimizer.base._step_supports_amp_scaling
    assert not optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu")
    stepped = optimizer if target == "wrapper" else optimizer.base
    for bad in (False, True, True, False):
        before = weights(player)
        scaler.scale(optimizer.game.loss(player.closure())).backward()
        if bad:
            player.model.head.weight.grad.fill_(torch.inf)
        scaler.step(stepped)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert_same(weights(player), before)
        else:
            assert not torch.equal(player.model.head.weight, before[3])
            assert all(w.isfinite().all() for w in weights(player))
    if target == "wrapper":
        assert len(optimizer.game.learner_samples) == 2


@pytest.mark.parametrize("accumulated", [False, True])
@or_refused("loss")
def test_a_closure_that_plays_a_round_means_what_torch_means(
    solver: mixadv.Solver, accumulated: bool
):
    """Lightning's closures: zero the gradients (or keep those of earlier micro-batches), play."""

    def train(by_closure: bool) -> tuple[Any, ...]:
        optimizer, player = wrapped(solver, AdamW)
        losses, share = [], 0.5 if accumulated else 1.0

        def closure() -> Tensor:
            if not accumulated:
                optimizer.zero_grad()
            loss = share * optimizer.game.loss(player.closure())
            loss.backward()
            return loss

        for _ in range(3):
            if accumulated:
                optimizer.zero_grad()
                (0.5 * optimizer.game.loss(player.closure())).backward()
            if by_closure:
                loss = optimizer.step(closure)
            else:
                loss = closure()
                optimizer.step()
            losses.append(loss.detach())
        return losses, weights(player), gradients(player), torch.get_rng_state()

    assert_same(train(by_closure=True), train(by_closure=False))


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_accumulates_micro_batches_as_one_batch(tmp_path: Path):
    """Its loss is not to be scaled again, and each sample plays its own game."""
    pytest.importorskip("accelerate")
    from transformers import Trainer

    from tests.test_trainer import arguments

    def train(micro: int) -> tuple[list[Tensor], list[float]]:
        p = player("bert", rows=8)
        without_dropout(p.model)
        optimizer = zoo.wrapped(p, "pgd", start="zero", radius=0.2, unit="absolute")

        class Playing(Trainer):
            loss_is_scaled_for_ga = False

            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
                self.loss_is_scaled_for_ga = False
                return optimizer.game.loss(lambda: model(**inputs))

        options = {"per_device_train_batch_size": 8 // micro, "max_grad_norm": 0}
        options |= {"gradient_accumulation_steps": micro}
        rows = [{k: v[i] for k, v in p.batch.items()} for i in range(8)]
        trainer = Playing(
            p.model,
            arguments(tmp_path, **options),
            train_dataset=rows,
            optimizers=(optimizer, SCHEDULERS["lambda"](optimizer)),
        )
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return weights(p), history

    one, two = train(1), train(2)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@or_refused("backward")
def test_a_closure_that_does_nothing_steps_with_the_gradients_there_are(solver: mixadv.Solver):
    """Lightning gives one where the loop has played by hand."""
    paths = []
    for idle in (None, lambda: None):
        optimizer, player = wrapped(solver, AdamW)
        for _ in range(3):
            optimizer.game.backward(player.closure())
            optimizer.step(idle)
            optimizer.zero_grad()
        paths.append([weights(player), optimizer.state_dict()["mixadv"], torch.get_rng_state()])
    assert_same(*paths)
    with pytest.raises(mixadv.GameError, match=r"returned a loss and played no round"):
        optimizer.step(player.closure())


@pytest.mark.parametrize("learner_steps", [1, 3])
def test_a_plain_checkpoint_makes_a_used_optimizer_a_fresh_one(learner_steps: int):
    solver = mixadv.MAT(learner_steps=learner_steps, damping=0.5, round_damping=0.5, samples=3)
    paths = []
    for used in (False, True):
        optimizer, p = wrapped(solver, AdamW)
        saved = copy.deepcopy([p.model.state_dict(), optimizer.base.state_dict()])
        random = torch.get_rng_state()
        if used:
            play(optimizer, p.closure(), "backward")
            p.model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            assert optimizer.game.round == 0
            assert optimizer.game.unit is None
        torch.set_rng_state(random)
        for _ in range(3):
            optimizer.step(p.closure())
        paths.append([weights(p), optimizer.state_dict()["mixadv"]])
    assert_same(*paths)


# The learner's moves around other optimizers ---------------------------------------------------


class Within(SGD):
    """Steps by its parent's step, as many published optimizers do."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class ClosureFirst(SGD):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


@pytest.mark.parametrize("base", [SGD, Within, ClosureFirst])
def test_the_learner_moves_once_per_step_of_any_base(base: type[SGD]):
    SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)  # torch hooks a class at its first instance
    for by_hand in (False, True):
        optimizer, p = wrapped(MIXED, base)
        for _ in range(3):
            if by_hand:  # frameworks step with a closure that plays
                optimizer.base.step(lambda o=optimizer, p=p: o.game.loss(p.closure()).backward())
            else:
                play(optimizer, p.closure(), "backward")
        assert optimizer.game.learner.count == 3


def test_the_learner_moves_on_after_a_step_that_failed():
    class Failing(SGD):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise OSError("no more memory")
            return super().step(closure)

    optimizer, p = wrapped(MIXED, Failing)
    optimizer.step(p.closure())
    count = optimizer.game.learner.count
    optimizer.base.broken = True
    with pytest.raises(OSError, match="memory"):
        play(optimizer, p.closure(), "backward")
    optimizer.base.broken = False
    play(optimizer, p.closure(), "backward")
    assert optimizer.game.learner.count == count + 1


@pytest.mark.parametrize("solver", [mixadv.SMART(), mixadv.MAT(samples=2)])
def test_a_teacher_of_half_the_trained_weights_is_refused(solver: mixadv.Solver):
    model, head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3)
    base = SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="trains 2 parameters that are not part of the model"):
        mixadv.wrap(base, model, solver)
    head.requires_grad_(False)
    mixadv.wrap(base, model, solver)


def test_clipping_runs_before_each_of_the_learners_steps():
    optimizer, p = wrapped(mixadv.MAT(learner_steps=2, learner_temperature=0.0))
    seen: list[float] = []

    def clip(*_: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(p.model.parameters(), 1e-3)
        seen.append(float(norm))

    before = weights(p)
    optimizer.base.register_step_pre_hook(clip)
    optimizer.step(p.closure())
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(p), before, strict=True)]).norm()
    assert len(seen) == 2
    assert min(seen) > 1e-3
    assert 0 < float(moved) <= 2 * 0.1 * 1e-3


def test_a_step_before_any_round_is_warned_of():
    """A loop with loss.backward() would train plainly, and nobody would notice."""
    optimizer, player = wrapped()
    player.closure()()[0].backward()
    with pytest.warns(UserWarning, match=r"before its game has played a round.*Schedule"):
        optimizer.step()
    play(optimizer, player.closure(), "backward")
