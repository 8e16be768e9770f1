"""Tells the formats apart and parses safely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import parse

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.aperio import read_aperio
from darefine_qupath.exchange.asap import read_asap
from darefine_qupath.exchange.features import read_features
from darefine_qupath.exchange.labels import read_label_mask

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from darefine_qupath.exchange.records import Imported

__all__ = ["read_annotations"]

_IMAGE_STARTS = (b"\x89PNG", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_annotations(
    path: Path | str,
    *,
    mpp: float | None = None,
    classes: Sequence[str] = (),
    labels: Mapping[int, str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Imported:
    """Read an annotation file of any known format, told by its content and not by its name.

    Parameters
    ----------
    path : Path or str
        Aperio ImageScope XML, ASAP XML, QuPath GeoJSON, or a label mask as PNG or TIFF.
    mpp : float, optional
        Micrometres per pixel of the image; a file that states another one gives a warning.
    classes : sequence of str, optional
        Class names of the project. A name of the file that differs only in case becomes the project's.
    labels : mapping of int to str, optional
        Class of each label of a mask; default what the mask says about itself.
    image_size : tuple of int, optional
        Width and height of the image in level-0 pixels, to which a mask is scaled; default what the mask says about
        itself, else its own size.

    Returns
    -------
    Imported
        In level-0 pixels.

    Raises
    ------
    ExchangeError
        If the file is not there, not readable, or of no known format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise ExchangeError(f"{path}: the annotation file cannot be opened ({error.strerror})") from error
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if start.startswith(_IMAGE_STARTS):
        return read_label_mask(path, labels=labels, image_size=image_size)
    if text.startswith((b"{", b"[")):
        return read_features(path, classes=classes)
    # XML in UTF-16 begins with its own mark.
    if text.startswith(b"<") or start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _read_xml(path, mpp, classes)
    raise ExchangeError(
        f"{path}: neither Aperio or ASAP XML, nor GeoJSON, nor a label mask (PNG, TIFF); it begins with {start[:16]!r}"
    )


def _read_xml(path: Path, mpp: float | None, classes: Sequence[str]) -> Imported:
    root = _parsed(path)
    if root.tag == "Annotations":
        return read_aperio(path, root, mpp=mpp, classes=classes)
    if root.tag == "ASAP_Annotations":
        return read_asap(path, root, classes=classes)
    raise ExchangeError(
        f"{path}: XML of an unknown kind, its root is <{root.tag}>; known are <Annotations> (Aperio ImageScope) and "
        f"<ASAP_Annotations>"
    )


def _parsed(path: Path) -> Element:
    try:
        root: Element | None = parse(path).getroot()
    except DefusedXmlException as error:
        raise ExchangeError(
            f"{path}: the XML declares entities ({type(error).__name__}), which annotation files do not need and which "
            f"can do harm; remove its <!DOCTYPE ...>"
        ) from error
    except (ParseError, ValueError, LookupError) as error:
        raise ExchangeError(f"{path}: the XML is damaged ({error})") from error
    if root is None:
        raise ExchangeError(f"{path}: the XML is empty")
    return root
