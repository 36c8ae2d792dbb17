"""Replicas stay equal: two processes on two shares of the data, every solver, every way to play."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mixadv
from tests.zoo import CANNOT

SOLVERS: dict[str, mixadv.Solver] = {name: mixadv.solver(name) for name in mixadv.SOLVERS} | {
    "ensemble": mixadv.MAT(particles=2, play_as="ensemble", learner_temperature=1e-6, samples=2)
}
WAYS = ["step", "backward", "loss", "accumulated"]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 4)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.words(ids).mean(1).tanh()))


def played(solver: mixadv.Solver, way: str, rank: int, wrapped: bool = True) -> list[Any]:
    """Train three rounds on this process's share and return what all processes must agree on."""
    torch.manual_seed(0)
    model = Bag()
    parallel = DistributedDataParallel(model) if wrapped else model
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = mixadv.wrap(base, parallel, solver)
    game = optimizer.game
    draw = torch.Generator().manual_seed(rank)
    torch.manual_seed(100 + rank)
    for _ in range(3):
        ids = torch.randint(0, 20, (8, 5), generator=draw)
        labels = torch.randint(0, 3, (8,), generator=draw)

        def closure(ids: Tensor = ids, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
            logits = parallel(ids)
            return F.cross_entropy(logits, labels), logits

        if way == "step":
            optimizer.step(closure)
            continue
        if way == "backward":
            game.backward(closure)
        else:
            if way == "accumulated":
                with parallel.no_sync():
                    game.loss(closure).backward()
            game.loss(closure).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = [] if game.learner is None else [*game.learner.average.values()]
    if solver.name == "textat":
        kept.append(game.memory["table"])
    return [*model.state_dict().values(), *kept, torch.tensor(game.unit)], game.strategy.points


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    warnings.simplefilter("error")
    for solver in SOLVERS.values():
        for way in WAYS:
            cannot = CANNOT.get((solver.name, "loss" if way == "accumulated" else way))
            if cannot:
                with pytest.raises(mixadv.GameError, match=cannot):
                    played(solver, way, rank)
                continue
            shared, points = played(solver, way, rank)
            for mine in shared:
                others = mine.clone()
                dist.broadcast(others, 0)
                torch.testing.assert_close(mine, others, rtol=0, atol=0)
            others = points[0].clone()
            dist.broadcast(others, 0)
            assert rank == 0 or not torch.equal(others, points[0]), "adversaries share their draws"
    with pytest.warns(UserWarning, match=r"gradients are not averaged.*game\.backward"):
        played(mixadv.PGD(), "step", rank, wrapped=False)
    with pytest.raises(ValueError, match=r"gradients of head= would not be averaged"):
        played(mixadv.CAT(head=nn.Linear(3, 2)), "step", rank)
    dist.destroy_process_group()


def test_replicas_stay_equal_and_adversaries_play_for_their_own_rows(tmp_path: Path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
