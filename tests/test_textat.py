"""TextAT's table: what is read from it, what is written into it, and who never touches it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.equilibrium import best_response
from tests.worlds import Twice, breaking
from tests.zoo import assert_same, fingerprint, player, small, wrapped

VOCABULARY, WIDTH = 12, 6
STILL = {"start": "zero", "steps": 1}  # plays and writes what it reads


def played(one, solver, rounds: int = 1, table: Tensor | None = None) -> mixadv.Game:
    """Play rounds on a given table; return the game."""
    game = mixadv.Game(one.model, solver)
    if table is not None:
        game.load_state_dict({**game.state_dict(), "memory": {"table": table}})
    for _ in range(rounds):
        game.backward(one.closure())
    return game


def random_table(size: float = 0.01, seed: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return size * torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)


def real(one) -> Tensor:
    return one.batch["ids"] != 0


# Reading ------------------------------------------------------------------------------------------


def test_a_fresh_table_is_uniform_and_the_seeds_alone():
    """Each row is at most as long as a start, whatever the batch and the number of the round."""
    tables = []
    for seed, rows in ((0, 6), (0, 2), (1, 6)):
        one = player("bert", rows=rows)
        game = mixadv.Game(one.model, mixadv.TextAT(steps=1, radius=None, step_size=0.3), seed=seed)
        game.backward(one.closure())
        unseen = torch.ones(99, dtype=torch.bool)
        unseen[player("bert").batch["input_ids"].unique()] = False
        tables.append(game.rounds.memory["table"][unseen])
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    entries = tables[0] * math.sqrt(16) / 0.3
    assert entries.abs().max() <= 1
    assert float(entries.square().mean()) == pytest.approx(1 / 3, rel=0.2)
    assert (tables[0].norm(dim=1) <= 0.3).all()


def test_every_place_of_a_token_reads_its_row():
    one, table = small(), random_table()
    game = played(one, mixadv.TextAT(**STILL, exclude=(3, 7)), table=table)
    ids = one.batch["ids"]
    own = (real(one) & (ids != 3) & (ids != 7))[..., None]
    assert_same(game.strategy.points[0][0], table[ids] * own)


def test_a_token_whose_row_is_zero_is_not_stuck_there():
    one = small()
    game = played(one, mixadv.TextAT(steps=2), table=torch.zeros(VOCABULARY, WIDTH).double())
    assert game.rounds.memory["table"][one.batch["ids"][real(one)]].any(1).all()


# Writing ------------------------------------------------------------------------------------------


@given(
    steps=st.integers(1, 4),
    radius=st.floats(0.01, 1.0),
    write=st.sampled_from(["mean", "accumulate"]),
    exclude=st.sets(st.integers(0, VOCABULARY - 1), max_size=4),
)
def test_only_tokens_of_the_batch_are_written(steps, radius, write, exclude):
    """Neither padding, nor those excluded, nor those that do not occur."""
    one, table = small(), random_table(0.3)
    words = {"steps": steps, "radius": radius, "step_size": 0.2, "write": write}
    game = played(one, mixadv.TextAT(**words, exclude=tuple(exclude)), 2, table)
    occurring = set(one.batch["ids"][real(one)].tolist()) - exclude
    changed = (game.rounds.memory["table"] != table).any(1).nonzero().flatten().tolist()
    assert set(changed) <= occurring
    if steps > 1:
        assert set(changed) == occurring


@pytest.mark.parametrize("write", ["mean", "accumulate"])
def test_what_is_written_is_what_every_place_came_to(write):
    """With δ held at zero by its start and one pass, η is the row, shrunk with its sample."""
    one, table = small(), random_table(0.3)
    radius = 0.5
    game = played(one, mixadv.TextAT(**STILL, radius=radius, write=write), table=table)
    ids, own = one.batch["ids"], real(one)[..., None]
    eta = table[ids] * own
    eta = eta * (radius / eta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    expected = table.clone()
    for token in ids[real(one)].unique():
        places = eta[(ids == token) & real(one)]
        expected[token] = places.mean(0) if write == "mean" else table[token] + places.sum(0)
    torch.testing.assert_close(game.rounds.memory["table"], expected, rtol=1e-12, atol=1e-15)
    assert not torch.equal(expected, table)


@given(
    radius=st.floats(0.05, 2.0),
    size=st.floats(0.0, 10.0),
    norm=st.sampled_from(["l1", "l2", "linf"]),
    per=st.sampled_from(["sample", "token"]),
    write=st.sampled_from(["mean", "accumulate"]),
)
def test_the_sum_of_both_perturbations_stays_in_the_ball(radius, size, norm, per, write):
    """Whatever the table has grown to; measured at the site, in every pass."""
    one = small()
    words = {"radius": radius, "norm": norm, "per": per, "write": write, "step_size": 0.5}
    game = mixadv.Game(one.model, mixadv.TextAT(**words, unit="absolute"))
    game.load_state_dict({**game.state_dict(), "memory": {"table": random_table(size)}})
    game.backward(one.closure())  # the first round is checked, and probes the site
    added, bare = [], one.model.embedding(one.batch["ids"]).detach()

    class Dropout(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            added.append((x - bare).detach())
            return x

    one.model.dropout = Dropout()
    game.backward(one.closure())
    order = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
    assert len(added) == 3
    for delta in added:
        groups = delta.flatten(1) if per == "sample" else delta
        lengths = torch.linalg.vector_norm(groups, order, dim=-1)
        assert (lengths <= radius * (1 + 1e-9)).all()


def test_two_calls_of_an_embedding_share_its_table():
    torch.manual_seed(0)
    model, draw = Twice().double(), torch.Generator().manual_seed(1)
    one, other = (torch.randint(0, 8, (4, n), generator=draw) for n in (3, 5))
    table = 0.1 * torch.randn(8, 4, generator=draw, dtype=torch.float64)
    game = mixadv.Game(model, mixadv.TextAT(**STILL, radius=None, write="accumulate"))
    game.load_state_dict({**game.state_dict(), "memory": {"table": table}})
    game.backward(lambda: F.cross_entropy(model(one, other), torch.tensor([0, 1, 2, 0])))
    for call, ids in enumerate((one, other)):
        assert_same(game.strategy.points[call][0], table[ids])
    places = torch.cat([one.flatten(), other.flatten()]).bincount(minlength=8)
    torch.testing.assert_close(game.rounds.memory["table"], table * (1 + places[:, None]))


def test_a_sample_without_a_finite_gradient_writes_nothing():
    """An overflow of its loss would erase the rows of its tokens."""
    one, table = small(reduction="none"), random_table()
    poisoned = []

    def closure():
        loss, logits = one.closure()()
        if logits.requires_grad and poisoned:
            factor = torch.ones_like(logits)
            factor[1] = float("inf")
            logits.register_hook(lambda g: g * factor)
        return loss, logits

    one.model.eval()
    game = mixadv.Game(one.model, mixadv.TextAT(steps=3))
    game.load_state_dict({**game.state_dict(), "memory": {"table": table}})
    with game.rounds.open(closure):
        pass
    poisoned.append(1)
    assert game.backward(closure, lambda loss: loss.backward()).nonfinite == 1
    ids = one.batch["ids"]
    alone = set(ids[1].tolist()) - set(torch.cat([ids[:1], ids[2:]]).flatten().tolist())
    assert alone
    found = game.rounds.memory["table"]
    assert found.isfinite().all()
    assert_same(found[list(alone)], table[list(alone)])
    others = torch.cat([ids[:1], ids[2:]])
    assert (found != table).any(1)[others[others != 0]].all()


# Who never touches it -----------------------------------------------------------------------------


def test_nothing_but_a_whole_round_writes():
    one = small()
    optimizer = wrapped(one.model, mixadv.TextAT())
    game, closure = optimizer.game, one.closure()
    optimizer.step(closure)
    saved = optimizer.state_dict()["mixadv"]["game"]["memory"]["table"]
    before = saved.clone()
    game.explain(closure)
    with torch.no_grad():
        game.loss(closure)
        one.model(one.batch["ids"])
    best_response(game, closure)
    for passes in (1, 2, 3):
        with pytest.raises(MemoryError):
            optimizer.step(breaking(closure, passes))
    assert_same(game.rounds.memory["table"], before)
    optimizer.step(closure)
    assert not torch.equal(game.rounds.memory["table"], before)
    assert_same(saved, before)  # a state that was saved stays what it was


def test_the_table_is_no_parameter():
    one = player("bert", rows=4)
    before = fingerprint(one.model)
    game = played(one, mixadv.TextAT())
    table = game.rounds.memory["table"]
    assert table.shape == (99, 16)
    assert not table.requires_grad
    live = [id(p) for p in game.rounds.arena.parameters()]
    assert live == before["identities"][: len(live)]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["bert.encoder.layer.0", "bert.embeddings"])
def test_a_site_without_tokens_is_refused(site):
    one = player("bert", rows=4)
    game = mixadv.Game(one.model, mixadv.TextAT(), site)
    with pytest.raises(mixadv.GameError, match=rf"{site}.*not an embedding.*Leave site= out"):
        game.backward(one.closure())


def test_a_table_of_another_vocabulary_is_refused():
    one = small()
    with pytest.raises(mixadv.GameError, match=r"\[5, 6\].*\[12, 6\].*same model"):
        played(one, mixadv.TextAT(), table=torch.zeros(5, 6).double())


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps .* at least 1, got 0"),
        ({"write": "means"}, ValueError, "'means' is not 'mean' or 'accumulate'"),
        ({"exclude": [1, 2]}, TypeError, r"tuple of token ids, got \[1, 2\]"),
        ({"exclude": (1, "[PAD]")}, TypeError, r"tuple of token ids"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        mixadv.TextAT(**words)
