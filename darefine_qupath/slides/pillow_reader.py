"""Read plain images as a whole: PNG, JPEG and the rest that Pillow opens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from darefine_qupath.errors import SlideError, SlideFormatError
from darefine_qupath.geometry import Box, PixelSize, Size
from darefine_qupath.slides.reader import WrongPixelsError, on_white

__all__ = ["PillowReader"]

MAX_PLAIN_PIXELS = 500_000_000
"""Largest image that is decoded as a whole (1.5 GB); larger ones need a tiled file."""

_pillow_limit = threading.Lock()


@contextmanager
def _large_images() -> Iterator[None]:
    """Lift Pillow's own limit, which stops at 179 megapixels; ours is checked instead."""
    with _pillow_limit:
        former, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = former


_MODES = {
    "1": "1-bit black and white",
    "L": "8-bit grey",
    "LA": "8-bit grey",
    "I": "32-bit integers",
    "F": "32-bit floating point",
    "CMYK": "CMYK",
    "LAB": "Lab colours",
    "HSV": "HSV colours",
}


class PillowReader:
    """A plain image, decoded as a whole: PNG, JPEG, JPEG 2000, BMP and the rest that Pillow opens.

    The resolution such files state is that of a screen or a printer, so they have no pixel size.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    SlideFormatError
        If Pillow does not open the file, it does not hold RGB, or it is too large to be decoded as a whole.
    SlideError
        If it is damaged.
    """

    name: ClassVar[str] = "pillow"

    def __init__(self, path: Path) -> None:
        try:
            with _large_images(), Image.open(path) as image:
                _refuse_image(path, image)
                self._pixels = on_white(image)
        except UnidentifiedImageError:
            raise SlideFormatError(f"{path}: Pillow does not know this format") from None
        except (OSError, SyntaxError, ValueError) as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{path}: the image is damaged ({error}); copy the file again") from error
        self.levels = (Size(self._pixels.shape[1], self._pixels.shape[0]),)
        self.pixel_size: PixelSize | None = None
        self.tile: Size | None = None
        self.magnification: float | None = None
        self.bounds: Box | None = None

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:  # noqa: ARG002  (there is one level)
        """Pixels of a window of the image."""
        return self._pixels[window.y : window.bottom, window.x : window.right].copy()

    def close(self) -> None:
        """Give the memory back."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _refuse_image(path: Path, image: Image.Image) -> None:
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1:
        raise WrongPixelsError(f"{path}: holds {frames} images; darefine reads single RGB images")
    if image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA"):
        kind = _MODES.get(image.mode, "16-bit grey" if image.mode.startswith("I;16") else f"mode {image.mode}")
        raise WrongPixelsError(f"{path}: holds {kind}; darefine reads RGB, convert the image first")
    if image.width * image.height > MAX_PLAIN_PIXELS:
        raise WrongPixelsError(
            f"{path}: {image.width} x {image.height} pixels are too many to decode as a whole (at most "
            f"{MAX_PLAIN_PIXELS:,}); convert it to a tiled pyramidal TIFF first"
        )
