"""Locks between processes: the operating system holds them, and drops them when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["open_lock", "try_lock", "unlock"]

_log = logging.getLogger(__name__)

_LOCK_BYTE = 0x7FFFFFFE
"""Far beyond what a lock file may say of its owner: Windows lets nobody read a locked byte."""


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
