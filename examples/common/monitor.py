"""What is seen of a run while it goes on: a progress bar, and TensorBoard if asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tqdm.auto import tqdm


class Monitor:
    """Shows the numbers of a run.

    Numbers are on the device, and reading them waits for it: they are asked for when the bar is
    drawn, not at every update, unless TensorBoard takes them all.

    Args:
        name: of the run.
        total: updates of the run.
        done: of which before.
        folder: for TensorBoard; None writes nothing.
        silent: shows nothing, as all processes but the first.
    """

    def __init__(self, name: str, total: int, done: int, folder: Path | None, silent: bool) -> None:
        # None: no bar where there is no terminal.
        hidden = True if silent else None
        self.bar = tqdm(total=total, initial=done, desc=name, leave=False, disable=hidden)
        self.writer: Any = None
        if folder is not None and not silent:
            from torch.utils.tensorboard import SummaryWriter

            # What was written after the checkpoint that a killed run goes on from comes again.
            self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def update(self, done: int, numbers: Callable[[], dict[str, float]]) -> None:
        """Show that an update is done, and its numbers."""
        drawn = self.bar.update()
        if not drawn and self.writer is None:
            return
        found = numbers()
        if drawn:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in found.items()})
        if self.writer is not None:
            for name, value in found.items():
                self.writer.add_scalar(f"train/{name}", value, done)

    def metrics(self, done: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """Write the metrics of splits."""
        if self.writer is not None:
            for split, metrics in found.items():
                for metric, value in metrics.items():
                    self.writer.add_scalar(f"{split}/{metric}", value, done)
