"""Turn COCO's run lengths into shapes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import shapes
from shapely.geometry import MultiPolygon
from shapely.geometry import shape as shapely_shape

from darefine_qupath.errors import ExchangeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

__all__ = ["RunLengths"]

_MAX_MASK_PX = 100_000_000
"""Pixels inside the boxes of all run lengths of a file together."""


class RunLengths:
    """Decodes the run lengths of a file, which may mark so many pixels in all."""

    def __init__(self, image_size: tuple[int, int] | None) -> None:
        self._size = image_size
        self._left_px = _MAX_MASK_PX

    def shape(self, drawn: Mapping[str, Any], item: str) -> BaseGeometry:
        """Turn the run lengths of an object into the shape of its pixels."""
        height, width = (_side(side, item) for side in _pair(drawn.get("size"), item))
        if self._size is not None and self._size != (width, height):
            size = " x ".join(map(str, self._size))
            raise ExchangeError(f"{item} has a mask of {width} x {height} pixels, its image has {size}")
        counts = drawn.get("counts")
        runs = uncompressed(counts) if isinstance(counts, str) else np.array(counts, np.int64)
        if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
            raise ExchangeError(f"{item} has run lengths that do not cover its {width} x {height} pixels")
        ends = np.cumsum(runs)
        starts, ends = (ends - runs)[1::2], ends[1::2]
        starts, ends = starts[ends > starts], ends[ends > starts]
        if len(starts) == 0:
            raise ExchangeError(f"{item} has run lengths that mark no pixel")
        mask, left, top = self._window(starts, ends, height, item)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            parts = [shapely_shape(found) for found, _ in shapes(mask, mask=mask.view(bool), connectivity=4)]
        # The mask lies on its side.
        moved = [shapely.transform(part, lambda points: points[:, ::-1] + (left, top)) for part in parts]
        return moved[0] if len(moved) == 1 else MultiPolygon(moved)

    def _window(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64], height: int, item: str
    ) -> tuple[NDArray[np.uint8], int, int]:
        """Draw runs, which go down the columns, into the smallest box that holds them, columns as rows."""
        left, right = int(starts[0]) // height, int(ends[-1] - 1) // height + 1
        is_within = starts // height == (ends - 1) // height
        rows = (int((starts % height).min()), int(((ends - 1) % height).max()) + 1)
        top, bottom = rows if is_within.all() else (0, height)
        self._left_px -= (right - left) * (bottom - top)
        if self._left_px < 0:
            raise ExchangeError(f"{item} asks for more than the {_MAX_MASK_PX:,} pixels of masks that a file may hold")
        mask = np.zeros((right - left, bottom - top), np.uint8)
        flat, tall = mask.reshape(-1), bottom - top
        begins = (starts // height - left) * tall + starts % height - top
        for begin, length in zip(begins.tolist(), (ends - starts).tolist(), strict=True):
            flat[begin : begin + length] = 1
        return mask, left, top


def _pair(value: object, item: str) -> Sequence[object]:
    if not isinstance(value, list) or len(value) != 2:
        raise ExchangeError(f"{item} has run lengths without the size of their mask")
    return value


def _side(value: object, item: str) -> int:
    if not isinstance(value, int) or not 0 < value < 2**31:
        raise ExchangeError(f"{item} has a mask of the size {str(value)[:20]}")
    return int(value)


def uncompressed(text: str) -> NDArray[np.int64]:
    """Run lengths of their text: groups of five bits, the lowest first; differences from the last but one."""
    return np.array(list(_differences(text)), np.int64)


def _differences(text: str) -> Iterator[int]:
    before = [0, 0]
    value = shift = place = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError("run lengths whose text is damaged")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        # The first three stand for themselves.
        length = value + (before[0] if place > 2 else 0)
        yield length
        before = [before[1], length]
        value, shift, place = 0, 0, place + 1
    if shift:
        raise ValueError("run lengths whose text is cut short")
