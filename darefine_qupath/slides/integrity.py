"""Find damage that a decoder may not notice: a TIFF that was cut short, tiles whose stream does not begin or end.

OpenSlide refuses such tiles, and other decoders fill them with grey; so what those may read is looked at first.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import tifffile

from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Box, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TileGuard", "refuse_beyond_end", "refuse_cut_short", "refuse_incomplete"]

_UNKNOWN, _WHOLE, _DAMAGED = 0, 1, 2

_TAIL_BYTES = 4
"""Bytes at the end of a tile in which its end marker must lie: writers pad to even lengths."""

_SUB_IFDS = 330
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_POINTERS = {4: "I", 13: "I", 16: "Q", 18: "Q"}
_MAX_DIRECTORY = 1 << 16
"""Bytes of a directory that are looked at: 3,000 entries, where files have 30."""
_MAX_DIRECTORIES = 4096

_START_MARKERS = (b"\xff\xd8", b"\xff\x4f")
_END_MARKER = b"\xff\xd9"


def refuse_cut_short(path: Path) -> None:
    """Refuse a TIFF with a directory, or a value of one (the description, the tiles' places), beyond its end.

    Parameters
    ----------
    path : Path
        A TIFF or BigTIFF.

    Raises
    ------
    SlideError
        If it has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for part in _parts(file):
            if part.stop > size:
                raise SlideError(
                    f"{path}: the file ends at byte {size:,}, and a part that it announces begins at {part.start:,} "
                    f"and ends at {part.stop:,}; it was cut short, copy it again"
                )


def refuse_beyond_end(path: Path, pages: Sequence[tifffile.TiffPage]) -> None:
    """Refuse a TIFF with tiles that lie beyond its end.

    Parameters
    ----------
    path : Path
        The file.
    pages : sequence of TiffPage
        Its levels.

    Raises
    ------
    SlideError
        With the number of tiles that are lost.
    """
    size = path.stat().st_size
    lost = total = 0
    for page in pages:
        ends = np.asarray(page.dataoffsets, np.uint64) + np.asarray(page.databytecounts, np.uint64)
        lost, total = lost + int((ends > size).sum()), total + len(ends)
    if lost:
        raise SlideError(
            f"{path}: {lost} of {total} tiles lie beyond the end of the file at byte {size:,}; it was cut short, copy "
            f"it again"
        )


def refuse_incomplete(path: Path, levels: Sequence[Size]) -> None:
    """Refuse a file with tiles beyond its end, as far as it is a TIFF whose levels are pages.

    Parameters
    ----------
    path : Path
        The file.
    levels : sequence of Size
        Width and height of every level by OpenSlide, which opens such a file and fails where it is read.

    Raises
    ------
    SlideError
        With the number of tiles that are lost.
    """
    refuse_beyond_end(path, [page for page in _pages(path) if (page.imagewidth, page.imagelength) in levels])


def _pages(path: Path) -> list[tifffile.TiffPage]:
    """Pages of a TIFF; none where the file is something else."""
    try:
        with tifffile.TiffFile(path) as tiff:
            if tiff.is_ndpi:
                return []
            return [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, OSError):
        return []


def _parts(file: BinaryIO) -> Iterator[range]:
    """Bytes of the image file directories and of their values, as announced: perhaps beyond the end."""
    header = file.read(16)
    order = "<" if header[:2] == b"II" else ">"
    is_big = len(header) == 16 and struct.unpack(order + "H", header[2:4])[0] == 43
    layout = _Layout(order, "Q", "Q") if is_big else _Layout(order, "H", "I")
    start = 8 if is_big else 4
    waiting, seen = layout.pointers(header[start : start + layout.pointer_size]), {0}
    while waiting and len(seen) <= _MAX_DIRECTORIES:
        offset = waiting.pop()
        if offset in seen:
            continue
        seen.add(offset)
        file.seek(offset)
        parts, following = layout.directory(file, offset)
        yield from parts
        waiting += following


@dataclass(frozen=True)
class _Layout:
    """How a TIFF writes numbers: its byte order, the letter of a count of entries and that of a place in the file."""

    order: str
    count: str
    pointer: str

    @property
    def pointer_size(self) -> int:
        return struct.calcsize(self.pointer)

    def pointers(self, raw: bytes) -> list[int]:
        number = len(raw) // self.pointer_size
        return list(struct.unpack_from(f"{self.order}{number}{self.pointer}", raw))

    def directory(self, file: BinaryIO, offset: int) -> tuple[list[range], list[int]]:
        """Parts that belong to the directory at `offset`, where the file stands, and where the next ones are."""
        head = file.read(struct.calcsize(self.count))
        if len(head) < struct.calcsize(self.count):
            return [range(offset, offset + struct.calcsize(self.count))], []
        (number,) = struct.unpack(self.order + self.count, head)
        entry = struct.Struct(f"{self.order}HH{self.pointer}{self.pointer_size}s")
        end = offset + len(head) + number * entry.size + self.pointer_size
        raw = file.read(min(number * entry.size, _MAX_DIRECTORY))
        parts, following = [range(offset, end)], self.pointers(file.read(self.pointer_size))
        for tag, kind, count, value in entry.iter_unpack(raw[: len(raw) // entry.size * entry.size]):
            size = count * _TYPE_SIZES.get(kind, 0)
            if size > self.pointer_size:
                begin = self.pointers(value)[0]
                parts.append(range(begin, begin + size))
                file.seek(begin)
            if tag == _SUB_IFDS and kind in _POINTERS:
                places = file.read(min(size, _MAX_DIRECTORY)) if size > self.pointer_size else value[:size]
                following += _Layout(self.order, self.count, _POINTERS[kind]).pointers(places)
        return parts, following


@dataclass
class _Level:
    offsets: NDArray[np.uint64]
    counts: NDArray[np.uint64]
    tile: Size
    states: NDArray[np.uint8]


class TileGuard:
    """Tells whether the JPEG or JPEG 2000 streams of the tiles below a window begin and end as they should.

    Parameters
    ----------
    path : Path
        The file.
    levels : sequence of _Level
        One per level; see `of`.
    """

    def __init__(self, path: Path, levels: Sequence[_Level]) -> None:
        self._levels = levels
        self._file = path.open("rb")
        self._lock = threading.Lock()

    @classmethod
    def of(cls, path: Path, levels: Sequence[Size]) -> TileGuard | None:
        """Guard for a file; None where its tiles cannot be told (no TIFF, other compression, overlapping tiles).

        Parameters
        ----------
        path : Path
            The file.
        levels : sequence of Size
            Width and height of every level by OpenSlide.

        Returns
        -------
        TileGuard or None
            Close it.
        """
        pages = _pages(path)
        found = [_level(pages, level) for level in levels]
        whole = [level for level in found if level is not None]
        return cls(path, whole) if len(whole) == len(levels) else None

    def is_whole(self, level: int, window: Box) -> bool:
        """Whether every tile that a window of a level touches has a whole stream."""
        tiles = self._levels[level]
        left, top = window.x // tiles.tile.width, window.y // tiles.tile.height
        right, bottom = -(-window.right // tiles.tile.width), -(-window.bottom // tiles.tile.height)
        states = tiles.states[top:bottom, left:right]
        if (states == _WHOLE).all():
            return True
        for row, column in np.argwhere(states == _UNKNOWN):
            states[row, column] = self._look(tiles, int(row) + top, int(column) + left)
        return bool((states == _WHOLE).all())

    def _look(self, tiles: _Level, row: int, column: int) -> int:
        index = row * tiles.states.shape[1] + column
        offset, count = int(tiles.offsets[index]), int(tiles.counts[index])
        if count < 2 + _TAIL_BYTES:
            return _DAMAGED
        with self._lock:
            self._file.seek(offset)
            head = self._file.read(2)
            self._file.seek(offset + count - _TAIL_BYTES)
            tail = self._file.read(_TAIL_BYTES)
        return _WHOLE if head in _START_MARKERS and _END_MARKER in tail else _DAMAGED

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def __del__(self) -> None:
        self.close()


def _level(pages: Sequence[tifffile.TiffPage], size: Size) -> _Level | None:
    """Tiles of the one tiled page of this size."""
    fitting = [page for page in pages if (page.imagewidth, page.imagelength) == size and page.is_tiled]
    if len(fitting) != 1:
        return None
    page = fitting[0]
    # 6 and 7: JPEG; 33003, 33005: Aperio's JPEG 2000.
    if page.compression not in (6, 7, 33003, 33005) or page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
        return None
    across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if len(page.dataoffsets) != across * down:
        return None
    return _Level(
        offsets=np.asarray(page.dataoffsets, np.uint64),
        counts=np.asarray(page.databytecounts, np.uint64),
        tile=Size(page.tilewidth, page.tilelength),
        states=np.zeros((down, across), np.uint8),
    )
