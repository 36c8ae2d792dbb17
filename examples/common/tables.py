"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; cells are written as `str` writes them.

    Example:
        >>> print(markdown(["solver", "test"], [["plain", 81.2], ["mat", 84.0]]))
        | solver | test |
        |---|---|
        | plain | 81.2 |
        | mat | 84.0 |
    """
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
