"""Fine-tune the embedded encoder with transformers.Trainer, plainly and against an adversary.

On several processes: torchrun --nproc-per-node 2 examples/trainer.py
"""

import argparse

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

import intent
import mixadv
from common import model
from common.results import EMBEDDED_MODEL, Run
from mixadv.integrations.transformers import AdversarialTrainer


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["plain", *(name for name, cls in mixadv.SOLVERS.items() if not cls.replays_batch)]
    parser.add_argument("--solver", nargs="+", default=["plain", "freelb"], choices=known)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="runs/trainer")
    return parser.parse_args(argv)


def accuracy(prediction) -> dict[str, float]:
    """Return the metrics of a split."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def losses(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the loss of each row."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def main(argv: list[str] | None = None) -> None:
    """Train with each solver; print a table of accuracies."""
    options, task = arguments(argv), intent.load(intent.arguments([]))
    table = ["".join(f"{head:>12}" for head in ["solver", *task.splits])]
    for name in options.solver:
        args = TrainingArguments(
            f"{options.output}/{name}", max_steps=options.steps, warmup_steps=options.steps // 10,
            learning_rate=4e-4, per_device_train_batch_size=16, per_device_eval_batch_size=64,
            report_to=[], save_strategy="no", use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        set_seed(args.seed)  # of the new head
        network, tokenizer = model.load(Run(task="intents", model=EMBEDDED_MODEL), task)
        encode = lambda rows: tokenizer(rows["text"], truncation=True)  # noqa: B023, E731
        splits = {s: r.map(encode, batched=True) for s, r in task.splits.items()}
        game = {} if name == "plain" else {"solver": mixadv.make_solver(name)}
        if game and game["solver"].weighs:  # rows, by the loss of each
            game["compute_loss_func"] = losses
        trainer = (AdversarialTrainer if game else Trainer)(
            network, args, DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
            train_dataset=task.train.map(encode, batched=True), **game,
        )  # fmt: skip
        trainer.train()
        found = (100 * trainer.evaluate(rows)["eval_accuracy"] for rows in splits.values())
        table.append(f"{name:>12}" + "".join(f"{x:12.1f}" for x in found))
    if trainer.is_world_process_zero():
        print(*table, sep="\n")


if __name__ == "__main__":
    main()
