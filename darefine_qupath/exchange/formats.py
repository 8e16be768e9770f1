"""Recognize the format of an annotation file and hand it to the reader of that format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.aperio import read_aperio
from darefine_qupath.exchange.asap import read_asap
from darefine_qupath.exchange.coco import Picture, holds_coco, read_coco
from darefine_qupath.exchange.documents import Document, documents, first_bytes
from darefine_qupath.exchange.file_names import is_annotation_file
from darefine_qupath.exchange.geojson import holds_features, read_features
from darefine_qupath.exchange.halo import is_halo, read_halo
from darefine_qupath.exchange.imported import Imported, merged
from darefine_qupath.exchange.label_masks import read_label_mask
from darefine_qupath.exchange.ndpa import is_ndpa, read_ndpa
from darefine_qupath.exchange.other_files import KNOWN, file_kind, json_kind, slide_kind, text_kind, xml_kind
from darefine_qupath.geometry import GlassFrame
from darefine_qupath.limits import DATA, naming, parse_json

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = ["read_annotations"]

_IMAGE_STARTS = (b"\x89PNG", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

_PARSED = replace(DATA, depth=10_000)
"""A feature that is nested too deeply is refused, and not its file."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the caller knows about the image, and wants."""

    path: Path
    mpp: float | None
    picture: Picture
    glass: Callable[[], GlassFrame | None] | None
    classes: Sequence[str]
    class_from: Sequence[str]


def read_annotations(
    path: Path | str,
    *,
    mpp: float | None = None,
    classes: Sequence[str] = (),
    labels: Mapping[int, str] | None = None,
    image_size: tuple[int, int] | None = None,
    stretch: bool = False,
    class_from: Sequence[str] = (),
    image_name: str | None = None,
    glass: Callable[[], GlassFrame | None] | None = None,
) -> Imported:
    """Read an annotation file of any known format, told by its content and not by its name.

    Parameters
    ----------
    path : Path or str
        Aperio ImageScope, HALO or ASAP XML, Hamamatsu NDPA, QuPath GeoJSON or COCO JSON, any of these in gzip or
        zip, or a label mask as PNG or TIFF.
    mpp : float, optional
        Micrometres per pixel of the image; a file that states another one gives a warning.
    classes : sequence of str, optional
        Class names of the project. A name of the file that differs only in case becomes the project's.
    labels : mapping of int to str, optional
        Class of each label of a mask; default what the mask says about itself.
    image_size : tuple of int, optional
        Width and height of the image in level-0 pixels, to which a mask is scaled; default what the mask says about
        itself, else its own size.
    stretch : bool, optional
        Scale a mask of another aspect ratio to the image all the same.
    class_from : sequence of str, optional
        Fields that hold the class of an object, the first with a value counts; default those of the format.
    image_name : str, optional
        File name of the image, by which a file of several images is searched.
    glass : callable, optional
        Asked where the image lies on its glass slide, when a file counts from there (NDPA).

    Returns
    -------
    Imported
        In level-0 pixels.

    Raises
    ------
    ExchangeError
        If the file is not there, not readable, or of no known format; it says of which.
    """
    path = Path(path)
    with naming(path, ExchangeError):
        try:
            start = first_bytes(path)
        except OSError as error:
            raise ExchangeError(f"the annotation file cannot be opened ({error.strerror})") from error
        kind = slide_kind(path.name, start)
        if kind is not None:
            raise ExchangeError(f"it {kind}: {KNOWN}")
        if start.startswith(_IMAGE_STARTS):
            if class_from:
                raise ExchangeError("it is a label mask, which has no fields; give its classes with --label N=CLASS")
            return read_label_mask(path, labels=labels, image_size=image_size, stretch=stretch, classes=classes)
        request = _Request(
            path=path,
            mpp=mpp,
            picture=Picture(name=image_name, size=image_size),
            glass=glass,
            classes=classes,
            class_from=class_from,
        )
        return _read_all(request)


def _read_all(request: _Request) -> Imported:
    """Read the file, or those of an archive, of which one that is named otherwise need not be an annotation file."""
    parts, left_out = [], []
    for document in documents(request.path):
        try:
            parts.append(_read(request, document))
        except ExchangeError as error:
            name = document.member or ""
            if is_annotation_file(name) or not PurePosixPath(name).suffix:
                raise
            left_out.append(str(error))
    if not parts:
        raise ExchangeError(left_out[0])
    found = merged(parts)
    return replace(found, warnings=(*found.warnings, *(f"{request.path}: left out, {why}" for why in left_out)))


def _read(request: _Request, document: Document) -> Imported:
    if document.member is None:
        return _read_text(request, document)
    with naming(document.member, ExchangeError):
        found = _read_text(request, document)
    return found.in_member(document.member)


def _read_text(request: _Request, document: Document) -> Imported:
    kind = file_kind(document.data)
    text = "" if kind else document.text
    start = text[:4096].lstrip()
    if start.startswith(("{", "[")):
        return _read_json(request, text)
    if start.startswith("<"):
        return _read_xml(request, text)
    raise ExchangeError(f"it {kind or text_kind(text)}: {KNOWN}")


def _read_json(request: _Request, text: str) -> Imported:
    data = parse_json(text, _PARSED, non_finite=True, half_characters=True)
    if holds_features(data):
        return read_features(request.path, data, classes=request.classes, class_from=request.class_from)
    if holds_coco(data):
        return read_coco(request.path, data, request.picture, classes=request.classes, class_from=request.class_from)
    raise ExchangeError(f"it {json_kind(data)}: {KNOWN}")


def _read_xml(request: _Request, text: str) -> Imported:
    root = _parsed(text)
    path, classes, class_from = request.path, request.classes, request.class_from
    if root.tag == "Annotations" and is_halo(root):
        return read_halo(path, root, classes=classes, class_from=class_from)
    if root.tag == "Annotations":
        return read_aperio(path, root, mpp=request.mpp, classes=classes, class_from=class_from)
    if root.tag == "ASAP_Annotations":
        return read_asap(path, root, classes=classes, class_from=class_from)
    if is_ndpa(root):
        frame = None if request.glass is None else request.glass()
        return read_ndpa(path, root, frame, classes=classes, class_from=class_from)
    raise ExchangeError(f"it {xml_kind(root)}: {KNOWN}")


_MANY_ELEMENTS = 200_000
_LEAST_LENGTH = 8


def _parsed(text: str) -> Element:
    elements = text.count("<") - text.count("</")
    if elements > max(_MANY_ELEMENTS, len(text) / _LEAST_LENGTH):
        raise ExchangeError(f"the XML is made of {elements:,} elements that hold nothing")
    try:
        root: Element | None = fromstring(text)
    except DefusedXmlException as error:
        raise ExchangeError(
            f"the XML declares entities ({type(error).__name__}), which annotation files do not need and which "
            f"can do harm; remove its <!DOCTYPE ...>"
        ) from error
    except (ParseError, ValueError, LookupError) as error:
        raise ExchangeError(f"the XML is damaged ({error})") from error
    if root is None:
        raise ExchangeError("the XML is empty")
    return root
