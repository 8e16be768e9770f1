"""Give regions below the smallest area to their neighbors, pixel by pixel, before anything is traced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rasterio import features

from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box
from darefine_qupath.polygons.concurrency import WARNINGS_LOCK
from darefine_qupath.polygons.map_reader import MapReader
from darefine_qupath.polygons.settings import VectorizeSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["IN_MEMORY_PIXELS", "merge_into_neighbor", "sieve_labels"]

IN_MEMORY_PIXELS = 1 << 30
"""Above this size the sieved map lies in a temporary file instead of in memory."""


_SIEVES = 4


def sieve_labels(source: MapReader, settings: VectorizeSettings, scratch: Path) -> NDArray[np.uint8]:
    """Map inside the image with regions below the smallest area given to their largest neighbor."""
    width, height = settings.columns[1] - settings.columns[0], settings.rows[1] - settings.rows[0]
    large = width * height > IN_MEMORY_PIXELS
    current = _read_all(source, settings, _canvas((height, width), scratch / "labels" if large else None))
    threshold = min(math.ceil(settings.min_area_px), current.size - 1)
    if threshold < 2:
        return current
    other = _canvas((height, width), scratch / "sieved" if large else None)
    for _ in range(_SIEVES):
        with WARNINGS_LOCK:
            features.sieve(current, threshold, out=other, connectivity=4)
        current, other = other, current
        # One pass leaves a small region whose neighbors are all small. Few of them are better dealt with one by one,
        # when they are known; many are not.
        if _changed(current, other) < current.size // 100:
            break
    return current


def _canvas(shape: tuple[int, int], path: Path | None) -> NDArray[np.uint8]:
    return np.empty(shape, np.uint8) if path is None else np.memmap(path, np.uint8, "w+", shape=shape)


def _changed(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    rows = range(0, len(first), 512)
    return sum(int(np.count_nonzero(first[row : row + 512] != second[row : row + 512])) for row in rows)


def _read_all(source: MapReader, settings: VectorizeSettings, canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = canvas.shape
    step = max(1, (1 << 24) // width)
    for row in range(0, height, step):
        count = min(step, height - row)
        strip = source.read(Box(settings.columns[0], settings.rows[0] + row, width, count))
        if strip.dtype != np.uint8 or strip.shape != (count, width):
            raise PolygonError(
                f"A label map is uint8 and {width} wide here, rows {row} to {row + count} are {strip.dtype} of shape "
                f"{strip.shape}"
            )
        canvas[row : row + count] = strip
    return canvas


def merge_into_neighbor(sieved: NDArray[np.uint8], seed: tuple[int, int], bounds: Box) -> Box | None:
    """Give the region of a pixel to the label it shares the longest border with; None where it is alone."""
    at = bounds.grow(1).intersection(Box(0, 0, sieved.shape[1], sieved.shape[0]))
    assert at is not None
    window = sieved[at.y : at.bottom, at.x : at.right]
    same = window == window[seed[0] - at.y, seed[1] - at.x]
    region = np.zeros_like(same)
    region[seed[0] - at.y, seed[1] - at.x] = True
    while True:
        grown = _neighbors(region).any(axis=0) & same | region
        if np.array_equal(grown, region):
            break
        region = grown
    around = [window[side & ~region] for side in _neighbors(region)]
    shares = np.bincount(np.concatenate(around), minlength=1)
    if not shares.any():
        return None
    window[region] = shares.argmax()
    return at


def _neighbors(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels above, below, left and right of those in a region; shape (4, height, width)."""
    sides = np.zeros((4, *region.shape), bool)
    sides[0, :-1], sides[1, 1:] = region[1:], region[:-1]
    sides[2, :, :-1], sides[3, :, 1:] = region[:, 1:], region[:, :-1]
    return sides
