"""Settings that all tests share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.zoo import TWINS, moving_inputs

settings.register_profile(
    "fast",
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("fast"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
torch.set_num_threads(1)  # of a module's fixtures too, which are made before those of its tests


for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():  # the seeds of devices to come are kept with a stack each
        devices.manual_seed_all = lambda seed: None


OWN = (
    *("test_rows", "test_images", "test_recomputation", "test_errors", "test_face", "test_pages"),
    *("test_weights", "test_weights_distributed"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make tests of all solvers slow for those that play the round of another."""
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        if item.path.stem not in OWN and any(str(value) in TWINS for value in values):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the workers of a session share."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Leave what is loaded out of later collections, of which Trainer makes one per run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _moving_inputs(request: pytest.FixtureRequest) -> Iterator[None]:
    with moving_inputs(request.node.name):
        yield
