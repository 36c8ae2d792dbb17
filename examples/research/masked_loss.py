r"""Measure masked-language models on held-out text, as they read it and under perturbation.

All models get the same rows and the same masks, and each its own worst perturbation: PGD on its
masked-LM loss in L2 balls around the embeddings of a row, in token norms of the first model. The
interval is Student's at 95 %, over rows; differences to the first model are paired by row.

    python examples/pretrain.py --objective mlm
    python examples/pretrain.py --objective alum
    python examples/research/masked_loss.py runs/pretrain/mlm/model runs/pretrain/alum/model
    python examples/research/masked_loss.py runs/pretrain/mlm/model runs/pretrain/alum/model \
        --data path/to/texts --split test --radii 0 0.5 1 2
"""

import argparse
import sys
from pathlib import Path

import _above  # noqa: F401
from common.command import entry, refuse_mistakes
from common.options import positive, script
from common.places import check_text, where
from common.pretraining import PYDOC


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise ValueError for a text that is not there."""
    parser = script("masked_loss", "MODEL ... [options]", __doc__, column=28)
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        type=where,
        metavar="MODEL",
        help="folders or hub models, with one tokenizer",
    )
    text = "as for pretrain.py (default: %(default)s)"
    add("--data", default=PYDOC, metavar="SOURCE", help=text)
    add("--split", default="test", help="where the data have several (default: %(default)s)")
    add("--rows", type=positive, default=256, metavar="N", help="(default: %(default)s)")
    add("--length", type=positive, default=64, metavar="TOKENS", help="(default: %(default)s)")
    text = "of the balls; 0 is no attack (default: 0 0.5 1)"
    add("--radii", nargs="+", type=float, default=[0.0, 0.5, 1.0], metavar="RADIUS", help=text)
    add("--batch-size", type=positive, default=16, metavar="ROWS", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="add the results to a file, as JSON lines")
    options = parser.parse_args(argv)
    check_text(options.data)
    return options


if __name__ == "__main__":
    refuse_mistakes("masked_loss", arguments)  # before the imports below, which take seconds

import json
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling

import mixadv
from common import model as finetuning
from common.evaluation import mean_token_norm
from common.pretraining import corpus
from common.pretraining.tasks import encoder
from common.tables import markdown
from mixadv.equilibrium import best_response
from mixadv.tokens.reading.masked import IGNORED, masked_predictions

STEPS = 5  # of the attack
Batch = dict[str, Tensor]


class Rows(NamedTuple):
    """What a model loses on each row.

    Attributes:
        loss: summed over the masked positions, `[rows]`.
        hits: masked tokens that the model finds, `[rows]`.
        masked: how many there are, `[rows]`.
    """

    loss: np.ndarray
    hits: np.ndarray
    masked: np.ndarray


def batches(options: argparse.Namespace, tokenizer: Any) -> list[Batch]:
    """Return the held-out rows with their masks."""
    texts = corpus.read(options.data, options.split).held_out
    rows = corpus.rows(texts, encoder(tokenizer, options.length), most=options.rows)
    collator = DataCollatorForLanguageModeling(tokenizer, seed=options.seed)
    size = options.batch_size
    found = (
        collator([*rows.select(range(i, min(i + size, len(rows))))])
        for i in range(0, len(rows), size)
    )
    return [batch for batch in found if (batch["labels"] != IGNORED).any()]


def on(device: torch.device, batch: Batch) -> Batch:
    """Return a batch on a device."""
    return {name: values.to(device) for name, values in batch.items()}


def attacked(model: Any, batch: Batch, radius: float) -> Tensor:
    """Return the logits `[B, k, C]` at the masked positions, at the end of PGD."""
    closure = lambda: masked_predictions(model, **batch)  # noqa: E731
    if radius == 0:
        with torch.no_grad():
            return closure()["logits"]
    attack = mixadv.PGD(steps=STEPS, radius=radius, step_size=2.5 * radius / STEPS, unit="absolute")
    predictions = best_response(mixadv.Game(model, attack), closure).predictions
    assert predictions is not None
    return predictions


def measure(model: Any, found: list[Batch], radius: float) -> Rows:
    """Return what a model loses on each row under attack."""
    columns: list[tuple[np.ndarray, ...]] = []
    for batch in tqdm(found, desc=f"radius {radius:g}", leave=False, disable=None):
        chosen = batch["labels"] != IGNORED
        labels = batch["labels"][chosen]
        logits = attacked(model, on(model.device, batch), radius).float().cpu()
        real = torch.arange(logits.shape[1]) < chosen.sum(1, keepdim=True)
        logits = logits[real]
        loss = F.cross_entropy(logits, labels, reduction="none")
        values = (loss, (logits.argmax(-1) == labels).float(), torch.ones_like(loss))
        row, zero = chosen.nonzero()[:, 0], torch.zeros(len(chosen))
        columns.append(tuple(zero.index_add(0, row, v).numpy() for v in values))
    return Rows(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def interval(summed: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return a mean over positions and the half width of its 95 % interval, over rows.

    Of a ratio of sums, by its linearisation: rows are drawn, and each brings its positions.
    """
    mean = summed.sum() / counts.sum()
    rest = (summed - mean * counts) / counts.mean()
    half = stats.t.ppf(0.975, len(rest) - 1) * stats.sem(rest)
    return float(mean), float(half)


def compare(options: argparse.Namespace) -> str:
    """Measure the models; return the table."""
    if min(options.radii) < 0:
        raise ValueError(f"--radii must be at least 0, got {min(options.radii):g}.")
    found: list[Batch] = []
    unit, first, results = 1.0, {}, []
    for name in options.models:
        model, tokenizer = finetuning.load_masked(name)
        if not found:
            found, vocabulary = batches(options, tokenizer), tokenizer.get_vocab()
            unit = mean_token_norm(model, on(model.device, found[0]))
        elif tokenizer.get_vocab() != vocabulary:
            raise ValueError(
                f"{name} has another tokenizer than {options.models[0]}, and their losses are of "
                "other tokens: pre-train both on one text with one --vocabulary, or the one with "
                "--tokenizer of the other."
            )
        for radius in options.radii:
            rows = measure(model, found, radius * unit)
            base = first.setdefault(radius, rows)
            results.append({
                "model": name, "radius": radius, "rows": len(rows.loss),
                "loss": interval(rows.loss, rows.masked),
                "accuracy": interval(rows.hits, rows.masked),
                "difference": interval(rows.loss - base.loss, rows.masked),
            })  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        shared = {n: getattr(options, n) for n in ("data", "split", "length", "seed")}
        with options.output.open("a") as file:
            file.writelines(json.dumps(shared | result) + "\n" for result in results)
    return table(results)


def table(results: list[dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    rows = []
    for r in results:
        hits = _cell([100 * value for value in r["accuracy"]], 1)
        cells = [_cell(r["loss"], 3), hits, _cell(r["difference"], 3)]
        rows.append([r["model"], f"{r['radius']:g}", *cells])
    return markdown(["model", "radius", "loss", "accuracy, %", "loss − first model's"], rows)


def _cell(value: Any, digits: int) -> str:
    mean, half = value
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


main = entry("masked_loss", arguments, compare)


if __name__ == "__main__":
    sys.exit(main())
