"""Models spread over processes: DistributedDataParallel, and weights sharded by `fully_shard`."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixadv.model.walk import modules


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def add_up(tensor: Tensor) -> None:
    """Add the tensors of all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def agreed(flag: bool, like: Tensor) -> bool:
    """Return whether a flag holds on all processes; the tensor is on the device they talk by."""
    if world_size() == 1:
        return flag
    every = torch.tensor(float(flag), device=like.device)
    dist.all_reduce(every, dist.ReduceOp.MIN)
    return bool(every)


@contextmanager
def local(model: nn.Module) -> Iterator[None]:
    """Keep the gradients of the body's passes on this process: no all-reduce follows them.

    DistributedDataParallel decides in the forward whether the backward will reduce.
    """
    with ExitStack() as stack:
        spread = dist.is_available() and dist.is_initialized()  # without which nothing is
        for module in modules(model) if spread else []:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def sharded(model: nn.Module) -> list[Any]:
    """Return the modules of a model whose weights `fully_shard` has spread over processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and imported by its users
    if fsdp is None or not dist.is_initialized():  # without which nothing is sharded
        return []
    return [m for m in modules(model) if isinstance(m, fsdp.FSDPModule)]


def foreign(model: nn.Module) -> list[Any]:
    """Return the weights that are spread otherwise than by `fully_shard`, as by tensor parallelism.

    Its own have one dimension of shards, behind those of replicas. Where it was applied to a part
    of the model alone, weights of that form elsewhere are taken for its own.
    """
    made = bool(sharded(model))
    spread: list[Any] = [p for p in model.parameters() if is_spread(p)]
    return [p for p in spread if not (made and _is_of_fully_shard(p.placements))]


def _is_of_fully_shard(placements: Any) -> bool:
    *replicas, shards = placements
    return shards.is_shard() and all(placement.is_replicate() for placement in replicas)


def reshard(model: nn.Module) -> None:
    """Free gathered weights, which a forward without a backward leaves in the model.

    They would be listed as its parameters, and used after the sharded ones have changed.
    """
    for module in sharded(model):
        module.reshard()


def replicas_alike(parameters: list[Tensor]) -> bool:
    """Return whether several processes hold the same weights; those that are spread do not."""
    if world_size() == 1 or any(is_spread(p) for p in parameters):
        return False
    sums = [p.detach().double().sum().to(parameters[0].device) for p in parameters]
    mine = torch.stack(sums).sum()[None]
    every = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine)
    return all(torch.allclose(x, mine, rtol=0, atol=0, equal_nan=True) for x in every)


def share(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a tensor that is equal on all, spread as `like` is."""
    if not is_spread(like):
        return whole
    spread: Any = like
    placed = sys.modules["torch.distributed.tensor"].distribute_tensor
    return placed(whole, spread.device_mesh, spread.placements, src_data_rank=None)  # sends nothing


def is_spread(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one process would hold it, whose parts may be spread."""
    spread: Any = tensor
    return spread.full_tensor() if is_spread(tensor) else tensor


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of a tensor that may be spread, 0-d."""
    return whole(torch.linalg.vector_norm(tensor)).square()  # in one pass, without a copy


def average(tensors: list[Tensor]) -> None:
    """Average each tensor over the processes, in place; those that are spread are averaged."""
    processes = world_size()
    if processes == 1:
        return
    for tensor in tensors:
        if not is_spread(tensor):
            dist.all_reduce(tensor)
            tensor.div_(processes)


@contextmanager
def swapped(model: nn.Module, weights: dict[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters other values while the body runs; those found come back, bit for bit."""
    reshard(model)
    found = {p: p.detach().clone() for p in weights}
    try:
        _put(weights)
        yield
    finally:
        reshard(model)
        _put(found)


@torch.no_grad()
def _put(values: dict[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)
    torch.clear_autocast_cache()  # it holds the values before, cast, until autocast is left
