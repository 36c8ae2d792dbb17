"""Replaying a forward pass: random state and buffers.

All passes between two optimizer steps see the same dropout masks and the same buffers, and these
end as after one forward: otherwise a divergence between clean and adversarial predictions measures
the noise of dropout, which is orders above the effect of a small δ, or one more power iteration of
a spectral norm.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.model.private_torch import keeping_version
from mixadv.model.walk import tensors

RandomState = list[tuple[torch.device, Tensor]]
HostState = tuple[Any, Any]
"""The state of Python's generator and of numpy's, None where nothing has imported numpy."""
RandomStates = tuple[RandomState, HostState]
Slot = tuple[nn.Module, str]
Snapshot = list[tuple[Any, Any]]  # buffers and copies of them, None where a pass has left none


def host_state() -> HostState:
    """Return the state of the generators that are not torch's, by which some models draw masks."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def set_host_state(state: HostState) -> None:
    """Set what `host_state` returned."""
    own, numpys = state
    random.setstate(own)
    if numpys is not None:
        sys.modules["numpy"].random.set_state(numpys)


def _alike(one: HostState, other: HostState) -> bool:
    """Return whether two host states are the same."""
    numpys = one[1], other[1]
    if one[0] != other[0] or None in numpys:
        return one[0] == other[0] and numpys == (None, None)
    (_, key, *rest), (_, other_key, *other_rest) = numpys
    return rest == other_rest and key.tobytes() == other_key.tobytes()


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Return the devices with a random state of their own that tensors are on."""
    found = {t.device for t in tensors if not t.is_cpu}
    return sorted((d for d in found if d.type not in ("cpu", "meta")), key=str)


def random_state(devices: list[torch.device]) -> RandomState:
    """Return the random state of the CPU and of each accelerator given."""
    states: RandomState = [(torch.device("cpu"), torch.get_rng_state())]
    for device in devices:
        backend: Any = torch.get_device_module(device)
        state = backend.get_rng_state() if device.type == "mps" else backend.get_rng_state(device)
        states.append((device, state))
    return states


def seeded(devices: list[torch.device], seed: int) -> RandomState:
    """Return the random state under a seed.

    Not by `torch.manual_seed`, which seeds accelerators too whose state does not come back.
    """
    everywhere = torch.device("cpu"), *devices
    return [(d, torch.Generator(d).manual_seed(seed).get_state()) for d in everywhere]


def set_random_state(states: RandomState) -> None:
    """Set what `random_state` returned."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        elif device.type == "mps":
            torch.mps.set_rng_state(state)
        else:
            backend: Any = torch.get_device_module(device)
            backend.set_rng_state(state, device)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode; restore the modes and the random state, also after errors."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    state = random_state(accelerators(p for module in modules for p in module.parameters()))
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        set_random_state(state)


class Replay:
    """Random state and buffers of one round.

    Args:
        modules: of the model, each once: their buffers, and the devices they are on.
        fresh: draw a new dropout mask in every pass.
        slots: of buffers that passes change, as for `Buffers`.
        seed: returns that of the masks which are new. They come from a stream of their own, for the
            one that is left behind goes on as after one forward, and would give them again.
        alone: nothing but passes draws, as where adversaries are ours, so that random state is read
            where a pass begins: reading takes as long as a small layer.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        fresh: bool = False,
        slots: list[Slot] | None = None,
        seed: Callable[[], int] = int,
        alone: bool = True,
    ) -> None:
        self.devices = accelerators(tensors(modules))
        self.fresh = fresh
        self.seed = seed
        self.buffers = Buffers(modules, slots)
        self.begin = self.kept = self.buffers.found  # of the first forward since the last step
        self.alone = alone
        self.found = None if alone else self._now()  # to go back to
        self.before: RandomStates | None = None
        self.after: RandomStates | None = None
        self.ran = False  # the first pass since the last step
        self.astray = False  # other passes came after it
        self.quiet = False  # the closure draws nothing but torch's numbers
        self.apart: RandomStates | None = None  # where the stream of new masks has come to

    @contextmanager
    def run(self, own: bool = True) -> Iterator[None]:
        """Run one pass from the state the first pass since the last step started from.

        Random state and buffers end as after the first of the learner's `own` passes.
        """
        first = own and not self.ran
        anew = self.fresh and not first
        if self.before is None:
            self.before = self._now()
            self.found = self.found or self.before
            self.begin = self.buffers.snapshot()  # another micro-batch may have been there
        else:
            self.arrive()
            self.astray = self.after is not None
            self.buffers.put(self.begin)
            if not anew:
                self._set(self.before, host=first or not own or not self.quiet)
        if anew:
            self._set(self.apart or self._seeded(self.seed()))
        yield
        if anew:
            self.apart = self._now()
        if first:
            self.ran = True
            self.kept = self.buffers.snapshot()
            if not self.alone:
                self.arrive()
        else:
            self.buffers.put(self.kept)

    def arrive(self) -> None:
        """Note where the first pass has left the random state, if nothing came after it."""
        if self.ran and self.after is None and self.before is not None:
            self.after = self._now()
            self.quiet = _alike(self.before[1], self.after[1])

    def drew(self) -> bool:
        """Return whether the first pass since the last step drew random numbers."""
        self.arrive()
        assert self.before is not None
        assert self.after is not None
        pairs = zip(self.before[0], self.after[0], strict=True)
        drew = any(not torch.equal(begun, ended) for (_, begun), (_, ended) in pairs)
        return drew or not self.quiet

    def settle(self) -> None:
        """Move to where one plain forward would have left the random state.

        What draws there goes on from it: the next micro-batch, or the optimizer's step.
        """
        if self.after is not None and self.astray:
            self._set(self.after)
            self.astray = False

    def renew(self) -> None:
        """Settle, and draw a new mask from where the random state is."""
        self.settle()
        self.before, self.after, self.ran = None, None, False

    def undo(self) -> None:
        """Put the random state and the buffers back to where the round found them."""
        if self.found is not None:
            self._set(self.found)
        self.buffers.undo()

    def _now(self) -> RandomStates:
        return random_state(self.devices), host_state()

    def _seeded(self, seed: int) -> RandomStates:
        """Return the states of all generators under a seed."""
        numpy = sys.modules.get("numpy")
        numpys = None if numpy is None else numpy.random.RandomState(seed % 2**32).get_state()
        host = random.Random(seed).getstate(), numpys
        return seeded(self.devices, seed), host

    def _set(self, state: RandomStates, host: bool = True) -> None:
        set_random_state(state[0])
        if host:  # numpy takes as long for it as a small layer for its forward
            set_host_state(state[1])


class Buffers:
    """Buffers that forward passes change, such as running statistics.

    They are found by value, in the first round: batch normalisation does not touch the version
    counters of its own. Until then, without the `slots` that `changed()` of an earlier round
    returned, all are watched and compared. Running statistics are always watched: a later round may
    be the first to run their layer.
    """

    def __init__(self, modules: Iterable[nn.Module], slots: list[Slot] | None = None) -> None:
        self.known = slots is not None
        named = [(m, n) for m in modules for n, b in m._buffers.items() if _is_kept(b)]
        if slots is not None:
            told = {(id(m), n) for m, n in slots}
            named = [(m, n) for m, n in named if (id(m), n) in told or _is_running(m)]
        self.slots = named
        self._written: set[Slot] = set()
        self.found = self.snapshot()

    def snapshot(self) -> Snapshot:
        """Return the buffers there are, and copies of their values."""
        live = [module._buffers[name] for module, name in self.slots]
        return [(b, None if b is None else b.detach().clone()) for b in live]

    def undo(self) -> None:
        """Put back what the round found."""
        self.put(self.found)

    def changed(self) -> list[Slot]:
        """Return the slots whose buffer was written to, or replaced, since the round began."""
        pairs = zip(self.slots, self.found, strict=True)
        return [
            (module, name)
            for (module, name), (buffer, value) in pairs
            if (module, name) in self._written
            or module._buffers[name] is not buffer
            or not (buffer is value or torch.equal(buffer, value))
        ]

    def put(self, snapshot: Snapshot) -> None:
        """Put buffers back, with the values they had."""
        for (module, name), (buffer, value) in zip(self.slots, snapshot, strict=True):
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer
                self._written.add((module, name))
            if buffer is not None and (self.known or not torch.equal(buffer, value)):
                self._written.add((module, name))
                # A graph may hold the buffer: it reads it in evaluation mode only, where it never
                # changes, so the version counter must not invalidate that graph.
                with torch.no_grad(), keeping_version(buffer):
                    buffer.copy_(value)


def _is_kept(buffer: Tensor | None) -> bool:
    return buffer is not None and not buffer.is_meta


def _is_running(module: nn.Module) -> bool:
    """Return whether a pass updates statistics of a module, as of batch normalisation."""
    return module.training and bool(getattr(module, "track_running_stats", False))
