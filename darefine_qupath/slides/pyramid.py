"""Open a slide and read any box of it at any size: the one class over every reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from darefine_qupath.errors import (
    GeometryError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
)
from darefine_qupath.geometry import (
    Box,
    Size,
    best_level,
    level_box,
    level_window,
)
from darefine_qupath.slides import resampling
from darefine_qupath.slides.agreement import AgreeingReader
from darefine_qupath.slides.choice import READERS, open_reader
from darefine_qupath.slides.openslide_reader import OpenSlideReader
from darefine_qupath.slides.pixel_size import is_plausible_pixel_size
from darefine_qupath.slides.reader import ImageReader
from darefine_qupath.slides.resampling import clamp_to_level, cropped_levels, read_padded, resample

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

__all__ = ["PyramidSlide", "open_slide"]


class PyramidSlide:
    """A slide over any reader of level pixels.

    It pickles by its path, and opens the file again in another process, forked or spawned. `pixel_size` is what the
    file says where it can be a microscope's, `stated_pixel_size` whatever it says; `mpp` is None for pixels that are
    not square, which nothing here resamples.

    Parameters
    ----------
    path : Path
        The file.
    crop_bounds : bool, optional
        Whether the frame is the part that holds the scan, as QuPath has it; False is its ``--no-crop``.
    reader : str, optional
        One of `READERS`.

    Raises
    ------
    SlideFormatError
        If the reader does not open the file.
    SlideError
        If the file is damaged.
    """

    def __init__(self, path: Path, *, crop_bounds: bool = True, reader: str = "auto") -> None:
        self.path = path
        self._crop_bounds = crop_bounds
        self._reader_name = reader
        self._reader: ImageReader | None = None
        self._pid = -1
        self._gdal: AgreeingReader | None = None
        self._gdal_agrees: bool | None = None if reader == "auto" else False
        opened = self._opened()
        self._file_levels = opened.levels
        whole = Box.of(opened.levels[0])
        self.bounds = (opened.bounds if crop_bounds else None) or whole
        self.size = self.bounds.size
        self.stated_pixel_size = opened.pixel_size
        self.pixel_size = opened.pixel_size if is_plausible_pixel_size(opened.pixel_size) else None
        self.mpp = None if self.pixel_size is None else self.pixel_size.side
        self.levels = opened.levels if self.bounds == whole else cropped_levels(self.size, opened.levels)

    @property
    def reader(self) -> str:
        """What reads the pixels: ``"openslide"``, ``"tifffile"`` or ``"pillow"``; compares the first two."""
        return (self._by_gdal() or self._opened()).name

    def image_reader(self) -> ImageReader:
        """Return what knows the file's format, in this process; `reader` may be a faster one that agrees with it."""
        return self._opened()

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Pixels of a box, resampled.

        Parameters
        ----------
        box : Box
            In level-0 pixels; may overhang the slide.
        size : tuple of int
            Width and height of the result.

        Returns
        -------
        ndarray of uint8, shape (height, width, 3)
            RGB, antialiased; white outside the slide. Where `size` is that of `box` these are the pixels of level 0.
            The array is the caller's to write to.

        Raises
        ------
        GeometryError
            If `size` is not positive.
        SlideError
            If the file is damaged there.
        """
        if min(size) < 1:
            raise GeometryError(f"A read needs a positive size, got {size[0]} x {size[1]}")
        in_file = box.shift(self.bounds.x, self.bounds.y)
        if in_file.intersection(self.bounds) is None:
            return np.full((size[1], size[0], 3), 255, np.uint8)
        base = self._file_levels[0]
        level = best_level(min(box.width / size[0], box.height / size[1]), base, self._file_levels)
        place = level_box(in_file, base, self._file_levels[level])
        try:
            pixels = resample(lambda window: self._padded(level, window), place, Size(*size))
            return np.require(pixels, requirements=("C", "W"))
        except SlideError as error:
            where = f"x {box.x}, y {box.y}, {box.width} x {box.height}"
            raise SlideError(
                f"{self.path}: the box {where} (level-0 pixels) cannot be read at level {level}: {error}; the file is "
                f"damaged there, copy it again or leave this part out"
            ) from error

    def hold(self, box: Box, downsample: float) -> PyramidSlide | None:
        """Take a box into memory, for many reads inside it that overlap.

        Parameters
        ----------
        box : Box
            In level-0 pixels.
        downsample : float
            At which the reads will be.

        Returns
        -------
        PyramidSlide or None
            Gives the same bytes as this slide, and shares its handle. None where they could differ, because OpenSlide
            interpolates at a downsample such as 2.000145 or a tile is damaged, and where the box is too large.
        """
        in_file = box.shift(self.bounds.x, self.bounds.y).intersection(self.bounds)
        if in_file is None:
            return None
        base = self._file_levels[0]
        level = best_level(downsample, base, self._file_levels)
        size = self._file_levels[level]
        window = clamp_to_level(level_window(level_box(in_file, base, size)).box, size)
        if window.area > resampling.MAX_WINDOW_PIXELS or not self._is_exact(level, window):
            return None
        try:
            return _HeldSlide(self, level, window, self._read_level(level, window))
        except SlideError:
            # What is not damaged can still be read piece by piece.
            return None

    def _is_exact(self, level: int, window: Box) -> bool:
        """Whether pixels of a level are the same whatever the window they are read in."""
        reader, gdal = self._opened(), self._by_gdal()
        if gdal is not None:
            return gdal.is_whole(level, window)
        return not isinstance(reader, OpenSlideReader) or reader.is_exact(level)

    def _padded(self, level: int, window: Box) -> NDArray[np.uint8]:
        size = self._file_levels[level]
        frame = level_window(level_box(self.bounds, self._file_levels[0], size)).box
        return read_padded(lambda inside: self._read_level(level, inside), window, frame, size)

    def _opened(self) -> ImageReader:
        """Reader of this process; a handle never crosses a fork."""
        if self._reader is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._gdal = None
            self._reader = open_reader(self.path, self._reader_name)
        return self._reader

    def _read_level(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Whole pixels inside a level: by GDAL where it agrees and no tile is damaged, else as the reader has them."""
        reader, gdal = self._opened(), self._by_gdal()
        return (reader if gdal is None or not gdal.is_whole(level, window) else gdal).read(level, window)

    def _by_gdal(self) -> AgreeingReader | None:
        """Return what reads in OpenSlide's place in this process; the first read finds out whether it may."""
        if self._gdal is None and self._gdal_agrees is not False:
            self._gdal = AgreeingReader.of(self.path, self._opened(), is_known_to_agree=bool(self._gdal_agrees))
            self._gdal_agrees = self._gdal is not None
        return self._gdal

    def close(self) -> None:
        """Give the file back; a later read opens it again."""
        for opened in (self._reader, self._gdal):
            if opened is not None and self._pid == os.getpid():
                opened.close()
        self._reader = self._gdal = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_gdal": None, "_pid": -1}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.size.width} x {self.size.height}, mpp={self.mpp})"


class _HeldSlide(PyramidSlide):
    """A slide that has some pixels of one level in memory; see `PyramidSlide.hold`."""

    def __init__(self, slide: PyramidSlide, level: int, window: Box, pixels: NDArray[np.uint8]) -> None:
        self.__dict__.update(slide.__dict__)
        self._held_level, self._held_window, self._held = level, window, pixels

    def _read_level(self, level: int, window: Box) -> NDArray[np.uint8]:
        if level != self._held_level or not self._held_window.contains(window):
            return super()._read_level(level, window)
        x, y = window.x - self._held_window.x, window.y - self._held_window.y
        return self._held[y : y + window.height, x : x + window.width].copy()


def open_slide(path: Path | str, *, crop_bounds: bool = True, reader: str = "auto") -> PyramidSlide:
    """Open an image as QuPath sees it.

    Parameters
    ----------
    path : Path or str
        The file.
    crop_bounds : bool, optional
        Whether to crop to OpenSlide's bounds, as QuPath does unless its image server has ``--no-crop``.
    reader : str, optional
        ``"auto"`` takes OpenSlide, and reads through GDAL where that agrees with it; an OME-TIFF and what OpenSlide
        does not open goes to tifffile with GDAL if it is a TIFF, to Pillow if it is any other image.
        ``"openslide"``, ``"tifffile"`` and ``"pillow"`` insist on one.

    Returns
    -------
    PyramidSlide
        Close it, or use ``with``. It pickles, and may cross a fork.

    Raises
    ------
    SlideNotFoundError
        If nothing is there.
    SlideFormatError
        If no reader opens the file, or it does not hold one 8-bit RGB image.
    SlideError
        If the file is damaged.
    """
    path = Path(path)
    if reader not in READERS:
        raise SlideFormatError(f"There is no reader {reader!r}; it is one of {', '.join(READERS)}")
    if not path.exists():
        raise SlideNotFoundError(f"{path}: there is no such image")
    return PyramidSlide(path, crop_bounds=crop_bounds, reader=reader)
