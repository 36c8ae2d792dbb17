"""What an evaluation has found so far, kept in a folder so that a killed one goes on."""

from __future__ import annotations

import copyreg
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

FORMAT = 3  # of the files; a change in what sections hold makes the old ones unknown
SAVED = ("_name_or_path", "transformers_version", "architectures", "dtype")
"""What a configuration says of where it was saved; the tensors have a dtype of their own."""


class Kept:
    """Finished parts by name and key, as JSON files; without a folder nothing is kept.

    A file is written whole or not at all. What is found is returned as it will be read, so that a
    resumed evaluation has the numbers of an uninterrupted one. A file of the folder that is not
    what was written there is a ValueError.

    Args:
        folder: made when the first part is finished.
        key: what all parts depend on, any objects that `digest` knows.
        progress: show bars in a terminal.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any], progress: bool = True) -> None:
        if folder is not None and not folder.is_dir():
            if folder.exists():
                raise NotADirectoryError(f"folder is {folder}, a file: name a folder, or none.")
            parent = next(above for above in folder.absolute().parents if above.exists())
            if not os.access(parent, os.W_OK):
                raise PermissionError(f"folder is {folder}, and {parent} cannot be written in.")
        self.folder = folder
        self.key = "" if folder is None else digest([FORMAT, key])
        self.progress = progress

    def once(self, name: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Return a part, computed unless it is kept."""
        path, whole = self._path(name, key)
        found = self._read(path, whole)
        return self._write(path, whole, compute()) if found is None else found

    def rows(
        self,
        name: str,
        key: Mapping[str, Any],
        count: int,
        compute: Callable[[slice], Iterable[Any]],
        step: int,
    ) -> list[Any]:
        """Return one record for each of `count` rows, computed and kept `step` at a time."""
        path, whole = self._path(name, key)
        found = self._read(path, whole) or []
        hidden = None if self.progress else True  # None: hidden where there is no terminal
        with tqdm(total=count, initial=len(found), desc=name, unit="row", disable=hidden) as bar:
            while len(found) < count:
                part = slice(len(found), min(len(found) + step, count))
                found = self._write(path, whole, [*found, *compute(part)])
                bar.update(part.stop - part.start)
        return found

    def _path(self, name: str, key: Mapping[str, Any]) -> tuple[Path | None, str]:
        if self.folder is None:
            return None, ""
        whole = digest([self.key, name, key])
        return self.folder / (re.sub(r"[^\w.-]+", "-", name) + f"-{whole[:12]}.json"), whole

    def _read(self, path: Path | None, key: str) -> Any:
        if path is None or not path.exists():
            return None
        try:
            kept = json.loads(path.read_text("utf-8"))
            if kept["key"] != key:
                raise ValueError("it is of another evaluation")
            return kept["found"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not what an evaluation wrote there ({error}): remove it, and that part "
                "is computed again."
            ) from None

    def _write(self, path: Path | None, key: str, found: Any) -> Any:
        found = as_json(found)
        if path is not None:
            write(path, json.dumps({"key": key, "found": found}, allow_nan=False))
        return found


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def as_json(value: Any) -> Any:
    """Return the value as JSON has it: lists, numbers that are finite or None, keys as strings.

    Example:
        >>> as_json({1: (np.float64(0.5), math.nan)})
        {'1': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def digest(value: Any) -> str:
    """Return a name that is the same for values that do the same, in another process too.

    Modules count by type, state and config, tokenizers by what they write, functions by their code
    and what they enclose, classes by name, other objects by what a pickle would restore them from.

    Raises:
        TypeError: for an object that does not say what it is made of, such as an open file.
    """
    known = hashlib.sha256()
    _add(value, known.update, {})
    return known.hexdigest()


def _add(value: Any, add: Callable[[bytes], object], seen: dict[int, Any]) -> None:
    """Feed a hash; `seen` holds the objects on the way, so that a cycle ends."""
    add(f"<{_name(type(value))}>".encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        raw = value if isinstance(value, bytes) else repr(value).encode()
        add(b"%d:%b" % (len(raw), raw))
        return
    if id(value) in seen:
        add(str(list(seen).index(id(value))).encode())
        return
    seen[id(value)] = value
    for part in _parts(value):
        _add(part, add, seen)
    del seen[id(value)]
    add(b"</>")


def _parts(value: Any) -> Iterable[Any]:
    """Return what an object is made of."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return [str(value.dtype), list(value.shape), raw.numpy().tobytes()]
    if isinstance(value, nn.Module):
        config: Any = getattr(value, "config", None)  # whatever folder and version it is saved by
        if hasattr(config, "to_dict"):
            config = {k: v for k, v in config.to_dict().items() if k not in SAVED}
        return [[type(part) for part in value.modules()], dict(value.state_dict()), config]
    if hasattr(value, "get_vocab"):
        return [_tokenizer(value)]
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, AbstractSet):
        return sorted(digest(part) for part in value)  # whose order differs between processes
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, type):
        return [_name(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    try:
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
        reduce = copyreg.dispatch_table.get(type(value))
        made = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception as error:
        raise TypeError(
            f"{value!r:.80} cannot be told apart from others of its kind ({error}), so that what "
            "is measured with it cannot be kept: leave folder out."
        ) from error
    if isinstance(made, str):  # the name of something global
        return [getattr(value, "__module__", None), made, getattr(value, "__wrapped__", None)]
    return [list(part) if isinstance(part, Iterator) else part for part in made]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _tokenizer(tokenizer: Any) -> Any:
    """Return what a tokenizer does, without the padding and cutting of its last call."""
    sides = [getattr(tokenizer, f"{what}_side", None) for what in ("padding", "truncation")]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [sides, dict(sorted(tokenizer.get_vocab().items()))]
    kept = json.loads(backend.to_str())
    return [sides, {k: v for k, v in kept.items() if k not in ("padding", "truncation")}]
