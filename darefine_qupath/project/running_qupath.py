"""Warn of a QuPath that runs beside darefine and may have the image open that is written."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = ["qupath_warnings"]


def qupath_warnings(data_file: Path, image: Path | None) -> tuple[str, ...]:
    """Tell what can be told about a QuPath that has the image open right now.

    Parameters
    ----------
    data_file : Path
        The image's ``data.qpdata``.
    image : Path or None
        The image file.

    Returns
    -------
    tuple of str
        One line each.
    """
    warnings = []
    leftover = data_file.with_name(f"{data_file.name}.bkp")
    if leftover.exists():
        warnings.append(
            f"{leftover} is there: QuPath is saving this image, or stopped while it did. If the objects you see are "
            f"not what they should be, that file holds the state before its save"
        )
    running = _qupath_processes()
    if running:
        has_image = image is not None and any(_has_open(pid, image) for pid in running)
        warnings.append(
            f"QuPath is running (process {running[0]}) and has {image.name} open: use File > Reload data there before "
            f"anything else, its Save would overwrite what was just written"
            if has_image and image is not None
            else f"QuPath is running (process {running[0]}): if this image is open there, use File > Reload data "
            f"before anything else, its Save would overwrite what was just written"
        )
    return tuple(warnings)


def _qupath_processes() -> list[int]:
    """Process ids of QuPath on this machine, where the system tells (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().startswith("QuPath"):
                found.append(int(folder.name))
    return found


def _has_open(pid: int, image: Path) -> bool:
    with contextlib.suppress(OSError):
        wanted = os.path.realpath(image)
        return any(os.path.realpath(link) == wanted for link in Path(f"/proc/{pid}/fd").iterdir())
    return False
