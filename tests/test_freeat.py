"""FreeAT: optimizer steps within a batch, and the perturbation that is carried to the next one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixadv
from tests.worlds import Twice, breaking
from tests.zoo import Player, assert_same, small, wrapped

STILL = {"step_size": 0.0, "radius": 0.5}  # plays and carries what it starts from


def cut(one: Player, rows: slice, length: int = 5):
    """The closure of a part of the batch."""
    ids, labels = one.batch["ids"][rows, :length], one.batch["labels"][rows]
    return one.closure(ids=ids, labels=labels)


def delta(optimizer) -> Tensor:
    """What was played last."""
    return optimizer.game.strategy.points[0][0]


# The carried perturbation -------------------------------------------------------------------------


def test_the_next_batch_starts_where_the_last_one_ended():
    one = small()
    optimizer = wrapped(one.model, mixadv.FreeAT(**STILL))
    optimizer.step(cut(one, slice(0, 3)))
    first = delta(optimizer)
    carried = optimizer.game.rounds.memory["delta"][0]
    assert_same(carried, first)
    optimizer.step(cut(one, slice(0, 3)))
    assert_same(delta(optimizer), first)
    assert first.any()


def test_it_ends_one_move_after_its_last_step():
    """The last gradient of δ is not thrown away: the next batch starts from it."""
    one = small()
    words = {"radius": None, "step_size": 0.3, "start": "zero", "steps": 1}
    optimizer = wrapped(one.model, mixadv.FreeAT(**words))
    optimizer.step(one.closure())
    assert not delta(optimizer).any()
    carried = optimizer.game.rounds.memory["delta"][0]
    lengths = carried.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3))
    optimizer.step(one.closure())
    assert_same(delta(optimizer), carried)


@pytest.mark.parametrize(("rows", "length"), [(slice(0, 2), 5), (slice(0, 3), 4)])
def test_a_batch_of_another_shape_starts_anew(rows, length):
    """As a game does that has seen no batch before, at the same round."""
    one, other = small(), small()
    carrying, fresh = (wrapped(x.model, mixadv.FreeAT(**STILL)) for x in (one, other))
    for optimizer, x in ((carrying, one), (fresh, other)):
        optimizer.step(cut(x, slice(0, 3)))
    fresh.game.rounds.memory = {}
    carrying.step(cut(one, rows, length))
    fresh.step(cut(other, rows, length))
    assert_same(delta(carrying), delta(fresh))
    carrying.step(cut(one, slice(0, 3)))  # only the last batch's is kept
    fresh.game.rounds.memory = {}
    fresh.step(cut(other, slice(0, 3)))
    assert_same(delta(carrying), delta(fresh))


def test_padding_of_the_next_batch_carries_nothing():
    one = small()
    optimizer = wrapped(one.model, mixadv.FreeAT(**STILL))
    optimizer.step(cut(one, slice(1, 6, 2)))  # all real
    before = delta(optimizer)
    optimizer.step(cut(one, slice(0, 6, 2)))  # padded from the fourth token on
    assert before[:, 3:].any()
    assert not delta(optimizer)[:, 3:].any()
    assert_same(delta(optimizer)[:, :3], before[:, :3])
    optimizer.step(cut(one, slice(1, 6, 2)))
    assert not delta(optimizer)[:, 3:].any()


def test_what_is_carried_is_projected_into_the_ball_of_this_game():
    one = small()
    optimizer = wrapped(one.model, mixadv.FreeAT(steps=1, **STILL))
    optimizer.step(one.closure())
    long = 100 * optimizer.game.rounds.memory["delta"][0]
    optimizer.game.rounds.memory = {"delta": [long]}
    optimizer.step(one.closure())
    lengths = delta(optimizer).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))


def test_nothing_is_carried_unless_asked():
    one, starts = small(), []
    optimizer = wrapped(one.model, mixadv.FreeAT(**STILL, carry=False))
    for _ in range(2):
        optimizer.step(one.closure())
        starts.append(delta(optimizer))
    assert optimizer.game.rounds.memory == {}
    assert not torch.equal(*starts)


def test_each_call_of_the_site_carries_its_own():
    torch.manual_seed(0)
    model, labels = Twice().double(), torch.tensor([0, 1, 2, 0])
    optimizer = wrapped(model, mixadv.FreeAT(**STILL))
    one, other = torch.randint(0, 8, (4, 3)), torch.randint(0, 8, (4, 5))
    seen = []
    for second in (other, other, other[:, :2]):
        optimizer.step(lambda x=second: F.cross_entropy(model(one, x), labels))
        seen.append([points[0] for points in optimizer.game.strategy.points])
    assert_same(seen[1], seen[0])
    assert_same(seen[2][0], seen[0][0])  # this call has kept its shape, the other has not
    assert seen[2][1].shape == (4, 2, 4)


def test_a_broken_round_carries_nothing_and_takes_its_steps_back():
    one = small()
    optimizer = wrapped(one.model, mixadv.FreeAT(steps=3))
    optimizer.step(one.closure())
    before = optimizer.game.rounds.memory["delta"][0].clone()
    weights = [p.detach().clone() for p in one.model.parameters()]
    with pytest.raises(MemoryError):
        optimizer.step(breaking(one.closure(), 3))
    assert_same(optimizer.game.rounds.memory["delta"][0], before)
    assert_same([p.detach() for p in one.model.parameters()], weights)


# The steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_batch_is_replayed_with_an_optimizer_step_in_each(steps):
    one, happened = small(), []
    optimizer = wrapped(one.model, mixadv.FreeAT(steps=steps, radius=0.0))
    optimizer.base.register_step_pre_hook(lambda *_: happened.append("step"))
    optimizer.step(one.closure())
    happened.clear()

    def closure():
        happened.append("forward")
        return one.closure()()

    optimizer.step(closure)
    assert happened == ["forward", "step"] * steps
    assert optimizer.outcome.steps == steps
    assert (optimizer.outcome.forwards, optimizer.outcome.delta_backwards) == (steps, 0)


def test_each_step_has_a_dropout_mask_of_its_own():
    one, seen = small(), []
    one.model.dropout.register_forward_hook(lambda *call: seen.append(call[2].detach() == 0))
    optimizer = wrapped(one.model, mixadv.FreeAT(steps=3, radius=0.0))
    optimizer.step(one.closure())
    seen.clear()
    optimizer.step(one.closure())
    masks = [mask[1::2] for mask in seen]  # rows without padding
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("door", ["backward", "loss"])
def test_loops_that_own_the_step_are_refused(door):
    one = small()
    game = wrapped(one.model, mixadv.FreeAT()).game
    with pytest.raises(
        mixadv.GameError, match=r"FreeAT takes an optimizer step after each.*step\("
    ):
        getattr(game, door)(one.closure())
    assert game.round == 0


def test_a_game_without_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"FreeAT steps within a batch.*mixadv\.wrap.*\.step"):
        mixadv.Game(small().model, mixadv.FreeAT())


def test_no_replay_is_none():
    with pytest.raises(ValueError, match=r"steps \(the number of replays\) must be at least 1"):
        mixadv.FreeAT(steps=0)
