"""Compute with boxes in level-0 pixels and with downsamples; nothing else multiplies by a downsample.

Every stored coordinate of darefine is a level-0 pixel of the image as QuPath sees it, half-open, ``(x, y)`` and
``(width, height)``; arrays are ``(row, column)``. Level sizes come from the level's own dimensions, never from
dividing by a downsample: downsamples such as 4.00012 exist, and truncation moves reads by a pixel. They exist because
scanners and converters drop the rows and columns that do not fill a whole pixel: such a level is exactly 4 times
smaller, only cut off, and is treated so (see `level_scale`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from darefine_qupath.errors import GeometryError

__all__ = [
    "MPP_LIMITS",
    "Box",
    "FloatBox",
    "GlassFrame",
    "LevelWindow",
    "PixelSize",
    "Size",
    "best_level",
    "fit_within",
    "is_possible_mpp",
    "level_box",
    "level_scale",
    "level_window",
    "scaled_size",
]

MPP_LIMITS = (0.001, 1000.0)
"""Micrometres per level-0 pixel that a slide may have: from electron micrographs to photographs of the glass."""


_SQUARE = 0.01
"""Relative difference of width and height up to which a pixel is square: scanners calibrate each axis by itself."""


def is_possible_mpp(mpp: float) -> bool:
    """Whether a slide may have so many micrometres per pixel."""
    return MPP_LIMITS[0] <= mpp <= MPP_LIMITS[1]


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class PixelSize(NamedTuple):
    """Width and height of a level-0 pixel in micrometres, as an image file or a project states them."""

    x: float
    y: float

    @property
    def is_possible(self) -> bool:
        """Whether both are those a slide may have."""
        return all(map(is_possible_mpp, self))

    @property
    def is_square(self) -> bool:
        """Whether one number can stand for both."""
        return self.is_possible and abs(self.x - self.y) <= _SQUARE * min(self)

    @property
    def side(self) -> float | None:
        """Micrometres per pixel along either axis; None for a size that is not possible or not square."""
        return (self.x + self.y) / 2 if self.is_square else None

    def __str__(self) -> str:
        return f"{self.x:g} x {self.y:g} um"


class GlassFrame(NamedTuple):
    """Where an image lies on its glass slide, for coordinates that count from the center of the glass.

    Attributes
    ----------
    center_nm : tuple of float
        Center of the image by that of the glass, x and y in nanometres.
    size : Size
        Of the image in level-0 pixels.
    pixel : PixelSize
        Micrometres per level-0 pixel.
    """

    center_nm: tuple[float, float]
    size: Size
    pixel: PixelSize

    def place(self, x_nm: float, y_nm: float) -> tuple[float, float]:
        """Level-0 pixel of a point in nanometres from the center of the glass."""
        return (
            (x_nm - self.center_nm[0]) / (1000 * self.pixel.x) + self.size.width / 2,
            (y_nm - self.center_nm[1]) / (1000 * self.pixel.y) + self.size.height / 2,
        )


class FloatBox(NamedTuple):
    """A rectangle in the pixels of one pyramid level; fractional on purpose."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Half-open rectangle in level-0 pixels; may overhang the slide.

    Attributes
    ----------
    x, y : int
        Left and top edge; negative is legal (a context overhangs the slide).
    width, height : int
        Size, at least 1.
    """

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise GeometryError(f"A box needs a positive size, got {self.width} x {self.height}")

    @classmethod
    def of(cls, size: tuple[int, int]) -> Box:
        """Box of a whole image of `size` (width, height)."""
        return cls(0, 0, *size)

    @classmethod
    def covering(cls, bounds: tuple[float, float, float, float]) -> Box:
        """Smallest box around ``(min x, min y, max x, max y)``, rounded outwards."""
        left, top = math.floor(bounds[0]), math.floor(bounds[1])
        return cls(left, top, max(1, math.ceil(bounds[2]) - left), max(1, math.ceil(bounds[3]) - top))

    @property
    def right(self) -> int:
        """First column to the right of the box."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """First row below the box."""
        return self.y + self.height

    @property
    def size(self) -> Size:
        """Width and height."""
        return Size(self.width, self.height)

    @property
    def area(self) -> int:
        """Number of level-0 pixels."""
        return self.width * self.height

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """``(min x, min y, max x, max y)``, as shapely gives it."""
        return (self.x, self.y, self.right, self.bottom)

    def shift(self, dx: int, dy: int) -> Box:
        """Return the box moved by `dx`, `dy`."""
        return Box(self.x + dx, self.y + dy, self.width, self.height)

    def grow(self, margin: int) -> Box:
        """Return the box with `margin` pixels more on every side."""
        return Box(self.x - margin, self.y - margin, self.width + 2 * margin, self.height + 2 * margin)

    def intersection(self, other: Box) -> Box | None:
        """Return the common part, or None where there is none."""
        left, top = max(self.x, other.x), max(self.y, other.y)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        if right <= left or bottom <= top:
            return None
        return Box(left, top, right - left, bottom - top)

    def contains(self, other: Box) -> bool:
        """Whether `other` lies wholly inside."""
        return self.x <= other.x and self.y <= other.y and other.right <= self.right and other.bottom <= self.bottom


def level_scale(base: tuple[int, int], level: tuple[int, int]) -> tuple[float, float]:
    """Level pixels per level-0 pixel, in x and y.

    Parameters
    ----------
    base, level : tuple of int
        Width and height of level 0 and of the level.

    Returns
    -------
    tuple of float
        Exactly ``1 / n`` where both sides of the level are the n-th part of level 0 to within a pixel, as a level is
        whose maker cut off the remainder; else the ratio of the sizes.
    """
    factor = round((base[0] / level[0] + base[1] / level[1]) / 2)
    if factor >= 1 and all(abs(whole / factor - part) < 1 for whole, part in zip(base, level, strict=True)):
        return 1 / factor, 1 / factor
    return level[0] / base[0], level[1] / base[1]


def level_box(box: Box, base: tuple[int, int], level: tuple[int, int]) -> FloatBox:
    """Place a level-0 box on a pyramid level.

    Parameters
    ----------
    box : Box
        In level-0 pixels.
    base, level : tuple of int
        Width and height of level 0 and of the level.

    Returns
    -------
    FloatBox
        The same place in level pixels, not rounded: the reader rounds once, outwards.
    """
    scale_x, scale_y = level_scale(base, level)
    return FloatBox(box.x * scale_x, box.y * scale_y, box.width * scale_x, box.height * scale_y)


@dataclass(frozen=True, slots=True)
class LevelWindow:
    """Whole pixels of a level around a place in it.

    Attributes
    ----------
    box : Box
        Whole pixels of the level, rounded outwards; may overhang it.
    inner : FloatBox
        The place inside `box`, counted from its upper left corner.
    """

    box: Box
    inner: FloatBox

    @property
    def is_whole(self) -> bool:
        """Whether the place is exactly the window, so that nothing has to be interpolated."""
        return self.inner == (0, 0, self.box.width, self.box.height)


_SLACK = 1e-6
"""Level pixels by which floating-point arithmetic may miss a whole pixel."""


def level_window(place: FloatBox, margin: tuple[float, float] = (0.0, 0.0), within: Box | None = None) -> LevelWindow:
    """Round a place on a level outwards to whole pixels: the one rounding between a box and a read.

    Parameters
    ----------
    place : FloatBox
        In pixels of the level, as `level_box` gives it.
    margin : tuple of float, optional
        Level pixels to take along in x and y, for the support of a filter.
    within : Box, optional
        Whole pixels that the margin may not leave.

    Returns
    -------
    LevelWindow
        Whole pixels, and where the place lies in them.
    """
    left, right = _snapped(place.x), _snapped(place.x + place.width)
    top, bottom = _snapped(place.y), _snapped(place.y + place.height)
    columns = _whole_pixels(left, right, margin[0], None if within is None else (within.x, within.right))
    rows = _whole_pixels(top, bottom, margin[1], None if within is None else (within.y, within.bottom))
    window = Box(columns[0], rows[0], columns[1] - columns[0], rows[1] - rows[0])
    return LevelWindow(window, FloatBox(left - window.x, top - window.y, right - left, bottom - top))


def _whole_pixels(start: float, end: float, margin: float, within: tuple[int, int] | None) -> tuple[int, int]:
    low, high = math.floor(start - margin), max(math.ceil(end + margin), math.floor(start) + 1)
    return (low, high) if within is None else (max(low, within[0]), min(high, within[1]))


def _snapped(value: float) -> float:
    return float(round(value)) if abs(value - round(value)) < _SLACK else value


def best_level(downsample: float, base: tuple[int, int], levels: tuple[tuple[int, int], ...]) -> int:
    """Coarsest level that is at least as fine as `downsample`.

    A level may be coarser than asked by 1 % (a downsample of 4.00012 serves a request for 4).

    Parameters
    ----------
    downsample : float
        Level-0 pixels per pixel that is wanted.
    base : tuple of int
        Width and height of level 0.
    levels : tuple of (int, int)
        Width and height of every level, finest first.

    Returns
    -------
    int
        Index into `levels`.
    """
    best = 0
    for index, (width, height) in enumerate(levels):
        if max(base[0] / width, base[1] / height) <= downsample * 1.01:
            best = index
    return best


def scaled_size(size: tuple[int, int], downsample: float) -> Size:
    """Size of an image at a downsample: rounded to the nearest pixel, at least 1."""
    if not downsample > 0:
        raise GeometryError(f"A downsample must be positive, got {downsample}")
    return Size(max(1, round(size[0] / downsample)), max(1, round(size[1] / downsample)))


def fit_within(size: tuple[int, int], limit: tuple[int, int]) -> Size:
    """Largest size of the same proportions within `limit`; never larger than `size`."""
    return scaled_size(size, max(1.0, size[0] / limit[0], size[1] / limit[1]))
