"""What opens an image file: OpenSlide, fastslide, TIFF through tifffile and GDAL, anything else through Pillow.

A source gives whole pixels of one level, inside that level, in the frame of the file (bounds not cropped), and nothing
else: placing, padding and resampling happen once, in `reading`.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol
from xml.etree.ElementTree import ParseError

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
from darefine_qupath.geometry import Box, Size
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
    "plausible_mpp",
    "refuse_disguised_tiff",
]

MAX_PLAIN_PIXELS = 500_000_000
"""Largest image that is decoded as a whole (1.5 GB); larger ones need a tiled file."""

_PLAUSIBLE_MPP = (0.01, 20.0)
"""Micrometres per pixel of a microscope; 72 and 96 dots per inch would be 353 and 265."""

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
    def mpp(self) -> float | None:
        """Micrometres per pixel by the file, mean of x and y."""

    @property
    def bounds(self) -> Box | None:
        """The part that holds the scan, where the file says so."""

    def read(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Pixels of a window inside a level, RGB on white, shape (height, width, 3); SlideError if it is damaged."""

    def close(self) -> None:
        """Give the file back."""


class _WrongPixelsError(SlideFormatError):
    """The file is understood and holds something other than one 8-bit RGB image: no other reader is asked."""


def plausible_mpp(x: float | None, y: float | None) -> float | None:
    """Mean of two pixel sizes in micrometres; None where they are missing or no microscope's."""
    low, high = _PLAUSIBLE_MPP
    values = [value for value in (x, y) if value is not None and math.isfinite(value) and low <= value <= high]
    return sum(values) / len(values) if values else None


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
        self.vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
        self.mpp = plausible_mpp(
            _number(properties.get(openslide.PROPERTY_NAME_MPP_X)),
            _number(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
        )
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
            raise SlideFormatError("fastslide is not installed; pip install fastslide")
        if not fastslide_works_here():
            raise SlideFormatError(
                "fastslide was used before this process was forked and would wait forever; start workers with 'spawn', "
                "or use reader='openslide'"
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
        self.mpp = plausible_mpp(*slide.mpp)
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
            self.mpp = _tiff_mpp(tiff)
            self.bounds: Box | None = None
            offsets = [int(level.keyframe.offset) for level in series.levels]
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
        return pixels if pixels.shape[2] == 3 else _on_white(Image.fromarray(pixels))

    def close(self) -> None:
        """Give the file back."""
        for dataset in self._datasets:
            dataset.close()


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


def _tiff_mpp(tiff: tifffile.TiffFile) -> float | None:
    """Pixel size by OME-XML, ImageJ's unit or the resolution tags, in this order."""
    if tiff.is_ome and tiff.ome_metadata:
        found = _ome_mpp(tiff.ome_metadata)
        if found is not None:
            return found
    page = tiff.pages.first
    resolution = [_ratio(page.tags.valueof(name)) for name in ("XResolution", "YResolution")]
    unit = getattr(page.tags.valueof("ResolutionUnit"), "name", "")
    scale = {"CENTIMETER": 10_000.0, "INCH": 25_400.0}.get(unit)
    ij_unit = str((tiff.imagej_metadata or {}).get("unit", ""))
    if ij_unit in ("micron", "microns", "um", "µm", "μm", "\\u00B5m"):
        scale = 1.0
    if scale is None:
        return None
    return plausible_mpp(*(scale / value if value else None for value in resolution))


def _ratio(value: object) -> float | None:
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return float(value[0] / value[1])
    return _number(value) if value is not None else None


_OME_UNITS = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 0.001, "mm": 1000.0}


def _ome_mpp(text: str) -> float | None:
    try:
        pixels = next(element for element in parse_xml(text).iter() if element.tag.rpartition("}")[2] == "Pixels")
    except (StopIteration, ParseError, DefusedXmlException):
        return None

    def size(axis: str) -> float | None:
        value = _number(pixels.get(f"PhysicalSize{axis}"))
        unit = _OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        return value * unit if value is not None and unit is not None else None

    return plausible_mpp(size("X"), size("Y"))


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
        self.mpp: float | None = None
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


def refuse_disguised_tiff(path: Path) -> None:
    """Refuse a TIFF that OpenSlide opens as generic although it is not one 8-bit RGB image.

    OpenSlide turns whatever libtiff decodes to RGB into a slide, and shows the first plane of a stack.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    SlideFormatError
        Naming what the file holds.
    """
    with _opened_tiff(path) as tiff:
        _refuse_tiff(path, tiff.series[0])


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
    raise SlideFormatError(f"{path}: no reader opens this file: {'; '.join(refusals)}")


def _tried(path: Path, reader: Callable[[Path], Source]) -> tuple[Source | None, str]:
    try:
        return reader(path), ""
    except _WrongPixelsError:
        raise
    except SlideFormatError as error:
        return None, str(error)
