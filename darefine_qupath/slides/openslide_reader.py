"""Read slides through OpenSlide, as QuPath does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import openslide
from numpy.typing import NDArray

from darefine_qupath.errors import SlideError, SlideFormatError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.slides.pixel_size import is_plausible_pixel_size, square_unless_both
from darefine_qupath.slides.reader import number_or_none, on_white, slide_error

__all__ = ["OpenSlideReader"]


class OpenSlideReader:
    """A file through OpenSlide.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    SlideFormatError
        If OpenSlide does not know the format.
    SlideError
        If it knows it and fails.
    """

    name: ClassVar[str] = "openslide"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = self._open()
        self.levels = tuple(Size(*size) for size in self._slide.level_dimensions)
        self._downsamples = tuple(float(factor) for factor in self._slide.level_downsamples)
        properties: Mapping[str, str] = dict(self._slide.properties)
        self.pixel_size = square_unless_both(
            number_or_none(properties.get(openslide.PROPERTY_NAME_MPP_X)),
            number_or_none(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
        )
        self.is_generic = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
        if self.is_generic and not is_plausible_pixel_size(self.pixel_size):
            # By the resolution tags, which say 72 dots per inch where nobody knew.
            self.pixel_size = None
        sides = [number_or_none(properties.get(f"openslide.level[0].tile-{axis}")) for axis in ("width", "height")]
        self.tile = Size(*(int(side) for side in sides if side)) if all(sides) else None
        self.magnification = number_or_none(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        self.bounds = _bounds(properties, self.levels[0])

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideFormatError(f"{self._path}: OpenSlide does not know this format") from None
        except openslide.OpenSlideError as error:
            raise SlideError(f"{self._path}: OpenSlide cannot open it ({error}); copy the file again") from error

    def is_exact(self, level: int) -> bool:
        """Whether OpenSlide copies the pixels of a level; at a downsample that is not whole it interpolates."""
        return self._downsamples[level].is_integer()

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Pixels of a window inside a level."""
        factor = self._downsamples[level]
        try:
            image = self._slide.read_region(
                (round(window.x * factor), round(window.y * factor)), level, (window.width, window.height)
            )
        except openslide.OpenSlideError as error:
            # One failed read puts the handle into an error state for good: the next one needs another handle.
            self._slide.close()
            self._slide = self._open()
            raise slide_error(error) from error
        return on_white(image)

    def close(self) -> None:
        """Give the file back."""
        self._slide.close()


def _bounds(properties: Mapping[str, str], size: Size) -> Box | None:
    """Where the scan lies by ``openslide.bounds-*``; None where the file does not say, or says all of it."""
    keys = (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y)
    sides = (openslide.PROPERTY_NAME_BOUNDS_WIDTH, openslide.PROPERTY_NAME_BOUNDS_HEIGHT)
    if not any(key in properties for key in keys + sides):
        return None
    x, y = (int(properties.get(key, 0)) for key in keys)
    width, height = (int(properties.get(key, whole)) for key, whole in zip(sides, size, strict=True))
    bounds = Box(x, y, width, height).intersection(Box.of(size)) if width > 0 and height > 0 else None
    return None if bounds == Box.of(size) else bounds
