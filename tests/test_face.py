"""What users meet of solvers: their parameters, their text, the names of the package."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

import mixadv


def test_a_solver_shows_what_differs_from_its_defaults():
    assert repr(mixadv.FreeLB()) == "FreeLB()"
    assert repr(mixadv.MAT(particles=4)) == "MAT(particles=4)"
    assert repr(mixadv.Ascent(steps=2, norm="linf")) == "Ascent(steps=2, norm='linf')"


@pytest.mark.parametrize("name", mixadv.solvers.WORDS)
def test_words_of_others_are_answered_with_ours(name: str):
    ours = mixadv.solvers.WORDS[name]
    solvers = {n: s for n, s in mixadv.SOLVERS.items() if ours in s.__dataclass_fields__}
    solver = "pgd" if "pgd" in solvers else next(iter(solvers))
    with pytest.raises(ValueError, match=rf"no hyper-parameter '{name}'. Here it is '{ours}'\."):
        mixadv.make_solver(solver, **{name: 1})


def test_subpackages_are_named_and_loaded_when_they_are_asked_for():
    program = (
        "import sys, mixadv\n"
        "later = ('games', 'tokens', 'robustness', 'equilibrium', 'integrations')\n"
        "assert not [n for n in later if f'mixadv.{n}' in sys.modules]\n"
        "assert {*later, *mixadv.__all__} <= {*dir(mixadv)}\n"
        "mixadv.games.solve\n"
        "assert not hasattr(mixadv, 'game_theory')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


FIXED = {
    "noise": {"steps"},
    "fgm": {"steps"},
    "r3f": {"steps"},
    "cat": {"steps", "start"},
    "textat": {"projection"},
}


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_what_a_solver_fixes_is_not_in_its_signature(name: str):
    solver = mixadv.SOLVERS[name]
    taken = {f.name for f in fields(solver) if f.init}
    assert {*inspect.signature(solver).parameters} == taken
    assert {f.name for f in fields(solver)} - taken == FIXED.get(name, set())
