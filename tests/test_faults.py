"""What goes wrong in a long run, and what it costs: out of memory, a broken batch, a kill."""

import contextlib
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import mixadv
from tests.zoo import (
    CANNOT,
    USUAL,
    WAYS,
    assert_same,
    fingerprint,
    play,
    small,
    uncollected,
    wrapped,
)

PLAYED = [(name, how) for name in mixadv.SOLVERS for how in WAYS if (name, how) not in CANNOT]
ROOT = Path(__file__).parent.parent


class Run:
    """A model in training, whose memory may run out in its n-th forward pass."""

    def __init__(self, name: str, how: str, **chosen: Any) -> None:
        self.how, self.player = how, small()
        self.forwards = self.steps = self.broken_at = 0
        self.held: list[weakref.ref[Tensor]] = []
        # CAT's head stands for all that a solver computes besides the model.
        if name == "cat":
            chosen["head"] = nn.Linear(3, 2).double()
            chosen["head"].register_forward_pre_hook(lambda *_: self.count())
        self.optimizer = wrapped(self.player, name, partial(SGD, momentum=0.5), **chosen)
        self.optimizer.base.register_step_post_hook(self.after_step)
        self.player.model.normalise.register_forward_hook(self.after_hidden)

    def after_step(self, *_: Any) -> None:
        self.steps += 1

    def count(self) -> None:
        self.forwards += 1
        if self.forwards == self.broken_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def after_hidden(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.held.append(weakref.ref(output))
        self.count()

    def train(self, rows: int = 6, scale: float = 1.0) -> Tensor:
        """Play a round on the first rows and step."""
        batch = {key: value[:rows] for key, value in self.player.batch.items()}
        inner = self.player.closure(**batch)

        def closure() -> tuple[Tensor, Tensor]:
            loss, logits = inner()
            return scale * loss, logits

        self.optimizer.zero_grad()
        return play(self.optimizer, closure, self.how)

    def state(self) -> dict[str, Any]:
        found = fingerprint(self.player.model, self.optimizer)
        del found["identities"]  # which differ between models
        return found


# Out of memory --------------------------------------------------------------------------------

# The checks of a first round are the same for every way. What is held between passes and after a
# round is the solver's, so every one steps; how a way lets go of it is told by one of each kind.
FITS = [(name, how, 1) for name, how in PLAYED if how == "step" or name in (*USUAL, "textat")]
FITS += [(name, "step", 0) for name in mixadv.SOLVERS]


@pytest.mark.parametrize(("name", "how", "rounds"), FITS)
def test_a_batch_that_does_not_fit_is_freed_and_played_in_smaller_parts(
    name: str, how: str, rounds: int
):
    """Raised as torch raised it, in whichever pass; nothing holds the memory, nothing differs."""

    def fresh() -> Run:
        run = Run(name, how)
        for _ in range(rounds):
            run.train()
        run.optimizer.zero_grad()
        run.held, run.forwards, run.steps = [], 0, 0
        return run

    whole = fresh()  # torch's random state is one for all: each is trained as it is made
    whole.train()
    half = fresh()
    half.train(rows=3)
    expected = half.state()
    for at in range(1, whole.forwards + 1):
        run = fresh()
        found, run.broken_at = run.state(), at
        with uncollected():
            with contextlib.suppress(torch.OutOfMemoryError):  # keeps no traceback
                run.train()
                pytest.fail("the error was swallowed")
            assert all(ref() is None for ref in run.held)
        run.optimizer.zero_grad()
        left, stepped = run.state(), run.steps
        if stepped or not rounds:  # the base has moved on; the unit is that of the whole batch
            left["optimizer"] = found["optimizer"]
        assert_same(left, found)
        run.train(rows=3)
        if rounds and not stepped:
            assert_same(run.state(), expected)
        assert all(p.isfinite().all() for p in run.player.model.parameters())


def test_memory_that_runs_out_on_a_route_is_no_fault_of_the_route():
    """Which the first round checks, and reports what does not run on it."""
    at, refused = 0, True
    while refused:
        run, at = Run("mat", "step", particles=2, particle_batching="vmap"), at + 1
        run.broken_at = at
        run.player.model.eval()  # running statistics do not run through vmap
        try:
            run.train()
            refused = False
        except torch.OutOfMemoryError:
            pass
    assert run.forwards > 9


# A batch that is not finite --------------------------------------------------------------------


def finite(tree: Any) -> bool:
    """Return whether all tensors of a nested state are finite."""
    if isinstance(tree, Tensor):
        return not tree.is_floating_point() or bool(tree.isfinite().all())
    values = tree.values() if isinstance(tree, dict) else tree
    return not isinstance(tree, (dict, list, tuple)) or all(map(finite, values))


@pytest.mark.parametrize(("name", "how"), PLAYED)
def test_a_loss_that_is_not_finite_reaches_only_the_gradients(name: str, how: str):
    """As in plain training: a loop that leaves such a step out has lost nothing to it."""
    run = Run(name, how)
    base = run.optimizer.base
    left_out = []

    def leave_out(*_: Any) -> None:
        held = [p for group in base.param_groups for p in group["params"]]
        left_out.append(not finite([p.grad for p in held if p.grad is not None]))
        if left_out[-1]:
            base.zero_grad()

    base.register_step_pre_hook(leave_out)
    for scale in (1.0, float("nan"), 1.0, float("inf"), 1.0):
        loss = run.train(scale=scale)
        assert bool(loss.isfinite()) == (scale == 1.0)
        assert all(left_out) if scale != 1.0 else not any(left_out)
        assert finite(run.state())
        assert finite(run.optimizer.game.strategy.state_dict())
        left_out.clear()
    assert run.optimizer.outcome.nonfinite in (None, 0)
