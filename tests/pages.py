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


def cells() -> list[list[str]]:
    """Return the cells of the table of solvers, row by row."""
    table = solver_table(mixadv.SOLVERS.values())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def joined(rows: list[list[str]]) -> str:
    """Return a table of cells."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def short_table() -> str:
    """Return name, one line and cost of each solver."""
    rows = cells()
    columns = [rows[0].index(name) for name in SHOWN]
    return joined([[row[at] for at in columns] for row in rows])


def linked_table() -> str:
    """Return the table of solvers whose names lead to their pages, without their classes."""
    rows = [[name, *others] for name, _, *others in cells()]
    links = [[f"[{row[0]}]({row[0].strip('`')}.md)", *row[1:]] for row in rows[2:]]
    return joined([*rows[:2], *links])


TABLES = {
    ROOT / "README.md": short_table,
    DOCS / "solvers" / "index.md": linked_table,
}


def main() -> None:
    """Write the tables of solvers."""
    for path, table in TABLES.items():
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- solvers -->\n).*?(<!-- /solvers -->)", re.DOTALL)
        path.write_text(pattern.sub(lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text))


if __name__ == "__main__":
    main()
