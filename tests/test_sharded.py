"""Weights sharded by `fully_shard`: two processes train as replicas do."""

import io
import warnings
from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import mixadv
from mixadv.model.noise import Noise
from mixadv.tokens import chat_batch, continuous_at, latent_at, latent_dpo, preference_batches
from tests.chat_zoo import chatting, speaking
from tests.processes import (
    SOLVERS,
    Net,
    Verdict,
    batches,
    by_name,
    closure,
    found,
    judge,
    one_process,
    play,
    refusal,
    replicated,
    sharded,
    start,
    times,
    verdicts_of,
    ways,
    whole,
)
from tests.worlds import classified
from tests.zoo import moving_inputs, note_refusal, without_dropout

ALL = ("words", "blocks.0", "blocks.1", "head")
CHATS = [
    {"prompt": "What is a film?", "chosen": "I would rather not.", "rejected": "A story."},
    {"prompt": "Why? Is it good?", "chosen": "No.", "rejected": "It is a very good film, indeed."},
]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def train(model: nn.Module, solver: mixadv.Solver, way: str, rank: int) -> list[Tensor]:
    """Train three rounds, evaluate after each, and return all that is seen."""
    optimizer = start(model, solver)
    game, seen = optimizer.game, []
    torch.manual_seed(100 + rank)
    for ids, labels in batches(rank, 3):
        seen.append(play(optimizer, way, closure(model, ids, labels)))
        with torch.no_grad():
            seen.append(model(ids))  # which leaves weights gathered
        if game.learner is not None and game.learner.average:
            with game.averaged(), torch.no_grad():
                seen.append(model(ids))
            with torch.no_grad():
                seen.append(model(ids))
        if game.learner is not None and game.learner.samples:
            seen.append(game.mixture(lambda ids=ids: model(ids)))
            named = [weight for sample in game.learner_samples for weight in sample.values()]
            assert len(named) == len(game.learner.samples) * len(list(model.parameters()))
    return [*(s.detach().clone() for s in seen), *found(optimizer)]


# Cases ---------------------------------------------------------------------------------------


def shards_train_as_replicas_do(
    rank: int, name: str, way: str = "step", parts: Any = None, copies: int = 0, **how: Any
) -> str | None:
    solver = SOLVERS[name]
    if copies:  # so many replicas of what is sharded over the processes that are left
        names = ("copies", "shards")
        how["mesh"] = init_device_mesh("cpu", (copies, 2 // copies), mesh_dim_names=names)
    model = sharded(**how) if parts is None else sharded(parts, **how)
    words = [way, "loss of shards"] if way in ("loss", "closure") else [way]
    for word in words:
        if reason := refusal(solver, word, lambda: train(model, solver, way, rank)):
            return reason
    expected = train(replicated(), solver, way, rank)
    torch.testing.assert_close(train(model, solver, way, rank), expected, **CLOSE)
    return None


def checkpoints_change_nothing(rank: int, name: str) -> None:
    expected = train(replicated(), SOLVERS[name], "step", rank)
    kept = train(sharded(reentrant=False), SOLVERS[name], "step", rank)
    torch.testing.assert_close(kept, expected, **CLOSE)
    with pytest.raises(mixadv.GameError, match=r"fully_shard.*use_reentrant=False"):
        train(sharded(reentrant=True), SOLVERS[name], "step", rank)


def noise_is_that_of_one_process(rank: int) -> None:
    alone, noise, own = Net(), Noise(3), []
    for weight, spread in zip(alone.parameters(), sharded().parameters(), strict=True):
        for kind in ("normal", "uniform"):
            noise.begin("learner", 0)
            expected = noise(kind, weight)
            noise.begin("learner", 0)
            drawn = noise(kind, spread)
            assert isinstance(drawn, DTensor)
            assert drawn.placements == spread.placements
            torch.testing.assert_close(whole(drawn), expected, rtol=0, atol=0)
            own.append(drawn.to_local())
    other = own[0].clone()
    dist.broadcast(other, 0)
    assert rank == 0 or not torch.equal(other, own[0])


def routes_agree_or_are_refused(rank: int) -> None:
    seen = []
    for route in ("loop", "stack", "vmap"):
        model = sharded()
        optimizer = start(without_dropout(model), mixadv.MAT(particles=2, particle_batching=route))
        ids, labels = next(batches(rank, 1))

        def run(model: nn.Module = model, ids: Tensor = ids, labels: Tensor = labels) -> Any:
            logits = model(ids)
            targets = labels.repeat(len(logits) // len(labels))
            return F.cross_entropy(logits, targets, reduction="none"), logits

        if route == "vmap":
            with pytest.raises(mixadv.GameError, match=r"fully_shard.*particle_batching='loop'"):
                optimizer.step(run)
        else:
            seen.append([optimizer.step(run), optimizer.step(run)])
    torch.testing.assert_close(*seen, **CLOSE)


def resumed(rank: int, name: str) -> None:
    """By the library's own state, and by that of torch for model and base optimizer."""
    model = sharded()
    optimizer = start(model, SOLVERS[name])
    rows = list(batches(rank, 4))
    for r in rows[:2]:
        optimizer.step(closure(model, *r))
    stream, own, state = torch.get_rng_state(), model.state_dict(), optimizer.state_dict()
    own, state = pickled(own), pickled(state)
    theirs = pickled(get_state_dict(model, optimizer.base))
    for r in rows[2:]:
        optimizer.step(closure(model, *r))
    for how in ("own", "theirs"):
        again = sharded()
        other = start(again, SOLVERS[name])
        if how == "own":
            again.load_state_dict(own)
            other.load_state_dict(state)
        else:
            weights, base = theirs
            set_state_dict(
                again, other.base, model_state_dict=weights, optim_state_dict=base
            )  # which steps the base once
            other.load_state_dict({**other.base.state_dict(), "mixadv": state["mixadv"]})
        torch.set_rng_state(stream)
        for r in rows[2:]:
            other.step(closure(again, *r))
        torch.testing.assert_close(found(other), found(optimizer), rtol=0, atol=0)


def pickled(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def nobody_waits(rank: int, names: tuple[str, ...]) -> None:
    """One process's payoff does not depend on δ, or is not finite: it passes as often."""
    for name in names:
        with moving_inputs(name):
            one_is_flat_and_then_not_finite(rank, name)


def one_is_flat_and_then_not_finite(rank: int, name: str) -> None:
    model = sharded()
    optimizer = start(model, SOLVERS[name])
    for number, (ids, labels) in enumerate(batches(rank, 3)):
        factor = {0: 0.0, 1: 1.0, 2: torch.nan}[number] if rank == 0 else 1.0
        run = classified(lambda x, m=model, f=factor: f * m(x), ids, labels=labels)
        if rank == 0 and number == 0:
            with pytest.warns(UserWarning, match=r"exactly zero in the first round"):
                optimizer.step(run)
        else:
            optimizer.step(run)
    assert not found(optimizer)[0].isfinite().all(), name


def low_formats(rank: int, name: str) -> None:
    """In the first round one process measures a gradient, the other none."""
    for dtype in (torch.bfloat16, torch.float16):
        model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        optimizer = start(model, SOLVERS[name])
        for number, rows in enumerate(batches(rank, 3)):
            factor = 0.0 if number == 0 and rank == 0 else 1.0
            with warnings.catch_warnings(action="ignore"):  # no gradient; the noise floor
                optimizer.step(times(factor, closure(model, *rows)))
        assert all(x.isfinite().all() for x in found(optimizer))
        assert optimizer.outcome.nonfinite == 0


def others_are_refused(rank: int) -> None:
    flat = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel.*fully_shard"):
        mixadv.Game(flat, mixadv.PGD())
    mesh = init_device_mesh("cpu", (2,))
    parallel = parallelize_module(Net(), mesh, {"head": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"2 weights are DTensors.*another δ"):
        mixadv.Game(parallel, mixadv.PGD())
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shards", "tensors"))
    both = parallelize_module(Net(), mesh["tensors"], {"head": ColwiseParallel()})
    fully_shard(both, mesh=mesh["shards"])
    with pytest.raises(ValueError, match=r"2 weights are DTensors.*another δ"):
        mixadv.Game(both, mixadv.PGD())
    replicas = Net()
    fully_shard(replicas, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))
    mixadv.Game(replicas, mixadv.PGD())  # shards and their replicas are its own


def explained(rank: int) -> None:
    model = sharded()
    game = mixadv.Game(model, mixadv.PGD())
    lengths = Net().words.weight.detach().norm(dim=1)
    mine = lengths[len(lengths) // 2 * rank :][: len(lengths) // 2]  # of an estimate
    assert game.explain().unit == pytest.approx(float(mine.mean()), rel=1e-6)
    ids, labels = next(batches(rank, 1))
    if rank == 0:  # nobody else is needed, but for weights to be gathered
        net = Net()
        assert mixadv.Game(net, mixadv.PGD()).explain(closure(net, ids, labels)).measured
    unit = torch.tensor(game.explain(closure(model, ids, labels)).unit)
    game.backward(closure(model, ids, labels))
    dist.all_reduce(unit)
    assert float(unit) / 2 == pytest.approx(game.unit, rel=1e-6)


def chats(rank: int, goals: Any, way: str, adapters: bool = False) -> None:
    """Both players' goals, on chats of other lengths in each process, train as of replicas."""
    tokenizer, found = chatting(), []
    chosen, rejected = preference_batches(tokenizer, CHATS[rank : rank + 1])
    others = chat_batch(tokenizer, ["Say it."], ["A film about pictures."])
    for spread in (False, True):
        model: Any = speaking("Llama", tokenizer).train()
        if adapters:
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
            with warnings.catch_warnings(action="ignore"):  # of PEFT, for transformers
                model = peft.get_peft_model(model, config)
        layers = model.get_submodule("base_model.model.model" if adapters else "model").layers
        for layer in layers if spread else ():
            fully_shard(layer)
        model = fully_shard(model) if spread else DistributedDataParallel(model)
        solver = mixadv.PGD(steps=2, step_size=0.05, radius=0.1, per="token", start="zero")
        optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver)
        for _ in range(2):
            told = goals(model, chosen, rejected, others)
            if way == "step":
                optimizer.step(**told)
            else:
                optimizer.game.backward(**told)
                optimizer.step()
                optimizer.zero_grad()
        weights = [whole(p) for p in model.parameters()]
        found.append([*weights, optimizer.outcome.payoff, torch.tensor(optimizer.game.unit)])
    torch.testing.assert_close(*found, **CLOSE)


# Tests ---------------------------------------------------------------------------------------

MESHES: dict[str, dict[str, Any]] = {
    "each block": {},
    "one group": {"parts": ()},
    "each module": {"parts": ALL},
    "gathered": {"reshard_after_forward": False},
}
FEW = ("freelb", "smart", "mat")
SLOW: dict[str, Any] = {
    "nobody waits": partial(nobody_waits, names=tuple(SOLVERS)),
    **by_name(checkpoints_change_nothing, "checkpointed"),
    **{
        f"{title}, {way}: {name}": partial(shards_train_as_replicas_do, name=name, way=way, **words)
        for title, words in MESHES.items()
        for name in SOLVERS
        for way in ways(SOLVERS[name], every=True)
    },
    **by_name(shards_train_as_replicas_do, "replicas of shards", FEW, copies=2),
    **by_name(shards_train_as_replicas_do, "shards of one replica", FEW, copies=1),
}
CASES: dict[str, Any] = {
    **by_name(shards_train_as_replicas_do, "step", way="step"),
    **by_name(shards_train_as_replicas_do, "loss", way="loss"),
    **by_name(resumed, "resumed", ("textat", "freeat", "smart", "mat")),
    "each module": partial(shards_train_as_replicas_do, name="smart", parts=ALL),
    "gathered": partial(shards_train_as_replicas_do, name="mat", reshard_after_forward=False),
    "checkpointed": partial(checkpoints_change_nothing, name="mat"),
    "noise": noise_is_that_of_one_process,
    "routes": routes_agree_or_are_refused,
    "others": others_are_refused,
    "explained": explained,
    "low formats": partial(low_formats, name="pgd"),
    "nobody waits": partial(nobody_waits, names=FEW),
    "chats, backward": partial(chats, goals=continuous_at, way="backward"),
    "chats, step": partial(chats, goals=latent_at, way="step"),
    "chats of adapters": partial(chats, goals=latent_dpo, way="backward", adapters=True),
}


verdicts = verdicts_of(CASES, "sharded")


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, verdicts: dict[str, Verdict]):
    verdicts[case].hold()


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_tensor_parallelism_is_refused(name: str, tmp_path: Any):
    """Processes that share a batch would each draw another δ for it."""
    with one_process(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        model = parallelize_module(Net(), mesh, {"head": ColwiseParallel()})
        with pytest.raises(ValueError, match=r"2 weights are DTensors.*another δ") as caught:
            mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, name)
    note_refusal(str(caught.value))


@pytest.mark.slow
def test_two_processes_with_other_groups_and_checkpoints(tmp_path: Any):
    for verdict in judge(SLOW, tmp_path).values():
        verdict.hold()
