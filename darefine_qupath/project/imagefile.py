"""Describe an image file as QuPath would: size, pixel size, levels, thumbnail, server builder.

`slides` answers, so that what it opens can be added to a project, and is there what darefine reads. Sizes are those
QuPath sees: cropped to OpenSlide's bounds where the file has them, unless the server is told ``--no-crop``. What
`slides` refuses because it is not 8-bit RGB is described by its header: QuPath shows it, darefine passes over it.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from darefine_qupath.errors import ProjectUnsupportedError, SlideError, SlideFormatError, SlideNotFoundError
from darefine_qupath.geometry import Box, PixelSize, Size, fit_within
from darefine_qupath.limits import naming
from darefine_qupath.project.interface import is_cropped
from darefine_qupath.project.lenient_json import JsonObject
from darefine_qupath.project.servers import BIO_FORMATS, IMAGEJ, OPENSLIDE, image_metadata, is_since, server_builder
from darefine_qupath.project.uris import file_uri
from darefine_qupath.slides import PyramidSlide, open_slide

__all__ = ["ImageFile", "builder_of", "probe", "thumbnail"]

_log = logging.getLogger(__name__)

_THUMBNAIL_LIMIT = (1000, 600)
_DEFAULT_TILE = Size(256, 256)


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
    pixel_size : PixelSize or None
        Of level 0.
    magnification : float or None
        Of the objective.
    is_rgb : bool
        Whether QuPath has it as plain 8-bit colour.
    is_readable : bool
        Whether `slides` opens it.
    """

    provider: str
    args: tuple[str, ...] = ()
    levels: tuple[Size, ...]
    tile: Size
    pixel_size: PixelSize | None = None
    magnification: float | None = None
    is_rgb: bool = True
    is_readable: bool = True

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

    Raises
    ------
    SlideNotFoundError
        If the file is not there.
    SlideFormatError
        If no reader opens it.
    SlideError
        If it is damaged.
    """
    with naming(path, SlideFormatError):
        return _probed(path, args)


def _probed(path: Path, args: Sequence[str]) -> ImageFile:
    _refuse_missing(path)
    try:
        with open_slide(path, crop_bounds=is_cropped(args)) as slide:
            if slide.image_reader().name != "pillow":
                return _described(slide, args)
    except SlideFormatError as refusal:
        with _header(path, refusal) as image:
            return replace(_by_header(image, is_rgb=False), is_readable=False)
    with _header(path) as image:
        # QuPath takes the pixels of a palette or a JPEG 2000 for something else than 8-bit colour.
        return _by_header(image, is_rgb=image.mode in ("RGB", "RGBA") and image.format != "JPEG2000")


def thumbnail(path: Path, args: Sequence[str] = ()) -> bytes:
    """JPEG of an image file, at most 1000 x 600 as QuPath's import command makes it.

    Raises
    ------
    SlideNotFoundError
        If the file is not there.
    SlideError
        If it cannot be read.
    """
    with naming(path, SlideFormatError):
        return _drawn(path, args)


def _drawn(path: Path, args: Sequence[str]) -> bytes:
    _refuse_missing(path)
    try:
        with open_slide(path, crop_bounds=is_cropped(args)) as slide:
            small = Image.fromarray(slide.read(Box.of(slide.size), fit_within(slide.size, _THUMBNAIL_LIMIT)))
    except SlideFormatError as refusal:
        with _header(path, refusal) as image:
            small = _decoded(path, image)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise SlideNotFoundError(f"There is no image {path}")


def _described(slide: PyramidSlide, args: Sequence[str]) -> ImageFile:
    source = slide.image_reader()
    levels = source.levels
    if slide.size != levels[0]:
        # Rounded down, as QuPath cuts the levels of a cropped slide.
        levels = tuple(
            Size(max(1, slide.size.width * x // levels[0].width), max(1, slide.size.height * y // levels[0].height))
            for x, y in levels
        )
    by_openslide = source.name == "openslide"
    return ImageFile(
        provider=OPENSLIDE if by_openslide else BIO_FORMATS,
        args=tuple(args) if by_openslide else ("--series", "0"),
        # Of a TIFF's pages that are no OME pyramid, Bio-Formats makes images of their own.
        levels=levels if by_openslide or getattr(source, "is_ome", False) else levels[:1],
        tile=source.tile or (_DEFAULT_TILE if by_openslide else slide.size),
        # OpenSlide computes 0.46700000000000003 from the file's 0.467.
        pixel_size=slide.pixel_size and PixelSize(*(float(f"{side:.12g}") for side in slide.pixel_size)),
        magnification=source.magnification,
    )


def builder_of(path: Path, name: str, found: ImageFile, mpp: float | None, version: str) -> JsonObject:
    """Make the server builder of an image file that is added to a project; `mpp` goes over what the file says."""
    metadata = None
    if found.is_rgb:
        metadata = image_metadata(
            name=name,
            levels=found.levels,
            tile=found.tile,
            mpp=found.pixel_size if mpp is None else (mpp, mpp),
            magnification=found.magnification,
            has_timepoints=found.provider == IMAGEJ and is_since(version, 0, 6),
        )
    elif mpp is not None and found.is_readable:
        _log.warning(
            "%s: the project cannot hold the pixel size of %s um of a file of this kind; set it in QuPath, or give "
            "--mpp each time",
            path,
            mpp,
        )
    elif mpp is not None:
        raise ProjectUnsupportedError(
            f"{path} is not an 8-bit RGB image: its pixel size cannot be set here; set it in QuPath"
        )
    return server_builder(file_uri(path), provider=found.provider, args=found.args, metadata=metadata)


@contextlib.contextmanager
def _header(path: Path, refusal: SlideFormatError | None = None) -> Iterator[Image.Image]:
    """Open an image that Pillow knows; what it does not know is refused as `slides` refused it."""
    try:
        image = Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise refusal or SlideFormatError(f"{path} cannot be read: {error}") from error
    with image:
        yield image


def _by_header(image: Image.Image, *, is_rgb: bool) -> ImageFile:
    by_imagej = image.format in ("PNG", "JPEG", "GIF", "BMP")
    size = Size(*image.size)
    return ImageFile(
        provider=IMAGEJ if by_imagej else BIO_FORMATS,
        args=() if by_imagej else ("--series", "0"),
        levels=(size,),
        tile=size,
        is_rgb=is_rgb,
    )


def _decoded(path: Path, image: Image.Image) -> Image.Image:
    try:
        return _plain_thumbnail(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideError(f"{path}: the image is damaged ({error}); copy the file again") from error


def _plain_thumbnail(image: Image.Image) -> Image.Image:
    size = fit_within(image.size, _THUMBNAIL_LIMIT)
    image.draft("RGB", size)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        spread = max(float(values.max() - values.min()), 1e-9)
        image = Image.fromarray(((values - values.min()) * (255 / spread)).astype(np.uint8))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
