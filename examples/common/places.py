"""Files and folders that a command line names, looked for before the hub is asked.

Nothing here imports torch: what is not there is said at once.
"""

import argparse
from glob import has_magic
from pathlib import Path

SOURCES = (
    "builtin (a small table of everyday words), typos, mlm:NAME (a masked language model), or a "
    "FILE of JSON lines with word and neighbors, also as .jsonl.gz"
)
"""Where the candidates of a word substitution come from, by name."""


def where(name: str) -> str:
    """Return the name of a model; raise for a path that leads nowhere, before a hub is asked."""
    if Path(name).expanduser().exists():
        return name
    if has_magic(name):
        raise argparse.ArgumentTypeError(f"nothing matches the pattern {name}{_there(name)}")
    if is_here(name):
        raise argparse.ArgumentTypeError(f"there is no {name}{_there(name)}")
    return name


def is_here(name: str) -> bool:
    """Return whether a name is that of a file or folder, be it there or not, and none of the hub's.

    Names on the hub have at most one slash, and no folder here is called as their owner is.
    """
    within = "/" in name and Path(Path(name).parts[0]).is_dir()
    path = not name or name[0] in "./~" or name.count("/") > 1 or within
    return path or Path(name).expanduser().exists()


def _there(name: str | Path) -> str:
    """Return what is where a path still leads."""
    whole = Path(name).expanduser()
    known = next((path for path in whole.parents if path.is_dir()), Path())
    held = sorted(path.name for path in known.iterdir() if not path.name.startswith("."))
    return f"; {known} holds {', '.join(held[:8])}{', …' if held[8:] else '.'}"


def a_file(name: str | Path) -> Path:
    """Return the path of a file; raise ValueError if there is none."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file {name}{_there(name)}")
    return path


def a_folder(name: str | Path) -> Path:
    """Return the path of a folder; raise ValueError if there is none."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"There is no folder {name}{_there(name)}")
    return path


def rows_of(folder: str, name: str, itself: bool = True) -> Path:
    """Return the folder of a data set in a folder: NAME, NAME_subset, or the folder `itself`.

    Raises:
        ValueError: if none of them holds JSON lines.
    """
    root = a_folder(folder)
    for candidate in (root / name, root / f"{name}_subset", *([root] if itself else [])):
        if any(candidate.glob("*.jsonl")) or any(candidate.glob("*.jsonl.gz")):
            return candidate
    raise ValueError(f"{folder} holds no JSON lines of {name}: no folder {name} or {name}_subset.")


def check_text(source: str) -> None:
    """Raise ValueError for a source of text that is a path, and leads nowhere."""
    path = Path(source).expanduser()
    if not path.is_dir() and (path.suffix in (".txt", ".jsonl", ".gz") or is_here(source)):
        a_file(source)


def check_words(source: str, option: str = "--neighbours") -> None:
    """Raise ValueError for a source of words that is not among `SOURCES`."""
    named = source in ("builtin", "typos") or source.startswith("mlm:")
    if not (named or Path(source).is_file()):
        raise ValueError(f"{option} {source}: there is no such file. There are {SOURCES}.")
