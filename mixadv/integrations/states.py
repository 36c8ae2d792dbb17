"""Players of weights that are spread over processes, saved beside Trainer's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.integrations.trainer import Base, wrapped
from mixadv.optimizer import STATE_KEY


class OwnStates(Base):
    """Saves both players beside Trainer's checkpoint, a file per process, where weights are spread.

    Accelerate gathers the state of the base optimizer of sharded weights, and DeepSpeed saves that
    of its own; neither knows the game.
    """

    if TYPE_CHECKING:

        @property
        def game(self) -> Game:
            """The mixin's."""
            ...

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._base_alone():
            super()._save_optimizer_and_scheduler(output_dir)
        made = wrapped(self.optimizer)
        if self.is_deepspeed_enabled:
            torch.save(self.game.state_dict(), self._players(output_dir))
        elif self.is_fsdp_enabled and made is not None:
            torch.save(made.state_dict()[STATE_KEY], self._players(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._base_alone():
            super()._load_optimizer_and_scheduler(checkpoint)
        made = wrapped(self.optimizer)
        spread = self.is_deepspeed_enabled or (self.is_fsdp_enabled and made is not None)
        if not spread or checkpoint is None:
            return
        if not (file := self._players(checkpoint)).exists():
            raise GameError(
                f"{checkpoint} has no {file.name}, the players' state of this process: resume with "
                "as many processes as saved it, and the mixin."
            )
        state = torch.load(file, map_location=self.args.device.type, weights_only=True)
        if made is None:
            self.game.load_state_dict(state)
        else:
            made.load_state_dict({**made.base.state_dict(), STATE_KEY: state})

    def _players(self, folder: str) -> Path:
        return Path(folder) / f"players_{self.args.process_index}.pt"

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """Be the Trainer of the base optimizer, where weights are sharded."""
        whole, made = self.optimizer, wrapped(self.optimizer)
        if self.is_fsdp_enabled and made is not None:
            self.optimizer = made.base
        try:
            yield
        finally:
            self.optimizer = whole
