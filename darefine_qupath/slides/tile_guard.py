"""Tell which tiles of a slide hold whole JPEG streams: OpenSlide refuses the others, GDAL fills them with grey."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from darefine_qupath.geometry import Box, Size
from darefine_qupath.slides.cut_short import tiff_pages

__all__ = ["TileGuard"]

_UNKNOWN = 0
_WHOLE = 1
_DAMAGED = 2

_TAIL_BYTES = 4
"""Bytes at the end of a tile in which its end marker must lie: writers pad to even lengths."""

_START_MARKERS = (b"\xff\xd8", b"\xff\x4f")
_END_MARKER = b"\xff\xd9"


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
        pages = tiff_pages(path)
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
