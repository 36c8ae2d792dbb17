"""A study from its TOML file."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from studying.plan import SETTINGS, Measures, Method, Study, Subject
from training.parameters import known


def read(path: Path) -> Study:
    """Return the study of a TOML file.

    Raises:
        ValueError: if it cannot be read, or says what is not known.
    """
    if not path.is_file():
        raise ValueError(f"There is no study {path}.")
    try:
        tables = tomllib.loads(path.read_text())
        _only(tables, {f.name for f in fields(Study)}, "study")
        methods = {name: _build(Method, table) for name, table in tables.pop("methods").items()}
        tasks = {name: _subject(table) for name, table in tables.pop("tasks").items()}
        measure = _build(Measures, tables.pop("measure", {}))
        return Study(methods, tasks, measure=measure, **_tuples(tables))
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _subject(table: dict[str, Any]) -> Subject:
    settings = {name: table.pop(name) for name in SETTINGS if name in table}
    return _build(Subject, table | {"settings": _tuples(settings)})


def _build(kind: type[Any], table: dict[str, Any]) -> Any:
    _only(table, {f.name for f in fields(kind)}, kind.__name__.lower())
    return kind(**_tuples(table))


def _only(table: dict[str, Any], names: set[str], where: str) -> None:
    for name in table:
        known(f"of a {where}:", name, sorted(names))


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
