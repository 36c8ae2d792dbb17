"""An outcome is that of its round, whenever it is read."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

import mixadv
from tests.zoo import small, wrapped

CONTEXTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a plain read": nullcontext,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    "name", ["noise", "pgd", "freelb", "smart", "mat", "cvar", "group_dro", "sam"]
)
def test_a_late_read_tells_what_a_read_at_once_does(name: str, context: str):
    def told(late: bool) -> dict[str, object]:
        player = small(reduction="none")
        more = {"groups": torch.tensor([0, 1] * 3)} if name == "group_dro" else {}
        solver = mixadv.make_solver(name, **({"groups": 2} if more else {}))
        optimizer = wrapped(player, solver)
        for _ in range(2):
            optimizer.step(player.closure(), **more)
        if not late:
            return vars(optimizer.outcome)
        with torch.no_grad():  # what comes after the round
            for tensor in (*player.model.parameters(), *player.batch.values()):
                tensor.add_(1)
        with CONTEXTS[context]():
            found = vars(optimizer.outcome)
        weights = optimizer.game.strategy.log_weights if optimizer.game.strategy else None
        assert weights is None or not weights.is_inference()
        return found

    at_once, late = told(late=False), told(late=True)
    for field, value in at_once.items():
        if isinstance(value, Tensor):
            assert not late[field].is_inference(), field
            assert torch.equal(value, late[field]), field
        else:
            assert value == late[field], field


def test_of_several_micro_batches_the_perturbations_of_the_last_alone_are_held():
    player, seen = small(), []
    optimizer = wrapped(player, "pgd")
    handle = player.model.dropout.register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(args[0]))
    )
    optimizer.step([player.closure() for _ in range(3)])
    handle.remove()
    points = optimizer.game.strategy.points[0]
    assert points.shape[1] == 6
    assert not [x for x in seen if x() is not None]
    alike = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == points.shape]
    assert {x.data_ptr() for x in alike} == {points.data_ptr()}
    assert float(optimizer.outcome.radius) > 0
