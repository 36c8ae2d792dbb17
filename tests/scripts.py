"""What tests of scripts share: a start of their own, and the weights at the end of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from common.loop import Training


@pytest.fixture(autouse=True)
def own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test its own cache of data, and no accelerator of another test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def weights_of(
    main: Callable[[list[str]], int], argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Run a command line to its end; return the weights that it evaluated."""
    result, weights = Training.result, {}

    def watched(training: Training) -> Any:
        weights.update({k: v.clone() for k, v in training.model.state_dict().items()})
        return result(training)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "result", watched)
        assert main(argv) == 0
    return weights
