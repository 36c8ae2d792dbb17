"""The training loop: that of `transformers.Trainer`, with a whole round on each batch.

Trainer loops, accumulates, schedules, distributes and writes checkpoints to go on from after a
kill. Why it is not `mixadv.integrations.transformers.AdversarialTrainer`, which trainer.py shows:
that takes one optimizer step per batch. Here `optimizer.step(closure)` plays a whole round on a
batch, as often as the solver steps (FreeAT, and MAT at its defaults), and the measured tables
compare methods at equal batches. Trainer's own order of rows is not used either, since an epoch's
rows may be perturbed against the model as it stands.
"""

import gc
import itertools
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

import mixadv
from common import data, model
from common.data import Task
from common.evaluation import Evaluator, Metrics
from common.results import Run, append, finished
from common.substitution import Source, candidates
from mixadv.optimizer import GameOptimizer


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


class Rounds(GameOptimizer):
    """Plays rounds; the step without a closure that Trainer takes after one does nothing."""

    def step(self, closure: Any = None, **keywords: Any) -> Any:
        """Play a round and step, as often as the solver says."""
        return None if closure is None else super().step(closure, **keywords)


class Training(Trainer, TrainerCallback):
    """One run, from its model to its result; a Trainer that follows its own steps."""

    def __init__(self, run: Run, task: Task, keeping: Keeping) -> None:
        self.run = run
        self.task = task
        self.keeping = keeping
        self.checkpoints = keeping.output / f"{run.key}.checkpoints"
        args = arguments(run, keeping, str(self.checkpoints))
        self.part = slice(args.process_index, None, args.world_size)  # of a batch, for this process
        set_seed(run.seed + args.process_index)
        self.rows, self.splits = chosen_rows(run, task)
        self.choose_on = "held-out" if run.hold_out else task.choose_on
        self.size = run.batch_size * args.world_size
        network, self.tokenizer = model.load(run, task)
        self.source = Source(run, self.rows, self.size, self.part, network, self.tokenizer)
        args.max_steps = self.updates = run.updates or math.ceil(self.source.updates(run.epochs))
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # Trainer seeds once more
            super().__init__(network.train(), args, callbacks=[self])
        self.model_wrapped = self.accelerator.prepare(network)
        self.game: mixadv.Game | None = None
        self.solver = player(run, task)
        self.optimizer, self.lr_scheduler = self.optimizers()
        self.encode = model.Encoder(
            self.tokenizer, run.max_length, task.labels is None, args.device
        )
        self.shown = args.process_index == 0 and not keeping.silent
        self.evaluator = Evaluator(
            run, task, network, self.encode, self.game, self.part, self.shown
        )
        self.progress = Progress()
        self.writer: Any = None

    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """Return the optimizer, wrapped where a game is played, and the schedule of its rate."""
        run = self.run
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay, fused=True
        )
        if self.solver is not None:
            how: Any = {"schedule": mixadv.Schedule(every=run.every), "seed": run.seed}
            wrapped = mixadv.wrap(optimizer, self.model_wrapped, self.solver, **how)
            self.game = wrapped.game
            whole = run.accumulate == 1 and run.share == 1
            optimizer = Rounds(optimizer, self.game) if whole else wrapped
        warmup = max(1, int(run.warmup * self.updates))
        decay = self.updates - warmup + 1
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min((done + 1) / warmup, (self.updates - done) / decay)
        )

    # Training --------------------------------------------------------------------------------

    def complete(self) -> dict[str, Any]:
        """Train from where the run stands to its end; return the result."""
        written = self.checkpoints.glob("*/progress.json")
        last = max(written, key=lambda path: path.stat().st_mtime, default=None)
        if last is not None:
            self.progress = Progress(**json.loads(last.read_text()))
        if self.shown and self.keeping.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What was written after the checkpoint that a killed run goes on from comes again.
            folder = str(self.keeping.output / "tensorboard" / self.run.key)
            self.writer = SummaryWriter(folder, purge_step=self.progress.updates + 1)
        self.bar = tqdm(
            total=self.updates,
            initial=self.progress.updates,
            desc=f"{self.run.task} {self.run.solver} seed {self.run.seed}",
            leave=False,
            disable=None if self.shown else True,  # None: no bar where there is no terminal
        )
        with self.bar, model.quiet():
            self.train(None if last is None else str(last.parent))
        result = self.result()
        self.show_metrics(result["last"])
        if self.writer is not None:
            self.writer.close()
        return result

    def get_train_dataloader(self) -> Any:
        """Return the batches to come; where there are none, Trainer ends at once."""
        progress, each = self.progress, self.run.accumulate
        batches = self.source.batches(progress.updates * each, progress.copied)
        return map(self.encode, itertools.islice(batches, (self.updates - progress.updates) * each))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Play a round on a batch, or add its gradients where several make an update.

        Where gradients are accumulated, Trainer steps the optimizer, for one of the game's samples
        of θ.
        """
        forward, parts = lambda: self.output(model, inputs), self.run.accumulate
        backward = lambda loss: self.accelerator.backward(loss / parts)  # noqa: E731
        if self.game is None:
            loss = forward().loss
            backward(loss)
        elif self.run.share < 1:
            loss = self.partly(model, inputs)
        elif parts == 1:
            self.optimizer.step(forward)
            loss = self.game.outcome.objective
        else:
            loss = self.game.backward(forward, backward=backward).objective
        self.progress.forwards += self.game.outcome.forwards if self.game else 1
        return loss.detach() / parts

    def partly(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Play a round on some rows of a batch, and train plainly on the others."""
        assert self.game is not None
        rows, share = len(batch["labels"]), self.run.share
        # Spread evenly, for rows of a batch are in the order of their lengths; one at least.
        played = [i for i in range(rows) if int((i + 1) * share) > int(i * share)] or [0]
        weights = {True: len(played) / rows, False: 1 - len(played) / rows}
        part = {
            how: {k: v[[i for i in range(rows) if (i in played) == how]] for k, v in batch.items()}
            for how in weights
        }
        backward = lambda loss: self.accelerator.backward(loss * weights[True])  # noqa: E731
        outcome = self.game.backward(lambda: self.output(model, part[True]), backward=backward)
        if not weights[False]:
            return outcome.objective
        plain = self.output(model, part[False]).loss.mean() * weights[False]
        self.accelerator.backward(plain)
        return outcome.objective * weights[True] + plain.detach()

    def output(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        """Return the model's output on a batch, with the loss that is trained.

        There is one for each row where the solver weighs rows.
        """
        output, labels, smoothing = model(**batch), batch["labels"], self.run.label_smoothing
        each = self.game is not None and bool(self.game.solver.weighs)
        how = "none" if each else "mean"
        if each and labels.is_floating_point():
            loss = torch.nn.functional.mse_loss
            output.loss = loss(output.logits.squeeze(-1), labels, reduction=how)
        elif each or smoothing:
            loss = torch.nn.functional.cross_entropy
            output.loss = loss(output.logits, labels, label_smoothing=smoothing, reduction=how)
        return output

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note an update, and evaluate if it is time to."""
        progress, every = self.progress, self.run.evaluate_every
        progress.seconds += time.perf_counter() - self.started
        progress.updates += 1
        outcome = self.game.outcome if self.game else None
        progress.optimizer_steps += outcome.steps if outcome else 1
        self.bar.update()
        if every and progress.updates % every == 0 and progress.updates < self.updates:
            self.show_metrics(self.consider(self.metrics(self.choose_on)))
        self.started = time.perf_counter()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write the progress; a checkpoint without it is one that a kill has torn."""
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = self.checkpoints / f"checkpoint-{self.progress.updates}"
            (folder / "written").write_text(json.dumps(asdict(self.progress)))
            (folder / "written").replace(folder / "progress.json")
            for older in set(self.checkpoints.iterdir()) - {folder}:
                shutil.rmtree(older)
        self.started = time.perf_counter()

    def log(self, logs: dict[str, float], *_: Any) -> None:
        """Show the numbers of an update; what Trainer tells at the end is not shown."""
        if "loss" in logs:
            found = self.numbers(logs["loss"])
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in found.items()})
            self.show("train", found)

    def numbers(self, loss: float) -> dict[str, float]:
        """Return what is shown of an update."""
        shown = {"loss": loss, "learning rate": self.lr_scheduler.get_last_lr()[0]}
        outcome = self.game.outcome if self.game else None
        if outcome is not None and outcome.payoff is not None:
            shown |= {"payoff": float(outcome.payoff), "radius": float(outcome.radius)}
        return shown

    def show(self, group: str, numbers: dict[str, float]) -> None:
        """Write numbers for TensorBoard."""
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(f"{group}/{name}", value, self.progress.updates)

    def show_metrics(self, found: Metrics) -> None:
        """Write the metrics of splits for TensorBoard."""
        for split, metrics in found.items():
            self.show(split, metrics)

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
            self.save_weights("best")
        return found

    def result(self) -> dict[str, Any]:
        """Evaluate at the end; return the line of results."""
        last = self.metrics(*self.splits)
        self.save_weights("last")
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

    def save_weights(self, name: str) -> None:
        """Save the weights that are evaluated, and the tokenizer, if models are saved."""
        if self.keeping.save and self.accelerator.is_main_process:
            folder = self.keeping.output / self.run.key / name
            with self.evaluator.weights() as network, model.quiet():
                network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def arguments(run: Run, keeping: Keeping, folder: str) -> TrainingArguments:
    """Return what Trainer is told of a run, but for its length."""
    args = TrainingArguments(
        folder,
        gradient_accumulation_steps=run.accumulate,
        max_grad_norm=0,
        max_steps=1,  # until the rows are known
        bf16=run.bf16,
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        save_steps=keeping.checkpoint_every,
        logging_steps=1 if keeping.tensorboard else 10,
        logging_nan_inf_filter=False,  # it waits for the device
        ignore_data_skip=True,  # the source starts where the run stands
        report_to="none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel's replicas would not receive δ
    return args


def chosen_rows(run: Run, task: Task) -> tuple[data.Dataset, dict[str, data.Dataset]]:
    """Return the rows that a run trains on and those it is evaluated on."""
    train, splits = data.choose(
        task, run.seed, hold_out=run.hold_out, shots=run.shots, limit=run.limit
    )
    return train, {n: data.at_most(rows, run.evaluate_rows) for n, rows in splits.items()}


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
        result = training.complete()
        if training.accelerator.is_main_process:
            append(path, result)
            shutil.rmtree(training.checkpoints, ignore_errors=True)
        training.accelerator.wait_for_everyone()
        del training
        gc.collect()  # a model lies in cycles, which are rarely looked for
    known = finished(path)
    return [known[key] for key in dict.fromkeys(run.key for run in runs)]
