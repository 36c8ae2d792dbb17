"""A study from its TOML file."""

import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from common.parameters import known
from studying.parts import SETTINGS, Measures, Method, Subject
from studying.plan import Study


def read(path: Path) -> Study:
    """Return the study of a TOML file.

    Raises:
        ValueError: if it cannot be read, or says what is not known.
    """
    if not path.is_file():
        raise ValueError(f"There is no study {path}.")
    try:
        tables = tomllib.loads(path.read_text())
        methods = {n: _build(Method, of) for n, of in _table("methods", tables["methods"]).items()}
        tasks = {name: _subject(of) for name, of in _table("tasks", tables["tasks"]).items()}
        measure = _build(Measures, tables.get("measure", {}))
        parts = {"methods": methods, "tasks": tasks, "measure": measure}
        return _build(Study, tables | parts)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table, got {value!r}.")
    return value


def _subject(table: Any) -> Subject:
    table = _table("a subject", table)
    settings = {name: table[name] for name in SETTINGS if name in table}
    if not isinstance(settings.get("train", []), list):
        raise ValueError(f"train must be a list, got {settings['train']!r}.")
    others = {name: value for name, value in table.items() if name not in SETTINGS}
    _only(table, _names(Subject) - {"settings"} | {*SETTINGS}, "subject")
    return _build(Subject, others | {"settings": _tuples(settings)})


def _build(kind: type[Any], table: Any) -> Any:
    where = kind.__name__.lower()
    _only(_table(f"a {where}", table), _names(kind), where)
    for f in fields(kind):
        needed = f.default is MISSING and f.default_factory is MISSING
        if needed and f.name not in table:
            raise ValueError(f"a {where} has no {f.name}.")
        if str(f.type).startswith("tuple") and not isinstance(table.get(f.name, []), list):
            raise ValueError(f"{f.name} must be a list, got {table[f.name]!r}.")
    return kind(**_tuples(table))


def _names(kind: type[Any]) -> set[str]:
    return {f.name for f in fields(kind)}


def _only(table: dict[str, Any], names: set[str], where: str) -> None:
    for name in table:
        known(f"of a {where}:", name, sorted(names))


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
