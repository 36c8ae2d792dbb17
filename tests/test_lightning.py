"""Lightning: its loops play the rounds that loops written by hand play."""

import copy
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, lr_scheduler
from torch.utils.data import DataLoader

import mixadv
from tests.zoo import assert_same, moving_inputs, or_refused, small

lightning: Any = pytest.importorskip("lightning")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's: few workers, no logger, …

CLIP = 0.1
BATCHES = 4


def build(name: str) -> mixadv.Solver:
    if name == "cat":
        return mixadv.CAT(head=torch.nn.Linear(3, 2).double())
    settings = {"mat": {"particles": 2, "learner_steps": 3, "samples": 2}}
    return mixadv.make_solver(name, **settings.get(name, {}))


class Module(lightning.LightningModule):
    """A module that plays in one of four ways."""

    def __init__(self, name: str, way: str = "automatic", dtype: Any = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.player = small()
        self.model = self.player.model.to(dtype)
        self.solver = build(name)
        self.way = way
        self.automatic_optimization = way == "automatic"

    def configure_optimizers(self) -> Any:
        base = AdamW(self.model.parameters(), lr=0.05)
        optimizer = mixadv.wrap(base, self.model, self.solver)
        self.game = optimizer.game
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def closure(self, batch: Tensor) -> Any:
        return lambda: self.player.forward(self.model, {**self.player.batch, "labels": batch})

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        torch.manual_seed(100 * self.current_epoch + index)  # which the loaders draw from too
        if self.way == "automatic":
            return self.game.loss(self.closure(batch))
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        if self.way == "backward":
            self.game.backward(self.closure(batch), backward=self.manual_backward)
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(self.closure(batch))
        scheduler.step()
        return None


def batches(rank: int = 0) -> DataLoader:
    draw = torch.Generator().manual_seed(3 + rank)
    return DataLoader(list(torch.randint(0, 3, (BATCHES, 6), generator=draw)), batch_size=None)


def trainer(folder: Path, **settings: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**{**quiet, "max_epochs": 2, **settings})


def held(optimizer: mixadv.GameOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def by_hand(module: Module, micro: int = 1, clip: float = 0.0, autocast: Any = None) -> None:
    """Train a module without Lightning."""
    (optimizer,), (schedule,) = module.configure_optimizers()
    game, scheduler = module.game, schedule["scheduler"]
    for epoch in range(2):
        for number, batch in enumerate(batches()):
            torch.manual_seed(100 * epoch + number)
            closure = module.closure(batch)
            if module.way == "step":
                optimizer.step(closure)
                scheduler.step()
                continue
            if module.way == "backward":
                game.backward(closure)
            else:
                with autocast or nullcontext():
                    loss = game.loss(closure) / micro
                loss.backward()
            if (number + 1) % micro == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(held(optimizer), clip)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()


def outcome(module: Module) -> dict[str, Any]:
    state = module.game.optimizer
    learner = module.game.learner
    return {
        "weights": copy.deepcopy(module.model.state_dict()),
        "lr": state.param_groups[0]["lr"],
        "game": module.game.state_dict(),
        "learner": None if learner is None else learner.state_dict(),
    }


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("loss")
def test_automatic_optimization_clips_accumulates_and_schedules(name: str, tmp_path: Path) -> None:
    for micro in (1, 2):
        settings = {"gradient_clip_val": CLIP, "accumulate_grad_batches": micro}
        module, other = Module(name), Module(name)
        trainer(tmp_path, **settings).fit(module, batches())
        by_hand(other, micro, CLIP)
        assert_same(outcome(module), outcome(other))


@pytest.mark.parametrize("way", ["backward", pytest.param("step", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused()
def test_manual_optimization_plays_the_same_rounds(name: str, way: str, tmp_path: Path) -> None:
    module, other = Module(name, way), Module(name, way)
    trainer(tmp_path).fit(module, batches())
    by_hand(other)
    assert_same(outcome(module), outcome(other))


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("loss")
def test_mixed_precision_is_autocast_around_the_rounds(name: str, tmp_path: Path) -> None:
    if name == "cat":
        pytest.skip("its head is in float64")
    module, other = (Module(name, dtype=torch.float32) for _ in range(2))
    trainer(tmp_path, precision="bf16-mixed").fit(module, batches())
    by_hand(other, autocast=torch.autocast("cpu", torch.bfloat16))
    assert_same(outcome(module), outcome(other))


@pytest.mark.parametrize("way", ["automatic", "backward", "step"])
@pytest.mark.parametrize("name", ["freeat", "textat", "cat", "smart", "mat"])
def test_a_checkpoint_of_lightning_resumes_both_players(
    name: str, way: str, tmp_path: Path
) -> None:
    if name == "freeat":
        way = "step"
    whole = Module(name, way)
    trainer(tmp_path).fit(whole, batches())
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Module(name, way), batches())
    first.save_checkpoint(tmp_path / "kept.ckpt")
    resumed = Module(name, way)
    trainer(tmp_path).fit(resumed, batches(), ckpt_path=tmp_path / "kept.ckpt")
    assert_same(outcome(resumed), outcome(whole))


def test_validation_sees_no_adversary_and_may_see_the_average(tmp_path: Path) -> None:
    class Validating(Module):
        def validation_step(self, batch: Tensor, index: int) -> None:
            closure = self.closure(batch)
            plain, played = closure()[0], self.game.loss(closure)
            with self.game.averaged():
                self.losses.append((plain, played, closure()[0]))

    module = Validating("mat")
    module.losses = []
    settings = {"max_epochs": 3, "num_sanity_val_steps": 2}
    trainer(tmp_path, **settings).fit(module, batches(), batches())
    assert len(module.losses) == 2 + 3 * BATCHES
    assert all(torch.equal(average, plain) for plain, _, average in module.losses[:2])
    for plain, played, average in module.losses[2:]:
        assert torch.equal(plain, played)
        assert not torch.equal(plain, average)


# Two processes -----------------------------------------------------------------------------------


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    settings: dict[str, Any] = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}
    settings = {**settings, "use_distributed_sampler": False, "max_epochs": 1}
    for name in [name for name in mixadv.SOLVERS if name != "freeat"]:
        for way in ("automatic", "backward"):
            with moving_inputs(name):
                module = Module(name, way)
                module.solver = mixadv.CAT() if name == "cat" else module.solver
                trainer(Path(folder), **settings).fit(module, batches(rank))
            shared = [*module.model.parameters()]
            if module.game.learner is not None:
                shared += module.game.learner.average.values()
            for mine in shared:
                others = mine.detach().clone()
                dist.broadcast(others, 0)
                assert_same(mine.detach(), others)
            points = module.game.strategy.points[0]
            others = points.clone()
            dist.broadcast(others, 0)
            assert rank == 0 or not torch.equal(others, points), "players share their draws"
    # A closure calls the model within Lightning's wrapper, past what averages the gradients.
    with pytest.warns(UserWarning, match="gradients are not averaged"):
        trainer(Path(folder), **settings).fit(Module("fgm", "step"), batches(rank))


@pytest.mark.slow
def test_replicas_stay_equal_under_lightning(tmp_path: Path) -> None:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(work, (str(tmp_path), port), nprocs=2)
