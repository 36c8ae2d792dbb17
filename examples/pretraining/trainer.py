"""transformers' Trainer on an objective of pre-training, plainly or against an adversary."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from mixadv.integrations.transformers import Adversarial
from pretraining.objectives import Objective

SEED = 0  # of the masks that held-out rows get, the same at each evaluation


class PretrainingTrainer(Trainer):
    """Minimises an objective, and measures it on held-out rows."""

    def __init__(self, *arguments: Any, objective: Objective, **keywords: Any) -> None:
        super().__init__(*arguments, data_collator=objective.collator, **keywords)
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
            mine, self.args.per_device_eval_batch_size, collate_fn=self.objective.collator
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Return the metrics of the objective; training's own draws go on as if none was made."""
        self.model.eval()
        found: list[dict[str, np.ndarray]] = []
        with torch.random.fork_rng():
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
