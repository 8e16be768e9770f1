"""Unpack annotation files and decode their text."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

from darefine_qupath.errors import DarefineError, ExchangeError
from darefine_qupath.exchange.other_files import archive_kind
from darefine_qupath.limits import DATA, open_file, read_file

__all__ = ["Document", "documents", "first_bytes", "member_names"]

_GZIP = b"\x1f\x8b"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_MAX_MEMBERS = 1000
_FREE_BYTES = 8 << 20
_PIECE = 1 << 20
_MAX_RATIO = 60
"""Bytes out of one packed byte, beyond the first few: drawn shapes give 5 to 20, a file made to burst 1,000."""

_DECLARED = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""")
_TEXT_CODECS = ("utf-8", "utf-16", "utf-32", "iso8859", "cp", "ascii", "gb", "big5", "shift_jis", "euc", "koi8", "mac-")
_WIDE = ("utf-16", "utf-32")


@dataclass(frozen=True, slots=True)
class Document:
    """One annotation file, of its own or out of an archive.

    Attributes
    ----------
    member : str or None
        Its name in the archive.
    data : bytes
        As it was written.
    """

    member: str | None
    data: bytes

    @property
    def text(self) -> str:
        """Its text, decoded by its byte order mark, else by what its XML declares, else as UTF-8.

        Raises
        ------
        ExchangeError
            If it is not text, or of an encoding that is not known.
        """
        codec = self._codec()
        try:
            return self.data.decode(codec).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ExchangeError(f"it is not {codec} text, by its byte {error.start}; save it as UTF-8") from error

    def _codec(self) -> str:
        guessed = json.detect_encoding(self.data[:4])
        declared = _DECLARED.match(self.data[:300].lstrip()) if guessed == "utf-8" else None
        if declared is None:
            return guessed
        name = declared[1].decode()
        try:
            found = codecs.lookup(name).name
        except LookupError:
            found = ""
        if not found.startswith(_TEXT_CODECS):
            raise ExchangeError(f"it is in the encoding {name!r}, which is not known; save it as UTF-8")
        # Many programs write "utf-16" over what they then save as UTF-8; UTF-16 would not show its declaration.
        return "utf-8" if found.startswith(_WIDE) else found


def first_bytes(path: Path, count: int = 4096) -> bytes:
    """Beginning of a file, by which its format is recognized."""
    with open_file(path) as file:
        return file.read(count)


def documents(path: Path) -> Iterator[Document]:
    """Give the annotation file, or those of the archive that it is.

    Parameters
    ----------
    path : Path
        A text file, one in gzip, or a zip of them, as QuPath reads them.

    Raises
    ------
    ExchangeError
        If an archive is damaged, holds something else, or would burst.
    """
    data = read_file(path, DATA)
    if data.startswith(_GZIP):
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = _unpacked(file, _room(data))
        if unpacked.startswith((_GZIP, *_ZIP)):
            raise ExchangeError("it is an archive in an archive; unpack it")
        yield Document(None, unpacked)
    elif data.startswith(_ZIP):
        yield from _members(data)
    else:
        yield Document(None, data)


def member_names(path: Path) -> list[str]:
    """Names of the files in a zip, without their folders; none where it is no zip, or cannot be read."""
    try:
        with open_file(path) as file, ZipFile(file) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (OSError, BadZipFile, RuntimeError, NotImplementedError, DarefineError):
        return []
    return [name.rsplit("/", 1)[-1] for name in names if not _is_hidden(name)]


def _members(data: bytes) -> Iterator[Document]:
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            kind = archive_kind(names)
            if kind is not None:
                raise ExchangeError(f"it {kind}")
            kept = [name for name in names if not _is_hidden(name)]
            if not 0 < len(kept) <= _MAX_MEMBERS:
                raise ExchangeError(f"it is a zip of {len(kept)} files; 1 to {_MAX_MEMBERS} are read")
            left = _room(data)
            for name in kept:
                with archive.open(name) as file:
                    unpacked = _unpacked(file, left)
                left -= len(unpacked)
                yield Document(name if len(kept) > 1 else None, unpacked)
    except (BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ExchangeError(f"it is a zip that cannot be read ({error})") from error


def _is_hidden(name: str) -> bool:
    """Whether an archive holds it for its system only."""
    return name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1].startswith(".")


def _room(packed: bytes) -> int:
    """Bytes that an archive may unpack to."""
    return max(_FREE_BYTES, len(packed) * _MAX_RATIO)


def _unpacked(file: IO[bytes] | gzip.GzipFile, most: int) -> bytes:
    try:
        pieces = [file.read(_PIECE)]
        while pieces[-1] and sum(map(len, pieces)) <= most:
            pieces.append(file.read(_PIECE))
    except (OSError, EOFError, zlib.error) as error:
        raise ExchangeError(f"it is damaged where it is packed ({error})") from error
    data = b"".join(pieces)
    if len(data) > most:
        raise ExchangeError(f"it unpacks to more than {_MAX_RATIO} times its size, as no drawn shapes do; unpack it")
    return data
