"""Read TIFFs: tifffile describes them, GDAL reads windows of any level."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import rasterio
import tifffile
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from darefine_qupath.errors import SlideError, SlideFormatError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.slides.cut_short import refuse_beyond_end, refuse_cut_short
from darefine_qupath.slides.pixel_size import OmeStatement, read_ome, size_by_resolution
from darefine_qupath.slides.reader import WrongPixelsError, on_white, refuse_unless_rgb, slide_error

__all__ = ["TiffReader", "refuse_disguised_tiff"]

_CACHE_BYTES = 64 << 20
"""What GDAL may keep of decoded tiles; its own limit is a share of the machine's memory."""

_AXES = {"Z": "z-slices", "T": "time points", "C": "channels", "Q": "images", "I": "images", "R": "images"}


class TiffReader:
    """A TIFF described by tifffile and read in windows through GDAL, which copies the pixels of any level.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    SlideFormatError
        If the file is no TIFF, or does not hold one 8-bit RGB image.
    SlideError
        If it was cut short.
    """

    name: ClassVar[str] = "tifffile"

    def __init__(self, path: Path) -> None:
        self._path = path
        offsets: list[int] = []
        with _opened_tiff(path) as tiff:
            series = tiff.series[0]
            _refuse_tiff(path, series)
            refuse_beyond_end(path, [level.keyframe for level in series.levels])
            said = read_ome(tiff.ome_metadata) if tiff.is_ome and tiff.ome_metadata else OmeStatement()
            self.is_ome = bool(tiff.is_ome)
            self.pixel_size = said.pixel_size or size_by_resolution(tiff)
            self.magnification = said.magnification
            page = series.keyframe
            self.tile = Size(page.tilewidth, page.tilelength) if page.is_tiled else None
            self.bounds: Box | None = None
            offsets = [int(level.keyframe.offset) for level in series.levels]
            self._left_out = [_LeftOut.of(level.keyframe) for level in series.levels]
        self._datasets = [_open_directory(path, offset) for offset in offsets]
        self.levels = tuple(Size(dataset.width, dataset.height) for dataset in self._datasets)
        self._lock = threading.Lock()

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Pixels of a window inside a level."""
        dataset = self._datasets[level]
        bands = range(1, min(dataset.count, 4) + 1)
        try:
            with self._lock, rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
                pixels = dataset.read(list(bands), window=Window(window.x, window.y, window.width, window.height))
        except RasterioError as error:
            raise slide_error(error) from error
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        left_out = self._left_out[level]
        if left_out is not None:
            left_out.paint(pixels, window)
        return pixels if pixels.shape[2] == 3 else on_white(Image.fromarray(pixels))

    def close(self) -> None:
        """Give the file back."""
        for dataset in self._datasets:
            dataset.close()


@dataclass(frozen=True)
class _LeftOut:
    """Tiles of a level that the writer left out, which are glass: GDAL shows them black."""

    tile: Size
    is_empty: NDArray[np.bool_]

    @classmethod
    def of(cls, page: tifffile.TiffPage) -> _LeftOut | None:
        if not page.is_tiled:
            return None
        across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
        is_empty = np.asarray(page.databytecounts[: across * down]) == 0
        if len(is_empty) != across * down or not is_empty.any():
            return None
        return cls(Size(page.tilewidth, page.tilelength), is_empty.reshape(down, across))

    def paint(self, pixels: NDArray[np.uint8], window: Box) -> None:
        """Make them white where they lie in a window that was read."""
        width, height = self.tile
        top, left = window.y // height, window.x // width
        below = self.is_empty[top : -(-window.bottom // height), left : -(-window.right // width)]
        for row, column in np.argwhere(below):
            y, x = (top + int(row)) * height - window.y, (left + int(column)) * width - window.x
            pixels[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = 255


@contextmanager
def _opened_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    try:
        refuse_cut_short(path)
        with tifffile.TiffFile(path) as tiff:
            if not tiff.series:
                raise SlideFormatError(f"{path}: the TIFF holds no image")
            yield tiff
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, OSError) as error:
        if isinstance(error, SlideError):
            raise
        raise SlideFormatError(f"{path}: not a readable TIFF ({error})") from error


def _refuse_tiff(path: Path, series: tifffile.TiffPageSeries) -> None:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    stacks = {_AXES.get(axis, f"planes along {axis}"): size for axis, size in sizes.items() if axis not in "YXS"}
    refuse_unless_rgb(path, str(series.dtype), 3, stacks)
    page = series.keyframe
    kind = getattr(page.photometric, "name", str(page.photometric))
    if kind not in ("RGB", "YCBCR"):
        name = {"MINISBLACK": "grey", "MINISWHITE": "grey", "PALETTE": "palette colours", "SEPARATED": "CMYK"}
        raise WrongPixelsError(f"{path}: holds {name.get(kind, kind)}; darefine reads RGB, convert the image first")
    refuse_unless_rgb(path, str(series.dtype), int(sizes.get("S", 1)), {})


def _open_directory(path: Path, offset: int) -> rasterio.DatasetReader:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(f"GTIFF_DIR:off:{offset}:{path}")
    except RasterioError as error:
        raise SlideFormatError(f"{path}: GDAL does not read this kind of TIFF ({error})") from error


def refuse_disguised_tiff(path: Path) -> bool:
    """Refuse a TIFF that OpenSlide opens as generic although it is not one 8-bit RGB image.

    OpenSlide turns whatever libtiff decodes to RGB into a slide, and shows the first plane of a stack.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    bool
        Whether it is an OME-TIFF: OpenSlide knows neither its pixel size nor its pyramid.

    Raises
    ------
    SlideFormatError
        Naming what the file holds.
    """
    with _opened_tiff(path) as tiff:
        _refuse_tiff(path, tiff.series[0])
        return bool(tiff.is_ome)
