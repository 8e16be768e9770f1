"""Recognize the format of an annotation file and hand it to the reader of that format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.aperio import is_aperio, read_aperio
from darefine_qupath.exchange.asap import is_asap, read_asap
from darefine_qupath.exchange.coco import holds_coco, read_coco
from darefine_qupath.exchange.documents import Document, documents, first_bytes
from darefine_qupath.exchange.file_names import is_annotation_file
from darefine_qupath.exchange.geojson import holds_features, read_features
from darefine_qupath.exchange.halo import is_halo, read_halo
from darefine_qupath.exchange.imported import Imported, merged
from darefine_qupath.exchange.label_masks import read_label_mask
from darefine_qupath.exchange.ndpa import is_ndpa, read_ndpa
from darefine_qupath.exchange.other_files import KNOWN, file_kind, json_kind, slide_kind, text_kind, xml_kind
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.geometry import GlassFrame
from darefine_qupath.limits import DATA, naming, parse_json

__all__ = ["read_annotations"]

_IMAGE_STARTS = (b"\x89PNG", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

_JSON_READERS: Sequence[tuple[Callable[[object], bool], Callable[[ReadRequest, Any], Imported]]] = (
    (holds_features, read_features),
    (holds_coco, read_coco),
)
_XML_READERS: Sequence[tuple[Callable[[Element], bool], Callable[[ReadRequest, Element], Imported]]] = (
    (is_halo, read_halo),
    (is_aperio, read_aperio),
    (is_asap, read_asap),
    (is_ndpa, read_ndpa),
)
"""Each format by how it is recognized, and its reader; the first that fits counts."""

_PARSED = replace(DATA, depth=10_000)
"""A feature that is nested too deeply is refused, and not its file."""


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
    """Read an annotation file of any known format, which is recognized by its content and not by its name.

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
        If the file is not there, not readable, or of no known format; the message names the format it has.
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
        request = ReadRequest(
            path=path,
            mpp=mpp,
            classes=classes,
            labels=labels,
            image_size=image_size,
            stretch=stretch,
            class_from=class_from,
            image_name=image_name,
            glass=glass,
        )
        return read_label_mask(request) if start.startswith(_IMAGE_STARTS) else _read_all(request)


def _read_all(request: ReadRequest) -> Imported:
    """Read the file, or all annotation files of an archive; others that lie there too are left out."""
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


def _read(request: ReadRequest, document: Document) -> Imported:
    if document.member is None:
        return _read_text(request, document)
    with naming(document.member, ExchangeError):
        found = _read_text(request, document)
    return found.in_member(document.member)


def _read_text(request: ReadRequest, document: Document) -> Imported:
    kind = file_kind(document.data)
    text = "" if kind else document.text
    start = text[:4096].lstrip()
    if start.startswith(("{", "[")):
        return _read_json(request, text)
    if start.startswith("<"):
        return _read_xml(request, text)
    raise ExchangeError(f"it {kind or text_kind(text)}: {KNOWN}")


def _read_json(request: ReadRequest, text: str) -> Imported:
    data = parse_json(text, _PARSED, non_finite=True, half_characters=True)
    read = next((read for holds, read in _JSON_READERS if holds(data)), None)
    if read is None:
        raise ExchangeError(f"it {json_kind(data)}: {KNOWN}")
    return read(request, data)


def _read_xml(request: ReadRequest, text: str) -> Imported:
    root = _parsed(text)
    read = next((read for is_of, read in _XML_READERS if is_of(root)), None)
    if read is None:
        raise ExchangeError(f"it {xml_kind(root)}: {KNOWN}")
    return read(request, root)


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
