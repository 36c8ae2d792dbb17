"""A study from its TOML file, and the manual of its keys."""

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mixadv.errors import nearest
from studying.parts import Measures, Method, Shifted, Subject
from studying.plan import Study

TABLES = {
    "": Study,
    "methods.NAME": Method,
    "tasks.NAME": Subject,
    "tasks.NAME.shifted.SET": Shifted,
    "measure": Measures,
}
"""The tables of a file, and what checks them."""
WORDS = {"tuple_type": "a list", "dataclass_type": "a table", "dict_type": "a table"}


def read(path: Path) -> Study:
    """Return the study of a TOML file.

    Raises:
        ValueError: if it cannot be read, or says what is not known.
    """
    try:
        return TypeAdapter(Study).validate_python(tomllib.loads(path.read_text()))
    except ValidationError as error:
        raise ValueError(f"{path}: {' '.join(map(_said, error.errors()))}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _said(mistake: Any) -> str:
    """Return what is wrong, and what to write."""
    *above, key = map(str, mistake["loc"] or ("study",))
    where, kind = ".".join([*above, key]), mistake["type"]
    if kind == "missing":
        return f"{where} is missing, {_fields(above)[key].description}."
    if kind == "unexpected_keyword_argument":
        names = _fields(above)
        near = nearest(key, names)
        return f"{where}: there is none of this name.{near} There are {', '.join(names)}."
    if kind == "too_short":
        return f"{where} is empty: give at least one."
    if kind == "value_error":
        return f"{where}: {mistake['ctx']['error']}"
    expected = WORDS.get(kind) or mistake["msg"].removeprefix("Input should be ")
    return f"{where} must be {expected}, got {mistake['input']!r}."


def _fields(table: list[str]) -> dict[str, Any]:
    """Return the fields of a table in a file."""
    given = ["NAME" if i == 1 else "SET" if i == 3 else key for i, key in enumerate(table)]
    return TABLES[".".join(given)].__pydantic_fields__


def keys() -> str:
    """Return the manual of a study's tables, their keys and defaults."""
    lines = ["keys of STUDY, of those that can be left out with their defaults:"]
    for table in TABLES:
        lines += [f"\n  [{table}]"] if table else []
        for key, about in _fields(table.split(".") if table else []).items():
            default = about.get_default(call_default_factory=True)
            value = "" if about.is_required() else f" = {json.dumps(default, default=lambda _: {})}"
            lines.append(f"  {key + value:24} {about.description}")
    return "\n".join(lines)
