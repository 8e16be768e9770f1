"""Lock a project for one writer, and replace several of its files together or not at all.

A write stages everything first (temporary files beside their targets, synced to disk), then renames one after the
other. A process killed at any moment leaves each file whole, old or new; what it staged is cleaned up by the next
write. An error while renaming takes the renames back.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from darefine_qupath.errors import (
    LimitError,
    ProjectChangedError,
    ProjectFormatError,
    ProjectLockedError,
    ProjectNotFoundError,
    ProjectWriteError,
)
from darefine_qupath.filesystem import followed, keep_attributes, open_lock, replace_file, sync_folder, try_lock, unlock
from darefine_qupath.limits import DATA, Limits, open_file

__all__ = [
    "FileVersion",
    "StagedFiles",
    "check_unchanged",
    "is_there",
    "read_with_version",
    "remove_leftovers",
    "write_lock",
]

_log = logging.getLogger(__name__)

LOCK_PATIENCE_S = 2.0
"""How long a write waits for another darefine process to finish its own."""

OWN_FOLDER = "darefine"
_STAGED = ".darefine-tmp"


# -- reading


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What a file was like when it was read."""

    size: int
    mtime_ns: int
    digest: str


def is_there(path: Path) -> bool:
    """Whether a file of a project is there.

    Raises
    ------
    ProjectFormatError
        If something is there that is no file, or nobody may know: neither must pass for an image without objects.
    """
    try:
        mode = path.lstat().st_mode
        mode = path.stat().st_mode if stat.S_ISLNK(mode) else mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise ProjectFormatError(f"cannot be read: {error.strerror}", path=path) from None
    if stat.S_ISREG(mode):
        return True
    if not mode and path.is_symlink():
        raise ProjectFormatError(f"is a link to {os.path.realpath(path)}, which is not there", path=path)
    if mode:
        raise ProjectFormatError("is not a regular file", path=path)
    return False


def read_with_version(path: Path, limits: Limits = DATA) -> tuple[bytes, FileVersion]:
    """Content of a file, and what it was like.

    Parameters
    ----------
    path : Path
        The file.
    limits : Limits, optional
        How large it may be.

    Returns
    -------
    tuple of bytes and FileVersion

    Raises
    ------
    ProjectNotFoundError
        If the file is not there.
    ProjectFormatError
        If it cannot be read, is no regular file or too large, or does not hold still.
    """
    try:
        for _ in range(5):
            with open_file(path) as file:
                before = os.fstat(file.fileno())
                # A byte more than it said shows a file that grows while it is read.
                data = file.read(before.st_size + 1) if before.st_size <= limits.file_bytes else b""
            after = path.stat()
            if after.st_size > limits.file_bytes:
                raise LimitError(f"it is larger than {limits.file_bytes:,} bytes")
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(
                data
            ) == after.st_size:
                return data, FileVersion(len(data), after.st_mtime_ns, hashlib.sha256(data).hexdigest())
    except FileNotFoundError:
        raise ProjectNotFoundError(f"{path} is not there") from None
    except LimitError as error:
        raise ProjectFormatError(str(error), path=path) from None
    except OSError as error:
        raise ProjectFormatError(f"cannot be read: {error.strerror or error}", path=path) from error
    raise ProjectFormatError("is being written by another program; try again", path=path)


def check_unchanged(path: Path, stamp: FileVersion | None) -> None:
    """Make sure that a file still is what it was when it was read.

    Parameters
    ----------
    path : Path
        The file.
    stamp : FileVersion or None
        From `read_with_version`; None = there was no file.

    Raises
    ------
    ProjectChangedError
        If it is something else now.
    """
    present = path.is_file()
    if not present and stamp is None:
        return
    if not present or stamp is None or read_with_version(path)[1].digest != stamp.digest:
        raise ProjectChangedError(
            f"{path} changed since it was read (QuPath or another program saved it); nothing was written, run it again"
        )


# -- lock


@contextlib.contextmanager
def write_lock(folder: Path, *, patience_s: float | None = None) -> Iterator[None]:
    """Keep other darefine processes from writing to a project.

    The operating system holds the lock and drops it when the process ends, however it ends.

    Parameters
    ----------
    folder : Path
        Folder of the project.
    patience_s : float, optional
        How long to wait for another process, `LOCK_PATIENCE_S` by default.

    Raises
    ------
    ProjectLockedError
        If another process is still writing then.
    ProjectWriteError
        If the project cannot be written to.
    """
    path = folder / OWN_FOLDER / ".lock"
    try:
        path.parent.mkdir(exist_ok=True)
        is_new = not path.exists()
        descriptor = open_lock(path)
        if is_new and (like := project_file(folder)) is not None:
            keep_attributes(like, path)
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        _acquire(descriptor, path, LOCK_PATIENCE_S if patience_s is None else patience_s)
        if os.fstat(descriptor).st_size:  # who held it last could not take back the note of it
            remove_leftovers(*_written_folders(folder))
        _note_owner(descriptor, f"{os.getpid()} on {_host()}")
        try:
            yield
        finally:
            _note_owner(descriptor, "")
            unlock(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return os.environ.get("COMPUTERNAME", "this computer") if sys.platform == "win32" else os.uname().nodename


def _acquire(descriptor: int, path: Path, patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while not try_lock(descriptor):
        if time.monotonic() >= until:
            with contextlib.suppress(OSError):
                owner = path.read_text(encoding="utf-8").strip()
                owner = f" (process {owner})" if owner else ""
            raise ProjectLockedError(
                f"Another darefine process{owner} is writing to {path.parent.parent}; try again when it has ended"
            )
        time.sleep(0.02)


def _written_folders(folder: Path) -> Iterator[Path]:
    """Every folder of a project that a write stages files in."""
    own = folder / OWN_FOLDER
    yield from (folder, folder / "classifiers", folder / "data", own, own / "runs")
    for parent in (folder / "data", own / "backups"):
        yield from parent.iterdir() if parent.is_dir() else ()


def _note_owner(descriptor: int, owner: str) -> None:
    # Only for the message that another process shows; a full disk must not stop it.
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_nlink > 1:
            return  # the file has a second name, and may be somebody's
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, owner.encode())


# -- staged writes


def write_error(what: Path, error: OSError) -> ProjectWriteError:
    """Error for a write that failed, saying what to do."""
    hints = {
        errno.ENOSPC: "; make room on the disk",
        errno.EDQUOT: "; the quota is used up",
        errno.EACCES: "; the files are read-only or open in another program",
        errno.EPERM: "; the files are read-only or open in another program",
        errno.EROFS: "; the disk is read-only",
    }
    hint = hints.get(error.errno or 0, "")
    return ProjectWriteError(f"Cannot write to {what}: {error.strerror or error}{hint}. The project is as it was")


def project_file(folder: Path) -> Path | None:
    """Return the file of the project in a folder, whose owner and mode new files of the project get."""
    return min(folder.glob("*.qpproj"), default=None)


def write_synced(path: Path, data: bytes, *, like: Path | None = None) -> None:
    """Write a new file and make sure that it is on the disk; with the attributes of `like`, where that is given."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666 if like is None else 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if like is not None:
            keep_attributes(like, path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Staged:
    target: Path
    new: Path
    former: Path | None


class StagedFiles:
    """Files that are replaced together: stage them all, then commit; leaving the ``with`` block takes back the rest.

    Parameters
    ----------
    folder : Path
        Folder of the project, for messages.

    Examples
    --------
    ``with Batch(folder) as batch: batch.stage(path, data); batch.commit()``
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._staged: list[_Staged] = []
        self._made: list[Path] = []
        self._renaming = False
        self._committed = False

    def __enter__(self) -> StagedFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self._take_back()

    def stage(self, target: Path, data: bytes, *, backup: Path | None = None, like: Path | None = None) -> Path:
        """Write the new content of `target` beside it.

        Parameters
        ----------
        target : Path
            File to be replaced or made. It keeps owner, mode and extended attributes, and a link stays one.
        data : bytes
            New content.
        backup : Path, optional
            Keep the former content here for good.
        like : Path, optional
            A file whose owner, mode and extended attributes one that is made gets, the project file by default.

        Returns
        -------
        Path
            The staged file, to be read back.

        Raises
        ------
        ProjectWriteError
            If there is no room, say.
        """
        target = followed(target)
        try:
            self._make_folder(target.parent)
            former = self._keep_former(target, backup)
            new = self._new_name(target)
            self._staged.append(_Staged(target, new, former))
            write_synced(new, data, like=former or (like if like and like.is_file() else project_file(self._folder)))
        except OSError as error:
            raise write_error(target, error) from error
        return new

    def _keep_former(self, target: Path, backup: Path | None) -> Path | None:
        if not target.is_file():
            return None
        former = self._new_name(target)
        self._made.append(former)
        content = target.read_bytes()
        write_synced(former, content, like=target)
        if backup is None:
            return former
        self._make_folder(backup.parent)
        replace_file(former, backup)
        self._made.append(backup)
        sync_folder(backup.parent)
        return backup

    def _make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            path.mkdir()
            self._made.append(path)
            sync_folder(path.parent)

    @staticmethod
    def _new_name(target: Path) -> Path:
        return target.with_name(f"{target.name}.{uuid4().hex[:12]}{_STAGED}")

    def commit(self) -> None:
        """Rename every staged file to its target, in the order of staging; all of them or none.

        Raises
        ------
        ProjectWriteError
            If a rename failed; those before it were taken back.
        """
        self._renaming = True
        try:
            for staged in self._staged:
                replace_file(staged.new, staged.target)
            for folder in {staged.target.parent for staged in self._staged}:
                sync_folder(folder)
        except OSError as error:
            raise write_error(self._folder, error) from error
        self._committed = True
        for path in self._made:
            if path.name.endswith(_STAGED):
                remove_quietly(path)

    def _take_back(self) -> None:
        for staged in reversed(self._staged):
            # Looked up on the disk: an interrupt may have come between a rename and a note of it.
            if not self._renaming or staged.new.exists():
                remove_quietly(staged.new)
            elif staged.former is None:
                remove_quietly(staged.target)
            else:
                _restore(staged.former, staged.target)
        for path in reversed(self._made):
            remove_quietly(path)


def _restore(former: Path, target: Path) -> None:
    try:
        replace_file(former, target)
    except OSError as error:
        kept = former.with_name(f"{target.name}.former")
        with contextlib.suppress(OSError):
            former.rename(kept)
        _log.error("%s could not be put back (%s); its former content is in %s", target, error, kept)


def remove_quietly(path: Path) -> None:
    """Remove a file or an empty folder, if the system lets us."""
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()


def remove_leftovers(*folders: Path) -> None:
    """Remove what a write that was killed left behind; only while holding the lock."""
    for folder in folders:
        for path in list(folder.iterdir()) if folder.is_dir() else ():
            staged = [path]
            if path.is_symlink():  # its file was staged where that is
                real = followed(path)
                staged = list(real.parent.glob(f"{glob.escape(real.name)}.*{_STAGED}"))
            for left in staged:
                if left.name.endswith(_STAGED):
                    _log.info("Removing %s, left by a write that did not finish", left)
                    remove_quietly(left)
