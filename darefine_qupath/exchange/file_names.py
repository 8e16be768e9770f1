"""Find the image that an annotation file is about by the name of the file.

``X.xml``, ``X.svs.geojson``, ``X_mask.png``, ``X.svs_mask.png`` and ``X.labels.tif`` are all about the image ``X.svs``;
so is ``TCGA-..-DX1.xml`` about ``TCGA-..-DX1.<UUID>.svs``, and the other way round.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["ANNOTATION_SUFFIXES", "SLIDE_SUFFIXES", "NameIndex", "is_annotation_file", "is_mask_name"]

SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi",
    ".png", ".jpg", ".jpeg", ".jp2",
)  # fmt: skip

ANNOTATION_SUFFIXES = (
    ".xml", ".geojson", ".json", ".gz", ".zip", ".ndpa", ".annotations", ".png", ".tif", ".tiff",
)  # fmt: skip

_ENDINGS = re.compile(r"[ ._-](masks?|labels?|annotations?|annot|seg|segmentation|gt|truth)$")
_LAST_SUFFIX = re.compile(r"\.(?=[0-9]*[a-z])[a-z0-9]+$")
_TCGA = re.compile(r"(tcga(?:-[a-z0-9]+){5})\.[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")

_Image = TypeVar("_Image")


def is_annotation_file(name: str) -> bool:
    """Whether a file's name is that of an annotation file or of a mask."""
    return name.casefold().endswith(ANNOTATION_SUFFIXES)


def is_mask_name(name: str) -> bool:
    """Whether a file's name says that it annotates another file: ``X_mask.png``."""
    stem, _, suffix = _folded(name).rpartition(".")
    return f".{suffix}" in ANNOTATION_SUFFIXES and _ENDINGS.search(stem) is not None


def _folded(name: str) -> str:
    """Name without case, with accents in one form: macOS writes them as characters of their own."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _shortened(name: str) -> Iterator[str]:
    """Names that a file's name may mean, the longest first."""
    while True:
        yield name
        suffix = next((each for each in (*ANNOTATION_SUFFIXES, *SLIDE_SUFFIXES, ".ome") if name.endswith(each)), "")
        shorter = name.removesuffix(suffix) if suffix else _ENDINGS.sub("", name)
        if shorter in ("", name):
            return
        name = shorter


def _stems(name: str) -> Iterator[str]:
    """Names of an image with and without its suffix."""
    yield name
    stem = _LAST_SUFFIX.sub("", name)
    yield stem
    yield stem.removesuffix(".ome")


class NameIndex(Generic[_Image]):
    """Finds the images that files are about.

    Parameters
    ----------
    images : iterable of (image, iterable of str)
        Images, and the names that each has: in the project, and of its file.
    """

    def __init__(self, images: Iterable[tuple[_Image, Iterable[str]]]) -> None:
        self._images: list[_Image] = []
        self._by_name: dict[str, set[int]] = {}
        self._by_barcode: dict[str, set[int]] = {}
        for number, (image, names) in enumerate(images):
            self._images.append(image)
            for stem in {stem for name in names for stem in _stems(_folded(name))}:
                self._by_name.setdefault(stem, set()).add(number)
                barcode = _TCGA.fullmatch(stem)
                if barcode:
                    self._by_barcode.setdefault(barcode[1], set()).add(number)

    def owners(self, file_name: str) -> list[_Image]:
        """Images that a file is about; the longest name that fits any counts.

        Parameters
        ----------
        file_name : str
            Without its folder.

        Returns
        -------
        list
            In the order of the images.
        """
        names = list(_shortened(_folded(file_name)))
        for name in names:
            if name in self._by_name:
                return self._found(self._by_name[name])
        barcodes = [found[1] for name in names if (found := _TCGA.fullmatch(name))]
        # A file with a UUID of its own is about no image with another one.
        for name in [] if barcodes else names:
            if name in self._by_barcode:
                return self._found(self._by_barcode[name])
        return next((self._found(self._by_name[name]) for name in barcodes if name in self._by_name), [])

    def _found(self, numbers: set[int]) -> list[_Image]:
        return [self._images[number] for number in sorted(numbers)]
