"""The `Slide` protocol and the one class that places, pads and resamples pixels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from darefine_qupath.errors import (
    GeometryError,
    MissingMppError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
)
from darefine_qupath.geometry import (
    MPP_LIMITS,
    Box,
    FloatBox,
    Size,
    best_level,
    level_box,
    level_scale,
    level_window,
)
from darefine_qupath.slides.integrity import TileGuard, refuse_incomplete
from darefine_qupath.slides.sources import (
    FastSlideSource,
    OpenSlideSource,
    PillowSource,
    SlideStuckError,
    Source,
    TiffSource,
    fastslide_works_here,
    first_that_opens,
    is_microscopes,
    refuse_disguised_tiff,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

__all__ = ["READERS", "PyramidSlide", "Reader", "Slide", "open_slide", "resolve_mpp"]

_log = logging.getLogger(__name__)

Reader = Literal["auto", "openslide", "fastslide", "tifffile", "pillow"]
READERS: tuple[str, ...] = get_args(Reader)

_SOURCES: Mapping[str, Callable[[Path], Source]] = {
    "openslide": OpenSlideSource,
    "fastslide": FastSlideSource,
    "tifffile": TiffSource,
    "pillow": PillowSource,
}

_FastSource = FastSlideSource | TiffSource

_FAST_SOURCES: tuple[type[_FastSource], ...] = (FastSlideSource, TiffSource)
"""Readers that serve in OpenSlide's place where they agree with it, which interpolates some levels and is slow."""

_MAX_WINDOW_PIXELS = 1 << 24
"""Level pixels that are held at a time; a larger read is done in parts, with the same result."""

_MAX_SLIDE_DIFFERENCE = 2.0
"""Mean difference in grey levels up to which another reader's pixels count as OpenSlide's."""

_PROBE_SIDE = 256
_NUM_PROBES = 4


class Slide(Protocol):
    """An image that can be read at any place and size."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> Size:
        """Width and height of level 0 as QuPath sees it: cropped to OpenSlide's bounds."""

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel by the file; None where it does not say, or its pixels are not square."""

    @property
    def levels(self) -> tuple[Size, ...]:
        """Width and height of every level in the same frame, finest first."""

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Pixels of `box`, resampled to `size` (width, height): RGB, shape (height, width, 3), white outside."""

    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class PyramidSlide:
    """A slide over any source of level pixels.

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
        self._reader = reader
        self._source: Source | None = None
        self._pid = -1
        self._fast_sources: tuple[type[_FastSource], ...] = _FAST_SOURCES if reader == "auto" else ()
        self._is_probed = False
        self._fast: _FastPath | None = None
        source = self._opened()
        self._file_levels = source.levels
        whole = Box.of(source.levels[0])
        self.bounds = (source.bounds if crop_bounds else None) or whole
        self.size = self.bounds.size
        self.stated_pixel_size = source.pixel_size
        self.pixel_size = source.pixel_size if is_microscopes(source.pixel_size) else None
        self.mpp = None if self.pixel_size is None else self.pixel_size.side
        self.levels = source.levels if self.bounds == whole else _cropped(self.size, source.levels)

    @property
    def reader(self) -> str:
        """What reads the pixels: ``"openslide"``, ``"fastslide"``, ``"tifffile"`` or ``"pillow"``; probes the file."""
        source, fast = self._opened(), self._fast_path()
        return source.name if fast is None else fast.source.name

    def source(self) -> Source:
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
            return np.require(self._resampled(level, place, Size(*size)), requirements=("C", "W"))
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
        window = _clamped(level_window(level_box(in_file, base, size)).box, size)
        if window.area > _MAX_WINDOW_PIXELS or not self._is_exact(level, window):
            return None
        try:
            return _HeldSlide(self, level, window, self._read_level(level, window))
        except SlideError:
            # What is not damaged can still be read piece by piece.
            return None

    def _is_exact(self, level: int, window: Box) -> bool:
        """Whether pixels of a level are the same whatever the window they are read in."""
        source, fast = self._opened(), self._fast_path()
        if fast is not None:
            return fast.guard.is_whole(level, window)
        return not isinstance(source, OpenSlideSource) or source.is_exact(level)

    def _resampled(self, level: int, place: FloatBox, size: Size) -> NDArray[np.uint8]:
        if place.width * place.height <= _MAX_WINDOW_PIXELS or max(size) == 1:
            return self._part(level, place, size, Box.of(size))
        # Parts of the result that need about a quarter of what may be held; the filter's support comes on top.
        share = (_MAX_WINDOW_PIXELS / 4 / (place.width * place.height)) ** 0.5
        step = (max(1, int(size.width * share)), max(1, int(size.height * share)))
        result = np.empty((size.height, size.width, 3), np.uint8)
        for y in range(0, size.height, step[1]):
            for x in range(0, size.width, step[0]):
                part = Box(x, y, min(step[0], size.width - x), min(step[1], size.height - y))
                result[y : part.bottom, x : part.right] = self._part(level, place, size, part)
        return result

    def _part(self, level: int, place: FloatBox, size: Size, part: Box) -> NDArray[np.uint8]:
        """One part of the result: `part` of `size`, where all of `size` shows `place`."""
        scale = (place.width / size.width, place.height / size.height)
        kernel, support = _filter(max(scale))
        all_of_it = level_window(place)
        wanted = FloatBox(
            place.x + part.x * scale[0], place.y + part.y * scale[1], part.width * scale[0], part.height * scale[1]
        )
        margin = (support * max(1.0, scale[0]), support * max(1.0, scale[1]))
        window = level_window(wanted, margin, all_of_it.box) if part.size != size else all_of_it
        pixels = self._padded(level, window.box)
        if window.is_whole and window.box.size == part.size:
            return pixels
        x, y, width, height = window.inner
        right, bottom = min(x + width, window.box.width), min(y + height, window.box.height)
        return np.asarray(Image.fromarray(pixels).resize(part.size, kernel, box=(x, y, right, bottom)))

    def _padded(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Whole pixels of a level: white outside the frame, the last pixels repeated where the level is cut short."""
        level_size = self._file_levels[level]
        frame = level_window(level_box(self.bounds, self._file_levels[0], level_size)).box
        shown = window.intersection(frame)
        if shown == window and Box.of(level_size).contains(window):
            return self._read_level(level, window)
        canvas = np.full((window.height, window.width, 3), 255, np.uint8)
        if shown is not None:
            rows, columns = shown.y - window.y, shown.x - window.x
            pixels = self._read_level(level, _clamped(shown, level_size))
            pixels = np.pad(
                pixels, ((0, shown.height - pixels.shape[0]), (0, shown.width - pixels.shape[1]), (0, 0)), mode="edge"
            )
            canvas[rows : rows + shown.height, columns : columns + shown.width] = pixels
        return canvas

    def _opened(self) -> Source:
        """Source of this process; a handle never crosses a fork."""
        if self._source is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._fast = None
            self._source = _open_source(self.path, self._reader)
        return self._source

    def _read_level(self, level: int, window: Box) -> NDArray[np.uint8]:
        """Whole pixels inside a level: by the fast path where there is one, else as the reference reads them."""
        source, fast = self._opened(), self._fast_path()
        if fast is None or not fast.guard.is_whole(level, window):
            return source.read(level, window)
        try:
            return fast.source.read(level, window)
        except SlideStuckError as error:
            _log.warning("%s: %s; OpenSlide goes on", self.path, error)
            self._give_up_fast_source()
            return source.read(level, window)

    def _fast_path(self) -> _FastPath | None:
        """Return the fast path of this process; the first read finds out which one may be used."""
        if self._fast is None and self._fast_sources:
            self._fast = self._open_fast_path(self._opened())
        return self._fast

    def _open_fast_path(self, reference: Source) -> _FastPath | None:
        guard = TileGuard.of(self.path, reference.levels) if reference.name == "openslide" else None
        if guard is None:
            self._fast_sources = ()
            return None
        while self._fast_sources:
            fast = self._try_fast_source(self._fast_sources[0], guard, reference)
            if fast is not None:
                return fast
            self._give_up_fast_source()
        guard.close()
        return None

    def _try_fast_source(self, kind: type[_FastSource], guard: TileGuard, reference: Source) -> _FastPath | None:
        if kind is FastSlideSource and not fastslide_works_here():
            if self._is_probed:
                _warn_of_fork(os.getpid())
            return None
        try:
            fast = _FastPath(kind(self.path), guard)
        except SlideError:
            return None
        if not self._is_probed:
            self._is_probed = _same_pixels(reference, fast)
            _log.info("%s: %s %s", self.path, kind.name, "reads it" if self._is_probed else "reads it differently")
        if self._is_probed:
            return fast
        fast.source.close()
        return None

    def _give_up_fast_source(self) -> None:
        self._fast_sources, self._is_probed, self._fast = self._fast_sources[1:], False, None

    def close(self) -> None:
        """Give the file back; a later read opens it again."""
        for source in (self._source, self._fast):
            if source is not None and self._pid == os.getpid():
                source.close()
        self._source = self._fast = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_fast": None, "_pid": -1}

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


def _clamped(window: Box, size: Size) -> Box:
    """Part of a window that a level has; its last row or column where the window lies beyond it."""
    left, top = min(window.x, size.width - 1), min(window.y, size.height - 1)
    return Box(left, top, max(1, min(window.right, size.width) - left), max(1, min(window.bottom, size.height) - top))


def _cropped(size: Size, levels: tuple[Size, ...]) -> tuple[Size, ...]:
    scales = (level_scale(levels[0], level) for level in levels)
    return tuple(Size(max(1, round(size.width * x)), max(1, round(size.height * y))) for x, y in scales)


def _filter(scale: float) -> tuple[Image.Resampling, float]:
    """Filter, and its support in pixels of the result, for a reduction by `scale`.

    Against the mean of the level-0 pixels, on H&E: Hamming is nearest of Pillow's filters for reductions by 1.25 and
    2.5 (and half the work of Lanczos), the plain mean from about 4 on.
    """
    if scale <= 1:
        return Image.Resampling.BICUBIC, 2.0
    return (Image.Resampling.HAMMING, 1.0) if scale < 4 else (Image.Resampling.BOX, 0.5)


@cache
def _warn_of_fork(pid: int) -> None:
    _log.warning(
        "Process %d was forked from one that had read slides through fastslide, whose threads do not survive that; "
        "another reader goes on here. Start worker processes with 'spawn' or 'forkserver'",
        pid,
    )


@dataclass(frozen=True)
class _FastPath:
    source: _FastSource
    guard: TileGuard

    def close(self) -> None:
        self.source.close()
        self.guard.close()


def _same_pixels(reference: Source, fast: _FastPath) -> bool:
    """Whether a reader has the same levels, and the same level 0 at some places and in the last corner."""
    if fast.source.levels != reference.levels:
        return False
    try:
        for place in _probes(reference):
            if not fast.guard.is_whole(0, place):
                return False
            difference = reference.read(0, place).astype(np.int16) - fast.source.read(0, place)
            if np.abs(difference).mean() >= _MAX_SLIDE_DIFFERENCE:
                return False
    except SlideError:
        return False
    return True


def _probes(source: Source) -> tuple[Box, ...]:
    size = source.levels[0]
    frame = source.bounds or Box.of(size)
    width, height = min(_PROBE_SIDE, frame.width), min(_PROBE_SIDE, frame.height)
    places = [
        Box(frame.x + (frame.width - width) * column // 7, frame.y + (frame.height - height) * row // 7, width, height)
        for row in range(8)
        for column in range(8)
    ]
    last = source.levels[-1]
    if len(source.levels) > 1 and last.width * last.height <= _MAX_WINDOW_PIXELS:
        overview = source.read(len(source.levels) - 1, Box.of(last)).mean(axis=2)
        x_scale, y_scale = last.width / size.width, last.height / size.height

        def brightness(place: Box) -> float:
            x, y = int((place.x + width / 2) * x_scale), int((place.y + height / 2) * y_scale)
            return float(overview[min(y, last.height - 1), min(x, last.width - 1)])

        inner = sorted(places[:-1], key=brightness)
    else:
        inner = places[9:-1:13]
    return (*inner[:_NUM_PROBES], places[-1])


def _open_source(path: Path, reader: str) -> Source:
    if reader != "auto":
        return _SOURCES[reader](path)
    if path.is_dir():
        return FastSlideSource(path)
    source = first_that_opens(path, (OpenSlideSource, *_fallbacks(path)))
    if isinstance(source, OpenSlideSource):
        refuse_incomplete(path, source.levels)
        if source.is_generic:
            return _known_better(path, source)
    return source


def _known_better(path: Path, source: Source) -> Source:
    """Source of a TIFF that OpenSlide opens as generic: of an OME-TIFF that is tifffile, which knows its pyramid."""
    if not refuse_disguised_tiff(path):
        return source
    with contextlib.suppress(SlideFormatError):
        better = TiffSource(path)
        source.close()
        return better
    return source


def _fallbacks(path: Path) -> tuple[Callable[[Path], Source], ...]:
    with path.open("rb") as file:
        is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return (TiffSource, PillowSource) if is_tiff else (PillowSource, FastSlideSource)


def open_slide(path: Path | str, *, crop_bounds: bool = True, reader: str = "auto") -> PyramidSlide:
    """Open an image as QuPath sees it.

    Parameters
    ----------
    path : Path or str
        The file (or the folder of an OME-Zarr).
    crop_bounds : bool, optional
        Whether to crop to OpenSlide's bounds, as QuPath does unless its image server has ``--no-crop``.
    reader : str, optional
        ``"auto"`` takes OpenSlide, and reads through fastslide or GDAL where one of them agrees with it; an OME-TIFF
        and what OpenSlide does not open goes to tifffile with GDAL if it is a TIFF, to Pillow if it is any other
        image, to fastslide if none of them knows it.
        ``"openslide"``, ``"fastslide"``, ``"tifffile"`` and ``"pillow"`` insist on one.

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


def resolve_mpp(given: float | None, project: float | None, slide: Slide) -> float:
    """Micrometres per pixel of a slide: as given, else by the project, else by the file.

    Parameters
    ----------
    given : float or None
        By the user.
    project : float or None
        QuPath's pixel calibration.
    slide : Slide
        Whose file may know.

    Returns
    -------
    float
        Micrometres per level-0 pixel.

    Raises
    ------
    MissingMppError
        If none of them says, or one says a value outside `MPP_LIMITS`.
    """
    least, largest = MPP_LIMITS
    for value in (given, project, slide.mpp):
        if value is not None:
            if not least <= value <= largest:
                raise MissingMppError(
                    f"{slide.path}: a pixel size of {value} um is not possible; it must be {least:g} to {largest:g}"
                )
            return value
    raise MissingMppError(
        f"{slide.path}: neither the project nor the file knows the pixel size; give it with --mpp, set it in QuPath "
        f"(Image tab, double click on Pixel width), or work in pixels (slice_px, context_px, stride_px)"
    )
