"""The training loop: updates, evaluation on the way, checkpoints to go on from after a kill."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from tqdm.auto import tqdm

import mixadv
from training import data, model
from training.data import Task
from training.evaluation import Evaluator
from training.results import Run, append, finished


@dataclass
class Progress:
    """What a run has done so far; part of its checkpoint."""

    updates: int = 0
    optimizer_steps: int = 0
    forwards: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    best_update: int = 0


class Training:
    """One run, from its model to its result."""

    def __init__(self, run: Run, task: Task, output: Path) -> None:
        self.run = run
        self.output = output
        self.accelerator = Accelerator(
            mixed_precision="bf16" if run.bf16 else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=run.accumulate),
        )
        set_seed(run.seed, device_specific=True)
        self.rows, self.splits = data.choose(
            task, run.seed, hold_out=run.hold_out, shots=run.shots, limit=run.limit
        )
        self.choose_on = "held-out" if run.hold_out else task.choose_on
        self.size = run.batch_size * self.accelerator.num_processes
        per_epoch = len(self.rows) / (self.size * run.accumulate)
        self.updates = run.updates or max(1, math.ceil(run.epochs * per_epoch))

        network, tokenizer = model.load(run, task)
        self.model = self.accelerator.prepare(network.train())
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=run.learning_rate,
            weight_decay=run.weight_decay,
            fused=True,
        )
        self.game: mixadv.Game | None = None
        if run.solver != "plain":
            solver = mixadv.solver(run.solver, **run.parameters)
            optimizer = mixadv.wrap(optimizer, self.model, solver, seed=run.seed)
            self.game = optimizer.game
        self.optimizer = self.accelerator.prepare(optimizer)
        warmup = max(1, int(run.warmup * self.updates))
        decay = self.updates - warmup + 1
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min((done + 1) / warmup, (self.updates - done) / decay)
        )
        self.encode = model.Encoder(
            tokenizer, run.max_length, task.labels is None, self.accelerator.device
        )
        self.evaluator = Evaluator(run, task, self.model, self.encode, self.accelerator)
        self.progress = Progress()
        self.checkpoint = output / f"{run.key}.pt"

    # Training --------------------------------------------------------------------------------

    def train(self, checkpoint_every: int) -> dict[str, Any]:
        """Train from where the run stands to its end; return the result."""
        self.restore()
        done = self.progress.updates
        source = data.batches(data.lengths(self.rows), self.size, self.run.seed)
        source = itertools.islice(source, done * self.run.accumulate, None)
        main = self.accelerator.is_main_process
        name = f"{self.run.task} {self.run.solver} seed {self.run.seed}"
        with tqdm(
            total=self.updates, initial=done, desc=name, leave=False, disable=None if main else True
        ) as bar:
            while self.progress.updates < self.updates:
                batches = list(itertools.islice(source, self.run.accumulate))
                started = time.perf_counter()
                loss = self.update([self.encode(self.rows[self.part(b)]) for b in batches])
                self.scheduler.step()
                self.progress.seconds += time.perf_counter() - started
                self.progress.updates += 1
                bar.set_postfix(self.numbers(loss), refresh=False)
                bar.update()
                every = self.run.evaluate_every
                if (
                    every
                    and self.progress.updates % every == 0 < self.updates - self.progress.updates
                ):
                    self.consider(self.evaluate([self.choose_on]))
                if self.progress.updates % checkpoint_every == 0:
                    self.save()
        return self.result()

    def part(self, batch: list[int]) -> list[int]:
        """Return the rows of a batch that this process trains on."""
        return batch[self.accelerator.process_index :: self.accelerator.num_processes]

    def update(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Update the weights on one batch or the micro-batches of one; return the objective.

        A game steps the optimizer itself, as often as its solver says. Where gradients of several
        micro-batches are accumulated, the loop steps it once, for the game's one sample of θ.
        """
        total = torch.zeros(())
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                forward = lambda: self.model(**batch)  # noqa: B023, E731
                if self.game and self.run.accumulate == 1:
                    self.optimizer.step(forward)
                    loss = self.game.outcome.objective
                else:
                    loss = self.backward(forward)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            total = total.to(loss) + loss / len(batches)
            outcome = self.game.outcome if self.game else None
            self.progress.forwards += outcome.forwards if outcome else 1
        self.progress.optimizer_steps += outcome.steps if outcome else 1
        return total

    def backward(self, forward: Callable[[], Any]) -> torch.Tensor:
        """Add the gradients of a micro-batch; return its objective."""
        if self.game:
            return self.game.backward(forward, backward=self.accelerator.backward).objective
        loss = forward().loss
        self.accelerator.backward(loss)
        return loss.detach()

    def numbers(self, loss: torch.Tensor) -> dict[str, str]:
        """Return what the progress bar shows."""
        shown = {"loss": f"{loss:.3f}"}
        outcome = self.game.outcome if self.game else None
        if outcome is not None and outcome.payoff is not None:
            shown |= {"payoff": f"{outcome.payoff:.2g}", "radius": f"{outcome.radius:.2g}"}
        return shown

    # Evaluation ------------------------------------------------------------------------------

    def evaluate(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Return the metrics of the splits named."""
        return self.evaluator(self.splits, names, self.game)

    def consider(self, metrics: dict[str, dict[str, float]]) -> None:
        """Note the score; where it is the best yet, the metrics of every split."""
        score = next(iter(metrics[self.choose_on].values()))
        best = not self.progress.curve or score > max(s for _, s in self.progress.curve)
        self.progress.curve.append([self.progress.updates, score])
        if best:
            others = [name for name in self.splits if name not in metrics]
            found = metrics | self.evaluate(others)
            self.progress.best = {name: found[name] for name in self.splits}
            self.progress.best_update = self.progress.updates

    def result(self) -> dict[str, Any]:
        """Evaluate at the end; return the line of results."""
        last = self.evaluate(list(self.splits))
        progress = self.progress
        found: dict[str, Any] = {}
        if self.run.evaluate_every:
            self.consider(last)
            found = {"best": progress.best, "best_update": progress.best_update}
            found |= {"chosen_on": self.choose_on, "curve": progress.curve}
        attacked = self.splits.get("test", self.splits.get(self.choose_on))
        last = last | self.evaluator.attacked(attacked, self.game)
        return {
            **asdict(self.run),
            "key": self.run.key,
            "updates": self.updates,
            "rows": len(self.rows),
            "optimizer_steps": progress.optimizer_steps,
            "forwards_per_update": progress.forwards // self.updates,
            "seconds_per_update": progress.seconds / self.updates,
            "last": last,
            **found,
        }

    # Checkpoints -----------------------------------------------------------------------------

    def live(self) -> dict[str, Any]:
        """Return what changes in training and has a state."""
        network = self.accelerator.unwrap_model(self.model)
        return {"model": network, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def save(self) -> None:
        """Write a checkpoint; a kill in the middle leaves the one before."""
        random = gather_object([_random()])
        if not self.accelerator.is_main_process:
            return
        state = {name: thing.state_dict() for name, thing in self.live().items()}
        state |= {"progress": asdict(self.progress), "random": random}
        self.output.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def restore(self) -> None:
        """Load the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        for name, thing in self.live().items():
            thing.load_state_dict(state[name])
        self.progress = Progress(**state["progress"])
        random = state["random"][self.accelerator.process_index]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])


def _random() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def run_all(
    runs: list[Run], task: Task, output: Path, checkpoint_every: int = 100
) -> list[dict[str, Any]]:
    """Train the runs that have no result yet; return the results of all."""
    path = output / "results.jsonl"
    for run in runs:
        if run.key in finished(path):
            continue
        training = Training(run, task, output)
        result = training.train(checkpoint_every)
        if training.accelerator.is_main_process:
            append(path, result)
            training.checkpoint.unlink(missing_ok=True)
        training.accelerator.wait_for_everyone()
    known = finished(path)
    return [known[key] for key in dict.fromkeys(run.key for run in runs)]
