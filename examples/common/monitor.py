"""What is seen of a run while it goes on: a progress bar, and TensorBoard if asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class Monitor(TrainerCallback):
    """Shows the numbers of a run.

    Not Trainer's own bar, which shows where there is no terminal and prints logs among the results,
    nor its TensorBoard, which keeps what comes again where a killed run goes on.

    Args:
        name: of the run.
        folder: for TensorBoard; None writes nothing.
        silent: shows no bar.
    """

    def __init__(self, name: str, folder: Path | None, silent: bool) -> None:
        self.name = name
        self.folder = folder
        self.silent = silent
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, and the file for TensorBoard."""
        hidden = True if self.silent or not state.is_world_process_zero else None
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            leave=False,
            disable=hidden,  # None: no bar where there is no terminal
        )
        if self.folder is not None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            # What was written after the checkpoint that a killed run goes on from comes again.
            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Show that an update is done."""
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the numbers of an update."""
        if "loss" in logs:
            found = {name: value for name, value in logs.items() if name != "epoch"}
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in found.items()})
            self._write("train", found, state.global_step)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar."""
        self.bar.close()

    def metrics(self, done: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """Write the metrics of splits."""
        for split, metrics in found.items():
            self._write(split, metrics, done)

    def _write(self, group: str, numbers: Mapping[str, float], done: int) -> None:
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(f"{group}/{name}", value, done)
            self.writer.flush()
