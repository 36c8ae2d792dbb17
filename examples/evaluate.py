r"""Measure how robust fine-tuned classifiers are, one by one and side by side.

The models are folders that glue.py and intent.py write with --save, or any sequence classifier with
its tokenizer. Measured are accuracy and calibration on the data and on shifted sets, accuracy under
PGD in embedding space, by how much a perturbation can raise the loss, and word substitution. Prints
a Markdown table of the models; their reports, with tables and pictures, are in OUTPUT. A killed
command goes on where it was when it comes again.

Mixtures stand in the same table: several models of which one is drawn for each text, or folders of
Mixture.save_pretrained. They are measured under attacks that are made for mixtures, and so are then
the models, as mixtures of one: what a mixture is worth beside a model of equal compute.

    python examples/intent.py --solver plain freelb --save
    python examples/evaluate.py --model runs/intent/*/last --data examples/data/intents/test.jsonl \
        --shifted twins=examples/data/intents/adversarial.jsonl --attack builtin typos
    python examples/evaluate.py --model runs/intent/intents-smart-0-*/last --mixture \
        mat='runs/intent/intents-mat-*/last' --data examples/data/intents/test.jsonl --rows 100
    python examples/evaluate.py --model runs/glue/sst2-*/last --data path/to/sst2/dev.jsonl \
        --shifted advglue=path/to/adv_sst2.jsonl --text sentence --rows 500 --unit-of minilm
    python examples/evaluate.py --model runs/glue/mnli-*/last --data path/to/mnli/dev.jsonl \
        --shifted anli=path/to/anli/test_r3.jsonl --text premise hypothesis
"""

import sys
from argparse import Namespace
from pathlib import Path

from common.command import entry, refuse_mistakes
from common.options import Members, Named, positive, script
from common.places import SOURCES, a_file, check_words, where
from common.results import EMBEDDED_MODEL


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for files that are not there."""
    parser = script("evaluate", "--model FOLDER ... --data FILE [options]", __doc__)
    add = parser.add_argument
    text = "fine-tuned classifiers, folders or hub names"
    add("--model", nargs="+", type=where, required=True, metavar="FOLDER", help=text)
    text = (
        "mixtures: models whose members are all alike, as a pattern that matches them or under one "
        "NAME several times; or a folder that Mixture.save_pretrained wrote, into which the model "
        "that its members change and the tokenizer are saved too. Not under --attack"
    )
    add("--mixture", nargs="+", action=Members, default={}, metavar="NAME=FOLDER", help=text)
    text = "JSON lines, also as .jsonl.gz: a text, or two, and a label by its number or name"
    add("--data", type=Path, required=True, metavar="FILE", help=text)
    text = "other sets, with the same columns: adversarial ones, of another domain, ..."
    add("--shifted", nargs="+", action=Named, default={}, metavar="NAME=FILE", help=text)
    text = "the column of the texts, or the two of pairs (default: the usual ones)"
    add("--text", nargs="+", metavar="COLUMN", help=text)
    add("--label", default="label", metavar="COLUMN", help="(default: %(default)s)")
    text = (
        f"attacks by word substitution; replacements come from {SOURCES}. They are those of "
        "attack.py at its defaults"
    )
    add("--attack", nargs="+", default=[], metavar="SOURCE", help=text)
    text = "of PGD, in units (default: 0.05 0.1 0.2)"
    add("--radii", nargs="*", type=float, default=[0.05, 0.1, 0.2], metavar="RADIUS", help=text)
    text = "of the loss increase, in units (default: %(default)g)"
    add("--increase-radius", type=float, default=0.1, metavar="RADIUS", help=text)
    text = (
        "the model whose mean token norm is the unit of all, so that all are perturbed in the same "
        f"balls (default: the first; {EMBEDDED_MODEL} is the embedded encoder, untrained)"
    )
    add("--unit-of", default="", metavar="MODEL", help=text)
    add("--steps", type=positive, default=10, metavar="K", help="of an ascent (default: 10)")
    text = "random starts of the loss increase (default: %(default)s)"
    add("--restarts", type=positive, default=3, metavar="N", help=text)
    text = "rows to attack, drawn the same for all models (default: %(default)s)"
    add("--rows", type=positive, default=300, metavar="N", help=text)
    text = "rows that a model reads at a time (default: %(default)s)"
    add("--batch-size", type=positive, default=32, metavar="ROWS", help=text)
    add("--max-length", type=positive, metavar="TOKENS", help="(default: what the model reads)")
    text = "folder of the reports (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/evaluate"), metavar="FOLDER", help=text)
    options = parser.parse_args(argv)
    for path in (options.data, *options.shifted.values()):
        a_file(path)
    for source in options.attack:
        check_words(source, "--attack")
    return options


if __name__ == "__main__":
    refuse_mistakes("evaluate", arguments)  # before the imports below, which take seconds

from typing import Any

import transformers

from common import mixtures, model
from common.substitution import attack, described
from mixadv.mixtures import Mixture
from mixadv.reports.kept import write
from mixadv.robustness import (
    Report,
    compare,
    evaluate,
    pictures,
    read_rows,
    text_batches,
    token_norm,
)
from mixadv.robustness.sections import drawn
from mixadv.tokens import WordSubstitution


def shortened(names: list[str], parts: int) -> dict[str, str]:
    """Return names by their last parts, if these tell them apart."""
    short = {"/".join(Path(name).parts[-parts:]).removesuffix(".jsonl"): name for name in names}
    return short if len(short) == len(names) else {name: name for name in names}


def unit(options: Namespace, labels: Any, columns: dict[str, Any]) -> float | None:
    """Return the mean token norm, on the rows attacked, of the model that is named for it."""
    if not options.unit_of:
        return None
    found, tokenizer, _ = model.pretrained(
        transformers.AutoModelForSequenceClassification,
        options.unit_of,
        num_labels=labels.num_labels,
        label2id=labels.label2id,
        ignore_mismatched_sizes=True,
    )
    found.to(model.device())
    rows = read_rows(options.data, found, **columns)
    attacked = rows.take(drawn(rows, options.rows, seed=0))
    batches = text_batches(
        found, tokenizer, attacked, batch_size=options.batch_size, max_length=options.max_length
    )
    return token_norm(found, batches)


def attacks(options: Namespace) -> dict[str, WordSubstitution]:
    """Return the attacks by word substitution, by name."""
    named = shortened(options.attack, 1).items()
    return {short: attack(name) for short, name in named}


class Reports:
    """What is found of one model after another, all perturbed in the same balls."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.found: dict[str, Report] = {}
        self.length: float | None = None
        text = options.text and (options.text[0] if len(options.text) == 1 else tuple(options.text))
        self.columns = {"text": text, "label": options.label}

    def add(self, name: str, found: Any, tokenizer: Any, **more: Any) -> None:
        """Evaluate a model or a mixture, and save its report."""
        options = self.options
        if self.length is None:
            self.length = unit(options, found.config, self.columns)
        report = evaluate(
            found,
            tokenizer,
            options.data,
            **self.columns,
            shifted=options.shifted,
            radii=options.radii,
            increase_radius=options.increase_radius,
            steps=options.steps,
            restarts=options.restarts,
            unit=self.length,
            rows=options.rows,
            folder=options.output / "kept",
            batch_size=options.batch_size,
            max_length=options.max_length,
            name=name,
            **more,
        )
        report.save(options.output / name.replace("/", "-"))
        self.found[name] = report
        self.length = report.sections["about"]["unit"]


def work(options: Namespace) -> str:
    """Evaluate all models and mixtures; return the table."""
    models, reports, made = shortened(options.model, 2), Reports(options), attacks(options)
    if twice := models.keys() & options.mixture.keys():
        raise ValueError(f"--mixture {twice.pop()} has the name of a model: name it otherwise.")
    for short, name in models.items():
        found, tokenizer = model.load_classifier(name)
        alone = Mixture([found]) if options.mixture else None
        reports.add(short, found, tokenizer, mixture=alone, attacks=made)
    for name, folders in options.mixture.items():
        reports.add(name, *mixtures.load(folders), attacks=made)
    told = "\n".join(described(name, attack) for name, attack in made.items())
    table = f"{compare(reports.found).rstrip()}\n\n{told}".rstrip()
    write(options.output / "compared.md", table + "\n")
    sections = {name: report.sections for name, report in reports.found.items()}
    pictures.save(sections, options.output)
    return table


main = entry("evaluate", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
