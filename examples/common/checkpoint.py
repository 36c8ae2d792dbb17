"""Checkpoints to go on from after a kill, to the same numbers."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def save(path: Path, live: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write the state of everything live; a kill in the middle leaves the checkpoint before.

    All processes hold the same weights and differ in their random states.
    """
    random = gather_object([_random()])
    if not PartialState().is_main_process:
        return
    state = {name: thing.state_dict() for name, thing in live.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state | {"progress": progress, "random": random}, temporary)
    temporary.replace(path)


def load(path: Path, live: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint if there is one; return the progress made, nothing without one."""
    if not path.exists():
        return {}
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, thing in live.items():
        thing.load_state_dict(state[name])
    random = state["random"][PartialState().process_index]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    return state["progress"]


def _random() -> dict[str, torch.Tensor]:
    """Return the state of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
