"""What QuPath would say of an image file: size, pixel size, levels, thumbnail.

OpenSlide comes first, as in QuPath; what it does not open is asked of Pillow. Sizes are those QuPath sees: cropped to
OpenSlide's bounds where the file has them, unless the server is told ``--no-crop``.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from darefine_qupath.errors import SlideFormatError, SlideNotFoundError
from darefine_qupath.geometry import Box, Size, fit_within
from darefine_qupath.project.files import BIO_FORMATS, IMAGEJ, OPENSLIDE

__all__ = ["ImageFile", "probe", "thumbnail"]

_THUMBNAIL_LIMIT = (1000, 600)
_LARGEST_MPP = 100.0
"""A TIFF of "72 dots per inch" has 353 micrometres per pixel: a default, not a measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """An image file as QuPath's server for it would describe it.

    Attributes
    ----------
    provider : str
        Java class of the server.
    args : tuple of str
        Its arguments.
    levels : tuple of Size
        Full resolution first.
    tile : Size
        Preferred tile.
    mpp : tuple of float or None
        Micrometres per pixel in x and y.
    magnification : float or None
        Of the objective.
    is_rgb : bool
        Whether it is plain 8-bit colour.
    """

    provider: str
    args: tuple[str, ...] = ()
    levels: tuple[Size, ...]
    tile: Size
    mpp: tuple[float, float] | None = None
    magnification: float | None = None
    is_rgb: bool = True

    @property
    def size(self) -> Size:
        """Level-0 pixels."""
        return self.levels[0]


def probe(path: Path, args: Sequence[str] = ()) -> ImageFile:
    """Describe an image file.

    Parameters
    ----------
    path : Path
        The file.
    args : sequence of str, optional
        Arguments of the image server; ``"--no-crop"`` matters.

    Returns
    -------
    ImageFile
        Without any pixel read.

    Raises
    ------
    SlideNotFoundError
        If the file is not there.
    SlideFormatError
        If neither reader opens it.
    """
    with _opened(path) as image:
        if isinstance(image, openslide.OpenSlide):
            return _probe_slide(image, args)
        return _probe_plain(image)


def thumbnail(path: Path, args: Sequence[str] = ()) -> bytes:
    """JPEG of an image file, at most 1000 x 600 as QuPath's import command makes it.

    Raises
    ------
    SlideNotFoundError
        If the file is not there.
    SlideFormatError
        If it cannot be read.
    """
    try:
        with _opened(path) as image:
            small = _slide_thumbnail(image, args) if isinstance(image, openslide.OpenSlide) else _plain_thumbnail(image)
    except (OSError, openslide.OpenSlideError, Image.DecompressionBombError) as error:
        if isinstance(error, SlideNotFoundError | SlideFormatError):
            raise
        raise SlideFormatError(f"{path} cannot be read: {error}") from error
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=90)
    return stream.getvalue()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[openslide.OpenSlide | Image.Image]:
    if not path.is_file():
        raise SlideNotFoundError(f"There is no image {path}")
    with _open(path) as image:
        yield image


def _open(path: Path) -> openslide.OpenSlide | Image.Image:
    with contextlib.suppress(openslide.OpenSlideError):
        return openslide.OpenSlide(path)
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SlideFormatError(
            f"{path} cannot be opened by OpenSlide or Pillow; convert it to a pyramidal TIFF"
        ) from error


# -- OpenSlide


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(properties[name])
    except (KeyError, ValueError):
        return None
    # OpenSlide computes 0.46700000000000003 from the file's 0.467.
    return float(f"{value:.12g}") if 0 < value < math.inf else None


def _pair(properties: Mapping[str, str]) -> tuple[float, float] | None:
    names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    across, down = (_number(properties, name) for name in names)
    return None if across is None or down is None else (across, down)


def _bounds(slide: openslide.OpenSlide, args: Sequence[str]) -> Box:
    """Part of the slide that QuPath shows, in level-0 pixels of OpenSlide."""
    names = ("x", "y", "width", "height")
    values = [slide.properties.get(f"openslide.bounds-{name}", "") for name in names]
    if "--no-crop" in args or not all(value.isdigit() for value in values):
        return Box.of(slide.dimensions)
    return Box(*map(int, values))


def _probe_slide(slide: openslide.OpenSlide, args: Sequence[str]) -> ImageFile:
    bounds = _bounds(slide, args)
    base = Size(*slide.dimensions)
    levels = [Size(*level) for level in slide.level_dimensions]
    if bounds.size != base:
        # Rounded down, as QuPath cuts the levels of a cropped slide.
        levels = [
            Size(max(1, bounds.width * level.width // base.width), max(1, bounds.height * level.height // base.height))
            for level in levels
        ]
    tile = [_number(slide.properties, f"openslide.level[0].tile-{axis}") or 256 for axis in ("width", "height")]
    return ImageFile(
        provider=OPENSLIDE,
        args=tuple(args),
        levels=tuple(levels),
        tile=Size(int(tile[0]), int(tile[1])),
        mpp=_pair(slide.properties),
        magnification=_number(slide.properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER),
    )


def _slide_thumbnail(slide: openslide.OpenSlide, args: Sequence[str]) -> Image.Image:
    bounds = _bounds(slide, args)
    size = fit_within(bounds.size, _THUMBNAIL_LIMIT)
    level = slide.get_best_level_for_downsample(bounds.width / size.width)
    across, down = (slide.level_dimensions[level][axis] / slide.dimensions[axis] for axis in (0, 1))
    part = (max(1, round(bounds.width * across)), max(1, round(bounds.height * down)))
    pixels = slide.read_region((bounds.x, bounds.y), level, part)
    colour = f"#{slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, 'ffffff').removeprefix('#')}"
    flat = Image.new("RGB", pixels.size, colour)
    flat.paste(pixels, mask=pixels.getchannel("A"))
    return flat.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


# -- Pillow


def _probe_plain(image: Image.Image) -> ImageFile:
    by_imagej = image.format in ("PNG", "JPEG", "GIF", "BMP")
    size = Size(*image.size)
    return ImageFile(
        provider=IMAGEJ if by_imagej else BIO_FORMATS,
        args=() if by_imagej else ("--series", "0"),
        levels=(size,),
        tile=size,
        mpp=_resolution(image) if image.format == "TIFF" else None,
        is_rgb=image.mode in ("RGB", "RGBA") and image.format != "JPEG2000",
    )


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    """Micrometres per pixel of a TIFF's resolution tags; None where they hold a mere default."""
    tags = getattr(image, "tag_v2", {})
    unit_um = {2: 25400.0, 3: 10000.0}.get(tags.get(296, 2))
    across, down = (float(tags.get(number, 0) or 0) for number in (282, 283))
    if unit_um is None or across <= 0 or down <= 0:
        return None
    mpp = (unit_um / across, unit_um / down)
    return mpp if max(mpp) <= _LARGEST_MPP else None


def _plain_thumbnail(image: Image.Image) -> Image.Image:
    size = fit_within(image.size, _THUMBNAIL_LIMIT)
    image.draft("RGB", size)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        spread = max(float(values.max() - values.min()), 1e-9)
        image = Image.fromarray(((values - values.min()) * (255 / spread)).astype(np.uint8))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
