"""Let GDAL read in OpenSlide's place where both give the same pixels: it copies any level, and is much faster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Box
from darefine_qupath.slides import resampling
from darefine_qupath.slides.reader import ImageReader
from darefine_qupath.slides.tiff_reader import TiffReader
from darefine_qupath.slides.tile_guard import TileGuard

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

__all__ = ["AgreeingReader"]

_log = logging.getLogger(__name__)

_MAX_DIFFERENCE = 2.0
"""Mean difference in grey levels up to which GDAL's pixels count as OpenSlide's."""

_PROBE_SIDE = 256
_NUM_PROBES = 4


class AgreeingReader:
    """A TIFF that GDAL reads as OpenSlide does, and a guard for the tiles that only OpenSlide finds damaged.

    Parameters
    ----------
    reader : TiffReader
        GDAL's view of the file.
    guard : TileGuard
        Of the same file.
    """

    def __init__(self, reader: TiffReader, guard: TileGuard) -> None:
        self._reader, self._guard = reader, guard
        self.name = reader.name

    @classmethod
    def of(cls, path: Path, reference: ImageReader, *, is_known_to_agree: bool) -> Self | None:
        """Open a file as GDAL reads it; None where OpenSlide must read it.

        Parameters
        ----------
        path : Path
            The file.
        reference : ImageReader
            What opened it.
        is_known_to_agree : bool
            Whether another process compared the two.

        Returns
        -------
        AgreeingReader or None
            Close it.
        """
        guard = TileGuard.of(path, reference.levels) if reference.name == "openslide" else None
        if guard is None:
            return None
        try:
            found = cls(TiffReader(path), guard)
        except SlideError:
            guard.close()
            return None
        if is_known_to_agree or found._agrees_with(reference):
            return found
        _log.info("%s: GDAL reads it differently", path)
        found.close()
        return None

    def _agrees_with(self, reference: ImageReader) -> bool:
        """Whether both have the same levels, and the same level 0 at some places and in the last corner."""
        if self._reader.levels != reference.levels:
            return False
        try:
            return all(self._is_same(reference, place) for place in _probes(reference))
        except SlideError:
            return False

    def _is_same(self, reference: ImageReader, place: Box) -> bool:
        if not self.is_whole(0, place):
            return False
        difference = reference.read(0, place).astype(np.int16) - self.read(0, place)
        return bool(np.abs(difference).mean() < _MAX_DIFFERENCE)

    def is_whole(self, level: int, window: Box) -> bool:
        """Whether no tile that a window of a level touches is damaged."""
        return self._guard.is_whole(level, window)

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Pixels of a window inside a level."""
        return self._reader.read(level, window)

    def close(self) -> None:
        """Give the file back."""
        self._reader.close()
        self._guard.close()


def _probes(reader: ImageReader) -> tuple[Box, ...]:
    size = reader.levels[0]
    frame = reader.bounds or Box.of(size)
    width, height = min(_PROBE_SIDE, frame.width), min(_PROBE_SIDE, frame.height)
    places = [
        Box(frame.x + (frame.width - width) * column // 7, frame.y + (frame.height - height) * row // 7, width, height)
        for row in range(8)
        for column in range(8)
    ]
    last = reader.levels[-1]
    if len(reader.levels) > 1 and last.width * last.height <= resampling.MAX_WINDOW_PIXELS:
        overview = reader.read(len(reader.levels) - 1, Box.of(last)).mean(axis=2)
        x_scale, y_scale = last.width / size.width, last.height / size.height

        def brightness(place: Box) -> float:
            x, y = int((place.x + width / 2) * x_scale), int((place.y + height / 2) * y_scale)
            return float(overview[min(y, last.height - 1), min(x, last.width - 1)])

        inner = sorted(places[:-1], key=brightness)
    else:
        inner = places[9:-1:13]
    return (*inner[:_NUM_PROBES], places[-1])
