r"""Pre-train an encoder on running text, from scratch or from a checkpoint.

Objectives: mlm, masked-language modelling; alum, the same against perturbations of the embeddings,
with virtual labels at the masked positions; electra, replaced-token detection; macbert, correction
of similar words and the order of sentences. Any solver that plays in embedding space goes with mlm
and macbert. Without arguments a tiny model learns the manual that each Python carries.

    python examples/pretrain.py --objective alum --curriculum 300
    python examples/pretrain.py --objective mlm --model minilm --data path/to/texts --only-new
    python examples/pretrain.py --objective mlm --solver freelb --set radius=0.3 --data books.txt
    accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py --objective electra
    python examples/glue.py --task cola --model runs/pretrain/mlm/model

OUTPUT gets model/ (weights and tokenizer, for from_pretrained), curves.png, log.json with all
that was logged, and checkpoints/. A killed run goes on from its last checkpoint when the same
command is given again, to the same numbers; one that is finished is not repeated.
"""

import argparse
import sys
from pathlib import Path

from common.command import entry, refuse_mistakes
from common.options import positive, script
from common.parameters import build, parameters
from common.places import where
from common.pretraining import OBJECTIVES, PYDOC, TINY
from common.pretraining.asked import adversary, check


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise ValueError for what cannot be run."""
    parser = script("pretrain", "[options]", __doc__, column=28)
    _text_and_model(parser)
    _adversary(parser)
    _training(parser)
    _output(parser)
    options = parser.parse_args(argv)
    check(options)
    return options


def _text_and_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text and model").add_argument
    text = f"{', '.join(OBJECTIVES)} (default: %(default)s)"
    add("--objective", default="mlm", metavar="NAME", help=text)
    text = (
        "pydoc (the manual of the Python language), a text file, JSON lines with a text in each, "
        "a folder with train and dev, or a hub data set as NAME or NAME:CONFIGURATION "
        "(default: %(default)s)"
    )
    add("--data", default=PYDOC, metavar="SOURCE", help=text)
    text = "tiny, minilm (the embedded encoder), a hub model or a folder (default: %(default)s)"
    add("--model", type=where, default=TINY, metavar="NAME", help=text)
    add("--from-scratch", action="store_true", help="draw the weights of --model anew")
    text = "words and pieces that the tokenizer of tiny learns from the text (default: %(default)s)"
    add("--vocabulary", type=positive, default=4096, metavar="N", help=text)
    text = (
        "a folder or hub model whose tokenizer tiny takes, in place of learning one: models of "
        "different texts can then be compared"
    )
    add("--tokenizer", default="", metavar="NAME", help=text)
    text = "train the parameters alone that the checkpoint lacks: a new head, before all else"
    add("--only-new", action="store_true", help=text)
    text = (
        "similar words of macbert and --substitute: a table, builtin, or by the embeddings of the "
        "embedded encoder (default)"
    )
    add("--neighbours", default="", metavar="FILE", help=text)
    text = (
        "augment the text: beside each paragraph its copy, with SHARE of the words that have "
        "neighbours replaced by one"
    )
    add("--substitute", type=float, default=0.0, metavar="SHARE", help=text)


def _adversary(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adversary").add_argument
    text = "plain, or who perturbs the embeddings (default: plain; alum for --objective alum)"
    add("--solver", default="", metavar="NAME", help=text)
    text = "parameters of the solver, read as JSON"
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help=text)
    text = "plain steps before the adversary's first (default: %(default)s)"
    add("--curriculum", type=int, default=0, metavar="STEPS", help=text)


def _training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=1000, metavar="N", help="(default: %(default)s)")
    text = "rows that a process reads at a time (default: %(default)s)"
    add("--batch-size", type=positive, default=16, metavar="ROWS", help=text)
    text = "batches of a step (default: %(default)s)"
    add("--accumulate", type=positive, default=1, metavar="N", help=text)
    text = "tokens of a row (default: %(default)s)"
    add("--length", type=positive, default=64, metavar="TOKENS", help=text)
    text = "at the end of the warm-up, before its linear decay (default: %(default)g)"
    add("--lr", type=float, default=1e-3, metavar="RATE", help=text)
    add("--warmup", type=float, default=0.1, metavar="SHARE", help="(default: %(default)g)")
    add("--weight-decay", type=float, default=0.01, help="(default: %(default)g)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--bf16", action="store_true", help="forward passes in bfloat16")


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    text = "(default: runs/pretrain/OBJECTIVE)"
    add("--output", type=Path, metavar="FOLDER", help=text)
    text = "steps between measures on held-out rows (default: a tenth of --steps)"
    add("--evaluate-every", type=positive, default=0, metavar="N", help=text)
    text = "held-out rows (default: %(default)s)"
    add("--evaluate-rows", type=positive, default=256, metavar="N", help=text)
    text = "steps between checkpoints (default: %(default)s)"
    add("--checkpoint-every", type=positive, default=200, metavar="N", help=text)


if __name__ == "__main__":
    refuse_mistakes("pretrain", arguments)  # before the imports below, which take seconds

import json
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PrinterCallback, TrainerState, TrainingArguments

import mixadv
from common.pretraining import corpus, curves, tasks
from common.pretraining.trainer import AdversarialPretrainingTrainer, PretrainingTrainer
from common.tables import markdown

READ = "Of held-out rows, before training and after it; curves.png has what is between."
OF_ELECTRA = (
    "\nAUC tells replaced tokens from others: it may fall again while both players learn, for the "
    "generator's replacements become harder to tell. loss is the discriminator's; that of training "
    "is the generator's plus 50 times it."
)
LOGGED = 100  # points of the training loss in a curve


def player(options: argparse.Namespace) -> mixadv.Solver | None:
    """Return who plays against the learner; None for nobody."""
    solver = adversary(options)
    return build(solver, parameters([solver], options.set, None)[solver])


def train(options: argparse.Namespace) -> str:
    """Train as the command line asks; return the table of held-out metrics."""
    PartialState(cpu=not torch.accelerator.is_available())
    solver = player(options)
    options.output = options.output or Path("runs/pretrain") / options.objective
    output: Path = options.output
    log = output / "log.json"
    asked = {name: str(value) for name, value in vars(options).items() if name != "output"}
    asked["processes"] = str(PartialState().num_processes)
    if same(output, asked) and log.is_file():
        return table(json.loads(log.read_text()))
    texts = corpus.read(options.data)
    set_seed(options.seed)
    task = tasks.TASKS[options.objective](options, texts)
    trainer = prepared(options, output, task, solver)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.json").write_text(json.dumps(asked, indent=1))
    last = latest(output / "checkpoints")
    if last is not None and step(last) == options.steps:  # killed after its last step
        trainer._load_from_checkpoint(str(last))
        trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    else:
        set_seed(options.seed, device_specific=True)  # other draws on each process
        trainer.train(resume_from_checkpoint=last and str(last))
    facts = {"chance": task.objective.chance, "processes": trainer.args.world_size}
    found = [facts, *trainer.state.log_history]
    if trainer.is_world_process_zero():
        task.save(output / "model")
        title = f"{options.objective}, {options.model} on {Path(options.data).name}"
        objective = task.objective
        curves.draw(found, objective.chance, title, output / "curves.png", objective.minimised)
        log.write_text(json.dumps(found, indent=1))
    return table(found)


def prepared(
    options: argparse.Namespace, output: Path, task: Any, solver: mixadv.Solver | None
) -> PretrainingTrainer:
    """Return the Trainer of a task."""
    if options.only_new:
        if not task.new:
            raise ValueError(f"--only-new: {options.model} lacks nothing, it has a head already.")
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(name in task.new)
    args = TrainingArguments(
        str(output / "checkpoints"),
        max_steps=options.steps,
        warmup_steps=int(options.warmup * options.steps),
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        seed=options.seed,
        bf16=options.bf16,
        logging_steps=max(1, options.steps // LOGGED),
        eval_strategy="steps",
        eval_steps=options.evaluate_every or max(1, options.steps // 10),
        eval_on_start=True,
        save_steps=options.checkpoint_every,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=None if sys.stderr.isatty() else True,
    )
    kind, extra = PretrainingTrainer, {}
    if solver is not None:
        kind = AdversarialPretrainingTrainer
        extra = {"solver": solver, "schedule": mixadv.Schedule(start=options.curriculum)}
    made = kind(
        task.model,
        args,
        objective=task.objective,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        **extra,
    )
    made.remove_callback(PrinterCallback)  # where there is no terminal
    return made


def same(output: Path, asked: dict[str, str]) -> bool:
    """Return whether a folder holds a run of these settings; raise if it holds another."""
    path = output / "settings.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    differs = [name for name in asked if found.get(name) != asked[name]]
    if differs:
        raise ValueError(
            f"{output} holds a run with {differs[0]}={found.get(differs[0])}, not "
            f"{asked[differs[0]]}: choose another --output, or remove the folder."
        )
    return True


def latest(folder: Path) -> Path | None:
    """Return the last checkpoint that was written to its end, if there is one."""
    return max(
        (p.parent for p in folder.glob("checkpoint-*/trainer_state.json")), key=step, default=None
    )


def step(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def table(log: list[dict[str, Any]]) -> str:
    """Return the held-out metrics at the first and the last measure, and chance, in Markdown."""
    chance, *entries = log
    held = [entry for entry in entries if "eval_loss" in entry]
    names = curves.metrics(held[0])
    lines = [
        [entry["step"], *(f"{entry[f'eval_{name}']:.3f}" for name in names)]
        for entry in (held[0], held[-1])
    ]
    guesses = [chance["chance"].get(name) for name in names]
    cells = ["–" if guess is None else f"{guess:.3f}" for guess in guesses]
    rows = markdown(["step", *names], [*lines, ["chance", *cells]])
    return f"{rows}\n\n{READ}{OF_ELECTRA if 'AUC' in names else ''}"


main = entry("pretrain", arguments, train)

if __name__ == "__main__":
    sys.exit(main())
