"""What users meet of solvers: their parameters, their text, the names of the package."""

import contextlib
import inspect
import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest

import mixadv


def test_a_solver_shows_what_differs_from_its_defaults():
    assert repr(mixadv.FreeLB()) == "FreeLB()"
    assert repr(mixadv.MAT(particles=4)) == "MAT(particles=4)"
    assert repr(mixadv.Ascent(steps=2, norm="linf")) == "Ascent(steps=2, norm='linf')"


@pytest.mark.parametrize("name", mixadv.solvers.base.WORDS)
def test_words_of_others_are_answered_with_ours(name: str):
    ours = mixadv.solvers.base.WORDS[name]
    solvers = {n: s for n, s in mixadv.SOLVERS.items() if ours in s.__dataclass_fields__}
    solver = "pgd" if "pgd" in solvers else next(iter(solvers))
    with pytest.raises(ValueError, match=rf"no hyper-parameter '{name}'. Here it is '{ours}'\."):
        mixadv.make_solver(solver, **{name: 1})


def test_nothing_is_loaded_before_it_is_asked_for():
    program = (
        "import sys, mixadv\n"
        "assert [n for n in sys.modules if n.startswith('mixadv')] == ['mixadv']\n"
        "assert 'torch' not in sys.modules\n"
        "later = ('games', 'tokens', 'robustness', 'equilibrium', 'integrations')\n"
        "assert {*later, 'game', *mixadv.__all__} <= {*dir(mixadv)}\n"
        "mixadv.wrap\n"
        "assert not [n for n in later if f'mixadv.{n}' in sys.modules]\n"
        "mixadv.games.solve\n"
        "assert mixadv.__dict__['wrap'] is mixadv.wrap\n"
        "assert not hasattr(mixadv, 'game_theory')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


ONE = {"particles", "direction", "sign"}  # of solvers that play one point, found by its gradient
FIXED = {
    "noise": {*ONE, "steps"},
    "fgm": {*ONE, "steps"},
    "pgd": {"particles"},
    "freeat": ONE,
    "freelb": ONE,
    "textat": {*ONE, "projection", "box"},
    "creat": ONE,
    "cat": {*ONE, "steps", "start"},
    "vat": {"particles"},
    "r3f": {*ONE, "steps"},
    "alum": {"particles"},
    "smart": {"particles"},
    "trades": {"particles"},
    "mart": ONE,
    "mat": set(),
    **dict.fromkeys(("sam", "asam", "awp"), {f.name for f in fields(mixadv.Solver)} - {"radius"}),
    "group_dro": ONE,
    "cvar": ONE,
    "chi_square": ONE,
}


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_what_a_solver_fixes_is_not_in_its_signature(name: str):
    solver = mixadv.SOLVERS[name]
    taken = {f.name for f in fields(solver) if f.init}
    assert {*inspect.signature(solver).parameters} == taken
    assert {f.name for f in fields(solver)} - taken == FIXED[name]


ASCENT = {
    "steps": [0, 2, 3],
    "step_size": [0.3],
    "radius": [0.3, None],
    "norm": ["l1", "linf"],
    "per": ["token"],
    "normalize": ["norm", "none"],
    "projection": ["ball", "sphere"],
    "start": ["zero", "uniform", "normal"],
    "start_size": [0.1],
    "temperature": [0.1],
    "particles": [2, 3],
    "unit": ["absolute"],
    "direction": ["gauss_newton"],
    "sign": ["boundary"],
    "fresh_dropout": [True],
    "particle_batching": ["vmap"],
}


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_no_parameter_is_taken_that_is_always_refused(name: str):
    solver = mixadv.SOLVERS[name]
    easy = {"cat": {"shared": False}, "pgd": {"payoff": "kl", "start": "normal"}}
    easy = easy.get(name, {"particles": 1} if name == "mat" else {})
    for parameter in ASCENT.keys() & inspect.signature(solver).parameters.keys():
        default, taken = getattr(solver(), parameter), 0
        for value in ASCENT[parameter]:
            with contextlib.suppress(ValueError):
                solver(**{**easy, parameter: value})
                taken += value != default
        assert taken, f"{name} takes {parameter}, and no value but the default"


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_help_says_what_it_does_the_formula_an_example_and_every_parameter(name: str):
    solver = mixadv.SOLVERS[name]
    own = inspect.getsource(solver).partition('"""')[2].splitlines()[0]
    text = inspect.getdoc(solver)
    order = [text.find(part) for part in (own, "\n\n    ", "Example:", "Attributes:")]
    assert order == sorted(order)
    assert order[0] == 0
    for taken in fields(solver):
        if taken.init:
            assert f"    {taken.name} (default {taken.default!r}):\n        " in text
    assert "see above" not in text


def test_help_of_a_solver_of_ones_own():
    @dataclass(frozen=True, kw_only=True)
    class Own(mixadv.Solver):
        """Plays its own game.

        Attributes:
            share: of the loss, between 0
                and 1.
        """

        share: float = 0.5
        steps: int = field(default=1, init=False)

        def play(self, stage):
            """Play nothing."""

    text = inspect.getdoc(Own)
    assert text.startswith("Plays its own game.\n")
    assert (
        "    share (default 0.5):\n        of the loss, between 0\n        and 1.\n" in text + "\n"
    )
    assert "radius (default 0.2):" in text
    assert "steps (" not in text
    assert "Example" not in text
