"""Name what a file is that is no annotation file, for a person who took the wrong one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = ["KNOWN", "archive_kind", "file_kind", "json_kind", "slide_kind", "text_kind", "xml_kind"]

KNOWN = "neither Aperio or ASAP XML, nor HALO's, Hamamatsu NDPA, GeoJSON, COCO JSON or a label mask (PNG, TIFF)"

_QPDATA = "is the data.qpdata of a QuPath project; open the project itself, or export its objects as GeoJSON in QuPath"

_STARTS: Sequence[tuple[bytes, str]] = (
    (b"\xac\xed\x00\x05", _QPDATA),
    (b"\x89PNG", "is a label mask in an archive; unpack it"),
    (b"II*\x00", "is a TIFF in an archive; unpack it"),
    (b"MM\x00*", "is a TIFF in an archive; unpack it"),
    (b"\xff\xd8\xff", "is a JPEG picture; label masks are PNG or TIFF, whose pixels stay as they are"),
    (b"GIF8", "is a GIF picture; label masks are PNG or TIFF"),
    (b"BM", "is a BMP picture; label masks are PNG or TIFF"),
    (b"\x89HDF", "is an HDF5 file"),
    (b"\x93NUMPY", "is an array of NumPy; save it as a label mask (PNG, TIFF)"),
    (b"SQLite format 3\x00", "is an SQLite database"),
    (b"MATLAB 5.0", "is a MATLAB file; export the shapes as GeoJSON, or as a label mask"),
    (b"%PDF", "is a PDF document"),
    (b"\x80\x04\x95", "is a Python pickle, which may hold any program; export its shapes as GeoJSON"),
    (b"PAR1", "is a Parquet table"),
    (b"\xd0\xcf\x11\xe0", "is an old document of Office"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"Rar!", "is a RAR archive; unpack it"),
    (b"BZh", "is packed by bzip2; unpack it"),
    (b"\xfd7zXZ", "is packed by xz; unpack it"),
    (b"version https://git-lfs", "is a pointer of Git LFS; the file itself was not fetched"),
)

_SLIDES = (".ndpi", ".svs", ".scn", ".bif", ".svslide", ".mrxs", ".czi", ".dcm", ".vms", ".vmu")

_COLUMNS = re.compile(r"[^\r\n]{0,2000}?[,;\t][^\r\n]{0,2000}[\r\n]")

_ROOTS: Mapping[str, str] = {
    "annotation": "is an annotation of PASCAL VOC or LabelMe",
    "annotations": "is XML of CVAT, which exports COCO JSON too, or of another program",
    "session": "is a session of Sedeen",
    "html": "is a web page",
    "HTML": "is a web page",
    "svg": "is an SVG drawing",
    "OME": "is OME-XML, whose shapes are not read",
    "kml": "is a map in KML",
    "Document": "is a document",
}

_KEYS: Sequence[tuple[frozenset[str], str]] = (
    (frozenset(("shapes", "imagePath")), "is an annotation of LabelMe; export it as COCO"),
    (frozenset(("_via_img_metadata",)), "is a project of the VGG Image Annotator; export it as COCO"),
    (frozenset(("_via_settings",)), "is a project of the VGG Image Annotator; export it as COCO"),
    (frozenset(("createTimestamp", "images")), "is a QuPath project; annotation files go into one"),
    (frozenset(("pathClasses",)), "holds the classes of a QuPath project, no shapes"),
    (frozenset(("cells", "nbformat")), "is a Jupyter notebook"),
    (frozenset(("arcs", "objects")), "is TopoJSON; save it as GeoJSON"),
)


def file_kind(data: bytes) -> str | None:
    """Say what a file is by how it begins; None where that is not known."""
    return next((kind for start, kind in _STARTS if data.startswith(start)), None)


def slide_kind(name: str, start: bytes) -> str | None:
    """Say which slide format a file is of; None where it is of none that its name or beginning tells."""
    suffix = name[name.rfind(".") :].lower()
    if suffix in _SLIDES or start.startswith(b"ZISRAWFILE") or start[128:132] == b"DICM":
        beside = f"; NDP.view keeps its shapes in {name}.ndpa" if suffix == ".ndpi" else ""
        return f"is a slide ({suffix.removeprefix('.') or 'image'}), and no annotation file{beside}"
    return None


def archive_kind(names: Sequence[str]) -> str | None:
    """Say what a zip is by what it holds; None where it may hold annotation files."""
    if "[Content_Types].xml" in names:
        return "is a document or table of Office; save its shapes as GeoJSON"
    if names and all(name.endswith(".npy") for name in names):
        return "holds arrays of NumPy; save them as label masks (PNG, TIFF)"
    return None


def text_kind(text: str) -> str:
    """Say what a text is that is neither XML nor JSON."""
    if not text.strip():
        return "is empty"
    first = text.lstrip()[:60].splitlines()[0]
    if _COLUMNS.match(text.lstrip()[:4100]):
        return f"is a table (CSV), beginning with {first!r}; which columns are corners is not known, save it as GeoJSON"
    return f"is text that is neither XML nor JSON, beginning with {first!r}"


def json_kind(value: object) -> str:
    """Say what JSON is that is neither GeoJSON nor COCO."""
    if isinstance(value, list):
        first = value[0] if value else None
        if isinstance(first, dict) and {"annotations", "data"} <= first.keys():
            return "is an export of Label Studio; export it as COCO"
        return "is a list of other things than GeoJSON features or COCO annotations"
    keys = list(value) if isinstance(value, dict) else []
    known = next((kind for names, kind in _KEYS if names <= set(keys)), None)
    if known is not None:
        return known
    shown = ", ".join(repr(key[:30]) for key in keys[:5]) or "none"
    return f"is JSON without features, neither GeoJSON nor COCO; its keys are {shown}"


def xml_kind(root: Element) -> str:
    """Say what XML is of another kind."""
    name = root.tag.rsplit("}", 1)[-1]
    return f"{_ROOTS.get(name, 'is XML of an unknown kind')}, its root is <{name[:40]}>"
