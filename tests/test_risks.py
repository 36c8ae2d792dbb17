"""Each risk of tests/README.md has a test, and the matrix in docs/ is the one that was written."""

import ast
import importlib
import pkgutil
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mixadv
from tests import matrix

TESTS = Path(__file__).parent
RISKS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (TESTS / "README.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| risk")
]


@cache
def defined(file: str) -> set[str]:
    """Return the names of the functions at the top of a test file."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("risk", RISKS, ids=[risk[0].partition(",")[0][:40] for risk in RISKS])
def test_every_risk_has_tests_that_exist(risk: list[str]):
    words, here, tests = risk
    assert words
    assert here
    named = re.findall(r"`([^`]+)`", tests)
    assert named
    for test in named:
        file, name = test.split("::")
        assert name in defined(file), test


# The matrix ------------------------------------------------------------------------------------


def test_readme_has_the_matrix_as_it_was_written():
    assert matrix.MARKED.findall(matrix.PAGE.read_text()) == [matrix.TABLE.read_text()]


def test_no_cell_of_the_matrix_is_silent():
    lines = matrix.TABLE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    header, _, *body = rows
    assert header == ["", *mixadv.SOLVERS]
    assert [row[0] for row in body] == list(matrix.WAYS)
    reasons = {line.partition(".")[0] for line in lines if re.match(r"\d+\. \S", line)}
    said = [cell for row in body for cell in row[1:]]
    assert all(re.fullmatch(r"✔|[✔–]\d+", cell) for cell in said)
    assert {cell[1:] for cell in said} == {"", *reasons}
    assert len(said) == len(matrix.WAYS) * len(mixadv.SOLVERS)


@pytest.mark.parametrize("way", matrix.WAYS)
def test_every_way_of_the_matrix_has_a_test_of_every_solver(way: str):
    for pattern in matrix.WAYS[way]:
        function, _, parameters = pattern.partition("[")
        assert "{solver}" in parameters
        file, name = function.split("::")
        assert name in defined(file), function
        module = importlib.import_module(f"tests.{file.removesuffix('.py')}")
        values = parametrized(module, getattr(module, name))
        tried = {str(getattr(v, "name", v)).rpartition(": ")[2] for v in values}
        assert tried >= set(mixadv.SOLVERS)


def parametrized(module, function) -> list:
    """Return all values that a test's arguments take, by its marks or by fixtures beside it."""
    values = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            for value in mark.args[1]:  # a bare one, one for each argument, or either with marks
                bare = value.values if isinstance(value, type(pytest.param())) else value
                values += bare if isinstance(bare, tuple) else (bare,)
    fixture = getattr(module, "solver", None)
    marker = getattr(fixture, "_fixture_function_marker", None)
    return [*values, *(marker.params or [] if marker is not None else [])]


# The package -----------------------------------------------------------------------------------


def test_every_requirement_is_one():
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        parsed = Requirement(requirement)
        assert parsed.specifier or parsed.name == project["name"], requirement


def test_every_public_name_exists():
    for found in pkgutil.walk_packages(mixadv.__path__, "mixadv."):
        if "integrations" in found.name:
            continue  # which need their frameworks
        module = importlib.import_module(found.name)
        names = getattr(module, "__all__", [])
        assert len(set(names)) == len(names)
        assert all(hasattr(module, name) for name in names), found.name
