r"""Attack fine-tuned classifiers by replacing words, and compare how they fare.

The models are folders that the other scripts write with --save, or any sequence classifier with
its tokenizer. Attacked are test rows (without them dev rows), drawn the same for all models; rows
that a model misclassifies from the start are not attacked. Prints a Markdown table and keeps what
was found on each row in a file of JSON for each model, so that a killed attack goes on where it was
when the same command comes again.

    python examples/glue.py --task sst2 --limit 2000 --save
    python examples/attack.py --model runs/glue/sst2-*/last --task sst2 --attack builtin
    python examples/attack.py --model runs/glue/sst2-*/last --task sst2 --rows 300 \
        --attack path/to/neighbours.jsonl --similarity 0.8
    python examples/attack.py --model runs/intent/*/last --task intents --attack typos
"""

import sys
from argparse import Namespace
from pathlib import Path

import intent
from common.command import entry, refuse_mistakes
from common.options import positive, script
from common.places import SOURCES, check_words, where
from common.results import EMBEDDED_MODEL
from common.tasks import script_of


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for a task or words that are not there."""
    parser = script("attack", "--model FOLDER ... [options]", __doc__)
    add = parser.add_argument
    text = "fine-tuned classifiers, folders or hub names"
    add("--model", nargs="+", type=where, required=True, metavar="FOLDER", help=text)
    text = "a task of glue.py or intent.py (default: intents, the embedded set)"
    add("--task", default=intent.EMBEDDED, metavar="NAME", help=text)
    add("--data", default="", metavar="FOLDER", help="of the task, as for its script")
    add("--split", default="", metavar="NAME", help="whose rows are attacked (default: test, dev)")
    add("--rows", type=positive, default=300, metavar="N", help="(default: %(default)s)")
    text = f"{SOURCES} (default: %(default)s)"
    add("--attack", "--neighbours", default="builtin", metavar="SOURCE", help=text)
    text = "least cosine with the original sentence, by --encoder (default: no bound)"
    add("--similarity", type=float, default=0.0, metavar="COSINE", help=text)
    text = "a sentence encoder for --similarity (default: %(default)s, the embedded one)"
    add("--encoder", default=EMBEDDED_MODEL, metavar="NAME", help=text)
    text = "of the words of a row may change (default: %(default)g)"
    add("--max-share", type=float, default=0.1, metavar="SHARE", help=text)
    text = "that may change in any row (default: %(default)s)"
    add("--min-words", type=int, default=4, metavar="WORDS", help=text)
    text = "that a model reads of a row (default: what it can)"
    add("--max-length", type=positive, metavar="TOKENS", help=text)
    text = "folder of what was found (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/attack"), metavar="FOLDER", help=text)
    options = parser.parse_args(argv)
    script_of(options.task).settings(options)
    check_words(options.attack, "--attack")
    return options


if __name__ == "__main__":
    refuse_mistakes("attack", arguments)  # before the imports below, which take seconds

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import transformers

from common import data, model, substitution
from common.data import Task
from common.tables import markdown
from mixadv.reports.kept import Kept
from mixadv.tokens import Attack, Similarity, WordSubstitution, attack_summary

STEP = 32  # rows attacked between two writes
HEAD = ("model", "rows", "clean", "under attack", "success %", "words", "queries", "s/row")


def load_task(options: Namespace) -> Task:
    """Return the task, of glue.py or of intent.py."""
    task = script_of(options.task).load(options)
    if task.labels is None:
        raise ValueError(f"{task.name} is a regression: an attack changes predicted labels.")
    return task


def chosen(options: Namespace, task: Task) -> tuple[list[Any], list[int]]:
    """Return the texts to attack and their labels."""
    split = options.split or next(s for s in ("test", *task.splits) if s in task.splits)
    if split not in task.splits:
        raise ValueError(f"--split {split}: {task.name} has {', '.join(task.splits)}.")
    rows = task.splits[split]
    numbers = random.Random(0).sample(range(len(rows)), min(options.rows, len(rows)))
    pairs, labels = data.texts(rows), rows["label"][:]
    texts = [pair if len(pair) == 2 else pair[0] for pair in (pairs[i] for i in numbers)]
    return texts, [labels[i] for i in numbers]


def load_victim(name: str, labels: Sequence[str]) -> tuple[Any, Any]:
    """Return a classifier that was fine-tuned on the task, and its tokenizer."""
    victim, tokenizer = model.load_classifier(name)
    own = [victim.config.id2label[i] for i in range(victim.config.num_labels)]
    if own != list(labels):
        raise ValueError(f"--model {name} tells {own} apart, and the task {list(labels)}.")
    return victim, tokenizer


def load_attack(options: Namespace) -> WordSubstitution:
    """Return the attack that the command line asks for."""
    similarity = None
    if options.similarity:
        encoder, tokenizer, _ = model.pretrained(transformers.AutoModel, options.encoder)
        similarity = Similarity(encoder.to(model.device()), tokenizer, options.similarity)
    return substitution.attack(
        options.attack,
        max_share=options.max_share,
        min_words=options.min_words,
        similarity=similarity,
        max_length=options.max_length,
    )


def run(name: str, options: Namespace, attack: WordSubstitution, task: Task) -> list[str]:
    """Attack a model on the rows that it was not attacked on yet; return its row of the table."""
    texts, labels = chosen(options, task)
    victim, tokenizer = load_victim(name, task.labels or ())

    def compute(part: slice) -> list[dict[str, Any]]:
        began = time.perf_counter()
        attacks = attack.attack(victim, tokenizer, texts[part], labels[part])
        seconds = (time.perf_counter() - began) / len(attacks)
        return [{"attack": asdict(made), "seconds": seconds} for made in attacks]

    settings = {"attack": attack, "texts": texts, "labels": labels}
    kept = Kept(options.output, {"model": victim, "tokenizer": tokenizer, **settings})
    source = Path(options.attack.replace(":", "-")).name.split(".")[0]
    return row(name, kept.rows(f"{options.task}-{source}", {}, len(texts), compute, STEP))


def row(name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row of the table."""
    numbers = attack_summary(Attack(**record["attack"]) for record in found)
    success = "–"
    if numbers["success_rate"] is not None:
        low, high = numbers["success_interval"]
        success = f"{100 * numbers['success_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    words, queries = (
        "–" if numbers[key] is None else f"{numbers[key]:.1f}"
        for key in ("words_changed", "queries")
    )
    rates = [f"{100 * numbers[k]:.1f}" for k in ("clean_accuracy", "accuracy_under_attack")]
    seconds = sum(record["seconds"] for record in found) / len(found)
    return [name, str(numbers["rows"]), *rates, success, words, queries, f"{seconds:.2f}"]


def work(options: Namespace) -> str:
    """Attack all models; return the table."""
    task, attack = load_task(options), load_attack(options)
    rows = [run(name, options, attack, task) for name in options.model]
    name = Path(options.attack).name
    return f"{markdown(HEAD, rows)}\n\n{substitution.described(name, attack)}"


main = entry("attack", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
