"""Names and values from the command line: solvers, and their hyper-parameters.

What takes seconds to import is imported where it is needed: a wrong name is answered before.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.results import PLAIN

if TYPE_CHECKING:
    import mixadv


def known(option: str, name: str, names: Iterable[str], besides: str = "") -> None:
    """Raise unless the name is one of those known."""
    names = list(names)
    if name not in names:
        from mixadv.errors import nearest

        raise ValueError(
            f"{option} {name}: there is none of this name.{nearest(name, names)} "
            f"There are {', '.join(names)}{besides}."
        )


def parameters(
    solvers: list[str], settings: list[str], config: Path | None
) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters that the command line gives each solver, checked.

    Args:
        solvers: their names.
        settings: NAME=VALUE for all, SOLVER.NAME=VALUE for one; values are read as JSON.
        config: a file with a table for each solver; `settings` go before it.
    """
    import mixadv

    for solver in solvers:
        known("--solver", solver, [PLAIN, *mixadv.SOLVERS])
    tables = _tables(config) if config else {}
    chosen = {solver: dict(tables.get(solver, {})) for solver in solvers}
    for setting in settings:
        name, equals, value = setting.partition("=")
        owner, dot, rest = name.rpartition(".")
        if not equals:
            raise ValueError(f"--set {setting}: write NAME=VALUE or SOLVER.NAME=VALUE.")
        if dot:
            known(f"--set {setting}:", owner, mixadv.SOLVERS)
        elif set(solvers) == {PLAIN}:
            raise ValueError(f"--set {setting}: plain has no parameters. Choose a --solver.")
        for solver in [owner] if dot else solvers:
            if solver not in chosen:
                raise ValueError(f"--set {setting}: {solver} is not among --solver.")
            if solver != PLAIN:
                chosen[solver][rest] = _value(value)
    for solver, given in chosen.items():
        _build(solver, given, "--set")
    return chosen


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of a file of hyper-parameters, checked."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    import mixadv

    kind = TypeAdapter(dict[str, dict[str, Any]], config=ConfigDict(strict=True))
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        text = path.read_text()
        read = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    try:
        tables = kind.validate_python(read)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "it"
        raise ValueError(
            f"--config {path}: {where} is {found['input']!r}, not a table: write one of "
            "parameters for each solver."
        ) from error
    for solver, table in tables.items():
        known(f"--config {path}:", solver, mixadv.SOLVERS)
        _build(solver, table, f"--config {path}")
    return tables


def _build(solver: str, given: dict[str, Any], where: str) -> mixadv.Solver | None:
    if solver == PLAIN:
        return None
    import mixadv

    try:
        return mixadv.make_solver(solver, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_evaluation(solver: str, given: dict[str, Any], evaluate: str) -> None:
    """Raise unless the solver keeps the weights that are to be evaluated."""
    if evaluate == "last":
        return
    built = _build(solver, given, "--set")
    learner = built.learner() if built else None
    if evaluate == "mean" and (learner is None or learner.average_decay is None):
        raise ValueError(f"--evaluate mean: {solver} keeps no mean of the weights. Choose last.")
    if evaluate == "mixture" and (learner is None or not learner.keeps_samples):
        how = f"Add --set {solver}.samples=8" if learner is not None else "Choose last"
        raise ValueError(f"--evaluate mixture: {solver} keeps no samples of the weights. {how}.")
