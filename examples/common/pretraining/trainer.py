"""transformers' Trainer on an objective of pre-training, plainly or against an adversary."""

import zlib
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from common.pretraining.objectives import Objective
from mixadv.integrations.transformers import Adversarial

SEED = 0  # of what held-out rows get: masks, replacements; the same at each evaluation


class Repeatable:
    """A collator whose draws follow from the seed, the epoch and the rows of a batch.

    A batch is collated before the one in front of it is trained on, so that draws from the shared
    generator would differ where a run is resumed; and by the number of workers.
    """

    def __init__(self, collator: Any, seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.epoch = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """Return the batch; the random state is left as it was."""
        text = repr((self.seed, self.epoch, [row["input_ids"] for row in rows]))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(text.encode()))  # the CPU's alone
            return self.collator(rows)


class Counting(TrainerCallback):
    """Tells a collator the epoch."""

    def __init__(self, collator: Repeatable) -> None:
        self.collator = collator

    def on_epoch_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Tell it; of a resumed run the epoch is a part of one more."""
        self.collator.epoch = int(state.epoch or 0)


class PretrainingTrainer(Trainer):
    """Minimises an objective, and measures it on held-out rows."""

    def __init__(self, *arguments: Any, objective: Objective, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.data_collator = Repeatable(objective.collator, self.args.seed)
        self.add_callback(Counting(self.data_collator))
        self.objective = objective
        # The loss is the mean of a micro-batch, and Trainer takes the mean of theirs.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the objective on a batch."""
        found = self.objective(model, dict(inputs))
        return (found["loss"], found) if return_outputs else found["loss"]

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Return the batches of held-out rows that this process measures."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        mine = rows.select(range(self.args.process_index, len(rows), self.args.world_size))
        return DataLoader(
            mine,
            self.args.per_device_eval_batch_size,
            collate_fn=Repeatable(self.objective.collator, SEED),
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Return the metrics of the objective; training's own draws go on as if none was made."""
        self.model.eval()
        found: list[dict[str, np.ndarray]] = []
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(SEED)
            for batch in dataloader:
                inputs = {name: values.to(self.args.device) for name, values in batch.items()}
                items = self.objective.measure(self.model, inputs)
                found.append({name: values.cpu().numpy() for name, values in items.items()})
        found = gather_object(found)
        items = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in self.objective.metrics(items).items()
        }
        return EvalLoopOutput(np.empty(0), None, metrics, len(self.eval_dataset))


class AdversarialPretrainingTrainer(Adversarial, PretrainingTrainer):
    """The same, as a game."""
