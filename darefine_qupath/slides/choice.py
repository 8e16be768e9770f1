"""Choose the reader of an image file: OpenSlide first, then tifffile with GDAL, then Pillow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from darefine_qupath.errors import SlideFormatError
from darefine_qupath.slides.cut_short import refuse_incomplete
from darefine_qupath.slides.openslide_reader import OpenSlideReader
from darefine_qupath.slides.pillow_reader import PillowReader
from darefine_qupath.slides.reader import ImageReader, WrongPixelsError
from darefine_qupath.slides.tiff_reader import TiffReader, refuse_disguised_tiff

__all__ = ["READERS", "ReaderName", "first_that_opens", "open_reader"]

ReaderName = Literal["auto", "openslide", "tifffile", "pillow"]
READERS: tuple[str, ...] = get_args(ReaderName)

_READERS: Mapping[str, Callable[[Path], ImageReader]] = {
    "openslide": OpenSlideReader,
    "tifffile": TiffReader,
    "pillow": PillowReader,
}


def open_reader(path: Path, reader: str) -> ImageReader:
    """Open an image file with the reader of a name, ``"auto"`` for the one that fits."""
    if reader != "auto":
        return _READERS[reader](path)
    if path.is_dir():
        raise SlideFormatError(f"{path} is a folder, not an image file")
    opened = first_that_opens(path, (OpenSlideReader, *_fallbacks(path)))
    if isinstance(opened, OpenSlideReader):
        refuse_incomplete(path, opened.levels)
        if opened.is_generic:
            return _known_better(path, opened)
    return opened


def _known_better(path: Path, opened: ImageReader) -> ImageReader:
    """Reader of a TIFF that OpenSlide opens as generic: of an OME-TIFF that is tifffile, which knows its pyramid."""
    if not refuse_disguised_tiff(path):
        return opened
    with contextlib.suppress(SlideFormatError):
        better = TiffReader(path)
        opened.close()
        return better
    return opened


def _fallbacks(path: Path) -> tuple[Callable[[Path], ImageReader], ...]:
    with path.open("rb") as file:
        is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return (TiffReader, PillowReader) if is_tiff else (PillowReader,)


def first_that_opens(path: Path, readers: Sequence[Callable[[Path], ImageReader]]) -> ImageReader:
    """Open a file with the first reader that knows its format.

    Parameters
    ----------
    path : Path
        The file.
    readers : sequence of callable
        In order of preference.

    Returns
    -------
    ImageReader
        The first one that does not refuse the format.

    Raises
    ------
    SlideFormatError
        What every reader said; or what the first one said that finds something other than RGB.
    SlideError
        As soon as a reader knows the format and the file is damaged.
    """
    refusals = []
    for reader in readers:
        opened, refusal = _tried(path, reader)
        if opened is not None:
            return opened
        refusals.append(refusal.removeprefix(f"{path}: "))
    raise SlideFormatError(f"{path}: no reader opens this file: {'; '.join(refusals)}; convert it to a pyramidal TIFF")


def _tried(path: Path, reader: Callable[[Path], ImageReader]) -> tuple[ImageReader | None, str]:
    try:
        return reader(path), ""
    except WrongPixelsError:
        raise
    except SlideFormatError as error:
        return None, str(error)
