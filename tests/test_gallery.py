"""The gallery: short programs that run, print what the site shows, and are all on it."""

import re
import warnings

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.gallery import PROGRAMS, alike, output_of, printed
from tests.pages import ROOT
from tests.zoo import slow_but

PAGE = (ROOT / "docs" / "gallery.md").read_text()


def test_programs_are_at_least_ten_and_short():
    assert len(PROGRAMS) >= 10
    for path in PROGRAMS.values():
        assert len(path.read_text().splitlines()) <= 40, path.name


def test_the_page_shows_each_program_and_what_it_printed():
    shown = re.findall(r"```\{literalinclude\} \.\./examples/gallery/(\S+)", PAGE)
    assert sorted(shown) == sorted(
        name for stem in PROGRAMS for name in (f"{stem}.py", f"output/{stem}.txt")
    )
    assert all(output_of(name).read_text().strip() for name in PROGRAMS)


def test_outputs_are_compared_by_words_and_numbers():
    assert alike("a 1.00, b 2e-05", "a 1.05, b 3e-05")
    assert not alike("a 1.00", "a 2.00")
    assert not alike("a 1.00", "b 1.00")


@pytest.mark.parametrize(
    "name", slow_but(("solve_a_game", "worst_group", "write_your_own_solver"), PROGRAMS)
)
def test_a_program_prints_what_the_site_shows(name: str):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        text = printed(name)
    assert alike(text, output_of(name).read_text()), text
