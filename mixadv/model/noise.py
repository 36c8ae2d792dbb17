"""The random draws of the two players."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from mixadv.model.parallel import share


class Noise:
    """The random draws of the two players, seeded anew each round from a few integers.

    Saved with a game are the seed and the number of the round: nothing else is needed to resume.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._key: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": {}}  # seeded anew each round

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        """Seed the draws of a player for a round; `rank` only where ranks draw differently."""
        self._key = (self.seed, player, round, rank)
        self._generators.clear()

    def state(self) -> dict[torch.device, Tensor]:
        """Return where the draws are, by device."""
        return {device: g.get_state() for device, g in self._generators.items()}

    def go_on_from(self, state: dict[torch.device, Tensor]) -> None:
        """Draw next what was drawn after `state` was returned, in the same round."""
        self._generators.clear()
        for device, found in state.items():
            self._generators[device] = torch.Generator(device)
            self._generators[device].set_state(found)

    def number(self, *of: str) -> int:
        """Return a number for something of the round that begun, always the same."""
        digest = hashlib.blake2b(repr((*self._key, *of)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        """Return a draw shaped like `like`: `"normal"`, or `"uniform"` in [−1, 1]."""
        if like.device not in self._generators:
            generator = torch.Generator(like.device)
            self._generators[like.device] = generator.manual_seed(self.number())
        generator = self._generators[like.device]
        options: Any = {"generator": generator, "dtype": like.dtype, "device": like.device}
        draw = torch.randn if kind == "normal" else torch.rand
        # Sharded weights: each process draws all and keeps its share, as one process would.
        drawn = share(draw(like.shape, **options), like)
        return drawn if kind == "normal" else 2 * drawn - 1
