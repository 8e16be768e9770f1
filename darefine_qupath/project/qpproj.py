"""The JSON files of a QuPath project: text to records and back, nothing else.

Files are read leniently (a byte order mark, bare ``NaN`` and ``Infinity``) and written as QuPath's Gson writes them, so
that what was not changed comes out as the same bytes: keys keep their order, numbers their spelling.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

from darefine_qupath.classes import Color, PathClass, default_color
from darefine_qupath.errors import LimitError, ProjectFormatError, ProjectUnsupportedError
from darefine_qupath.geometry import PixelSize, Size
from darefine_qupath.limits import NOTES, check_depth, whole_text
from darefine_qupath.project.uris import file_uri

__all__ = [
    "BIO_FORMATS",
    "IMAGEJ",
    "LIMITS",
    "NEW_PROJECT_VERSION",
    "NO_ID",
    "OPENSLIDE",
    "EntryRecord",
    "JsonObject",
    "Server",
    "classes_json",
    "entry_json",
    "entry_records",
    "image_metadata",
    "is_since",
    "json_bytes",
    "merged_classes",
    "new_project",
    "parse_classes",
    "parse_json",
    "parse_project",
    "server_builder",
    "server_json",
    "server_of",
    "version_of",
    "with_uri",
]

JsonObject = dict[str, Any]

NEW_PROJECT_VERSION = "0.6.0"
"""Form of new projects: 0.6 and 0.7 write the same, and 0.4 to 0.7 all read it."""

OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
IMAGEJ = "qupath.imagej.images.servers.ImageJServerBuilder"
BIO_FORMATS = "qupath.lib.images.servers.bioformats.BioFormatsServerBuilder"

LIMITS = replace(NOTES, file_bytes=256 << 20)
"""A project of 100,000 images takes less."""
NO_ID = 10**18
"""Entry ids are smaller: QuPath's are 64-bit numbers."""

_BOM = b"\xef\xbb\xbf"


_MILESTONES = ("v0.2.0-m1", "v0.2.0-m2")


class _Number(float):
    """A number that remembers how it was spelled."""

    text: str

    def __new__(cls, text: str) -> _Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def _integer(text: str) -> int | _Number:
    # Python refuses to convert thousands of digits, and -0 is not 0; such a number is kept as its text.
    return int(text) if len(text) < 300 and text != "-0" else _Number(text)


def parse_json(data: bytes, path: Path) -> Any:  # noqa: ANN401 - JSON is any value
    """Read JSON as QuPath's lenient reader does.

    Parameters
    ----------
    data : bytes
        Content of the file.
    path : Path
        The file, for messages.

    Returns
    -------
    object
        Plain values; a number with a fraction remembers its spelling.

    Raises
    ------
    ProjectFormatError
        With file and byte offset.
    """
    start = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = data[start:].decode()
        check_depth(data, LIMITS)
        return json.loads(text, parse_float=_Number, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ProjectFormatError("this is not UTF-8 text", path=path, offset=start + error.start) from None
    except json.JSONDecodeError as error:
        offset = start + len(text[: error.pos].encode())
        raise ProjectFormatError(f"this is not JSON: {error.msg}", path=path, offset=offset) from None
    except (RecursionError, LimitError):
        raise ProjectFormatError("this JSON is nested too deeply", path=path, offset=start) from None


class _MisplacedError(Exception):
    """A value of a JSON file is not what it should be.

    Parameters
    ----------
    message : str
        What is wrong.
    keys : str or int
        The way to the value, from the outside in.
    """

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.message = message
        self.keys = keys


def _offset_of(data: bytes, keys: Sequence[str | int]) -> int:
    """Byte offset of a value in a JSON file; where a key is missing, of the object that should have it."""
    start = len(_BOM) if data.startswith(_BOM) else 0
    text = data[start:].decode()
    position = _after_blanks(text, 0)
    for key in keys:
        inner = _position_of(text, position, key)
        if inner is None:
            break
        position = inner
    return start + len(text[:position].encode())


def _after_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in tuple(" \t\r\n"):
        position += 1
    return position


def _position_of(text: str, position: int, key: str | int) -> int | None:
    """Find an item of the object or array at `position`; of a key that is there twice the last, as it is read."""
    decoder = json.JSONDecoder(parse_int=str)  # Python refuses to convert thousands of digits
    found = None
    index: str | int = -1
    is_object = text[position] == "{"
    if text[position] not in "{[":
        return None
    position = _after_blanks(text, position + 1)
    while text[position] not in "}]":
        if is_object:
            index, position = decoder.raw_decode(text, position)
            position = _after_blanks(text, _after_blanks(text, position) + 1)
        else:
            index = int(index) + 1
        if index == key:
            found = position
        position = _after_blanks(text, decoder.raw_decode(text, position)[1])
        if text[position] == ",":
            position = _after_blanks(text, position + 1)
    return found


# Gson escapes what could end a script element, and we what UTF-8 cannot hold: half a surrogate pair.
_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *map(ord, "<>&='\u2028\u2029"), *range(0xD800, 0xE000))}
_ESCAPES |= {ord(char): f"\\{letter}" for char, letter in zip('\t\b\n\r\f"\\', 'tbnrf"\\', strict=True)}


def _java_double(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    sign = "-" if math.copysign(1, value) < 0 else ""
    exact = Decimal(repr(abs(value)))
    if value == 0 or Decimal("1e-3") <= exact < Decimal("1e7"):
        text = format(exact, "f")
        return sign + (text if "." in text else f"{text}.0")
    digits = "".join(map(str, exact.as_tuple().digits)).rstrip("0")
    return f"{sign}{digits[0]}.{digits[1:] or '0'}E{exact.adjusted()}"


def _scalar(value: object) -> str:
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    if isinstance(value, _Number):
        return value.text
    if isinstance(value, float):
        return _java_double(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _encode(value: object, newline: str) -> str:
    """Encode `value`; `newline` is the line break with the present indentation, empty for compact text."""
    deeper = f"{newline}  " if newline else ""
    if isinstance(value, Mapping):
        colon = ": " if newline else ":"
        items = [f"{_scalar(str(key))}{colon}{_encode(item, deeper)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list | tuple):
        items = [_encode(item, deeper) for item in value]
        opening, closing = "[", "]"
    else:
        return _scalar(value)
    if not items:
        return opening + closing
    return f"{opening}{deeper}{f',{deeper}'.join(items)}{newline}{closing}"


def json_bytes(value: object, *, pretty: bool = True) -> bytes:
    """Write JSON as QuPath does.

    Parameters
    ----------
    value : object
        Plain values.
    pretty : bool, optional
        Two spaces of indentation, or everything on one line.

    Returns
    -------
    bytes
        UTF-8 without a line break at the end.
    """
    return _encode(value, "\n" if pretty else "").encode()


# -- project.qpproj


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryRecord:
    """One entry of ``images`` as the file says it.

    Attributes
    ----------
    id : int
        Name of the data folder.
    name : str
        As shown in QuPath.
    description : str or None
        Free text.
    metadata : mapping of str to str
        Project metadata of the image.
    builder : dict
        The ``serverBuilder`` object.
    """

    id: int
    name: str
    description: str | None
    metadata: Mapping[str, str]
    builder: JsonObject


def parse_project(data: bytes, path: Path) -> JsonObject:
    """Read ``project.qpproj`` and check what everything else relies on.

    Raises
    ------
    ProjectFormatError
        If it is not a QuPath project.
    ProjectUnsupportedError
        If it is one of QuPath 0.1, or of the first two milestones of 0.2.
    """
    document = parse_json(data, path)
    try:
        return _checked_project(document, path)
    except _MisplacedError as error:
        raise ProjectFormatError(error.message, path=path, offset=_offset_of(data, error.keys)) from None


def _checked_project(document: Any, path: Path) -> JsonObject:  # noqa: ANN401 - JSON is any value
    if not isinstance(document, dict):
        raise _MisplacedError("this is not a QuPath project: the JSON is not an object")
    if not {"version", "lastID", "images"} & document.keys():
        raise _MisplacedError("this is not a QuPath project: no version, lastID or images")
    images = document.get("images", [])
    if not isinstance(images, list) or not all(isinstance(entry, dict) for entry in images):
        raise _MisplacedError("images is not a list of entries", "images")
    if any("path" in entry and "serverBuilder" not in entry for entry in images):
        raise ProjectUnsupportedError(f"{path} is a project of QuPath 0.1; open and save it in QuPath 0.2 or later")
    if document.get("version") in _MILESTONES:
        version = document["version"]
        raise ProjectUnsupportedError(f"{path} is a project of QuPath {version}, which no later QuPath opens either")
    _checked_records(document)
    return document


def entry_records(document: Mapping[str, Any], path: Path) -> tuple[EntryRecord, ...]:
    """Entries of a project, in its order.

    Parameters
    ----------
    document : mapping
        What `parse_project` gave.
    path : Path
        The file, for messages.

    Returns
    -------
    tuple of EntryRecord
        One for each of ``images``.

    Raises
    ------
    ProjectFormatError
        If an entry has no server or no id of its own.
    """
    try:
        return _checked_records(document)
    except _MisplacedError as error:
        raise ProjectFormatError(error.message, path=path) from None


def _checked_records(document: Mapping[str, Any]) -> tuple[EntryRecord, ...]:
    records = tuple(_entry_record(entry, index) for index, entry in enumerate(document.get("images", [])))
    seen: set[int] = set()
    for index, record in enumerate(records):
        if record.id in seen:
            raise _MisplacedError(f"entry id {record.id} occurs twice", "images", index, "entryID")
        seen.add(record.id)
    return records


def _entry_record(entry: Mapping[str, Any], index: int) -> EntryRecord:
    number, builder, metadata = entry.get("entryID"), entry.get("serverBuilder"), entry.get("metadata")
    # The id names a folder: nothing but a plain number may get there.
    if isinstance(number, str) and re.fullmatch(r"[0-9]{1,18}", number):
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < NO_ID:
        message = f"image {index + 1} has entryID {str(number)[:40]!r}, not a number"
        raise _MisplacedError(message, "images", index, "entryID")
    if not isinstance(builder, dict):
        message = f"image {index + 1} (entry {number}) has no serverBuilder"
        raise _MisplacedError(message, "images", index, "serverBuilder")
    if not isinstance(metadata, dict | None):
        message = f"image {index + 1} (entry {number}) has metadata that is not an object"
        raise _MisplacedError(message, "images", index, "metadata")
    name, description = entry.get("imageName"), entry.get("description")
    return EntryRecord(
        id=number,
        name=whole_text(name if isinstance(name, str) else str(builder.get("uri") or number).rsplit("/", 1)[-1]),
        description=whole_text(description) if isinstance(description, str) else None,
        metadata={
            whole_text(key): whole_text(value) if isinstance(value, str) else _brief(value)
            for key, value in (metadata or {}).items()
        },
        builder=builder,
    )


def _brief(value: object) -> str:
    # QuPath keeps texts here and nothing else; what else stands there is shown.
    return _scalar(value) if not isinstance(value, (dict, list)) else json_bytes(value, pretty=False).decode()[:200]


def version_of(document: Mapping[str, Any]) -> str:
    """QuPath version that wrote the project, ``"unknown"`` where it does not say."""
    version = document.get("version")
    return whole_text(version) if isinstance(version, str) else "unknown"


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_since(version: str, major: int, minor: int) -> bool:
    """Whether a QuPath version is at least `major`.`minor`; an unknown version is not."""
    return _release(version) >= (major, minor)


def new_project(path: Path, *, timestamp_ms: int, version: str = NEW_PROJECT_VERSION) -> JsonObject:
    """Content of a project without images.

    Parameters
    ----------
    path : Path
        The ``project.qpproj``, absolute.
    timestamp_ms : int
        Milliseconds since 1970.
    version : str, optional
        QuPath version that it is written for.

    Returns
    -------
    dict
        For `json_bytes`.
    """
    return {
        "version": version,
        "createTimestamp": timestamp_ms,
        "modifyTimestamp": timestamp_ms,
        "uri": file_uri(path),
        "lastID": 0,
        "images": [],
    }


def entry_json(record: EntryRecord, *, version: str) -> JsonObject:
    """Entry for ``images`` as QuPath `version` writes it, with a new randomised name."""
    entry: JsonObject = {
        "serverBuilder": record.builder,
        "entryID": record.id,
        "randomizedName": str(uuid4()),
        "imageName": record.name,
    }
    if record.description is not None:
        entry["description"] = record.description
    entry["metadata"] = dict(record.metadata)
    if _release(version) >= (0, 6):
        entry["tags"] = []
    return entry


# -- image servers

_WRAPPERS = {
    "rotated": "rotated",
    "cropped": "cropped to a part of the file",
    "affine": "transformed by a matrix",
    "channels": "put together from channels of several images",
    "color": "recoloured channel by channel",
    "color_deconvolved": "split into stains",
    "normalized": "normalised in colour",
    "typeConvert": "converted to another pixel type",
    "sliced": "a part of a stack",
    "sparse": "put together from regions of several images",
    "swapRedBlue": "shown with its colour channels in another order",
    "z_projected": "projected over a stack",
    "z_concatenated": "a stack put together from several images",
}
# Neither changes a level-0 pixel: a rotation by nothing, and levels computed on the fly for a file that has none.
_TRANSPARENT = ("rotated", "pyramidize")


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """What a server builder says of its image.

    Attributes
    ----------
    uri : str or None
        As stored; the first one where there are several.
    provider : str or None
        Java class that opens it.
    args : tuple of str
        Its arguments.
    size : Size or None
        Level-0 pixels, where the builder holds metadata.
    pixel_size : PixelSize or None
        As stored, possible or not; None when not calibrated in micrometres.
    has_metadata : bool
        Whether the builder holds metadata: it is then what QuPath goes by, whatever the file says.
    unsupported : str or None
        Why level-0 pixels of the file are not those of the image.
    """

    uri: str | None = None
    provider: str | None = None
    args: tuple[str, ...] = ()
    size: Size | None = None
    pixel_size: PixelSize | None = None
    has_metadata: bool = False
    unsupported: str | None = None


def server_of(builder: Mapping[str, Any]) -> Server:
    """Read a server builder; what we cannot place safely is named in `Server.unsupported`."""
    inner, reason = _innermost(builder)
    metadata = builder.get("metadata")
    if not isinstance(metadata, Mapping) and reason is None:
        metadata = inner.get("metadata")
    uri, args, provider = inner.get("uri"), inner.get("args"), inner.get("providerClassName")
    arguments = tuple(whole_text(str(value)) for value in args) if isinstance(args, list) else ()
    return Server(
        uri=whole_text(uri) if isinstance(uri, str) else None,
        provider=whole_text(provider) if isinstance(provider, str) else None,
        args=arguments,
        size=_size(metadata),
        pixel_size=_pixel_size(metadata),
        has_metadata=_size(metadata) is not None,
        unsupported=reason or _series(arguments) or _odd_size(metadata),
    )


def _innermost(builder: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Follow wrapped builders to the file; also say why the outermost is not simply that file."""
    reason: str | None = None
    for _ in range(100):
        kind = builder.get("builderType")
        if kind == "uri":
            return builder, reason
        if kind not in _TRANSPARENT or builder.get("rotation", "ROTATE_NONE") != "ROTATE_NONE":
            reason = reason or _refusal(builder)
        below = _below(builder)
        if below is None:
            return builder, reason or _refusal(builder)
        builder = below
    return builder, f"its image server is wrapped more than 100 times ({builder.get('builderType')!r})"


def _below(builder: Mapping[str, Any]) -> Mapping[str, Any] | None:
    several = builder.get("builders") or builder.get("channels")
    below = builder.get("builder") or (several[0] if isinstance(several, list) and several else None)
    return below if isinstance(below, Mapping) else None


def _refusal(builder: Mapping[str, Any]) -> str:
    kind = builder.get("builderType")
    if not isinstance(kind, str):
        return "its image server has no builderType; QuPath itself could not open this project"
    how = _WRAPPERS.get(kind, "of a kind that is not known here")
    if kind == "rotated":
        how += f" ({builder.get('rotation')})"
    return f"its image server ({kind!r}) shows the file {how}; write that image to a file of its own in QuPath"


def _series(args: Sequence[str]) -> str | None:
    joined = " ".join(args)
    series = re.search(r"--series[= ](\d+)", joined)
    if series and int(series[1]) > 0:
        return f"it is image number {int(series[1]) + 1} of a file that holds several; write it to a file of its own"
    named = re.search(r"--name[= ](.+)", joined)
    if named:
        return f"it is image {named[1]!r} of a file that holds several; write it to a file of its own"
    return None


def _size(metadata: object) -> Size | None:
    if not isinstance(metadata, Mapping):
        return None
    width, height = metadata.get("width"), metadata.get("height")
    if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 and max(width, height) < 1 << 31:
        return Size(width, height)
    return None


def _odd_size(metadata: object) -> str | None:
    if not isinstance(metadata, Mapping) or _size(metadata) is not None or not {"width", "height"} & metadata.keys():
        return None
    width, height = (_scalar(metadata.get(name))[:20] for name in ("width", "height"))
    return f"its size is {width} x {height} pixels in the project file, and no image's; remove it and add it again"


def _pixel_size(metadata: object) -> PixelSize | None:
    calibration = metadata.get("pixelCalibration") if isinstance(metadata, Mapping) else None
    if not isinstance(calibration, Mapping):
        return None
    values = [_micrometers(calibration.get(axis)) for axis in ("pixelWidth", "pixelHeight")]
    known = [value for value in values if value is not None]
    return PixelSize(*known) if len(known) == 2 else None


def _micrometers(quantity: object) -> float | None:
    if not isinstance(quantity, Mapping) or quantity.get("unit") not in ("\u00b5m", "\u03bcm", "um"):
        return None
    value = quantity.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of some hundred digits
        return math.inf


def server_builder(uri: str, *, provider: str, args: Sequence[str] = (), metadata: JsonObject | None) -> JsonObject:
    """Builder of an image file; `metadata` is left out where it is None."""
    builder: JsonObject = {"builderType": "uri", "providerClassName": provider, "uri": uri, "args": list(args)}
    return builder if metadata is None else builder | {"metadata": metadata}


def _downsample(base: Size, level: Size) -> float:
    """QuPath's estimate of what a level was meant to be: a power of 2, a whole number, else the mean ratio."""
    ratios = [base.width / level.width, base.height / level.height]
    power = 2.0 ** math.floor(math.log2(sum(ratios) / 2) + 0.5)
    if all(abs(full / power - part) < 2 for full, part in zip(base, level, strict=True)):
        return power
    for axis, ratio in enumerate(ratios):
        whole = float(math.floor(ratio + 0.5))
        if abs(base[axis] / whole - level[axis]) <= 1:
            ratios[axis] = whole
    return power if power in ratios else sum(ratios) / 2


def image_metadata(
    *,
    name: str,
    levels: Sequence[Size],
    tile: Size,
    mpp: tuple[float, float] | None,
    magnification: float | None,
    has_timepoints: bool = False,
) -> JsonObject:
    """Metadata of an 8-bit RGB image as QuPath writes them.

    Parameters
    ----------
    name : str
        Name of the image.
    levels : sequence of Size
        Pyramid levels, full resolution first.
    tile : Size
        Preferred tile.
    mpp : tuple of float or None
        Micrometres per pixel in x and y; None = not calibrated.
    magnification : float or None
        Of the objective.
    has_timepoints : bool, optional
        Whether to list the one time point, as QuPath 0.6 and later do for a plain image.

    Returns
    -------
    dict
        For `server_builder`.
    """
    width, height = (1.0, 1.0) if mpp is None else mpp
    unit = "px" if mpp is None else "\u00b5m"
    base = levels[0]
    metadata: JsonObject = {
        "name": name,
        "width": base.width,
        "height": base.height,
        "sizeZ": 1,
        "sizeT": 1,
        "channelType": "DEFAULT",
        "isRGB": True,
        "pixelType": "UINT8",
        "levels": [
            {"downsample": _downsample(base, level), "width": level.width, "height": level.height} for level in levels
        ],
        "channels": [
            {"name": "Red", "color": Color(255, 0, 0).argb},
            {"name": "Green", "color": Color(0, 255, 0).argb},
            {"name": "Blue", "color": Color(0, 0, 255).argb},
        ],
        "pixelCalibration": {
            "pixelWidth": {"value": float(width), "unit": unit},
            "pixelHeight": {"value": float(height), "unit": unit},
            "zSpacing": {"value": 1.0, "unit": "z-slice"},
            "timeUnit": "SECONDS",
            "timepoints": [0.0] if has_timepoints else [],
        },
    }
    if magnification is not None:
        metadata["magnification"] = float(magnification)
    return metadata | {"preferredTileWidth": tile.width, "preferredTileHeight": tile.height}


def server_json(builder: JsonObject, *, version: str) -> bytes:
    """Content of ``server.json`` in the form of a QuPath version."""
    release = _release(version)
    if release >= (0, 6):
        return json_bytes(builder)
    if release >= (0, 5):
        wrapped = {"builder": builder} | ({"metadata": builder["metadata"]} if "metadata" in builder else {})
        return json_bytes(wrapped, pretty=False)
    return json_bytes({key: value for key, value in builder.items() if key != "builderType"}, pretty=False)


def with_uri(builder: JsonObject, uri: str) -> JsonObject:
    """Return a builder of a file with another URI; a wrapped one comes back unchanged."""
    return builder | {"uri": uri} if builder.get("builderType") == "uri" else builder


# -- classes.json


def _class_list(data: bytes, path: Path) -> tuple[JsonObject, list[JsonObject]]:
    """Read a class list: the whole document, and its classes."""
    document = parse_json(data, path)
    try:
        return document, _class_items(document)
    except _MisplacedError as error:
        raise ProjectFormatError(error.message, path=path, offset=_offset_of(data, error.keys)) from None


def _class_items(document: object) -> list[JsonObject]:
    items = document.get("pathClasses", []) if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _MisplacedError("this is not a class list: pathClasses is not a list of classes", "pathClasses")
    for index, item in enumerate(items):
        if not isinstance(item.get("name"), str):
            raise _MisplacedError("a class in pathClasses has no name", "pathClasses", index, "name")
    return items


def parse_classes(data: bytes, path: Path) -> tuple[PathClass, ...]:
    """Class list of ``classes.json``; a class without a colour gets its default one.

    Raises
    ------
    ProjectFormatError
        If it is not a class list.
    """
    classes: dict[str, PathClass] = {}
    for item in _class_list(data, path)[1]:
        argb = item.get("color")
        name = whole_text(item["name"])
        color = Color.from_argb(argb) if isinstance(argb, int) else default_color(name)
        classes.setdefault(name, PathClass(name, color))
    return tuple(classes.values())


def classes_json(classes: Sequence[PathClass], former: bytes | None, path: Path) -> bytes:
    """Content of ``classes.json``.

    Parameters
    ----------
    classes : sequence of PathClass
        The whole list, in order.
    former : bytes or None
        Present content; keys of it that we do not know are kept.
    path : Path
        The file, for messages.

    Returns
    -------
    bytes
        As QuPath writes it.
    """
    document, stored = ({}, []) if former is None else _class_list(former, path)
    known = {whole_text(item["name"]): item for item in stored}
    items = [
        known.get(path_class.name, {}) | {"name": path_class.name, "color": path_class.color.argb}
        for path_class in classes
    ]
    return json_bytes(document | {"pathClasses": items})


def merged_classes(classes: Sequence[PathClass], more: Sequence[PathClass]) -> tuple[PathClass, ...]:
    """`classes`, then those of `more` whose names are new; what stands there keeps its colour."""
    merged = {path_class.name: path_class for path_class in more}
    first = {path_class.name: path_class for path_class in classes}
    return (*classes, *(path_class for name, path_class in merged.items() if name not in first))
