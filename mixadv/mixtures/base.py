"""Which base members were saved with: a digest of each tensor that they take from it.

Adapters, heads and dropout masks are a mixture on one base alone. On another one of the same shapes
they load as well, and predict something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.mixtures.adapters import Adapter, is_peft
from mixadv.mixtures.members import Member, Model, Weights
from mixadv.model.modules import base_of, unwrap


def digests(model: nn.Module, members: Sequence[Member]) -> dict[str, str]:
    """Return what `check` compares: number format, shape and SHA-256 of what members share.

    That is what at least one of them takes from the model, by the names that PEFT found it under.
    Whole models take nothing, and weights only what they do not name.
    """
    changing = [member for member in members if not isinstance(member, Model)]
    if not changing:
        return {}
    own = [_own(model, member) for member in changing]
    everywhere = own[0].intersection(*own[1:])
    shared = {name: value for name, value in _named(model).items() if id(value) not in everywhere}
    return {name: _digest(value) for name, value in shared.items()}


def check(folder: Path, saved: Mapping[str, str], model: nn.Module) -> None:
    """Raise ValueError unless the model has the tensors that members were saved with."""
    own = _named(model)
    now = {name: _digest(own[name]) if name in own else "missing" for name in saved}
    if not (other := [name for name in saved if saved[name] != now[name]]):
        return
    name = other[0]
    raise ValueError(
        f"The model is not the base that the members of {folder} were saved with: {len(other)} of "
        f"the {len(saved)} tensors that they take from it differ. {name!r} was {saved[name]}, and "
        f"is {now[name]}. Load that base as it was when the mixture was saved. If this is that "
        "base in another number format, such as bf16 or quantised: "
        "Mixture.from_pretrained(folder, model, check_base=False)."
    )


def _own(model: nn.Module, member: Member) -> set[int]:
    """Return the identities of the model's tensors that a member does not take from it."""
    if isinstance(member, Adapter):
        return _adapter(model, member.name)
    held = member.replaced(model).values() if isinstance(member, Weights) else ()
    inner: Any = unwrap(model)
    replaced = _replaced(inner, inner.active_adapters) if is_peft(inner) else set()
    return _ids(held) | replaced


def _adapter(model: nn.Module, name: str) -> set[int]:
    """Return those of what an adapter brings along, of what it replaces, and of other adapters."""
    import peft

    inner: Any = unwrap(model)
    saved = peft.get_peft_model_state_dict(
        inner,
        inner.state_dict(keep_vars=True),
        adapter_name=name,
        save_embedding_layers=False,  # which it would look for on the hub
    )
    return _ids(saved.values()) | _added(inner) | _replaced(inner, [name])


def _added(model: nn.Module) -> set[int]:
    """Return those of what PEFT added to a model, for any adapter."""
    base = base_of(model)
    found = _tensors(model) - _tensors(base)
    for module in base.modules():
        if (inner := _within(module)) is not None:
            found |= _tensors(module) - _tensors(inner)
    return found


def _replaced(model: nn.Module, names: Iterable[str]) -> set[int]:
    """Return those of modules, such as a head, in whose place each adapter has its own."""
    found: set[int] = set()
    for module in model.modules():
        copies: Any = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and all(name in copies for name in names):
            found |= _tensors(_within(module) or nn.Module())
    return found


def _within(module: nn.Module) -> nn.Module | None:
    """Return what a module of PEFT wraps, if it is one."""
    if not type(module).__module__.startswith("peft."):
        return None
    return module._modules.get("base_layer", module._modules.get("original_module"))


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model, by the names they had before PEFT and others wrapped it."""
    inner: Any = unwrap(model)
    start = ""
    if is_peft(inner):
        start = "base_model." if base_of(inner) is inner.base_model else "base_model.model."
    return {
        name.removeprefix(start).replace(".base_layer.", ".").replace(".original_module.", "."): v
        for name, v in inner.state_dict(keep_vars=True).items()
        if isinstance(v, Tensor)
    }


def _tensors(module: nn.Module) -> set[int]:
    return _ids([*module.parameters(), *module.buffers()])


def _ids(tensors: Iterable[Any]) -> set[int]:
    return {id(tensor) for tensor in tensors}


def _digest(value: Tensor) -> str:
    """Return the number format, the shape and a hash of the bytes, alike on all devices."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.sha256(raw.numpy().data).hexdigest()
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {found[:16]}"
