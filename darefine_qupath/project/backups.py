"""Keep the last former states of every image of a project, as dated files in ``darefine/backups/``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from darefine_qupath.errors import ProjectError
from darefine_qupath.project.staging import OWN_FOLDER, read_with_version, remove_quietly

__all__ = [
    "BACKUPS_KEPT",
    "Backup",
    "backup_path",
    "backups_of",
    "choose_backup",
    "drop_copy_of_present",
    "prune_backups",
    "without_present",
]


BACKUPS_KEPT = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Backup:
    """A former state of one image's data.

    Attributes
    ----------
    path : Path
        The file.
    time : datetime
        When it was replaced, in UTC.
    size : int
        Bytes.
    """

    path: Path
    time: datetime
    size: int


_BACKUP_NAME = "data.qpdata"
_BACKUP_TIME = "%Y%m%dT%H%M%S.%fZ"


def _backup_folder(project: Path, entry_id: str) -> Path:
    return project / OWN_FOLDER / "backups" / entry_id


def backup_path(project: Path, entry_id: str) -> Path:
    """Name for the next backup of an image's data, later than all there are."""
    now = datetime.now(timezone.utc)
    former = backups_of(project, entry_id)
    if former and former[0].time >= now:
        now = former[0].time + timedelta(microseconds=1)
    return _backup_folder(project, entry_id) / f"{now.strftime(_BACKUP_TIME)}-{_BACKUP_NAME}"


def backups_of(project: Path, entry_id: str) -> tuple[Backup, ...]:
    """Backups of an image's data, newest first.

    Parameters
    ----------
    project : Path
        Folder of the project.
    entry_id : str
        Entry id.

    Returns
    -------
    tuple of Backup
        At most `BACKUPS_KEPT`.
    """
    folder = _backup_folder(project, entry_id)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(ValueError):
            written = datetime.strptime(path.name.removesuffix(f"-{_BACKUP_NAME}"), _BACKUP_TIME)
            found.append(Backup(path=path, time=written.replace(tzinfo=timezone.utc), size=path.stat().st_size))
    return tuple(sorted(found, key=lambda backup: backup.path.name, reverse=True))


def without_present(backups: Sequence[Backup], data_file: Path) -> tuple[Backup, ...]:
    """Backups, newest first, without the copy of the present state that a write leaves which is killed before the end.

    Parameters
    ----------
    backups : sequence of Backup
        From `backups_of`.
    data_file : Path
        The image's present data.

    Returns
    -------
    tuple of Backup
    """
    if not backups or not data_file.is_file() or data_file.stat().st_size != backups[0].size:
        return tuple(backups)
    is_present = read_with_version(data_file)[1].digest == read_with_version(backups[0].path)[1].digest
    return tuple(backups[1:] if is_present else backups)


def drop_copy_of_present(project: Path, entry_id: str, data_file: Path) -> None:
    """Remove the copy that `without_present` leaves out; only while holding the lock."""
    found = backups_of(project, entry_id)
    for backup in found[: len(found) - len(without_present(found, data_file))]:
        remove_quietly(backup.path)


def choose_backup(backups: Sequence[Backup], which: str | int, image: str) -> Backup:
    """Choose a backup by its number, 1 for the newest, or by the beginning of its file name.

    Raises
    ------
    ProjectError
        If none or several match; `image` is the name to tell.
    """
    if isinstance(which, int):
        found = backups[which - 1 : which] if which > 0 else ()
    else:
        found = tuple(backup for backup in backups if backup.path.name.startswith(which))
    if len(found) != 1:
        names = ", ".join(backup.path.name for backup in backups) or "none"
        raise ProjectError(f"{len(found) or 'No'} backups of {image!r} match {which!r}; there are: {names}")
    return found[0]


def prune_backups(project: Path, entry_id: str) -> None:
    """Keep the last `BACKUPS_KEPT` backups of an image."""
    for backup in backups_of(project, entry_id)[BACKUPS_KEPT:]:
        remove_quietly(backup.path)
