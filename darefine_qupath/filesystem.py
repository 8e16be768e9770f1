"""Replace files as a whole or not at all, and lock them between processes.

The operating system holds a lock, and drops it when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import re
import secrets
import stat
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from darefine_qupath.errors import DarefineError

if TYPE_CHECKING:
    from collections.abc import Iterator

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "atomic_write",
    "followed",
    "keep_attributes",
    "open_lock",
    "remove_temporaries",
    "replace_file",
    "sync_folder",
    "try_lock",
    "unlock",
]

_log = logging.getLogger(__name__)

# A virus scanner or an indexer holds a new file for a moment, and Windows moves nothing that is held.
_PATIENCE_S = 1.0 if os.name == "nt" else 0.0
_ABANDONED_S = 24 * 3600.0
# Of `atomic_write`, and of safetensors, which writes to a file of its own first.
_TEMPORARY = re.compile(r"\..+-[0-9a-f]{8}(\.\w+)?|\.tmp\w{6}")
"""A temporary file of this age has no writer any more."""

_LOCK_BYTE = 0x7FFFFFFE
"""Far beyond what a lock file may say of its owner: Windows lets nobody read a locked byte."""


def followed(path: Path) -> Path:
    """Return the file that a path names in the end: what is written through a link leaves the link in place."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def keep_attributes(former: Path, new: Path) -> None:
    """Give a new file what the one that it is to replace has: owner, group, mode and extended attributes.

    An owner that only root can give stays away; without the group, the group's rights become those of everybody else,
    so that nobody may read more than before. Windows has none of these.

    Parameters
    ----------
    former : Path
        The file whose attributes they are.
    new : Path
        Must exist.

    Raises
    ------
    OSError
        If one of them is not there.
    """
    if sys.platform == "win32":
        return
    found, own = former.stat(), new.stat()
    mode = stat.S_IMODE(found.st_mode)
    if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid) and not _given_to(new, found.st_uid, found.st_gid):
        mode = mode & 0o707 | (mode & 0o007) << 3
    _copy_extended(former, new)
    with contextlib.suppress(PermissionError, NotImplementedError):  # some network shares have one mode for all
        new.chmod(mode)


def _given_to(path: Path, owner: int, group: int) -> bool:
    """Give a file to a user and a group, or to the group alone; whether the group has it."""
    for user in (owner, -1):
        with contextlib.suppress(OSError):
            os.chown(path, user, group)
            return True
    return False


def _copy_extended(former: Path, new: Path) -> None:
    # Access lists, labels of SELinux and what file managers note; what cannot be kept belongs to the system.
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        for name in os.listxattr(former):
            with contextlib.suppress(OSError):
                os.setxattr(new, name, os.getxattr(former, name))


def replace_file(source: Path, target: Path) -> None:
    """Give a file the name of another, which it replaces in one step.

    Parameters
    ----------
    source, target : Path
        In the same folder, or at least on the same disk.

    Raises
    ------
    OSError
        If the system refuses; on Windows, if it goes on refusing for a second.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            os.replace(source, target)  # noqa: PTH105 - the one call whose atomicity is documented for every system
            return
        except PermissionError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.02)


@contextmanager
def atomic_write(path: Path, error: type[DarefineError], *, like: Path | None = None) -> Iterator[Path]:
    """Give a temporary file beside `path` that takes its place once it is written and on the disk.

    Parameters
    ----------
    path : Path
        The file to write. One that is there keeps its content until the new one is whole, and its owner, mode and
        extended attributes for good; a link stays one.
    error : type of DarefineError
        Raised, with path and reason, where the system refuses.
    like : Path, optional
        A file whose owner, mode and extended attributes a new file gets.

    Yields
    ------
    Path
        An empty file in the same folder, hidden, with the same suffix: writers choose the format by it.

    Raises
    ------
    DarefineError
        `error`, if the folder cannot be written to or the disk is full; the former file stays as it was.
    """
    if not path.parent.is_dir():
        raise error(f"{path} cannot be written: there is no folder {path.parent}")
    target = followed(path)
    temporary = target.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        _remove_abandoned(temporary)
        temporary.touch(exist_ok=False)
        # Some writers (safetensors) leave files that only their owner reads; a result has the user's usual rights.
        mode = temporary.stat().st_mode
        model = target if target.is_file() else like
        if model is not None:
            temporary.chmod(stat.S_IRUSR | stat.S_IWUSR)  # nobody reads half of it who might not read the former one
        yield temporary
        with temporary.open("rb+") as file:
            temporary.chmod(mode)
            if model is not None:
                keep_attributes(model, temporary)
            os.fsync(file.fileno())
        replace_file(temporary, target)
        sync_folder(target.parent)
    except DarefineError:  # some are OSErrors; what went wrong inside has its own words
        raise
    except OSError as problem:
        raise error(f"{path} cannot be written ({problem.strerror or problem})") from problem
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(temporary: Path) -> None:
    """Remove what writers of the same file left that were killed."""
    stem, suffix = temporary.stem[:-8], temporary.suffix
    wanted = re.compile(rf"{re.escape(stem)}[0-9a-f]{{8}}{re.escape(suffix)}")
    for path in temporary.parent.glob(f"{glob.escape(stem)}*"):
        with contextlib.suppress(OSError):
            if wanted.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in a folder to which nobody writes at the moment.

    Parameters
    ----------
    folder : Path
        Its hidden files of `atomic_write` and of safetensors go, others stay.
    """
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut; Windows does that by itself.

    Parameters
    ----------
    folder : Path
        The folder.

    Raises
    ------
    OSError
        If the disk fails. A network file system that cannot sync a folder is no failure.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """Open a lock file, and make it if need be; its content stays as it is.

    Parameters
    ----------
    path : Path
        Only ever ours: what a link of that name points to is not touched.

    Returns
    -------
    int
        Descriptor, for `try_lock`.

    Raises
    ------
    OSError
        If it is a link or no regular file, or cannot be opened.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a link; remove it")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is not a file; remove it")
    return descriptor


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, without waiting.

    Parameters
    ----------
    descriptor : int
        Of the file; to close it gives the lock up.

    Returns
    -------
    bool
        False if another process has it. Where the file system has no locks, True with a warning.

    Raises
    ------
    OSError
        For any other reason.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            _log.warning("This file system has no locks: see to it that only one darefine process writes at a time")
            return True
        raise
    return True


def unlock(descriptor: int) -> None:
    """Give up the lock of an open file.

    Parameters
    ----------
    descriptor : int
        Of the file.
    """
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
