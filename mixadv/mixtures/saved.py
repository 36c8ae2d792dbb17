"""A mixture on disk: `mixture.json`, and one safetensors file for each member that has weights.

    mixture.json          probabilities, the kind of each member, the seeds of dropout masks, and
                          digests of what the members take from the base
    members-4f2a…/0.safetensors, 1.safetensors, …   of an adapter a folder, as PEFT writes it

The base model is not there: it is the caller's, by whose `save_pretrained` it is kept once for all
mixtures. Each save writes a folder of members of its own and then replaces `mixture.json`, which
names it: a save that is killed leaves the mixture that was there before.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.mixtures import base
from mixadv.mixtures.adapters import Adapter, is_peft
from mixadv.mixtures.members import Dropout, Member, Model, Weights
from mixadv.model.replay import evaluating

FORMAT = {"format": "mixadv.Mixture", "version": 1}
INDEX = "mixture.json"
MEMBERS = re.compile(r"members-[0-9a-f]{32}")


def write(folder: Path, members: Sequence[Member], probabilities: Tensor, model: nn.Module) -> None:
    """Write members of a model and their probabilities into a folder, made if it is not there."""
    tensors = _safetensors()
    kinds = [_described(member) for member in members]
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"members-{uuid.uuid4().hex}"
    own.mkdir()
    try:
        for number, member in enumerate(members):
            if (values := _values(member)) is not None:
                tensors.save_file(_apart(values), own / f"{number}.safetensors")
            elif isinstance(member, Adapter):
                peft: Any = model
                peft.save_pretrained(own / str(number), selected_adapters=[member.name])
        index = {
            **FORMAT,
            "folder": own.name,
            "members": kinds,
            "probabilities": probabilities.tolist(),
            "base": base.digests(model, members),
        }
        new = own / INDEX
        new.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(new, folder / INDEX)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise
    for old in folder.iterdir():
        if MEMBERS.fullmatch(old.name) and old != own:
            shutil.rmtree(old, ignore_errors=True)


def read(
    folder: Path,
    model: nn.Module | None,
    models: Sequence[nn.Module] | None,
    check_base: bool,
) -> tuple[list[Member], list[float], nn.Module | None]:
    """Return members and probabilities as they were written, and the model if they change it.

    Args:
        folder: that `write` wrote.
        model: the base, which gives the dtype and device of weights; copied for members that are
            whole models, unless there are `models`.
        models: for the members that are whole models, in their order; their weights are replaced.
        check_base: raise unless the base is the one that the members were saved with.
    """
    index = _index(folder)
    own, kinds = folder / index["folder"], index["members"]
    whole = [number for number, kind in enumerate(kinds) if kind["kind"] == "model"]
    if models is None and model is not None:
        models = [copy.deepcopy(model) for _ in whole]
    if model is None and len(whole) < len(kinds):
        raise ValueError(
            f"The members of {folder} change a model that is not saved with them: "
            "Mixture.from_pretrained(folder, model), with the one they were made of."
        )
    if models is None or len(models) != len(whole):
        raise ValueError(
            f"{folder} has {len(whole)} whole models, and {len(models or ())} were given to load "
            "them into: Mixture.from_pretrained(folder, models=[…]), one for each, or "
            "from_pretrained(folder, model), of which copies are made."
        )
    if check_base and model is not None:
        base.check(folder, index.get("base", {}), model)
    own_models = dict(zip(whole, models, strict=True))
    members: list[Member] = []
    for number, kind in enumerate(kinds):
        path = own / f"{number}.safetensors"
        if kind["kind"] == "dropout":
            members.append(Dropout(kind["seed"]))
        elif kind["kind"] == "model":
            members.append(_loaded(own_models[number], _read_tensors(path)))
        elif kind["kind"] == "adapter":
            name = _free(model, kind["name"])
            model = _with_adapter(model, own / str(number), name)
            members.append(Adapter(name))
        else:
            members.append(Weights(_placed(_read_tensors(path), model)))
    return members, index["probabilities"], None if len(whole) == len(kinds) else model


def _described(member: Member) -> dict[str, Any]:
    if isinstance(member, Dropout):
        return {"kind": "dropout", "seed": member.seed}
    if isinstance(member, Adapter):
        return {"kind": "adapter", "name": member.name}
    if isinstance(member, Model):
        return {"kind": "model"}
    if isinstance(member, Weights):
        return {"kind": "weights"}
    raise TypeError(
        f"A {type(member).__name__} is a member that only its own code can save: give its weights "
        "by name, Mixture([{name: tensor, …}, …], model=model)."
    )


def _values(member: Member) -> Mapping[str, Tensor] | None:
    if isinstance(member, Model):
        return member.module.state_dict()
    return member.values if isinstance(member, Weights) else None


def _apart(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as the format asks: tied weights are there twice."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in values.items()
    }


def _placed(values: dict[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Return tensors on the device of the model's."""
    assert model is not None
    first = next(iter(model.parameters()), None)
    return {n: v if first is None else v.to(first.device) for n, v in values.items()}


def _loaded(module: nn.Module, values: dict[str, Tensor]) -> Model:
    try:
        module.load_state_dict(values)
    except RuntimeError as error:
        raise ValueError(
            f"A member of the mixture is a model of another shape than the {type(module).__name__} "
            f"it is loaded into: give models=[…], one for each member. {error}"
        ) from error
    return Model(module)


def _free(model: Any, name: str) -> str:
    """Return the name of an adapter, changed where the model has one of this name.

    PEFT would write into that one, and keep the scale and the dropout that it has.
    """
    taken = model.peft_config if is_peft(model) else {}
    while name in taken:
        name += "_"
    return name


def _with_adapter(model: Any, folder: Path, name: str) -> nn.Module:
    """Return the model, wrapped by PEFT where it is not yet, with an adapter read from a folder."""
    found = sorted(folder.rglob("adapter_config.json"))
    if not found:
        raise FileNotFoundError(
            f"{folder} has no adapter, which {INDEX} names: the mixture was not copied whole."
        )
    if is_peft(model):
        with evaluating(model):  # it would stay in evaluation mode, here and below
            model.load_adapter(str(found[0].parent), name)
        return model
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"The mixture of {folder} has adapters: pip install peft.") from error
    known = set(model.modules())
    with evaluating(model):
        adapted = peft.PeftModel.from_pretrained(model, str(found[0].parent), name)
    for part in set(adapted.modules()) - known:
        part.training = model.training
    return adapted


def _index(folder: Path) -> dict[str, Any]:
    """Return what `mixture.json` says; raise unless `write` wrote it."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {INDEX}: give the folder that mixture.save_pretrained(folder) wrote."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Save the mixture again.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT["format"]:
        raise ValueError(f"{path} is not of mixture.save_pretrained: it names no {FORMAT}.")
    if index.get("version") != FORMAT["version"]:
        raise ValueError(
            f"{path} is of version {index.get('version')!r}, and this mixadv reads version "
            f"{FORMAT['version']}: save the mixture with this version, or install the other."
        )
    kinds: Any = index.get("members")
    shares: Any = index.get("probabilities")
    listed = isinstance(kinds, list) and isinstance(shares, list) and len(kinds) == len(shares)
    known = listed and all(map(_is_kind, kinds))
    numbers = listed and all(isinstance(share, (int, float)) for share in shares)
    named = MEMBERS.fullmatch(str(index.get("folder")))
    named = named and isinstance(index.get("base", {}), dict)  # which older ones do not have
    if not (known and numbers and named):
        raise ValueError(
            f"{path} does not describe a mixture: it needs a folder, and as many probabilities as "
            "members of a known kind. Save the mixture again."
        )
    return index


def _is_kind(kind: Any) -> bool:
    if not isinstance(kind, dict):
        return False
    seed, name = kind.get("seed"), kind.get("name")
    match kind.get("kind"):
        case "weights" | "model":
            return True
        case "dropout":
            return isinstance(seed, int) and not isinstance(seed, bool)
        case "adapter":
            return isinstance(name, str)
    return False


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, which {INDEX} names: the mixture was not copied whole."
        )
    try:
        return tensors.load_file(path)
    except Exception as error:  # SafetensorError, a plain Exception
        raise ValueError(
            f"{path} is no safetensors file, or was cut short ({error}): copy the mixture anew."
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Mixtures are saved and loaded by safetensors: pip install 'mixadv[transformers]'."
        ) from error
    return safetensors.torch
