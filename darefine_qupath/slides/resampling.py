"""Place, pad and resample the pixels of a level: a box at any size, from whole pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darefine_qupath.geometry import Box, FloatBox, Size, level_scale, level_window

__all__ = ["MAX_WINDOW_PIXELS", "clamp_to_level", "cropped_levels", "read_padded", "resample"]

MAX_WINDOW_PIXELS = 1 << 24
"""Level pixels that are held at a time; a larger read is done in parts, with the same result."""

_Read = Callable[[Box], NDArray[np.uint8]]


def resample(read: _Read, place: FloatBox, size: Size) -> NDArray[np.uint8]:
    """Resample a part of a level.

    Parameters
    ----------
    read : callable
        Gives whole pixels of the level, padded.
    place : FloatBox
        The part, in pixels of the level.
    size : Size
        Of the result.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
        The pixels of the level themselves where it needs no resampling.
    """
    if place.width * place.height <= MAX_WINDOW_PIXELS or max(size) == 1:
        return _resampled(read, place, size, Box.of(size))
    # Parts of the result that need about a quarter of what may be held; the filter's support comes on top.
    share = (MAX_WINDOW_PIXELS / 4 / (place.width * place.height)) ** 0.5
    step = (max(1, int(size.width * share)), max(1, int(size.height * share)))
    result = np.empty((size.height, size.width, 3), np.uint8)
    for y in range(0, size.height, step[1]):
        for x in range(0, size.width, step[0]):
            part = Box(x, y, min(step[0], size.width - x), min(step[1], size.height - y))
            result[y : part.bottom, x : part.right] = _resampled(read, place, size, part)
    return result


def _resampled(read: _Read, place: FloatBox, size: Size, part: Box) -> NDArray[np.uint8]:
    """One part of the result: `part` of `size`, where all of `size` shows `place`."""
    scale = (place.width / size.width, place.height / size.height)
    kernel, support = _filter(max(scale))
    all_of_it = level_window(place)
    wanted = FloatBox(
        place.x + part.x * scale[0], place.y + part.y * scale[1], part.width * scale[0], part.height * scale[1]
    )
    margin = (support * max(1.0, scale[0]), support * max(1.0, scale[1]))
    window = level_window(wanted, margin, all_of_it.box) if part.size != size else all_of_it
    pixels = read(window.box)
    if window.is_whole and window.box.size == part.size:
        return pixels
    x, y, width, height = window.inner
    right, bottom = min(x + width, window.box.width), min(y + height, window.box.height)
    return np.asarray(Image.fromarray(pixels).resize(part.size, kernel, box=(x, y, right, bottom)))


def _filter(scale: float) -> tuple[Image.Resampling, float]:
    """Filter, and its support in pixels of the result, for a reduction by `scale`.

    Against the mean of the level-0 pixels, on H&E: Hamming is nearest of Pillow's filters for reductions by 1.25 and
    2.5 (and half the work of Lanczos), the plain mean from about 4 on.
    """
    if scale <= 1:
        return Image.Resampling.BICUBIC, 2.0
    return (Image.Resampling.HAMMING, 1.0) if scale < 4 else (Image.Resampling.BOX, 0.5)


def read_padded(read: _Read, window: Box, frame: Box, size: Size) -> NDArray[np.uint8]:
    """Read a window of a level that may overhang it.

    Parameters
    ----------
    read : callable
        Gives whole pixels inside the level.
    window : Box
        In pixels of the level.
    frame : Box
        What is shown of the level; white outside.
    size : Size
        Of the level; where it is cut short of the frame, its last pixels are repeated.

    Returns
    -------
    ndarray of uint8, shape (height, width, 3)
    """
    shown = window.intersection(frame)
    if shown == window and Box.of(size).contains(window):
        return read(window)
    canvas = np.full((window.height, window.width, 3), 255, np.uint8)
    if shown is not None:
        rows, columns = shown.y - window.y, shown.x - window.x
        pixels = read(clamp_to_level(shown, size))
        missing = ((0, shown.height - pixels.shape[0]), (0, shown.width - pixels.shape[1]), (0, 0))
        canvas[rows : rows + shown.height, columns : columns + shown.width] = np.pad(pixels, missing, mode="edge")
    return canvas


def clamp_to_level(window: Box, size: Size) -> Box:
    """Part of a window that a level has; its last row or column where the window lies beyond it."""
    left, top = min(window.x, size.width - 1), min(window.y, size.height - 1)
    return Box(left, top, max(1, min(window.right, size.width) - left), max(1, min(window.bottom, size.height) - top))


def cropped_levels(size: Size, levels: tuple[Size, ...]) -> tuple[Size, ...]:
    """Width and height of every level of a slide that is cropped to `size`."""
    scales = (level_scale(levels[0], level) for level in levels)
    return tuple(Size(max(1, round(size.width * x)), max(1, round(size.height * y))) for x, y in scales)
