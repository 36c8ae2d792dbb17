"""Names and values from the command line: solvers, and their hyper-parameters.

What takes seconds to import is imported where it is needed: a wrong name is answered before.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.results import PLAIN

if TYPE_CHECKING:
    import mixadv


def _written(pattern: str) -> list[str]:
    """Return what stands in the files of solvers, in that order, without importing them."""
    package = importlib.util.find_spec("mixadv")
    assert package is not None
    assert package.origin is not None
    files = sorted(Path(package.origin).parent.glob("solvers/*.py"))
    texts = (path.read_text(encoding="utf-8") for path in files)
    return [found for text in texts for found in re.findall(pattern, text)]


_NAMED = r'name: ClassVar\[str\] = "(\w+)"'
SOLVERS = [name for name in _written(_NAMED) if name != PLAIN]
"""The names in `mixadv.SOLVERS`, which takes seconds to import; a test compares them."""
REPLAYING = _written(_NAMED + r"(?=(?:.*\n){1,9}?.*replays_batch: ClassVar\[bool\] = True)")
"""Solvers that step several times on a batch."""


def known(option: str, name: str, names: Iterable[str], besides: str = "") -> None:
    """Raise unless the name is one of those known."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{option} {name}: there is none of this name.{meant} "
            f"There are {', '.join(names)}{besides}."
        )


def check_solver(name: str, of_trainer: bool = False) -> None:
    """Raise unless there is a solver of this name, and Trainer can play it where it is to."""
    known("--solver", name, [PLAIN, *SOLVERS])
    if of_trainer and name in REPLAYING:
        raise ValueError(
            f"--solver {name} steps several times on a batch; Trainer steps once: choose another "
            "solver, such as freelb."
        )


def parameters(
    solvers: list[str], settings: list[str], config: Path | None
) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters that the command line gives each solver; `check` checks them.

    Args:
        solvers: their names.
        settings: NAME=VALUE for all, SOLVER.NAME=VALUE for one; values are read as JSON.
        config: a file with a table for each solver; `settings` go before it.
    """
    for solver in solvers:
        check_solver(solver)
    tables = _tables(config) if config else {}
    chosen = {solver: dict(tables.get(solver, {})) for solver in solvers}
    for setting in settings:
        name, equals, value = setting.partition("=")
        owner, dot, rest = name.rpartition(".")
        if not equals:
            raise ValueError(f"--set {setting}: write NAME=VALUE or SOLVER.NAME=VALUE.")
        if dot:
            known(f"--set {setting}:", owner, SOLVERS)
        elif set(solvers) == {PLAIN}:
            raise ValueError(f"--set {setting}: plain has no parameters. Choose a --solver.")
        for solver in [owner] if dot else solvers:
            if solver not in chosen:
                raise ValueError(f"--set {setting}: {solver} is not among --solver.")
            if solver != PLAIN:
                chosen[solver][rest] = _value(value)
    return chosen


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of a file of hyper-parameters, each of a solver."""
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        text = path.read_text()
        read = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    for name, table in (read if isinstance(read, dict) else {"it": read}).items():
        if not isinstance(table, dict):
            raise ValueError(
                f"--config {path}: {name} is {table!r}, not a table: write one of parameters for "
                "each solver."
            )
        known(f"--config {path}:", name, SOLVERS)
    return read


def check(chosen: dict[str, dict[str, Any]], config: Path | None, evaluate: str) -> None:
    """Raise unless solvers take their parameters, and keep the weights that are evaluated.

    Args:
        chosen: parameters by solver.
        config: the file that some are of: all its tables are checked.
        evaluate: which weights: "last", "mean" or "mixture".
    """
    for solver, given in (_tables(config) if config else {}).items():
        build(solver, given, f"--config {config}")
    for solver, given in chosen.items():
        built = build(solver, given)
        if evaluate != "last":
            _check_evaluation(solver, built, evaluate)


def build(solver: str, given: dict[str, Any], where: str = "--set") -> mixadv.Solver | None:
    """Return a solver with its parameters, which come from `where`; None for plain training."""
    if solver == PLAIN:
        return None
    import mixadv

    try:
        return mixadv.make_solver(solver, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_evaluation(solver: str, built: mixadv.Solver | None, evaluate: str) -> None:
    """Raise unless the solver keeps the weights that are to be evaluated."""
    learner = built.learner() if built else None
    if evaluate == "mean" and (learner is None or learner.average_decay is None):
        raise ValueError(f"--evaluate mean: {solver} keeps no mean of the weights. Choose last.")
    if evaluate == "mixture" and (learner is None or not learner.keeps_samples):
        how = f"Add --set {solver}.samples=8" if learner is not None else "Choose last"
        raise ValueError(f"--evaluate mixture: {solver} keeps no samples of the weights. {how}.")
