r"""Measure how robust fine-tuned classifiers are, one by one and side by side.

The models are folders that glue.py and intent.py write with --save, or any sequence classifier with
its tokenizer. Measured are accuracy and calibration on the data and on shifted sets, accuracy under
PGD in embedding space, by how much a perturbation can raise the loss, and word substitution. Prints
a Markdown table of the models; their reports, with tables and pictures, are in OUTPUT. A killed
command goes on where it was when it comes again.

    python examples/intent.py --solver plain freelb --save
    python examples/evaluate.py --model runs/intent/*/last --data examples/data/intents/test.jsonl \
        --shifted twins=examples/data/intents/adversarial.jsonl --attack builtin typos
    python examples/evaluate.py --model runs/glue/sst2-*/last --data path/to/sst2/dev.jsonl \
        --shifted advglue=path/to/adv_sst2.jsonl --text sentence --rows 500 --unit-of minilm
    python examples/evaluate.py --model runs/glue/mnli-*/last --data path/to/mnli/dev.jsonl \
        --shifted anli=path/to/anli/test_r3.jsonl --text premise hypothesis
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import transformers

from common import command, model
from common.options import Named, positive, script
from common.substitution import SOURCES, candidates
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


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = script("evaluate", "--model FOLDER ... --data FILE [options]", __doc__)
    add = parser.add_argument
    text = "fine-tuned classifiers, folders or hub names"
    add("--model", nargs="+", required=True, metavar="FOLDER", help=text)
    text = "JSON lines, also as .jsonl.gz: a text, or two, and a label by its number or name"
    add("--data", type=Path, required=True, metavar="FILE", help=text)
    text = "other sets, with the same columns: adversarial ones, of another domain, ..."
    add("--shifted", nargs="+", action=Named, default={}, metavar="NAME=FILE", help=text)
    text = "the column of the texts, or the two of pairs (default: the usual ones)"
    add("--text", nargs="+", metavar="COLUMN", help=text)
    add("--label", default="label", metavar="COLUMN", help="(default: %(default)s)")
    text = f"attacks by word substitution; replacements come from {SOURCES}"
    add("--attack", nargs="+", default=[], metavar="SOURCE", help=text)
    text = "of PGD, in units (default: 0.05 0.1 0.2)"
    add("--radii", nargs="*", type=float, default=[0.05, 0.1, 0.2], metavar="RADIUS", help=text)
    text = "of the loss increase, in units (default: %(default)g)"
    add("--increase-radius", type=float, default=0.1, metavar="RADIUS", help=text)
    text = (
        "the model whose mean token norm is the unit of all, so that all are perturbed in the same "
        f"balls (default: the first; {model.EMBEDDED_MODEL} is the embedded encoder, untrained)"
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
    return parser.parse_args(argv)


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


def work(options: Namespace) -> str:
    """Evaluate all models; return the table."""
    attacks = {
        short: WordSubstitution(candidates(name))
        for short, name in shortened(options.attack, 1).items()
    }
    columns = {"text": None, "label": options.label}
    if options.text:
        columns["text"] = options.text[0] if len(options.text) == 1 else tuple(options.text)
    reports: dict[str, Report] = {}
    length = None
    for short, name in shortened(options.model, 2).items():
        found, tokenizer = model.load_classifier(name)
        length = unit(options, found.config, columns) if length is None else length
        reports[short] = evaluate(
            found,
            tokenizer,
            options.data,
            **columns,
            shifted=options.shifted,
            attacks=attacks,
            radii=options.radii,
            increase_radius=options.increase_radius,
            steps=options.steps,
            restarts=options.restarts,
            unit=length,
            rows=options.rows,
            folder=options.output / "kept",
            batch_size=options.batch_size,
            max_length=options.max_length,
            name=short,
        )
        reports[short].save(options.output / short.replace("/", "-"))
        length = reports[short].sections["about"]["unit"]
    table = compare(reports)
    write(options.output / "compared.md", table)
    pictures.save({name: report.sections for name, report in reports.items()}, options.output)
    return table.rstrip()


main = command.entry("evaluate", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
