"""What opens an image file: OpenSlide, fastslide, TIFF through tifffile and GDAL, anything else through Pillow.

A source gives whole pixels of one level, inside that level, in the frame of the file (bounds not cropped), and nothing
else: placing, padding and resampling happen once, in `reading`.
"""

from __future__ import annotations

import math
import os
import threading
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import openslide
import rasterio
import tifffile
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring as parse_xml
from PIL import Image, UnidentifiedImageError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from darefine_qupath.errors import SlideError, SlideFormatError
from darefine_qupath.geometry import Box, PixelSize, Size
from darefine_qupath.slides.integrity import refuse_beyond_end, refuse_cut_short

try:
    import fastslide
except ImportError:  # no wheel for this platform
    fastslide = None

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = [
    "FastSlideSource",
    "OpenSlideSource",
    "PillowSource",
    "SlideStuckError",
    "Source",
    "TiffSource",
    "fastslide_works_here",
    "first_that_opens",
    "is_microscopes",
    "refuse_disguised_tiff",
]

_MICROSCOPES = (0.01, 20.0)
"""Micrometres per pixel of a microscope."""

MAX_PLAIN_PIXELS = 500_000_000
"""Largest image that is decoded as a whole (1.5 GB); larger ones need a tiled file."""

_CACHE_BYTES = 64 << 20
"""What fastslide and GDAL may keep of decoded tiles; GDAL's own limit is a share of the machine's memory."""

FAST_PATIENCE_S = 20.0
"""Seconds after which a read through fastslide counts as lost: some damaged tiles make it wait forever."""


class Source(Protocol):
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


class _WrongPixelsError(SlideFormatError):
    """The file is understood and holds something other than one 8-bit RGB image: no other reader is asked."""


def _pixel_size(x: float | None, y: float | None) -> PixelSize | None:
    """Size of a pixel; the axis that is not stated is as long as the other."""
    if x is None or y is None:
        x = y = y if x is None else x
    return None if x is None or y is None else PixelSize(x, y)


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unreadable(error: Exception) -> SlideError:
    return SlideError(_reason(error))


class OpenSlideSource:
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
        self.pixel_size = _pixel_size(
            _number(properties.get(openslide.PROPERTY_NAME_MPP_X)),
            _number(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
        )
        self.is_generic = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
        if self.is_generic and not is_microscopes(self.pixel_size):
            # By the resolution tags, which say 72 dots per inch where nobody knew.
            self.pixel_size = None
        sides = [_number(properties.get(f"openslide.level[0].tile-{axis}")) for axis in ("width", "height")]
        self.tile = Size(*(int(side) for side in sides if side)) if all(sides) else None
        self.magnification = _number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
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
            raise _unreadable(error) from error
        return _on_white(image)

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


def _on_white(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels of an image; what is transparent shows white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB"))


_fastslide_reads_in: int | None = None


def fastslide_works_here() -> bool:
    """Whether fastslide can be used in this process.

    Its threads start with the first read and do not survive a fork: in the child of a process that has read through
    it, any read would wait forever.
    """
    return fastslide is not None and _fastslide_reads_in in (None, os.getpid())


class SlideStuckError(SlideError):
    """A reader does not come back."""


def _within(patience_s: float, function: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Call a function in a thread that is given up when it takes too long."""
    results: list[NDArray[np.uint8] | Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(patience_s)
    if not results:
        raise TimeoutError
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


class FastSlideSource:
    """A file through fastslide.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    SlideFormatError
        If fastslide is not installed, does not open the file, or the file does not hold 8-bit RGB.
    """

    name: ClassVar[str] = "fastslide"

    def __init__(self, path: Path) -> None:
        if fastslide is None:
            raise SlideFormatError(f"{path}: fastslide is not installed; pip install fastslide")
        if not fastslide_works_here():
            raise SlideFormatError(
                f"{path}: fastslide was used before this process was forked and would wait forever; start workers with "
                f"'spawn', or use reader='openslide'"
            )
        self._path = path
        self._is_stuck = False
        try:
            self._slide = fastslide.FastSlide.from_file_path(path, cache=_CACHE_BYTES)
        except (RuntimeError, ValueError, OSError) as error:
            raise SlideFormatError(f"{path}: fastslide does not open it ({_reason(error)})") from error
        slide = self._slide
        if not slide.level_dimensions:
            raise SlideFormatError(f"{path}: fastslide finds no image in it")
        _refuse_unless_rgb(
            path, slide.dtype, slide.num_channels, {"z-slices": slide.z_count, "time points": slide.t_count}
        )
        self.levels = tuple(Size(*size) for size in slide.level_dimensions)
        self.pixel_size = _pixel_size(*(float(value) if value else None for value in slide.mpp))
        self.tile: Size | None = None
        self.magnification: float | None = None
        (x, y), (width, height) = slide.bounds
        bounds = Box(x, y, width, height) if width > 0 and height > 0 else None
        self.bounds = None if bounds == Box.of(self.levels[0]) else bounds

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Pixels of a window inside a level."""
        global _fastslide_reads_in
        _fastslide_reads_in = os.getpid()
        try:
            pixels = _within(FAST_PATIENCE_S, lambda: self._read(level, window))
        except TimeoutError:
            self._is_stuck = True
            raise SlideStuckError(f"fastslide gave no answer in {FAST_PATIENCE_S:g} s") from None
        except (RuntimeError, ValueError, OSError) as error:
            raise _unreadable(error) from error
        if pixels.shape[:2] != (window.height, window.width):
            raise SlideError(f"fastslide gave {pixels.shape[1]} x {pixels.shape[0]} pixels")
        return pixels if pixels.shape[2] == 3 else _on_white(Image.fromarray(pixels))

    def _read(self, level: int, window: Box) -> NDArray[np.uint8]:
        image = self._slide.read_region(location=(window.x, window.y), level=level, size=tuple(window.size))
        return np.asarray(image.numpy())

    def close(self) -> None:
        """Give the file back, unless a read is lost in it."""
        if not self._is_stuck:
            self._slide.close()


def _refuse_unless_rgb(path: Path, dtype: str, channels: int, stacks: Mapping[str, int]) -> None:
    for what, number in stacks.items():
        if number > 1:
            raise _WrongPixelsError(f"{path}: holds {number} {what}; darefine reads single RGB images")
    if dtype != "uint8":
        raise _WrongPixelsError(f"{path}: pixels are {dtype}; darefine reads 8-bit RGB, convert the image first")
    if channels not in (3, 4):
        what = "1 channel (grey)" if channels == 1 else f"{channels} channels"
        raise _WrongPixelsError(f"{path}: holds {what}; darefine reads RGB, convert the image first")


_AXES = {"Z": "z-slices", "T": "time points", "C": "channels", "Q": "images", "I": "images", "R": "images"}


class TiffSource:
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
            said = _ome(tiff.ome_metadata) if tiff.is_ome and tiff.ome_metadata else _Ome()
            self.is_ome = bool(tiff.is_ome)
            self.pixel_size = said.pixel_size or _by_resolution(tiff)
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
            raise _unreadable(error) from error
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        left_out = self._left_out[level]
        if left_out is not None:
            left_out.paint(pixels, window)
        return pixels if pixels.shape[2] == 3 else _on_white(Image.fromarray(pixels))

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
    _refuse_unless_rgb(path, str(series.dtype), 3, stacks)
    page = series.keyframe
    kind = getattr(page.photometric, "name", str(page.photometric))
    if kind not in ("RGB", "YCBCR"):
        name = {"MINISBLACK": "grey", "MINISWHITE": "grey", "PALETTE": "palette colours", "SEPARATED": "CMYK"}
        raise _WrongPixelsError(f"{path}: holds {name.get(kind, kind)}; darefine reads RGB, convert the image first")
    _refuse_unless_rgb(path, str(series.dtype), int(sizes.get("S", 1)), {})


def _open_directory(path: Path, offset: int) -> rasterio.DatasetReader:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(f"GTIFF_DIR:off:{offset}:{path}")
    except RasterioError as error:
        raise SlideFormatError(f"{path}: GDAL does not read this kind of TIFF ({error})") from error


def is_microscopes(size: PixelSize | None) -> bool:
    """Whether pixels may be those of a microscope; 72 and 96 dots per inch would be 353 and 265 micrometres."""
    return size is not None and all(_MICROSCOPES[0] <= value <= _MICROSCOPES[1] for value in size)


def _by_resolution(tiff: tifffile.TiffFile) -> PixelSize | None:
    """Size of a pixel by ImageJ's unit or the resolution tags, unless they hold a mere default."""
    page = tiff.pages.first
    resolution = [_ratio(page.tags.valueof(name)) for name in ("XResolution", "YResolution")]
    unit = getattr(page.tags.valueof("ResolutionUnit"), "name", "")
    scale = {"CENTIMETER": 10_000.0, "INCH": 25_400.0}.get(unit)
    ij_unit = str((tiff.imagej_metadata or {}).get("unit", ""))
    # ImageJ escapes what is not ASCII.
    scale = _UNITS_UM.get(unicodedata.normalize("NFKC", ij_unit.replace("\\u00B5", "\u00b5")), scale)
    if scale is None:
        return None
    found = _pixel_size(*(scale / value if value else None for value in resolution))
    return found if is_microscopes(found) else None


def _ratio(value: object) -> float | None:
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return float(value[0] / value[1])
    return _number(value) if value is not None else None


_UNITS_UM = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "\u03bcm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0,
    "nm": 1e-3, "pm": 1e-6, "\u00c5": 1e-4, "in": 25_400.0, "thou": 25.4,
}  # fmt: skip
"""Micrometres in the units of length of the OME schema that microscopes use; pixels are no length."""


@dataclass(frozen=True)
class _Ome:
    """What OME-XML says of the first image of a file."""

    pixel_size: PixelSize | None = None
    magnification: float | None = None


def _ome(text: str) -> _Ome:
    try:
        elements: dict[str, Element] = {}
        for element in parse_xml(text).iter():
            elements.setdefault(element.tag.rpartition("}")[2], element)
    except (ParseError, DefusedXmlException, ValueError):
        return _Ome()
    pixels, objective = elements.get("Pixels"), elements.get("Objective")

    def side(axis: str) -> float | None:
        value = _number(None if pixels is None else pixels.get(f"PhysicalSize{axis}"))
        unit = "" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "um")
        # NFKC makes one of the two code points of the micro sign, and of the angstrom.
        scale = _UNITS_UM.get(unicodedata.normalize("NFKC", unit).strip())
        # 250 nm are 0.25 um, not 0.25000000000000006.
        return None if value is None or scale is None else float(f"{value * scale:.12g}")

    power = _number(None if objective is None else objective.get("NominalMagnification"))
    return _Ome(_pixel_size(side("X"), side("Y")), power if power is not None and 0 < power < math.inf else None)


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


class PillowSource:
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
                self._pixels = _on_white(image)
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
        raise _WrongPixelsError(f"{path}: holds {frames} images; darefine reads single RGB images")
    if image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA"):
        kind = _MODES.get(image.mode, "16-bit grey" if image.mode.startswith("I;16") else f"mode {image.mode}")
        raise _WrongPixelsError(f"{path}: holds {kind}; darefine reads RGB, convert the image first")
    if image.width * image.height > MAX_PLAIN_PIXELS:
        raise _WrongPixelsError(
            f"{path}: {image.width} x {image.height} pixels are too many to decode as a whole (at most "
            f"{MAX_PLAIN_PIXELS:,}); convert it to a tiled pyramidal TIFF first"
        )


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


def first_that_opens(path: Path, readers: Sequence[Callable[[Path], Source]]) -> Source:
    """Open a file with the first reader that knows its format.

    Parameters
    ----------
    path : Path
        The file.
    readers : sequence of callable
        In order of preference.

    Returns
    -------
    Source
        Of the first reader that does not refuse the format.

    Raises
    ------
    SlideFormatError
        What every reader said; or what the first one said that finds something other than RGB.
    SlideError
        As soon as a reader knows the format and the file is damaged.
    """
    refusals = []
    for reader in readers:
        source, refusal = _tried(path, reader)
        if source is not None:
            return source
        refusals.append(refusal.removeprefix(f"{path}: "))
    raise SlideFormatError(f"{path}: no reader opens this file: {'; '.join(refusals)}; convert it to a pyramidal TIFF")


def _tried(path: Path, reader: Callable[[Path], Source]) -> tuple[Source | None, str]:
    try:
        return reader(path), ""
    except _WrongPixelsError:
        raise
    except SlideFormatError as error:
        return None, str(error)
