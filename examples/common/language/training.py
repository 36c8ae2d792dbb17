"""A language model with adapters, trained by rounds, and measured on the way."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

import mixadv
from common import model as models
from common.language import Setting
from common.language.rows import SYSTEM
from common.results import append, finished
from mixadv.robustness.generation import Speaker
from mixadv.tokens import ChatBatch, answer_losses

RESULTS = "results.jsonl"


@dataclass
class Learner:
    """A model with new adapters, its tokenizer and the optimizer of the adapters."""

    network: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    speaker: Speaker = field(init=False)

    def __post_init__(self) -> None:
        self.speaker = Speaker(self.network, self.tokenizer, SYSTEM, max_new_tokens=12)

    def read(self, prompts: list[str], answers: list[str]) -> ChatBatch:
        """Return a batch that `losses` takes."""
        return self.speaker.read(prompts, answers, padding_side="left")

    def losses(self, batch: ChatBatch) -> Tensor:
        """Return the loss of each row's answer, `[B]`; rows are padded on the left.

        The vocabulary is a fifth of the model: logits are computed from where answers begin alone.
        """
        keep = 1 + int((batch.labels >= 0).any(0).sum())
        logits = self.network(**batch.inputs, logits_to_keep=keep).logits
        return answer_losses(logits, batch.labels[:, -keep:])

    def plain(self, prompts: list[str], answers: list[str]) -> Tensor:
        """Take a step without an adversary."""
        batch = self.read(prompts, answers)
        return self.descend(lambda: self.losses(batch))

    def descend(self, losses: Callable[[], Tensor]) -> Tensor:
        """Take a step on the mean of losses."""
        self.optimizer.zero_grad()
        loss = losses().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def layer(self) -> torch.nn.Module:
        """Return the layer that is perturbed, at about a third of the depth as in papers."""
        layers = self.network.get_base_model().model.layers
        return layers[3 * len(layers) // 10]  # the tenth of 30


def learner(setting: Setting, network: Any, tokenizer: Any, name: str = "default") -> Learner:
    """Return a model with a new adapter in training mode, which others may lie beside."""
    torch.manual_seed(setting.seed)
    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if isinstance(network, peft.PeftModel):
        network.add_adapter(name, config)
        network.set_adapter(name)
    else:
        network = peft.get_peft_model(network, config, adapter_name=name)
    network.train()
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=setting.learning_rate, weight_decay=0.0)
    return Learner(network, tokenizer, optimizer)


def load(setting: Setting) -> tuple[Any, Any]:
    """Return the language model of a run and its tokenizer."""
    network, tokenizer, _ = models.pretrained(
        transformers.AutoModelForCausalLM, setting.model, dtype=getattr(torch, setting.dtype)
    )
    return network.to(models.device()), tokenizer


def train(
    setting: Setting,
    step: Callable[[], Tensor],
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Take the updates of a run; return its measures on the way and its seconds an update."""
    curve, losses, seconds = [], [], 0.0
    what = f"{setting.experiment} {setting.arm} seed {setting.seed}"
    for update in tqdm(range(1, setting.updates + 1), what, leave=False, disable=None):
        started = time.perf_counter()
        losses.append(float(step()))
        seconds += time.perf_counter() - started
        if update % setting.measure_every == 0 or update == setting.updates:
            curve.append({"update": update, **measure()})
    return {"curve": curve, "losses": losses, "seconds_per_update": seconds / setting.updates}


def once(
    settings: list[Setting], output: Path, run: Callable[[Setting], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the results of all runs; one that has a line in the results is not repeated."""
    path = output / RESULTS
    there = finished(path)
    for setting in settings:
        if setting.key not in there:
            there[setting.key] = {"key": setting.key, **asdict(setting), **run(setting)}
            append(path, there[setting.key])
            gc.collect()
    return [there[setting.key] for setting in settings]


def player(setting: Setting, one: Learner, solver: mixadv.Solver, site: Any = None) -> Any:
    """Return the optimizer of a learner, which plays a solver's rounds."""
    return mixadv.wrap(one.optimizer, one.network, solver, site=site, seed=setting.seed)


def pgd(setting: Setting) -> mixadv.Solver:
    """Return the adversary: from δ = 0, by steps that reach the border and as far again."""
    step_size = 2 * setting.radius / setting.steps
    ball: Any = {"radius": setting.radius, "per": "token", "start": "zero"}
    return mixadv.PGD(steps=setting.steps, step_size=step_size, **ball)
