"""Fine-tune the embedded encoder with transformers.Trainer, plainly and against an adversary.

Prints the accuracy on each split, in percent. Trainer logs on the way what the adversary did; what
its names mean is in docs/howto/trainer.md. A minute or two for each solver on two cores.

    python examples/trainer.py --solver plain freelb mat
    torchrun --nproc-per-node 2 examples/trainer.py
"""

import sys
from argparse import Namespace
from pathlib import Path

from common.command import entry, refuse_mistakes
from common.options import positive, script
from common.parameters import PLAIN, check_solver


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for a solver that cannot be played."""
    parser = script("trainer", "[options]", __doc__)
    add = parser.add_argument
    text = "plain, or names as of the other scripts, one training for each (default: plain freelb)"
    add("--solver", nargs="+", default=["plain", "freelb"], metavar="NAME", help=text)
    text = "optimizer steps of each, of batches of 16 (default: %(default)s)"
    add("--steps", type=positive, default=60, metavar="N", help=text)
    text = "folder of what Trainer writes (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/trainer"), metavar="FOLDER", help=text)
    options = parser.parse_args(argv)
    for name in options.solver:
        check_solver(name, of_trainer=True)
    return options


if __name__ == "__main__":
    refuse_mistakes("trainer", arguments)  # before the imports below, which take seconds

from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

import intent
import mixadv
from common import model
from common.results import EMBEDDED_MODEL, Run
from mixadv.integrations.transformers import AdversarialTrainer


def accuracy(prediction) -> dict[str, float]:
    """Return the metrics of a split."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def losses(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the loss of each row."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def trainer_of(name: str, task: Any, options: Namespace) -> Trainer:
    """Return the Trainer of a solver, of a new head."""
    args = TrainingArguments(
        f"{options.output}/{name}", max_steps=options.steps, warmup_steps=options.steps // 10,
        learning_rate=4e-4, per_device_train_batch_size=16, per_device_eval_batch_size=64,
        report_to=[], save_strategy="no", use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    set_seed(args.seed)  # of the new head
    network, tokenizer = model.load(Run(task="intents", model=EMBEDDED_MODEL), task)
    encode = lambda rows: tokenizer(rows["text"], truncation=True)  # noqa: E731
    game: dict[str, Any] = {} if name == PLAIN else {"solver": mixadv.make_solver(name)}
    if game and game["solver"].weighs:  # rows, by the loss of each
        game["compute_loss_func"] = losses
    return (AdversarialTrainer if game else Trainer)(
        network, args, DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
        train_dataset=task.train.map(encode, batched=True),
        eval_dataset={s: rows.map(encode, batched=True) for s, rows in task.splits.items()}, **game,
    )  # fmt: skip


def work(options: Namespace) -> str:
    """Train with each solver; return a table of accuracies."""
    task = intent.load(intent.arguments([]))
    trainers = {name: trainer_of(name, task, options) for name in options.solver}
    table = ["".join(f"{head:>12}" for head in ["solver", *task.splits])]
    for name, trainer in trainers.items():
        set_seed(trainer.args.seed)  # whatever was trained before
        trainer.train()
        found = [trainer.evaluate(rows)["eval_accuracy"] for rows in trainer.eval_dataset.values()]
        table.append(f"{name:>12}" + "".join(f"{100 * x:12.1f}" for x in found))
    return "\n".join(table)


main = entry("trainer", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
