"""How the site is built: `make docs`."""

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import mixadv  # noqa: E402
from mixadv.round.cost import count_passes  # noqa: E402
from mixadv.solvers.base import Solver  # noqa: E402

project, author, copyright = "mixadv", "the mixadv developers", "the mixadv developers"
version = release = mixadv.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "mixadv"
html_static_path, html_css_files = ["site.css"], ["site.css"]
myst_heading_anchors = 4
default_role = "code"  # docstrings quote code by single backticks
napoleon_use_ivar = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
if os.environ.get("MIXADV_DOCS_ONLINE"):  # the build needs no network otherwise
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
    }


def solver_page(solver: type[Solver]) -> str:
    """Return the page of a solver: its file's docstring, what a batch costs, its parameters."""
    text = inspect.getdoc(inspect.getmodule(solver)) or ""
    head, _, rest = text.partition("\n\n")
    p = count_passes(solver())
    passes = f"{p}: {p.plain_steps:.1f} plain steps"
    published = "".join(
        f"- `{model}`: {', '.join(f'`{task}`' for task in tasks)}\n"
        for model, tasks in solver.presets.items()
    )
    parts = [
        f"# {solver.__name__}",
        head,
        markdown(rest),
        f"**A batch at the defaults**: {passes}.",
        f"**Settings that were published**, for `{solver.__name__}.published(task, model=…)`:"
        f"\n\n{published}"
        if published
        else "",
        f"```{{eval-rst}}\n.. autoclass:: mixadv.{solver.__name__}\n   :members: published\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(text: str) -> str:
    """Return a docstring whose indented equations are blocks of text."""
    blocks, indented = [], False
    for line in text.splitlines():
        starts = line.startswith("    ") and line.strip() != ""
        if starts and not indented:
            blocks.append("\n```text")
        if indented and not starts and line.strip():
            blocks.append("```\n")
        indented = starts or (indented and not line.strip())
        blocks.append(line[4:] if indented else line)
    return re.sub(r"\n+```\n", "\n```\n", "\n".join([*blocks, "```"] if indented else blocks))


def write_solver_pages(app: Any) -> None:
    """Write a page for each solver of the registry, where it changed."""
    for name, solver in mixadv.SOLVERS.items():
        path, page = HERE / "solvers" / f"{name}.md", solver_page(solver)
        if not path.exists() or path.read_text() != page:
            path.write_text(page)


def equations(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make indented paragraphs of docstrings literal blocks, as equations and tables are.

    Those of a solver's file, which `help` repeats, stand on top of its page already.
    """
    if what == "class" and issubclass(obj, Solver) and "Example:" in lines:
        end = lines.index("Example:")
        first = next((i for i in range(end) if lines[i].startswith(" " * 4)), end)
        while first > 0 and lines[first - 1].strip():
            first -= 1
        del lines[first:end]
        lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]
    for number in range(len(lines) - 1, 0, -1):
        if not re.match(r" {4,}\S", lines[number]):
            continue
        before = lines[number - 1]
        if not before.strip() and (number < 2 or not lines[number - 2].startswith(" " * 4)):
            lines[number:number] = ["::", ""]
        elif re.match(r"\S+ .*:$", before):  # a sentence, and no title of a section
            lines[number:number] = ["", "::", ""]


def signature(
    app: Any, what: str, name: str, obj: Any, options: Any, found: str, returns: str
) -> tuple[str, str] | None:
    """Return what a solver is called with: parameters by name, which its docstring lists."""
    return ("(**parameters)", "") if what == "class" and issubclass(obj, Solver) else None


def setup(app: Any) -> None:
    """Register what is written before a build."""
    app.connect("builder-inited", write_solver_pages)
    app.connect("autodoc-process-docstring", equations, priority=400)
    app.connect("autodoc-process-signature", signature)
