"""What is measured: a model, a batch, and the parts of one ordinary training step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmark_parts import EMBEDDED, MODELS
from common import model as embedded

LABELS = 2
PARTS = ("F", "A", "S", "O", "N")
"""Of a round; see `Work.parts`."""


@dataclass(frozen=True)
class Setting:
    """All that seconds and memory depend on, besides the machine and who plays."""

    model: str
    batch: int
    length: int
    dropout: float = 0.0
    device: str = "cpu"
    threads: int = 1

    def __str__(self) -> str:
        where = f"{self.device}, {self.threads} thread{'s' * (self.threads > 1)}"
        size = f"{self.batch}×{self.length} tokens"
        return f"{self.model}, {size}, dropout {self.dropout:g}, {where}"


class Part(NamedTuple):
    """Something to time: what comes before the clock starts, and what it times."""

    prepare: Callable[[], object]
    play: Callable[[], object]


def encoder(layers: int, hidden: int, heads: int, words: int, dropout: float = 0.0) -> nn.Module:
    """Return a BERT with random weights that classifies sequences."""
    config = transformers.BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=LABELS,
    )
    return transformers.BertForSequenceClassification(config)


def load(name: str, dropout: float) -> Any:
    """Return the model of that name; the embedded one has trained weights and a new head."""
    if name != EMBEDDED:
        return encoder(*MODELS[name], dropout)
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a new head is what is wanted
    try:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            embedded.path(embedded.EMBEDDED_MODEL),
            num_labels=LABELS,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    finally:
        transformers.utils.logging.set_verbosity(level)


class Work:
    """A model and a batch of random tokens, on which every solver plays from the same weights.

    All optimizers share their moments, so that many solvers fit into memory.

    Attributes:
        unit: mean L2 norm of a token's embedding, in which lengths of δ are given.
        coordinates: of one sample's δ.
    """

    def __init__(self, setting: Setting, model: Any = None) -> None:
        torch.manual_seed(0)
        self.setting = setting
        loaded = load(setting.model, setting.dropout) if model is None else model
        self.model: Any = loaded.to(setting.device).train()
        words = self.model.config.vocab_size
        ids = torch.randint(5, words, (setting.batch, setting.length))
        labels = torch.randint(LABELS, (setting.batch,))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.batch = {name: tensor.to(setting.device) for name, tensor in batch.items()}
        self.parameters = list(self.model.parameters())
        self.initial = [p.detach().clone() for p in self.parameters]
        self.embedding = self.model.get_input_embeddings()
        with torch.no_grad():
            self.unit = self.embed().norm(dim=-1).mean().item()
        self.coordinates = setting.length * self.model.config.hidden_size
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-5, fused=True)
        self.step()  # makes the moments

    def adamw(self) -> torch.optim.Optimizer:
        """Return an optimizer of its own hooks."""
        optimizer = torch.optim.AdamW(self.parameters, lr=2e-5, fused=True)
        optimizer.state = self.optimizer.state
        return optimizer

    def embed(self) -> Tensor:
        """Return the embedded words of the batch, `[B, n, D]`."""
        return self.embedding(self.batch["input_ids"])

    def closure(self, rows: int | None = None) -> Callable[[], Any]:
        """Return what runs a forward pass, on the first rows of the batch."""
        batch = self.rows(rows)
        return lambda: self.model(**batch)

    def losses(self, rows: int | None = None) -> Callable[[], tuple[Tensor, Tensor]]:
        """Return what runs the same pass for one loss per sample and logits."""
        batch = self.rows(rows)

        def closure() -> tuple[Tensor, Tensor]:
            logits = self.model(**batch).logits
            return F.cross_entropy(logits, batch["labels"], reduction="none"), logits

        return closure

    def rows(self, number: int | None) -> dict[str, Tensor]:
        """Return the first rows of the batch; None for all."""
        return {name: tensor[:number] for name, tensor in self.batch.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Put the weights back to where every round starts, without gradients."""
        for parameter, value in zip(self.parameters, self.initial, strict=True):
            parameter.copy_(value)
            parameter.grad = None

    # Parts of a round ------------------------------------------------------------------------

    def parts(self) -> dict[str, Part]:
        """Return the parts that floors are composed of.

        F is a forward pass, A one with a backward to δ alone, S a whole ordinary step, O the
        optimizer in it, N a normal draw for every weight.
        """
        plays = [self.closure(), self.ascent, self.step, self.optimizer.step, self.draw]
        prepared = {"O": self._gradients}
        pairs = zip(PARTS, plays, strict=True)
        return {name: Part(prepared.get(name, self.reset), play) for name, play in pairs}

    def step(self) -> None:
        """Train on the batch for one step."""
        self.optimizer.zero_grad()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()

    def draw(self) -> list[Tensor]:
        """Return normal draws shaped like the weights."""
        return [torch.randn_like(p) for p in self.parameters]

    def ascent(self) -> Tensor:
        """Return the gradient of the loss with respect to δ alone, at δ = 0."""
        delta = torch.zeros_like(self.embed()).requires_grad_()
        self.model.requires_grad_(False)
        try:
            return torch.autograd.grad(self.perturbed(delta).loss, delta)[0]
        finally:
            self.model.requires_grad_(True)

    def perturbed(self, delta: Tensor) -> Any:
        """Return the model's output with δ `[B, n, D]` added to the embedded words."""
        hook = self.embedding.register_forward_hook(lambda module, args, output: output + delta)
        try:
            return self.model(**self.batch)
        finally:
            hook.remove()

    def _gradients(self) -> None:
        self.reset()
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
