"""What the programs of the gallery print; `python -m tests.gallery [NAME ...]` writes it anew."""

import contextlib
import io
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path

GALLERY = Path(__file__).parent.parent / "examples" / "gallery"
PROGRAMS = {path.stem: path for path in sorted(GALLERY.glob("*.py"))}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def output_of(name: str) -> Path:
    """Return the file of what a program printed."""
    return GALLERY / "output" / f"{name}.txt"


def printed(name: str) -> str:
    """Run a program of the gallery in a folder of its own; return what it prints."""
    out, here = io.StringIO(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        os.chdir(folder)
        try:
            runpy.run_path(str(PROGRAMS[name]), run_name="__main__")
        finally:
            os.chdir(here)
    return out.getvalue()


def alike(text: str, other: str, tolerance: float = 0.1) -> bool:
    """Return whether texts agree in their words, and in their numbers up to a tolerance."""
    if NUMBER.sub("#", text).split() != NUMBER.sub("#", other).split():
        return False
    pairs = zip(NUMBER.findall(text), NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= tolerance * (1 + abs(float(b))) for a, b in pairs)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PROGRAMS:
        output_of(chosen).write_text(printed(chosen))
