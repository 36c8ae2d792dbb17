"""Every statement leads to code and to tests, and the bounds are what they say they are."""

import ast
import importlib
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from theory import bounds, oracles

seeds = st.integers(0, 2**32 - 1)

ROOT = Path(__file__).parent.parent
FIELDS = ("Assumes", "Claim", "Proof", "Source", "Code", "Tests")
REQUIRED = {
    *(f"H{k}" for k in range(1, 8)),
    *("O2", "P1", "R1", "R2", "C1", "C3", "C4", "G1", "G2"),
    *(f"E{k}" for k in range(1, 7)),
    *("F6", "M1", "M2", "M3", "L1", "L2", "S1", "D1", "D2", "W1", "B1", "T1", "T2"),
}


def statements():
    """Each statement's number, with the text of each of its fields."""
    _, *sections = re.split(
        r"^## (\w+) · .*$", (ROOT / "theory/statements.md").read_text(), flags=re.M
    )
    found = {}
    for number, body in zip(sections[::2], sections[1::2], strict=True):
        _, *fields = re.split(r"^\*\*(\w+)\.\*\*", body, flags=re.M)
        found[number] = dict(zip(fields[::2], map(str.strip, fields[1::2]), strict=True))
    return found


STATEMENTS = statements()
every_statement = pytest.mark.parametrize("number", STATEMENTS)


def names(text):
    return re.findall(r"`([^`]+)`", text)


def test_no_statement_is_missing():
    assert set(STATEMENTS) == REQUIRED


@every_statement
def test_statement_has_every_field(number):
    assert tuple(STATEMENTS[number]) == FIELDS
    assert all(STATEMENTS[number].values())


@every_statement
def test_code_of_a_statement_can_be_imported(number):
    paths = names(STATEMENTS[number]["Code"])
    assert paths
    for path in paths:
        module, name = path.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name)), path


@every_statement
def test_tests_of_a_statement_exist(number):
    tests = names(STATEMENTS[number]["Tests"])
    assert tests
    for test in tests:
        file, name = test.split("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


BOUNDS = [name for name, _ in inspect.getmembers(bounds, inspect.isfunction) if name[0] != "_"]


@pytest.mark.parametrize("function", BOUNDS)
def test_every_bound_has_a_statement_that_it_names_and_a_test(function):
    using = [n for n, f in STATEMENTS.items() if f"theory.bounds.{function}" in names(f["Code"])]
    assert using
    named = getattr(bounds, function).__doc__.partition(":")[0].split(", ")
    assert sorted(named) == sorted(using)
    files = *(ROOT / "tests").glob("test_*.py"), ROOT / "theory/worst.py"  # which a test runs
    sources = [path.read_text() for path in files]
    assert any(f"bounds.{function}(" in source for source in sources)


@given(seeds, st.integers(2, 50), st.integers(2, 50), st.integers(1, 10_000))
def test_step_sizes_of_hedge_make_its_bound_smallest(seed, m, n, steps):
    range_, factor = 1.7, np.random.default_rng(seed).uniform(0.5, 2, 2)
    single, pair = bounds.hedge_step(range_, m, n, steps), bounds.hedge_steps(range_, m, n, steps)
    best = bounds.hedge_optimal_step(range_, m, n, steps)
    both = bounds.hedge_optimal_steps(range_, m, n, steps)
    assert bounds.hedge(range_, m, n, steps, single) == pytest.approx(best)
    assert bounds.hedge(range_, m, n, steps, pair) == pytest.approx(both)
    assert bounds.hedge(range_, m, n, steps, single * factor[0]) >= best
    moved = pair[0] * factor[0], pair[1] * factor[1]
    assert both <= bounds.hedge(range_, m, n, steps, moved)
    assert both <= best * (1 + 1e-12) <= bounds.anytime_hedge(range_, m, n, steps)
    assert bounds.measure_hedge(math.log(m * n), range_, steps, single) == pytest.approx(best)


@given(st.floats(0.01, 100), st.integers(2, 40), st.integers(2, 40), st.integers(50, 100_000))
def test_temperature_of_magnetic_descent_makes_its_bound_smallest(range_, m, n, steps):
    def bound(log_tau):
        tau = range_ * math.exp(log_tau)
        return bounds.magnetic(range_, m, n, steps, tau, bounds.magnetic_step(range_, tau))

    grid = np.linspace(-8, 1, 200)
    start = grid[np.argmin([bound(z) for z in grid])]
    best = minimize_scalar(bound, bounds=(start - 0.1, start + 0.1), method="bounded").fun
    found = bounds.magnetic_temperature(range_, m, n, steps)
    assert bound(math.log(found / range_)) == pytest.approx(best, rel=1e-5)


@given(st.integers(1, 4), st.just(0.0) | st.floats(0.01, 100), st.floats(1e-4, 10))
def test_smoothed_comparator_costs_the_minimum_over_its_width(dimension, lipschitz, weight):
    width = np.geomspace(1e-8, 1, 20_001)
    slope = lipschitz * bounds.CUBE * math.sqrt(dimension)
    cost = weight * dimension * np.log(1 / width) + slope * width
    found = bounds.smoothing(dimension, lipschitz, weight, bounds.CUBE)
    assert found <= cost.min() + 1e-12
    assert found == pytest.approx(cost.min(), rel=1e-5)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_a_smoothed_comparator_is_no_further_away_than_its_reach(dimension):
    """Uniform on [0, 1]^d: mean distance from a corner, and from the centre on a torus."""
    points = np.random.default_rng(0).random((100_000, dimension))
    for reach, origin in ((bounds.CUBE, 0.0), (bounds.TORUS, 0.5)):
        distance = np.linalg.norm(points - origin, axis=1)
        squared = (distance**2).mean()
        assert distance.mean() <= reach * math.sqrt(dimension)
        assert squared == pytest.approx(reach**2 * dimension, rel=0.02)


@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_mixtures_of_classifiers_lower_the_robust_risk_at_most_by_their_number(
    seed, classifiers, samples, perturbations
):
    """Each column is one choice of a perturbation for every sample."""
    losses = np.random.default_rng(seed).exponential(size=(classifiers, samples, perturbations))
    losses *= losses > 0.5
    choices = np.stack(np.meshgrid(*[range(perturbations)] * samples, indexing="ij")).reshape(
        samples, -1
    )
    payoff = losses[:, np.arange(samples)[:, None], choices].mean(1)
    pure = losses.max(-1).mean(-1).min()
    found = oracles.equilibrium(payoff)
    assert bounds.mixed_risk(pure, classifiers) - 1e-9 <= found.value <= pure + 1e-9
    mixed = np.einsum("k,ksd->sd", found.x, losses).max(-1).mean()
    assert mixed == pytest.approx(found.value, abs=1e-9)


def test_a_pure_coin_may_lose_what_a_mixed_one_keeps():
    pennies = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert pennies.min(0).max() == -1.0
    found = oracles.equilibrium(pennies)
    np.testing.assert_allclose([found.value, *found.x, *found.y], [0, 0.5, 0.5, 0.5, 0.5])


def test_thresholds_attain_both_ends_of_what_mixing_can_gain():
    for classifiers in range(1, 6):
        payoff, expected = oracles.thresholds(classifiers)
        assert payoff.max(1).min() == 1.0
        assert expected.value == bounds.mixed_risk(1.0, classifiers)
        assert oracles.equilibrium(payoff).value == pytest.approx(expected.value)
