"""Fixtures that several test modules share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from darefine_qupath.cli import main

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def data() -> Path:
    """Folder of the committed test files."""
    return DATA


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real files that may not enter the repository; the test skips where it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: these real files may not be redistributed")
    return SHARED


@pytest.fixture
def place(tmp_path: Path, data: Path) -> Callable[[str], Path]:
    """Copies a fixture project with its images to where nobody has seen it; gives its folder."""
    qupath = data / "qupath"

    def copy(name: str) -> Path:
        shutil.copytree(qupath / name, tmp_path / name)
        if not (tmp_path / "images").exists():
            shutil.copytree(qupath / "images", tmp_path / "images")
        return tmp_path / name

    return copy


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; gives exit code, standard output and standard error."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
