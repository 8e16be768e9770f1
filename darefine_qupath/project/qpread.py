"""What is in a ``data.qpdata`` file: the objects of an image as records, and everything that stands beside them."""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Colour
from darefine_qupath.errors import ProjectFormatError
from darefine_qupath.project import javautil
from darefine_qupath.project.files import is_since
from darefine_qupath.project.javanodes import Content, JavaArray, JavaEnum, JavaObject, JavaString, Stream
from darefine_qupath.project.javapacked import PackedObject, Template, unpack
from darefine_qupath.project.javastream import decode, no_collection
from darefine_qupath.project.javautil import NodeError, list_items, map_items, text, type_name
from darefine_qupath.project.rois import RoiBatch, RoiError, RoiRecord

__all__ = [
    "OBJECT_ID",
    "Found",
    "ImageData",
    "ObjectParts",
    "Opaque",
    "StainVector",
    "Stains",
    "TmaGrid",
    "WorkflowStep",
    "class_of",
    "read",
    "walk",
]

OBJECT_ID = "Object ID"
EOF = "EOF"
_VERSION_PREFIX = "Data file version"
_OBJECTS = "qupath.lib.objects."
_ROOT = f"{_OBJECTS}PathRootObject"
_METADATA = f"{_OBJECTS}MetadataMap"
PATH_CLASS = f"{_OBJECTS}classes.PathClass"
_HIERARCHY = f"{_OBJECTS}hierarchy.PathObjectHierarchy"
_STAINS = "qupath.lib.color.ColorDeconvolutionStains"
_WORKFLOW = "qupath.lib.plugins.workflow.Workflow"
_IMAGE_TYPE = "qupath.lib.images.ImageData$ImageType"
_LISTS = "qupath.lib.measurements."
_NUMERIC_LISTS = {
    f"{_LISTS}NumericMeasurementList$FloatList": ("[F", 4, "f"),
    f"{_LISTS}NumericMeasurementList$DoubleList": ("[D", 8, "d"),
}
_DEFAULT_LIST = f"{_LISTS}DefaultMeasurementList"
KINDS: dict[str, Kind] = {
    f"{_OBJECTS}PathAnnotationObject": "annotation",
    f"{_OBJECTS}PathDetectionObject": "detection",
    f"{_OBJECTS}PathCellObject": "cell",
    f"{_OBJECTS}PathTileObject": "tile",
    f"{_OBJECTS}TMACoreObject": "tma core",
}
_BOOLEAN = "java.lang.Boolean"
_I4 = struct.Struct(">i")
_F8 = struct.Struct(">d")
_MAX_CLASS_DEPTH = 64
_MAX_PROPERTY_DEPTH = 16
_ID_NAMESPACE = uuid5(NAMESPACE_URL, "darefine_qupath/objects-without-id")


class StainVector(NamedTuple):
    """A stain: name, unit vector in red, green, blue optical density, and whether it is what the others leave."""

    name: str
    rgb: tuple[float, float, float]
    residual: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stains:
    """Colour deconvolution of a brightfield image.

    Attributes
    ----------
    name : str
        As shown in QuPath.
    vectors : tuple of StainVector
        Always three; the third is computed where the file names two.
    background : tuple of float
        Red, green and blue of no stain.
    """

    name: str
    vectors: tuple[StainVector, ...]
    background: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowStep:
    """A step of the image's history.

    Attributes
    ----------
    java_class : str
        Class of the step.
    name : str or None
        As shown in QuPath.
    script : str or None
        Script line that does it again.
    """

    java_class: str
    name: str | None
    script: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TmaGrid:
    """Grid of a tissue microarray: columns, rows, and the cores row by row."""

    width: int
    height: int
    cores: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is kept and not interpreted, by its Java class."""

    java_class: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageData:
    """All that a ``data.qpdata`` file says.

    Attributes
    ----------
    path : Path or None
        The file, for messages.
    data : bytes
        Its bytes; `edit` starts from them.
    data_version : str
        ``"Data file version 3"``.
    qupath_version : str or None
        Version of QuPath that wrote it; None in old files.
    server_text : str
        The JSON (or older text) that names the image.
    server : mapping or None
        The image server's builder in it; None where there is none.
    locale : str or None
        Format locale of the writer, ``"en_US"``.
    image_type : str
        QuPath's ImageType.
    stains : Stains or None
        Of a brightfield image.
    workflow : tuple of WorkflowStep
        History, oldest first.
    objects : tuple of Annotation
        Every object but the root, parents before children.
    root_id : UUID
        Identity of the root.
    tma_grid : TmaGrid or None
        Of a tissue microarray.
    properties : mapping of str to value
        Image properties; `Opaque` where the value is an object of a QuPath class.
    colours : mapping of str to Colour
        Colours of the path classes met, by full name.
    duplicates : frozenset of UUID
        Identities that more than one object has.
    has_ids : bool
        Whether every object's identity is in the file; otherwise identities are derived from positions.
    """

    path: Path | None
    data: bytes
    data_version: str
    qupath_version: str | None
    server_text: str
    server: Mapping[str, Any] | None
    locale: str | None
    image_type: str
    stains: Stains | None
    workflow: tuple[WorkflowStep, ...]
    objects: tuple[Annotation, ...]
    root_id: UUID
    tma_grid: TmaGrid | None
    properties: Mapping[str, Any]
    colours: Mapping[str, Colour]
    duplicates: frozenset[UUID]
    has_ids: bool

    @property
    def tally(self) -> list[tuple[Kind, str | None]]:
        """Kind and class of every object."""
        return [(record.kind, record.path_class) for record in self.objects]


class _Budget:
    """Keeps a damaged file, whose handles may refer to one value a million times, from growing in memory."""

    def __init__(self, size: int) -> None:
        self.left = 8 * size + 1_000_000

    def spend(self, size: int, node: object) -> None:
        self.left -= size
        if self.left < 0:
            raise NodeError("Values are shared so often that they would not fit into memory", node)


class ObjectParts:
    """Where the parts of an object stand in what it wrote.

    Attributes
    ----------
    node : JavaObject
        The object.
    content : tuple
        What it wrote.
    metadata : JavaObject or None
        MetadataMap.
    measurements : JavaObject or None
        Measurement list.
    layout : int
        3 for the layout with metadata, 4 for the one with a UUID object, 2 for the one before either.
    first_child, num_children : int
        Slice of the content that the children take.
    """

    __slots__ = ("content", "first_child", "layout", "measurements", "metadata", "node", "num_children")

    def __init__(self, node: JavaObject) -> None:
        self.node = node
        self.content = node.data
        self.metadata: JavaObject | None = None
        self.measurements: Content = None
        try:
            self._parse(self.content)
        except (IndexError, struct.error):
            raise NodeError(f"{node.desc.name} ends before its parts do", node) from None

    def _parse(self, content: Sequence[Content]) -> None:
        third = content[2]
        kind = third.desc.name if isinstance(third, JavaObject) else ""
        if kind == _METADATA:
            self.layout, self.metadata, self.measurements, position = 3, third, content[3], 4  # type: ignore[assignment]
        elif kind == "java.util.UUID":
            self._parse_v4(content)
            return
        else:
            self.layout, self.measurements, position = 2, third, 3
        block = content[position]
        if not isinstance(block, bytes) or len(block) != 4:
            raise NodeError(f"{self.node.desc.name} has {type_name(block)} where its children's number is", self.node)
        self._set_children(content, position + 1, _I4.unpack(block)[0])

    def _parse_v4(self, content: Sequence[Content]) -> None:
        self.layout = 4
        block = content[3]
        if not isinstance(block, bytes):
            raise NodeError(f"{self.node.desc.name} has {type_name(block)} where its fields' number is", self.node)
        num_fields = _I4.unpack_from(block)[0]
        if not 0 <= num_fields < len(content) - 3:
            raise NodeError(f"{self.node.desc.name} has {num_fields} fields", self.node)
        for value in content[4 : 4 + num_fields]:
            if isinstance(value, JavaObject) and value.desc.name == _METADATA:
                self.metadata = value
            elif value is not None:
                self.measurements = value
        # Without fields both numbers are in one block.
        rest = block[4:] if num_fields == 0 else content[4 + num_fields]
        if not isinstance(rest, bytes):
            raise NodeError(f"{self.node.desc.name} has {type_name(rest)} where its children's number is", self.node)
        self._set_children(content, 4 + num_fields + bool(num_fields), _I4.unpack_from(rest)[0])

    def _set_children(self, content: Sequence[Content], first: int, count: int) -> None:
        if not 0 <= count <= len(content) - first:
            raise NodeError(
                f"{self.node.desc.name} has {count} children, and room for {len(content) - first}", self.node
            )
        self.first_child = first
        self.num_children = count

    @property
    def id(self) -> UUID | None:
        """Identity as stored; None where there is none."""
        if self.layout == 4:
            identity: Any = self.content[2]
            high, low = (javautil.field(identity, f"{part}SigBits") for part in ("most", "least"))
            return UUID(int=((high & (2**64 - 1)) << 64) | (low & (2**64 - 1)))
        return None if self.layout == 2 or self.metadata is None else _stored_id(self.metadata)

    @property
    def children(self) -> Sequence[Content]:
        """The objects below this one."""
        return self.content[self.first_child : self.first_child + self.num_children]

    @property
    def tail(self) -> int:
        """Where the part that only objects with a ROI have begins."""
        return self.first_child + self.num_children

    @property
    def has_lock(self) -> bool:
        """Whether the tail begins with the lock; that of old files does not."""
        content = self.content
        if self.tail >= len(content):
            raise NodeError(f"{self.node.desc.name} ends before its class", self.node)
        first = content[self.tail]
        return isinstance(first, JavaObject) and first.desc.name == _BOOLEAN


def _stored_id(metadata: JavaObject) -> UUID | None:
    content = metadata.data
    if len(content) != 3 or content[1].__class__ is not JavaArray or content[2].__class__ is not JavaArray:
        raise NodeError("Object metadata is not laid out as a map of strings", metadata)
    keys: Any = content[1].data
    values: Any = content[2].data
    if isinstance(keys, bytes) or isinstance(values, bytes) or len(keys) != len(values):
        raise NodeError("Object metadata has not as many values as keys", metadata)
    for key, value in zip(reversed(keys), reversed(values), strict=True):
        if isinstance(key, JavaString) and key.raw == b"Object ID":
            return _uuid_of(text(value))
    return None


_UUID_SHAPE = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}").fullmatch
_UUID_PARTS = re.compile(r"[0-9a-fA-F]{1,16}(-[0-9a-fA-F]{1,16}){4}")


def _uuid_of(string: str | None) -> UUID | None:
    """UUID as Java's ``UUID.fromString`` understands it; None where it would not."""
    if string is None:
        return None
    if _UUID_SHAPE(string):
        return UUID(int=int(string.replace("-", ""), 16))
    if not _UUID_PARTS.fullmatch(string):
        return None
    widths = (8, 4, 4, 4, 12)
    parts = [part[-width:].rjust(width, "0") for part, width in zip(string.split("-"), widths, strict=True)]
    return UUID("".join(parts))


class Found(NamedTuple):
    """An object of the hierarchy.

    Attributes
    ----------
    node : JavaObject
        The object.
    id : UUID
        Its identity, stored or derived.
    parent : int
        Number of the object above it; -1: none.
    has_id : bool
        Whether the identity is stored.
    """

    node: JavaObject
    id: UUID
    parent: int
    has_id: bool


def walk(root: JavaObject, salt: str) -> Iterator[Found]:
    """Every object of a hierarchy, parents before children.

    Parameters
    ----------
    root : JavaObject
        Comes first.
    salt : str
        What identities of objects that have none are derived from, beside their position.

    Yields
    ------
    Found
        One for each object.

    Raises
    ------
    NodeError
        If something that is no object stands among them, or one stands there twice.
    """
    seen: set[int] = set()
    places: dict[Template, int | None] = {}
    pending: list[tuple[Content, int]] = [(root, -1)]
    while pending:
        node, parent = pending.pop()
        if not isinstance(node, JavaObject) or not node.desc.is_externalizable:
            raise NodeError(f"{type_name(node)} where an object of the hierarchy should be", node)
        number = len(seen)
        seen.add(id(node))
        if len(seen) == number:
            raise NodeError("An object is in the hierarchy twice", node)
        is_packed = isinstance(node, PackedObject) and node.is_packed
        identity = _packed_id(node, places) if is_packed else None  # type: ignore[arg-type]
        if identity is not None:
            yield Found(node, identity, parent, has_id=True)
            continue
        parts = ObjectParts(node)
        if parts.num_children:
            if is_packed:
                # Its children must be the same nodes from now on.
                node.open()  # type: ignore[attr-defined]
                parts = ObjectParts(node)
            pending.extend([(child, number) for child in reversed(parts.children)])
        identity = parts.id
        yield Found(node, identity or uuid5(_ID_NAMESPACE, f"{salt}#{number}"), parent, identity is not None)


def _packed_id(node: PackedObject, places: dict[Template, int | None]) -> UUID | None:
    """Find the stored identity of an object without children, and do not decode it; None where that cannot be."""
    template = node.template
    if template not in places:
        places[template] = _place_of_id(node)
    place = places[template]
    if place is None:
        return None
    raw = node.gap(place)[2:]
    return _uuid_of(raw.decode("ascii")) if raw.isascii() else None


def _place_of_id(node: PackedObject) -> int | None:
    """Which gap of a template holds the identity."""
    parts = ObjectParts(node)
    identity = parts.id
    if identity is None or parts.layout != 3 or parts.num_children:
        return None
    texts = [gap[2:] if part.gap == 0 else b"" for part, gap in zip(node.template.parts, node.gaps, strict=True)]
    stored = str(identity).encode()
    # Where the key is a gap too, others of this form may have other keys.
    if texts.count(stored) != 1 or OBJECT_ID.encode() in texts:
        return None
    return texts.index(stored)


class _Row(NamedTuple):
    """An object on its way to a record; its ROI is made later, with all others."""

    id: UUID
    kind: Kind
    name: str | None
    colour: int | None
    parent: UUID | None
    locked: bool
    path_class: str | None
    measurements: dict[str, float]
    metadata: dict[str, str]
    probability: float
    is_missing: bool
    roi: int
    nucleus: int

    def record(self, rois: Sequence[RoiRecord]) -> Annotation:
        roi, plane, geometry = (None, Plane(), None) if self.roi < 0 else rois[self.roi]
        return Annotation(
            geometry=geometry,
            path_class=self.path_class,
            id=self.id,
            kind=self.kind,
            name=self.name,
            locked=self.locked,
            parent=self.parent,
            measurements=self.measurements,
            metadata=self.metadata,
            roi=roi,
            plane=plane,
            colour=self.colour,
            class_probability=self.probability,
            nucleus=None if self.nucleus < 0 else rois[self.nucleus].geometry,
            is_missing=self.is_missing,
        )


class Reader:
    """Takes what records need out of the hierarchy's nodes, so that the nodes can go before the geometries come."""

    def __init__(self, size: int, rois: RoiBatch) -> None:
        self.budget = _Budget(size)
        self.rois = rois
        self.classes: dict[int, str] = {}
        self.colours: dict[str, Colour] = {}
        self.names: dict[int, tuple[Content, list[str]]] = {}
        """By node; the node is kept, so that no other can come to have its id."""
        self.ids: list[UUID] = []
        self.has_ids = True
        self.cores: dict[int, UUID] = {}

    def rows(self, objects: Iterable[Found]) -> list[_Row]:
        """Rows of all objects but the root, parents before children."""
        rows = []
        for found in objects:
            self.ids.append(found.id)
            self.has_ids = self.has_ids and found.has_id
            if found.parent >= 0:
                rows.append(self.row(found, self.ids[found.parent] if found.parent else None))
        return rows

    def row(self, found: Found, parent: UUID | None) -> _Row:
        """Row of one object, and of the identity of the one above."""
        node, identity, _, has_id = found
        parts = ObjectParts(node)
        kind = KINDS.get(node.desc.name)
        if kind is None:
            raise NodeError(f"{node.desc.name} is not a kind of object that can be read", node)
        if kind == "tma core":
            self.cores[id(node)] = identity
        content = parts.content
        tail = content[parts.tail :]
        locked = False
        if tail and isinstance(tail[0], JavaObject) and tail[0].desc.name == _BOOLEAN:
            locked = tail[0].data[0] != b"\0"
            tail = tail[1:]
        if len(tail) < 3 or not isinstance(tail[2], bytes) or len(tail[2]) < 8:
            raise NodeError(f"{node.desc.name} ends before its class and ROI", node)
        probability: float = _F8.unpack_from(tail[2])[0]
        return _Row(
            identity,
            kind,
            self._text(content[0]),
            None if content[1] is None else int(javautil.number(content[1])),
            parent,
            locked,
            self._path_class(tail[0]),
            self._measurements(parts.measurements),
            self._metadata(parts, has_id=has_id),
            _plain(probability),
            kind == "tma core" and tail[2][8:9] not in (b"", b"\0"),
            self._roi(tail[1]),
            self._roi(tail[3]) if kind == "cell" and len(tail) > 3 else -1,
        )

    def _roi(self, node: Content) -> int:
        if node is None:
            return -1
        if not isinstance(node, JavaObject):
            raise NodeError(f"{type_name(node)} where a ROI should be", node)
        return self.rois.add(node)

    def _text(self, node: Content) -> str | None:
        if isinstance(node, JavaString):
            self.budget.spend(len(node.raw), node)
        return text(node)

    def _path_class(self, node: Content) -> str | None:
        """Full name of a class."""
        if node is None:
            return None
        name = self.classes.get(id(node))
        if name is None:
            name, colour = class_of(node)
            self.budget.spend(len(name), node)
            self.classes[id(node)] = name
            if colour is not None:
                self.colours.setdefault(name, colour)
        return name or None

    def _metadata(self, parts: ObjectParts, *, has_id: bool) -> dict[str, str]:
        """Metadata without the identity."""
        if parts.metadata is None:
            return {}
        is_id_inside = has_id and parts.layout == 3
        _, keys, values = parts.metadata.data
        if is_id_inside and len(keys.data) == 1:
            return {}
        metadata = {}
        for key, value in zip(keys.data, values.data, strict=True):
            metadata[self._text(key) or ""] = self._text(value) or ""
        if is_id_inside:
            metadata.pop(OBJECT_ID, None)
        return metadata

    def _measurements(self, node: Content) -> dict[str, float]:
        """Measurements by name, in order."""
        if node is None:
            return {}
        name = type_name(node)
        if name in _NUMERIC_LISTS and isinstance(node, JavaObject):
            return self._numeric(node, *_NUMERIC_LISTS[name])
        if name == _DEFAULT_LIST and isinstance(node, JavaObject):
            items = list_items(javautil.field(node, "list"))
            self.budget.spend(16 * len(items), node)
            return dict([self._measurement(item) for item in items])
        raise NodeError(f"{name} is not a measurement list that can be read", node)

    def _measurement(self, item: Content) -> tuple[str, float]:
        if not isinstance(item, JavaObject):
            raise NodeError(f"{type_name(item)} where a measurement should be", item)
        return self._text(javautil.field(item, "name")) or "", _plain(float(javautil.number(item)))

    def _numeric(self, node: JavaObject, array_class: str, width: int, code: str) -> dict[str, float]:
        index = node.desc.index
        if "values" not in index or "names" not in index:
            raise NodeError(f"{node.desc.name} has no names or no values", node)
        values, names_node = node.data[index["values"][0]], node.data[index["names"][0]]
        names = self._names(names_node)
        if not isinstance(values, JavaArray) or values.desc.name != array_class:
            raise NodeError(f"{type_name(values)} where measured values should be", node)
        count = len(names)
        if len(values.data) < width * count:
            raise NodeError(f"{count} measurements have {len(values.data) // width} values", node)
        self.budget.spend(16 * count, node)
        numbers = struct.unpack_from(f">{count}{code}", values.data)  # type: ignore[arg-type]
        return dict(zip(names, [value if value == value else math.nan for value in numbers], strict=True))

    def _names(self, node: Content) -> list[str]:
        known = self.names.get(id(node))
        if known is None:
            known = self.names[id(node)] = (node, [self._text(item) or "" for item in list_items(node)])
        return known[1]


def _plain(value: float) -> float:
    """One NaN for all, so that records compare equal."""
    return value if value == value else math.nan  # only NaN differs from itself


def class_of(node: Content) -> tuple[str, Colour | None]:
    """Full name and colour of a PathClass node.

    Raises
    ------
    NodeError
        If it is none, or is its own ancestor.
    """
    parts: list[str] = []
    colour: Colour | None = None
    current = node
    while current is not None:
        if not isinstance(current, JavaObject) or current.desc.name != PATH_CLASS:
            raise NodeError(f"{type_name(current)} where a class should be", node)
        if current is node:
            packed = javautil.field(current, "colorRGB")
            colour = None if packed is None else Colour.from_argb(int(javautil.number(packed)))
        parts.append(text(javautil.field(current, "name")) or "")
        current = javautil.field(current, "parentClass")
        if len(parts) > _MAX_CLASS_DEPTH:
            raise NodeError(f"A class is derived more than {_MAX_CLASS_DEPTH} times", node)
    return ": ".join(reversed(parts)), colour


@dataclass(slots=True)
class Items:
    """Top-level items by type, as QuPath itself tells them apart."""

    data_version: str = ""
    server_text: str = ""
    locale: str | None = None
    image_type: str = "UNSET"
    stains: Stains | None = None
    workflow: tuple[WorkflowStep, ...] = ()
    hierarchy: JavaObject | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)
    is_complete: bool = False
    qupath_version: str | None = None
    server: Mapping[str, Any] | None = None


def _items(stream: Stream) -> Items:
    items = Items()
    contents = iter(stream.contents)
    first = next(contents, None)
    if not isinstance(first, bytes) or len(first) < 2:
        raise NodeError("The file does not begin with its version", stream.nodes[0] if stream.nodes else None)
    items.data_version = text(JavaString.of_raw(first[2:])) or ""
    if not items.data_version.startswith(_VERSION_PREFIX):
        raise NodeError(f"The file begins with {items.data_version[:40]!r} instead of its version", None)
    readers: dict[str, Callable[[JavaObject], None]] = {
        "java.util.Locale": lambda node: setattr(items, "locale", _locale(node)),
        _STAINS: lambda node: setattr(items, "stains", _stains(node)),
        _WORKFLOW: lambda node: setattr(items, "workflow", tuple(_workflow(node))),
        _HIERARCHY: lambda node: setattr(items, "hierarchy", node),
        "java.util.HashMap": lambda node: setattr(items, "properties", _properties(node)),
        "java.util.LinkedHashMap": lambda node: setattr(items, "properties", _properties(node)),
    }
    has_server = False
    for item in contents:
        if isinstance(item, JavaString):
            if item.raw == EOF.encode():
                items.is_complete = True
                break
            if not has_server:
                items.server_text, has_server = text(item) or "", True
                _parse_server(items)
        elif isinstance(item, JavaEnum) and item.desc.name == _IMAGE_TYPE:
            items.image_type = text(item.constant) or "UNSET"
        elif isinstance(item, JavaObject) and item.desc.name in readers:
            readers[item.desc.name](item)
    return items


def _parse_server(items: Items) -> None:
    wrapper = _json(items.server_text) or {}
    version, server = wrapper.get("qupathVersion"), wrapper.get("server")
    items.qupath_version = None if version is None else str(version)
    items.server = server if isinstance(server, dict) else None


def _locale(node: JavaObject) -> str:
    parts = [text(javautil.field(node, name)) or "" for name in ("language", "country", "variant")]
    return "_".join(parts).rstrip("_")


def _triple(value: object, node: JavaObject) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in str(value).split())
    except ValueError:
        raise NodeError(f"{value!r} is not a stain vector", node) from None
    return red, green, blue


def _unit(vector: tuple[float, float, float]) -> tuple[float, float, float]:
    length = math.sqrt(sum(part * part for part in vector))
    if not length > 0:
        return vector
    return vector[0] / length, vector[1] / length, vector[2] / length


def _cross(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _stains(node: JavaObject) -> Stains:
    described = next((text(part) for part in node.content if isinstance(part, JavaString)), None)
    values = _json(described or "")
    if values is None:
        raise NodeError("The colour deconvolution stains cannot be read", node)
    vectors = []
    for number in (1, 2, 3):
        if f"Stain {number}" in values:
            rgb = _unit(_triple(values.get(f"Values {number}"), node))
            vectors.append(StainVector(str(values[f"Stain {number}"]), rgb, residual=False))
    if len(vectors) == 2:
        vectors.append(StainVector("Residual", _unit(_cross(vectors[0].rgb, vectors[1].rgb)), residual=True))
    background = _triple(values.get("Background", "255 255 255"), node)
    return Stains(name=str(values.get("Name", "")), vectors=tuple(vectors), background=background)


def _json(described: str) -> dict[str, Any] | None:
    """Parse as QuPath's lenient Gson would; None for what is no JSON object."""
    try:
        value = json.loads(described, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _workflow(node: JavaObject) -> Iterator[WorkflowStep]:
    for step in node.content:
        if isinstance(step, JavaObject):
            kind = step.desc.name.rpartition(".")[2]
            reader = _STEPS.get(kind)
            name, script = (None, None) if reader is None else reader(step)
            yield WorkflowStep(java_class=step.desc.name, name=name, script=script)


_Step = tuple[str | None, str | None]


def _simple_step(step: JavaObject) -> _Step:
    strings = [text(part) for part in step.content if not isinstance(part, bytes)]
    if len(strings) != 5:
        raise NodeError(f"{step.desc.name} has {len(strings)} texts instead of 5", step)
    name, plugin, argument, before, after = strings
    return name, f"{before or ''}runPlugin('{plugin}', '{argument or ''}'){after or ''}"


def _scriptable_step(step: JavaObject) -> _Step:
    return text(javautil.field(step, "name")), text(javautil.field(step, "script"))


def _classifier_step(step: JavaObject) -> _Step:
    return text(javautil.field(step, "name")), f"runClassifier('{text(javautil.field(step, 'classifierPath')) or ''}')"


def _plugin_step(step: JavaObject) -> _Step:
    argument, before, after = (
        text(javautil.field(step, name)) or "" for name in ("arg", "scriptBefore", "scriptAfter")
    )
    plugin = type_name(javautil.field(step, "pluginClass"))
    return text(javautil.field(step, "name")), f"{before}runPlugin('{plugin}', '{argument}'){after}"


_STEPS: dict[str, Callable[[JavaObject], _Step]] = {
    "SimplePluginWorkflowStep": _simple_step,
    "DefaultScriptableWorkflowStep": _scriptable_step,
    "RunSavedClassifierWorkflowStep": _classifier_step,
    "DefaultPluginWorkflowStep": _plugin_step,
}


def _properties(node: JavaObject) -> dict[str, Any]:
    known: dict[int, Any] = {}
    return {str(_plain_value(key, 0, known)): _plain_value(value, 0, known) for key, value in map_items(node)}


_NUMBERS = {f"java.lang.{name}" for name in ("Integer", "Double", "Boolean", "Long", "Float", "Short", "Byte")}


def _plain_value(node: Content, depth: int, known: dict[int, Any]) -> Any:  # noqa: ANN401 - a property is anything
    """Python value of a property; each node once, since handles may share one a million times."""
    if node is None or isinstance(node, JavaString):
        return text(node)
    if id(node) not in known:
        known[id(node)] = Opaque(type_name(node))
        if isinstance(node, JavaObject) and depth < _MAX_PROPERTY_DEPTH:
            known[id(node)] = _plain_object(node, depth, known)
    return known[id(node)]


def _plain_object(node: JavaObject, depth: int, known: dict[int, Any]) -> Any:  # noqa: ANN401
    name = node.desc.name
    if name in _NUMBERS:
        return javautil.number(node)
    try:
        if name.endswith("Map"):
            pairs = map_items(node)
            return {
                _key(_plain_value(key, depth + 1, known)): _plain_value(value, depth + 1, known) for key, value in pairs
            }
        if name.endswith("List") or name == "java.util.CollSer":
            return [_plain_value(item, depth + 1, known) for item in list_items(node)]
    except NodeError:
        return Opaque(name)
    return Opaque(name)


def _key(value: object) -> object:
    return value if isinstance(value, (str, int, float)) else str(value)


def _tma_grid(hierarchy: JavaObject, ids: Mapping[int, UUID]) -> TmaGrid | None:
    grid = javautil.field(hierarchy, "tmaGrid")
    if grid is None:
        return None
    if not isinstance(grid, JavaObject):
        raise NodeError(f"{type_name(grid)} where the TMA grid should be", hierarchy)
    cores = list_items(javautil.field(grid, "cores"))
    if any(id(core) not in ids for core in cores):
        raise NodeError("The TMA grid holds a core that is not in the hierarchy", grid)
    return TmaGrid(
        width=javautil.field(grid, "gridWidth"),
        height=javautil.field(grid, "gridHeight"),
        cores=tuple(ids[id(core)] for core in cores),
    )


def root_of(items: Items) -> JavaObject:
    if items.hierarchy is None:
        raise NodeError("The file has no object hierarchy", None)
    root = javautil.field(items.hierarchy, "rootObject")
    if not isinstance(root, JavaObject) or root.desc.name != _ROOT:
        raise NodeError(f"{type_name(root)} where the root object should be", items.hierarchy)
    return root


class _Collected(NamedTuple):
    """All that a file says but for the geometries; no node of its stream."""

    items: Items
    reader: Reader
    rows: list[_Row]
    tma_grid: TmaGrid | None
    qupath_version: str | None
    server: Mapping[str, Any] | None


def _collect(stream: Stream, data: bytes, path: Path | None, rois: RoiBatch | None = None) -> _Collected:
    items = complete_items(stream, data, path)
    if rois is None:
        rois = roi_batch(items, data)
    reader = Reader(len(data), rois)
    rows = reader.rows(walk(root_of(items), items.server_text))
    grid = _tma_grid(items.hierarchy, reader.cores)  # type: ignore[arg-type]
    items.hierarchy = None
    return _Collected(items, reader, rows, grid, items.qupath_version, items.server)


def roi_batch(items: Items, data: bytes) -> RoiBatch:
    """Batch for the ROIs of a file."""
    return RoiBatch(8 * len(data) + 1_000_000, rounds_all=is_since(items.qupath_version or "", 0, 6))


def complete_items(stream: Stream, data: bytes, path: Path | None) -> Items:
    """Top-level items of a whole file.

    Raises
    ------
    ProjectFormatError
        If its end is missing.
    """
    items = _items(stream)
    if items.is_complete:
        return items
    raise ProjectFormatError(
        "The file ends without its closing 'EOF': its end is missing; take QuPath's data.qpdata.bkp or a backup",
        path=path,
        offset=len(data),
    )


def open_compact(data: bytes, path: Path | None) -> Stream:
    """Decode a file; objects that are alike stay bytes, but for those that define a path class."""
    stream = decode(data, path=path, is_compact=True)
    unpack(stream, PATH_CLASS)
    return stream


def _decode_and_collect(data: bytes, path: Path | None) -> _Collected:
    with contextlib.suppress(NodeError):
        return _collect(open_compact(data, path), data, path)
    # Only the whole tree tells where a node stands.
    stream = decode(data, path=path)
    try:
        return _collect(stream, data, path)
    except NodeError as error:
        raise ProjectFormatError(error.message, path=path, offset=stream.offset_of(error.node) or 4) from None


class _RoiFinder(RoiBatch):
    """Counts ROIs up to one of them."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self.slot = slot

    def add(self, node: JavaObject) -> int:
        number = super().add(node)
        if number == self.slot:
            raise NodeError("", node)
        return number


def _offset_of_roi(slot: int, data: bytes) -> int | None:
    """Where a ROI stands; its node is gone when its geometry turns out to be none, so the file is decoded again."""
    stream = decode(data)
    try:
        _collect(stream, data, None, _RoiFinder(slot))
    except NodeError as error:
        return stream.offset_of(error.node)
    return None


def duplicates_of(ids: Sequence[UUID]) -> frozenset[UUID]:
    """Identities that occur more than once."""
    if len(set(ids)) == len(ids):
        return frozenset()
    seen: set[UUID] = set()
    return frozenset(identity for identity in ids if identity in seen or seen.add(identity))  # type: ignore[func-returns-value]


def read(data: bytes, *, path: Path | None = None) -> ImageData:
    """Read a ``data.qpdata`` file.

    Parameters
    ----------
    data : bytes
        The whole file.
    path : Path, optional
        Named in errors.

    Returns
    -------
    ImageData
        Objects as records, and everything beside them.

    Raises
    ------
    ProjectFormatError
        If the file is damaged or holds something that cannot be read; names file, offset and class.
    """
    with no_collection():
        items, reader, rows, grid, version, server = _decode_and_collect(data, path)
        try:
            rois = reader.rois.build()
        except RoiError as error:
            raise ProjectFormatError(error.message, path=path, offset=_offset_of_roi(error.slot, data)) from None
        objects = []
        rows.reverse()
        while rows:
            objects.append(rows.pop().record(rois))
    return ImageData(
        path=path,
        data=data,
        data_version=items.data_version,
        qupath_version=version,
        server_text=items.server_text,
        server=server,
        locale=items.locale,
        image_type=items.image_type,
        stains=items.stains,
        workflow=items.workflow,
        objects=tuple(objects),
        root_id=reader.ids[0],
        tma_grid=grid,
        properties=items.properties,
        colours=reader.colours,
        duplicates=duplicates_of(reader.ids),
        has_ids=reader.has_ids,
    )
