r"""Find the neurons that know the parts of speech, in several models, and how few are enough.

The models are folders or hub names of encoders, with a head or without, each with a name for
tables and pictures: those that the other scripts write with --save, or "minilm" for the embedded
encoder. They read sentences with `tokens` and `upos`, from a folder of JSON lines or from the hub.
Prints Markdown tables and writes pictures. A finished analysis is a file of JSON in the output
folder, and is not repeated.

    python examples/glue.py --task sst2 --limit 2000 --solver plain freelb --save
    python examples/neurons.py --data path/to/en_ewt --model before=minilm \
        plain=runs/glue/sst2-plain-0-*/last freelb=runs/glue/sst2-freelb-0-*/last
    python examples/neurons.py --data universal_dependencies:en_ewt --model before=minilm
"""

import sys
from argparse import Namespace
from pathlib import Path

from common.command import entry, refuse_mistakes
from common.options import Named, positive, script

HUB = "universal_dependencies:en_ewt"


def arguments(argv: list[str] | None = None) -> Namespace:
    """Parse the command line; raise ValueError for data that are not there."""
    parser = script("neurons", "--model NAME=FOLDER ... [options]", __doc__)
    add = parser.add_argument
    text = "models, each with a name for the tables"
    add("--model", nargs="+", action=Named, required=True, metavar="NAME=FOLDER", help=text)
    text = (
        "with train and dev .jsonl or .jsonl.gz, or NAME:CONFIG of the hub (default: %(default)s)"
    )
    add("--data", default=HUB, metavar="FOLDER", help=text)
    text = "of train for the probes, and of dev to measure on (default: %(default)s)"
    add("--tokens", type=positive, default=8000, metavar="WORDS", help=text)
    text = "of the probes (default: chosen for each model on words of train)"
    add("--penalty", type=float, metavar="LAMBDA", help=text)
    text = "that the smallest set of neurons may lack, a share (default: %(default)g)"
    add("--tolerance", type=float, default=0.01, metavar="ACCURACY", help=text)
    text = "of random neurons (default: %(default)s)"
    add("--draws", type=positive, default=3, metavar="N", help=text)
    text = "of sentences, random neurons and control tasks (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="N", help=text)
    add("--max-length", type=positive, default=128, metavar="TOKENS", help="(default: %(default)s)")
    add("--batch-size", type=positive, default=32, metavar="N", help="sentences in a pass")
    text = "folder of analyses and pictures (default: %(default)s)"
    add("--output", type=Path, default=Path("runs/neurons"), metavar="FOLDER", help=text)
    options = parser.parse_args(argv)
    if not (Path(options.data).expanduser().is_dir() or ":" in options.data):
        raise ValueError(f"There is no folder {options.data}; a hub data set is given as {HUB}.")
    return options


if __name__ == "__main__":
    refuse_mistakes("neurons", arguments)  # before the imports below, which take seconds

from typing import Any

import transformers
from tqdm.auto import tqdm

from common import data, model
from mixadv.neurons import NeuronAnalysis, activations, analyse_neurons
from mixadv.neurons.analysis import compare, counts, draw, table
from mixadv.reports.kept import Kept
from mixadv.robustness.data import DataError

SPLITS = ("train", "dev")
READ = """\
neurons: the fewest that lack at most --tolerance of the accuracy of all. The rest is accuracy on
held-out words, in percent, of probes that read: all neurons; top, the smallest set; random, as many
drawn at random; last, as many of those ranked last. control: all neurons, where each word has one
label drawn at random, which tells what a probe learns by heart; selectivity: all minus control.
shuffled: tags shuffled; majority: the most frequent tag, always."""
Tagged = tuple[list[list[str]], list[list[str]]]


def load_data(where: str) -> dict[str, Tagged]:
    """Return words and tags of the sentences of train and dev."""
    folder = Path(where).expanduser()
    splits = data.from_folder(folder) if folder.is_dir() else data.from_hub(*where.split(":", 1))
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise DataError(f"{where} has no {missing[0]}, it has {', '.join(splits) or 'no rows'}.")
    return {split: tagged(splits[split], f"{where}, {split}") for split in SPLITS}


def tagged(rows: data.Dataset, where: str) -> Tagged:
    """Return words and tags; the hub has tags as numbers, with names beside them."""
    for column in ("tokens", "upos"):
        if column not in rows.column_names:
            raise DataError(f"{where} has no column {column!r}: {', '.join(rows.column_names)}.")
    names = getattr(getattr(rows.features["upos"], "feature", None), "names", None)
    tags = rows["upos"][:]
    if names:
        tags = [[names[tag] for tag in own] for own in tags]
    return rows["tokens"][:], tags


class AsSaved:
    """Loads a model as the class that it was saved from, so that no part of it is new."""

    @staticmethod
    def from_pretrained(where: str, **settings: Any) -> Any:
        """Return the model, with what transformers returns beside it."""
        saved = transformers.AutoConfig.from_pretrained(where).architectures or [""]
        kind = getattr(transformers, saved[0], transformers.AutoModel)
        return kind.from_pretrained(where, **settings)


def run(name: str, where: str, options: Namespace, rows: dict[str, Tagged]) -> NeuronAnalysis:
    """Return the analysis of a model, made now unless its file is there."""
    encoder, tokenizer, _ = model.pretrained(AsSaved, where)
    encoder.to(model.device())
    reading = {k: getattr(options, k) for k in ("max_length", "seed")}
    probing = {k: getattr(options, k) for k in ("penalty", "tolerance", "draws", "seed")}
    reading["max_tokens"] = options.tokens

    def compute() -> dict[str, Any]:
        train, held_out = (
            activations(encoder, tokenizer, *rows[split], batch_size=options.batch_size, **reading)
            for split in SPLITS
        )
        known = held_out.with_tags(train.names)  # the rarest tags may be missing in a small draw
        return analyse_neurons(train, known, progress=sys.stderr.isatty(), **probing).as_dict()

    kept = Kept(options.output, {"model": encoder, "tokenizer": tokenizer, "rows": rows})
    return NeuronAnalysis(**kept.once(name, {**reading, **probing}, compute))


def work(options: Namespace) -> str:
    """Analyse all models; return the tables."""
    rows = load_data(options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    analyses = {
        name: run(name, where, options, rows)
        for name, where in tqdm(options.model.items(), unit="model", disable=None)
    }
    for name, found in analyses.items():
        draw(found, options.output / f"{name}.png")
    compare(analyses, "layer", options.output / "layers.png")
    compare(analyses, "tag", options.output / "tags.png")
    return f"{table(analyses)}\n\n{READ}\n\n{counts(analyses)}"


main = entry("neurons", arguments, work)


if __name__ == "__main__":
    sys.exit(main())
