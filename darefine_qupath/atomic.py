"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from darefine_qupath.errors import DarefineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["put_in_place", "replacing", "sync_folder"]

# A virus scanner or an indexer holds a new file for a moment, and Windows moves nothing that is held.
_PATIENCE_S = 1.0 if os.name == "nt" else 0.0


def put_in_place(source: Path, target: Path) -> None:
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
def replacing(path: Path, error: type[DarefineError]) -> Iterator[Path]:
    """Give a temporary file beside `path` that takes its place once it is written and on the disk.

    Parameters
    ----------
    path : Path
        The file to write. One that is there keeps its content until the new one is whole.
    error : type of DarefineError
        Raised, with path and reason, where the system refuses.

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
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
        # Some writers (safetensors) leave files that only their owner reads; a result has the user's usual rights.
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        put_in_place(temporary, path)
        sync_folder(path.parent)
    except DarefineError:  # some are OSErrors; what went wrong inside has its own words
        raise
    except OSError as problem:
        raise error(f"{path} cannot be written ({problem.strerror or problem})") from problem
    finally:
        temporary.unlink(missing_ok=True)


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
