"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; cells are written as `str` writes them.

    Example:
        >>> print(markdown(["solver", "test"], [["plain", 81.2], ["mat", 84.0]]))
        | solver | test |
        | --- | --- |
        | plain | 81.2 |
        | mat | 84.0 |
    """
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
