"""README, CONTRIBUTING and the pages of the site, as text; `python -m tests.pages` writes tables.

Tables of solvers are those of the registry: run it when a solver is added.
"""

import re
from pathlib import Path

import mixadv
from mixadv.round.explain import solver_table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {DOCS / "solvers" / f"{name}.md" for name in mixadv.SOLVERS}
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in FILES
    if path not in GENERATED
}
ALL = "\n".join(PAGES.values())
FENCE = re.compile(r"^```([^\s`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN = ("name", "what it plays", "cost")
"""Columns of README's table of solvers."""


def marked(name: str, text: str) -> str:
    """Return what stands between the marks of a name; there is one such place."""
    [found] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return found.strip()


def short_table() -> str:
    """Return name, one line and cost of each solver."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in solver_table(mixadv.SOLVERS.values()).splitlines()
    ]
    columns = [lines[0].index(name) for name in SHOWN]
    return "\n".join("| " + " | ".join(line[at] for at in columns) + " |" for line in lines)


TABLES = {
    ROOT / "README.md": short_table,
    DOCS / "solvers" / "index.md": lambda: solver_table(mixadv.SOLVERS.values()),
}


def main() -> None:
    """Write the tables of solvers."""
    for path, table in TABLES.items():
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- solvers -->\n).*?(<!-- /solvers -->)", re.DOTALL)
        path.write_text(pattern.sub(lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text))


if __name__ == "__main__":
    main()
