"""Define what a reader of image files gives, whatever the format, and refuse what is not 8-bit RGB.

A reader gives whole pixels of one level, inside that level, in the frame of the file (bounds not cropped), and nothing
else: placing, padding and resampling happen once, in `resampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darefine_qupath.errors import SlideError, SlideFormatError
from darefine_qupath.geometry import Box, PixelSize, Size

__all__ = [
    "ImageReader",
    "WrongPixelsError",
    "number_or_none",
    "on_white",
    "refuse_unless_rgb",
    "slide_error",
]


class ImageReader(Protocol):
    """An open image file."""

    @property
    def name(self) -> str:
        """The reader."""

    @property
    def levels(self) -> tuple[Size, ...]:
        """Width and height of every level as stored, finest first."""

    @property
    def pixel_size(self) -> PixelSize | None:
        """As the file states it, possible or not; None where it states none."""

    @property
    def tile(self) -> Size | None:
        """Width and height of the tiles of level 0, where it has some."""

    @property
    def magnification(self) -> float | None:
        """Of the objective, where the file says."""

    @property
    def bounds(self) -> Box | None:
        """The part that holds the scan, where the file says so."""

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Pixels of a window inside a level, RGB on white, shape (height, width, 3); SlideError if it is damaged."""

    def close(self) -> None:
        """Give the file back."""


class WrongPixelsError(SlideFormatError):
    """The file is understood and holds something other than one 8-bit RGB image: no other reader is asked."""


def number_or_none(text: object) -> float | None:
    """Read a number; None where there is none."""
    try:
        return float(str(text))
    except ValueError:
        return None


def slide_error(error: Exception) -> SlideError:
    """Error with the first line of what a library says."""
    return SlideError(next(iter(str(error).splitlines()), type(error).__name__))


def on_white(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels of an image; what is transparent shows white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB"))


def refuse_unless_rgb(path: Path, dtype: str, channels: int, stacks: Mapping[str, int]) -> None:
    """Refuse an image that is not one plane of 8-bit RGB.

    Raises
    ------
    WrongPixelsError
        Naming what the file holds.
    """
    for what, number in stacks.items():
        if number > 1:
            raise WrongPixelsError(f"{path}: holds {number} {what}; darefine reads single RGB images")
    if dtype != "uint8":
        raise WrongPixelsError(f"{path}: pixels are {dtype}; darefine reads 8-bit RGB, convert the image first")
    if channels not in (3, 4):
        what = "1 channel (grey)" if channels == 1 else f"{channels} channels"
        raise WrongPixelsError(f"{path}: holds {what}; darefine reads RGB, convert the image first")
