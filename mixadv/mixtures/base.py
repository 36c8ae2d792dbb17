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
from mixadv.model.parallel import is_spread, whole


def digests(model: nn.Module, members: Sequence[Member]) -> dict[str, str]:
    """Return what `check` compares: number format, shape and SHA-256 of what members share.

    That is what at least one of them takes from the model, by the names that PEFT found it under.
    Whole models take nothing, and weights only what they do not name. Tensors whose bytes are not
    here have none: those on meta, as offloaded ones, and sparse or quantised ones of several parts.
    Of a model that is spread over processes, all of them call this.
    """
    changing = [member for member in members if not isinstance(member, Model)]
    if not changing:
        return {}
    own = [_own(model, member) for member in changing]
    everywhere = own[0].intersection(*own[1:])
    shared = {name: value for name, value in _named(model).items() if id(value) not in everywhere}
    return {name: _digest(value) for name, value in shared.items() if _has_bytes(value)}


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
        "base in another number format, such as bf16 or quantised, or its bytes are elsewhere: "
        "Mixture.from_pretrained(folder, model, check_base=False)."
    )


def _own(model: nn.Module, member: Member) -> set[int]:
    """Return the identities of the model's tensors that a member does not take from it."""
    if isinstance(member, Adapter):
        inner: Any = unwrap(model)
        own = _saved(inner, member.name) | _added(inner)  # other adapters with it
        return own | _replaced(inner, [member.name])
    held = _ids(member.replaced(model).values() if isinstance(member, Weights) else ())
    return held | _idle(model)


def _idle(model: nn.Module) -> set[int]:
    """Return those of adapters that are not active, and of what active ones replace."""
    inner: Any = unwrap(model)
    if not is_peft(inner):
        return set()
    active = inner.active_adapters
    used = set[int]().union(*(_saved(inner, name) for name in active))
    return (_added(inner) - used) | _replaced(inner, active)


def _saved(model: Any, name: str) -> set[int]:
    """Return those of what an adapter brings along."""
    import peft

    saved = peft.get_peft_model_state_dict(
        model,
        model.state_dict(keep_vars=True),
        adapter_name=name,
        save_embedding_layers=False,  # which it would look for on the hub
    )
    return _ids(saved.values())


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
    inner: Any = module._modules.get("base_layer") or getattr(module, "original_module", None)
    return inner if isinstance(inner, nn.Module) else None


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model, by the names they had before PEFT and others wrapped it."""
    found: dict[str, Tensor] = {}
    ahead: list[tuple[str, nn.Module]] = [("", base_of(unwrap(model)))]
    while ahead:
        prefix, module = ahead.pop()
        if (inner := _within(module)) is not None:
            ahead.append((prefix, inner))
            continue
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        held = {**module._parameters, **{name: module._buffers[name] for name in sorted(kept)}}
        found |= {prefix + name: value for name, value in held.items() if value is not None}
        within = reversed(module._modules.items())
        ahead += [(prefix + _without(f"{name}."), m) for name, m in within if m is not None]
    return found


def _without(name: str) -> str:
    """Return a name as it is in a state dict, where checkpointing leaves no trace."""
    return "" if name == "_checkpoint_wrapped_module." else name


def _tensors(module: nn.Module) -> set[int]:
    return _ids([*module.parameters(), *module.buffers()])


def _ids(tensors: Iterable[Any]) -> set[int]:
    return {id(tensor) for tensor in tensors}


def _has_bytes(value: Tensor) -> bool:
    """Return whether the bytes of a tensor are here: of one on meta, or of parts, they are not."""
    of_parts = hasattr(value, "__tensor_flatten__") and not is_spread(value)
    return not (value.is_meta or of_parts) and value.layout is torch.strided


def _digest(value: Tensor) -> str:
    """Return the number format, the shape and a hash of the bytes, alike on all devices."""
    kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if not _has_bytes(value):
        return f"{kind} whose bytes are not here"
    own = whole(value.detach()).cpu().resolve_conj().resolve_neg().contiguous()
    raw = own.reshape(-1).view(torch.uint8)
    return f"{kind} {hashlib.sha256(raw.numpy().data).hexdigest()[:16]}"
