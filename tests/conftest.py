"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

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
