"""Number and name runs, and find their files.

Runs are ordered by a number that the project counts, since clocks go back, and differ between machines. Runs of before
there were numbers come first, by date.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.project.staging import StagedFiles, write_lock
from darefine_qupath.review.run import Run

__all__ = [
    "RunFile",
    "call_number",
    "is_named",
    "new_token",
    "next_number",
    "now_utc",
    "number_of",
    "run_files",
    "run_name",
    "runs_folder",
    "take_number",
]


_COUNTER = "last-run"
_NAME = re.compile(r"([0-9]{1,18})-([^_]+?)(-[0-9a-f]{8})?(?:_([0-9]{1,18}))?", re.ASCII)
LOCK_PATIENCE_S = 60.0
"""How long a run waits for its number or its record: another process may be writing a large image."""


class RunFile(NamedTuple):
    """A run's file by its name alone.

    Attributes
    ----------
    order : tuple of int and str
        Number and id; where the run stands among all of the project.
    path : Path
        The file.
    image : str or None
        Entry id; None where only the content tells (runs of before there were numbers).
    call : int or None
        Number of the first run of the same call of predict; None where only the content tells.
    """

    order: tuple[int, str]
    path: Path
    image: str | None
    call: int | None

    @property
    def id(self) -> str:
        """Run id."""
        return self.order[1]


def runs_folder(project: Project) -> Path:
    """Where a project's runs are."""
    return project.folder / "darefine" / "runs"


def new_token() -> str:
    """Return the random part of a new run's id: numbers begin anew in a copy of a project, or without its records."""
    return secrets.token_hex(4)


def run_name(number: int, image: ImageEntry, token: str) -> str:
    """Id of a run."""
    return f"{number:06d}-{image.id}-{token}"


def is_named(run_id: str, name: str) -> bool:
    """Whether a name means a run: its id, which people may type without the random part."""
    found = _NAME.fullmatch(run_id)
    return name == run_id or (found is not None and name == f"{found[1]}-{found[2]}")


def number_of(run_id: str | None) -> int | None:
    """Read the number in a run's id; None where it has none."""
    found = None if run_id is None else _NAME.fullmatch(run_id)
    return None if found is None else int(found[1])


def call_number(run: Run) -> int | None:
    """Return the number of the first run of the same call of predict; the names of their files tell it too."""
    return number_of(run.batch) or run.number or None


def path_of_run(project: Project, run: Run) -> Path:
    """Path of a run's file; its name tells the call too, so that a damaged file still says what it belongs to."""
    call = call_number(run) if run.number else None
    suffix = "" if call in (None, run.number) else f"_{call:06d}"
    return runs_folder(project) / f"{run.id}{suffix}.json"


def run_files(project: Project, image: ImageEntry | None = None) -> tuple[RunFile, ...]:
    """List the files of runs, oldest first.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry, optional
        Only those that may be of this image; all by default.
    """
    names = _names(project)
    if image is not None:
        names = [name for name in names if f"-{image.id}" in name]
    found = [_run_file(runs_folder(project) / name) for name in names]
    return tuple(sorted(file for file in found if image is None or file.image in (image.id, None)))


def _names(project: Project) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        # A path for each name would cost more than all the rest.
        return [name for name in os.listdir(runs_folder(project)) if name.endswith(".json")]  # noqa: PTH208
    return []


def _run_file(path: Path) -> RunFile:
    parts = _NAME.fullmatch(path.stem)
    if parts is None:
        return RunFile((0, path.stem), path, None, None)
    number, image, token, call = parts.groups()
    return RunFile((int(number), f"{number}-{image}{token or ''}"), path, image, int(call or number))


def next_number(project: Project, *, after: str | None = None) -> int:
    """Return the number that the next run would get; it is taken only by `take_number`.

    Parameters
    ----------
    project : Project
        Open project.
    after : str, optional
        Id of the run that the image's data was written by: records may be gone, or be those of another copy.
    """
    numbers = [number_of(name.removesuffix(".json")) or 0 for name in _names(project)]
    counter = runs_folder(project).parent / _COUNTER
    with contextlib.suppress(OSError, ValueError):
        # A run's file that was moved away does not give its number free.
        numbers.append(int(counter.read_bytes()[:18]))
    return max([number_of(after) or 0, *numbers]) + 1


def take_number(project: Project, *, after: str | None = None) -> int:
    """Take the number of a new run, as `next_number` gives it; no other process gets the same.

    Raises
    ------
    ProjectLockedError
        If another process holds the project for long.
    ProjectWriteError
        If the project cannot be written to.
    """
    with write_lock(project.folder, patience_s=LOCK_PATIENCE_S):
        number = next_number(project, after=after)
        with StagedFiles(project.folder) as batch:
            batch.stage(runs_folder(project).parent / _COUNTER, f"{number}\n".encode())
            batch.commit()
    return number


def now_utc() -> str:
    """Date of a run that starts now."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
