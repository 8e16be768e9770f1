"""Recognize a slide's file again, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from darefine_qupath.errors import SlideError

__all__ = ["file_digest"]

_PART = 1 << 16
_NUM_PARTS = 16


def file_digest(path: Path) -> str:
    """Digest a slide's file by its length and some parts of it, so that gigabytes need not be read.

    Parameters
    ----------
    path : Path
        The file; it may lie anywhere, have any name and any time.

    Returns
    -------
    str
        32 hexadecimal digits; of all bytes where they are no more than a megabyte.

    Raises
    ------
    SlideError
        If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            digest.update(str(length).encode())
            # The first part and the last are among them: headers and directories stand there.
            for number in range(_NUM_PARTS):
                file.seek(max(0, length - _PART) * number // (_NUM_PARTS - 1))
                digest.update(file.read(_PART))
    except OSError as error:
        raise SlideError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:32]
