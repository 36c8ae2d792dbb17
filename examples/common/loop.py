"""The training loop: updates, evaluation on the way, checkpoints to go on from after a kill.

Why it is not `mixadv.integrations.transformers.AdversarialTrainer`, which trainer.py shows: Trainer
takes one optimizer step per batch. Here `optimizer.step(closure)` plays a whole round on a batch,
as often as the solver steps (FreeAT, and MAT at its defaults), and the measured tables compare
methods at equal batches. A Trainer would spread a MAT round over several batches, and cannot play
FreeAT. It also has an order of rows of its own, made before training, whereas an epoch's rows may
be perturbed against the model as it stands, its own decay of the rate, and clips gradients.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed

import mixadv
from common import checkpoint, data, model
from common.data import Task
from common.evaluation import Evaluator, Metrics
from common.monitor import Monitor
from common.results import Run, append, finished
from common.substitution import Source, candidates


@dataclass(frozen=True)
class Keeping:
    """What is kept of runs besides their results.

    Attributes:
        output: the folder of results, checkpoints and models.
        checkpoint_every: updates.
        save: the models evaluated.
        tensorboard: whether runs are written for it.
        silent: whether runs show no bar, as where several are trained side by side.
    """

    output: Path
    checkpoint_every: int = 100
    save: bool = False
    tensorboard: bool = False
    silent: bool = False


@dataclass
class Progress:
    """What a run has done so far, and found; kept in its checkpoints."""

    updates: int = 0
    optimizer_steps: int = 0
    forwards: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    best: Metrics = field(default_factory=dict)
    best_update: int = 0
    copied: list[list[Any]] = field(default_factory=list)  # perturbed rows of the epoch


class Training:
    """One run, from its model to its result."""

    def __init__(self, run: Run, task: Task, keeping: Keeping) -> None:
        self.run = run
        self.task = task
        self.keeping = keeping
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else processes without one stay alone
            mixed_precision="bf16" if run.bf16 else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=run.accumulate),
        )
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.part = slice(rank, None, processes)  # of the rows of a batch, for this process
        set_seed(run.seed, device_specific=True)
        self.rows, self.splits = chosen_rows(run, task)
        self.choose_on = "held-out" if run.hold_out else task.choose_on
        self.size = run.batch_size * processes
        network, self.tokenizer = model.load(run, task)
        self.source = Source(run, self.rows, self.size, self.part, network, self.tokenizer)
        self.updates = run.updates or math.ceil(self.source.updates(run.epochs))
        self.model = self.accelerator.prepare(network.train())
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=run.learning_rate,
            weight_decay=run.weight_decay,
            fused=True,
        )
        self.game: mixadv.Game | None = None
        self.solver = player(run, task)
        if self.solver is not None:
            schedule = mixadv.Schedule(every=run.every)
            optimizer = mixadv.wrap(
                optimizer, self.model, self.solver, schedule=schedule, seed=run.seed
            )
            self.game = optimizer.game
        self.optimizer = self.accelerator.prepare(optimizer)
        warmup = max(1, int(run.warmup * self.updates))
        decay = self.updates - warmup + 1
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min((done + 1) / warmup, (self.updates - done) / decay)
        )
        device = self.accelerator.device
        self.encode = model.Encoder(self.tokenizer, run.max_length, task.labels is None, device)
        self.evaluator = Evaluator(run, task, network, self.encode, self.game, self.part)
        self.progress = Progress()
        self.checkpoint = keeping.output / f"{run.key}.pt"

    # Training --------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train from where the run stands to its end; return the result."""
        done = checkpoint.load(self.checkpoint, self.live())
        self.progress = Progress(**done)
        progress, every = self.progress, self.run.evaluate_every
        source = self.source.batches(progress.updates * self.run.accumulate, progress.copied)
        with self.monitor() as monitor:
            while progress.updates < self.updates:
                started = time.perf_counter()
                batches = itertools.islice(source, self.run.accumulate)
                loss = self.update([self.encode(columns) for columns in batches])
                self.scheduler.step()
                progress.seconds += time.perf_counter() - started
                progress.updates += 1
                monitor.update(progress.updates, lambda: self.numbers(loss))  # noqa: B023
                last = progress.updates == self.updates
                if every and progress.updates % every == 0 and not last:
                    monitor.metrics(progress.updates, self.consider(self.metrics(self.choose_on)))
                if last or progress.updates % self.keeping.checkpoint_every == 0:
                    checkpoint.save(self.checkpoint, self.live(), asdict(progress))
            result = self.result()
            monitor.metrics(self.updates, result["last"])
        return result

    def monitor(self) -> Monitor:
        """Return what shows the run."""
        name = f"{self.run.task} {self.run.solver} seed {self.run.seed}"
        folder = self.keeping.output / "tensorboard" / self.run.key
        return Monitor(
            name,
            self.updates,
            self.progress.updates,
            folder if self.keeping.tensorboard else None,
            silent=self.keeping.silent or not self.accelerator.is_main_process,
        )

    def update(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Update the weights on the batches; return the objective.

        A game steps the optimizer itself, as often as its solver says. Where gradients of several
        batches are accumulated, the loop steps it, once, for one of the game's samples of θ.
        """
        total = torch.zeros(())
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                forward = lambda: self.forward(batch)  # noqa: B023, E731
                if self.game is not None and len(batches) == 1:
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

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        """Return the model's output on a batch, with the loss that is trained."""
        output = self.model(**batch)
        if smoothing := self.run.label_smoothing:
            loss = torch.nn.functional.cross_entropy
            output.loss = loss(output.logits, batch["labels"], label_smoothing=smoothing)
        return output

    def backward(self, forward: Callable[[], Any]) -> torch.Tensor:
        """Add the gradients of a batch; return its objective."""
        if self.game is not None:
            return self.game.backward(forward, backward=self.accelerator.backward).objective
        loss = forward().loss
        self.accelerator.backward(loss)
        return loss.detach()

    def numbers(self, loss: torch.Tensor) -> dict[str, float]:
        """Return what is shown of an update."""
        shown = {"loss": loss, "learning rate": self.scheduler.get_last_lr()[0]}
        outcome = self.game.outcome if self.game else None
        if outcome is not None and outcome.payoff is not None:
            shown |= {"payoff": outcome.payoff, "radius": outcome.radius}
        return {name: float(value) for name, value in shown.items()}

    # Evaluation ------------------------------------------------------------------------------

    def metrics(self, *names: str) -> Metrics:
        """Return the metrics of the splits named."""
        return self.evaluator.metrics(self.splits, names)

    def consider(self, found: Metrics) -> Metrics:
        """Note the score; if it is the best yet, the metrics of every split. Return them all."""
        progress = self.progress
        score = next(iter(found[self.choose_on].values()))
        best = not progress.curve or score > max(score for _, score in progress.curve)
        progress.curve.append([progress.updates, score])
        if best:
            found = found | self.metrics(*(name for name in self.splits if name not in found))
            progress.best = {name: found[name] for name in self.splits}
            progress.best_update = progress.updates
            self.save_model("best")
        return found

    def result(self) -> dict[str, Any]:
        """Evaluate at the end; return the line of results."""
        last = self.metrics(*self.splits)
        self.save_model("last")
        progress = self.progress
        found: dict[str, Any] = {}
        if self.run.evaluate_every:
            self.consider(last)
            found = {"best": progress.best, "best_update": progress.best_update}
            found |= {"chosen_on": self.choose_on, "curve": progress.curve}
        if self.run.radii:
            split = next(name for name in ("test", *self.splits) if name in self.splits)
            last = last | self.evaluator.attacked(self.splits[split])
        return {
            **asdict(self.run),
            "key": self.run.key,
            "played": asdict(self.solver) if self.solver else {},
            "rows": len(self.rows),
            "dropped": dict(self.task.dropped),
            "processes": self.accelerator.num_processes,
            "updates": self.updates,
            "optimizer_steps": progress.optimizer_steps,
            "forwards_per_update": progress.forwards // self.updates,
            "seconds_per_update": progress.seconds / self.updates,
            "last": last,
            **found,
        }

    def save_model(self, name: str) -> None:
        """Save the weights that are evaluated, and the tokenizer, if models are saved."""
        if self.keeping.save and self.accelerator.is_main_process:
            folder = self.keeping.output / self.run.key / name
            with self.evaluator.weights() as network, model.quiet():
                network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def live(self) -> dict[str, Any]:
        """Return what changes in training and has a state."""
        network = self.evaluator.model
        return {"model": network, "optimizer": self.optimizer, "scheduler": self.scheduler}


def chosen_rows(run: Run, task: Task) -> tuple[data.Dataset, dict[str, data.Dataset]]:
    """Return the rows that a run trains on and those it is evaluated on."""
    return data.choose(task, run.seed, hold_out=run.hold_out, shots=run.shots, limit=run.limit)


def player(run: Run, task: Task) -> mixadv.Solver | None:
    """Return the solver of a run; None for plain training.

    A divergence of class probabilities says nothing about a single number: where one is predicted,
    the default is the squared error.
    """
    if run.solver not in mixadv.SOLVERS:
        return None
    names = {f.name for f in fields(mixadv.SOLVERS[run.solver])}
    number = task.labels is None and "divergence" in names
    default = {"divergence": "squared_error"} if number else {}
    return mixadv.make_solver(run.solver, **(default | run.parameters))


def check(run: Run, task: Task) -> None:
    """Raise unless the task has what the run needs."""
    _, splits = chosen_rows(run, task)
    if run.evaluate_every and not run.hold_out and task.choose_on not in splits:
        raise ValueError(
            f"evaluate_every chooses the best weights on {task.choose_on}, and {task.name} has no "
            "such rows: set hold_out to choose on training rows."
        )
    if run.evaluate == "mixture" and task.labels is None:
        raise ValueError(f"A mixture has probabilities of labels, and {task.name} has none.")
    if run.label_smoothing and task.labels is None:
        raise ValueError(f"label_smoothing spreads over labels, and {task.name} has none.")
    if run.substitute:
        if task.labels is None:
            raise ValueError(f"substitute attacks predicted labels, and {task.name} has none.")
        if run.epochs <= 1 and not run.updates:
            raise ValueError(
                "substitute perturbs rows before each epoch but the first, and there is none: "
                f"epochs is {run.epochs:g}."
            )
        candidates(run.neighbours)  # raises if they cannot be read


def run_all(runs: list[Run], task: Task, keeping: Keeping) -> list[dict[str, Any]]:
    """Train the runs that have no result yet; return the results of all."""
    path = keeping.output / "results.jsonl"
    for run in runs:
        check(run, task)
    for run in runs:
        unsaved = keeping.save and not (keeping.output / run.key / "last").is_dir()
        if run.key in finished(path) and not unsaved:
            continue
        training = Training(run, task, keeping)
        result = training.train()
        if training.accelerator.is_main_process:
            append(path, result)
            training.checkpoint.unlink(missing_ok=True)
        training.accelerator.wait_for_everyone()
        del training
        gc.collect()  # a model lies in cycles, which are rarely looked for
    known = finished(path)
    return [known[key] for key in dict.fromkeys(run.key for run in runs)]
