"""Two processes over gloo, started once for many cases, and a tiny model for them to train."""

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mixadv
from tests.worlds import classified
from tests.zoo import CANNOT, MOVING, moving_inputs, note_refusal, wrapped

Case = Callable[[int], Any]  # of the rank; a function of a module, or a partial one
SOLVERS: dict[str, mixadv.Solver] = {name: mixadv.make_solver(name) for name in mixadv.SOLVERS} | {
    **MOVING,
    "ensemble": mixadv.MAT(particles=2, play_as="ensemble", learner_temperature=1e-6, samples=2),
    "leap": mixadv.ALUM(direction="gauss_newton", sign="boundary"),
    "recomputed": mixadv.ALUM(direction="gauss_newton", recompute=True),
}
WORDS, CLASSES, LENGTH = 20, 3, 5
WAIT = timedelta(seconds=60)  # for a process that waits in vain: a hang is an error


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Be a group of one process.

    The last to hold a group may be a replica, which then waits for the group's threads with the
    GIL, and they may need that to let go of what they worked on: a barrier has them do it before.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.barrier()
        dist.destroy_process_group()


class Verdict(NamedTuple):
    """What came of a case on two processes."""

    wrong: str  # an empty text for nothing
    refused: str  # the reason of a case that was refused, and has to be

    def hold(self, changed: bool = False) -> None:
        """Fail where something went wrong; note a refusal, or what was `changed` for it."""
        assert not self.wrong, self.wrong
        if self.refused:
            note_refusal(self.refused, changed)


def judge(cases: dict[str, Case], folder: Path) -> dict[str, Verdict]:
    """Run cases on two processes; a case that is refused returns the reason.

    Those who ask for the same folder, such as several workers, have them run once.
    """
    folder.mkdir(exist_ok=True)
    run = folder / "run"
    # A failure is written down, and the cases that follow are not run.
    with FileLock(folder / "lock"), suppress(ProcessException):
        if not run.exists():
            run.touch()
            # Both are forked from a server that has imported what they need, once for a session.
            get_context("forkserver").set_forkserver_preload([__name__])
            words = {"nprocs": 2, "start_method": "forkserver"}
            torch.multiprocessing.start_processes(_work, (cases, str(folder)), **words)
    verdicts = {}
    for number, name in enumerate(cases):
        wrong = [_read(folder / f"{number}.{rank}", "not run") for rank in range(2)]
        reason = _read(folder / f"{number}.refused", "")
        verdicts[name] = Verdict("\n".join(wrong).strip(), reason)
    return verdicts


def _read(file: Path, otherwise: str) -> str:
    return file.read_text() if file.exists() else otherwise


def refusal(solver: mixadv.Solver, way: str, run: Callable[[], Any]) -> str | None:
    """Return why a solver refuses what is run, None where it has no reason to."""
    why = CANNOT.get(("recomputed" if solver.recompute else solver.name, way))
    if why is None:
        return None
    with pytest.raises(mixadv.GameError, match=why) as caught:
        run()
    return str(caught.value)


def _work(rank: int, cases: dict[str, Case], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=WAIT)
    for number, (name, case) in enumerate(cases.items()):
        said = Path(folder, f"{number}.{rank}")
        try:
            with moving_inputs(name):
                reason = case(rank)
        except BaseException:
            said.write_text(traceback.format_exc())
            raise
        said.write_text("")
        if reason and rank == 0:
            Path(folder, f"{number}.refused").write_text(reason)
    dist.barrier()
    dist.destroy_process_group()


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.dropout(x)))


class Net(nn.Module):
    """An embedding, two blocks, a buffer and a head on the mean; in float64."""

    def __init__(self, unused: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, CLASSES)
        self.register_buffer("calls", torch.zeros(()))
        if unused:
            self.unused = nn.Linear(2, 2)
        self.reentrant = reentrant
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x = self.words(ids)
        for block in self.blocks:
            again = self.reentrant
            x = block(x) if again is None else checkpoint(block, x, use_reentrant=again)
        return self.head(x.mean(1))


def replicated(**how: Any) -> nn.Module:
    """Return a model in DistributedDataParallel."""
    return DistributedDataParallel(Net(**how), find_unused_parameters="unused" in how)


def sharded(parts: tuple[str, ...] = ("blocks.0", "blocks.1"), **how: Any) -> nn.Module:
    """Return a model whose parts, and the rest as another, are sharded."""
    model = Net(how.pop("unused", False), how.pop("reentrant", None))
    for name in parts:
        fully_shard(model.get_submodule(name), **how)
    fully_shard(model, **how)
    return model


def batches(rank: int, rounds: int, rows: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Return a process's own batches."""
    draw = torch.Generator().manual_seed(rank)
    for _ in range(rounds):
        ids = torch.randint(0, WORDS, (rows, LENGTH), generator=draw)
        yield ids, torch.randint(0, CLASSES, (rows,), generator=draw)


def closure(model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], Any]:
    """Return a closure of the loss and the logits."""
    return classified(model, ids, labels=labels)


def times(factor: float, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a closure of loss and logits that are multiplied by a factor."""
    return lambda: tuple(factor * x for x in run())


def by_name(
    case: Case, title: str, names: Iterable[str] = SOLVERS, **words: Any
) -> dict[str, Case]:
    """Return a case for each solver, under a title and its name."""
    return {f"{title}: {name}": partial(case, name=name, **words) for name in names}


def verdicts_of(cases: dict[str, Case], title: str) -> Any:
    """Return a fixture of what came of cases, which the workers of a session run once."""

    @pytest.fixture(scope="module")
    def verdicts(together: Path) -> dict[str, Verdict]:
        return judge(cases, together / title)

    return verdicts


def start(model: nn.Module, solver: mixadv.Solver) -> mixadv.GameOptimizer:
    """Return an optimizer of the model."""
    return wrapped(model, solver, torch.optim.AdamW, lr=0.01)


def play(optimizer: mixadv.GameOptimizer, way: str, *closures: Callable[[], Any]) -> Tensor:
    """Play a round in one of the ways, of several micro-batches where there are."""
    if way == "step":
        return optimizer.step(*closures)
    model, game, objective = optimizer.game.model, optimizer.game, torch.zeros(())
    if way == "closure":
        return optimizer.step(lambda: _whole_step(optimizer, closures[0]))
    for number, run in enumerate(closures):
        waits = isinstance(model, DistributedDataParallel) and number < len(closures) - 1
        with model.no_sync() if waits else torch.enable_grad():
            if way == "backward":
                objective = game.backward(run).objective
            else:
                objective = game.loss(run)
                objective.backward()
    optimizer.step()
    optimizer.zero_grad()
    return objective.detach()


def _whole_step(optimizer: mixadv.GameOptimizer, run: Callable[[], Any]) -> Tensor:
    """Do what a closure does in a loop that leaves the step to the optimizer."""
    optimizer.zero_grad()
    loss = optimizer.game.loss(run)
    loss.backward()
    return loss.detach()


def ways(solver: mixadv.Solver, every: bool = False) -> list[str]:
    """Return two ways in which a solver is played, or all four."""
    if solver.replays_batch:
        return ["step"]
    return ["step", "loss", "backward", "closure"] if every else ["step", "loss"]


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, put together where it is sharded."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor.detach().clone() if full is None else full().detach().clone()


def found(optimizer: mixadv.GameOptimizer) -> list[Tensor]:
    """Return what training came to, equal on all processes: weights and what is kept of them."""
    game = optimizer.game
    kept = [] if game.learner is None else [game.learner.average, game.learner.teacher]
    kept += [] if game.learner is None else game.learner.samples
    table = [game.rounds.memory["table"]] if "table" in game.rounds.memory else []
    weights = [*game.rounds.arena.parameters(), *(w for part in kept for w in part.values())]
    return [whole(w) for w in [*weights, *table, torch.tensor(game.unit or 0.0)]]


def assert_equal_on_all(tensors: list[Tensor]) -> None:
    """Assert that processes hold the same, bit for bit."""
    for mine in tensors:
        first = mine.clone()
        dist.broadcast(first, 0)
        torch.testing.assert_close(mine, first, rtol=0, atol=0, equal_nan=True)
