"""The objects of a ``data.qpdata`` file: where their parts stand, their identities, and what records need of them."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Color
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaObject
from darefine_qupath.javaserial.packed import PackedObject, Template
from darefine_qupath.javaserial.protocol import F8, I4
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, list_items, text, type_name
from darefine_qupath.project.qpdata.rois import RoiBatch, RoiRecord

__all__ = [
    "KINDS",
    "MAX_CLASS_DEPTH",
    "OBJECT_ID",
    "PATH_CLASS",
    "Found",
    "ObjectParts",
    "Reader",
    "Row",
    "class_of",
    "walk",
]

OBJECT_ID = "Object ID"
_OBJECTS = "qupath.lib.objects."
_METADATA = f"{_OBJECTS}MetadataMap"
PATH_CLASS = f"{_OBJECTS}classes.PathClass"
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
MAX_CLASS_DEPTH = 64
_ID_NAMESPACE = uuid5(NAMESPACE_URL, "darefine_qupath/objects-without-id")


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
        self._set_children(content, position + 1, I4.unpack(block)[0])

    def _parse_v4(self, content: Sequence[Content]) -> None:
        self.layout = 4
        block = content[3]
        if not isinstance(block, bytes):
            raise NodeError(f"{self.node.desc.name} has {type_name(block)} where its fields' number is", self.node)
        num_fields = I4.unpack_from(block)[0]
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
        self._set_children(content, 4 + num_fields + bool(num_fields), I4.unpack_from(rest)[0])

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
            high, low = (values.field(identity, f"{part}SigBits") for part in ("most", "least"))
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


class Row(NamedTuple):
    """An object on its way to a record; its ROI is made later, with all others."""

    id: UUID
    kind: Kind
    name: str | None
    color: int | None
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
        """Make the record, once all ROIs of the batch are made."""
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
            color=self.color,
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
        self.colors: dict[str, Color] = {}
        self.names: dict[int, tuple[Content, list[str]]] = {}
        """By node; the node is kept, so that no other can come to have its id."""
        self.ids: list[UUID] = []
        self.has_ids = True
        self.cores: dict[int, UUID] = {}

    def rows(self, objects: Iterable[Found]) -> list[Row]:
        """Rows of all objects but the root, parents before children."""
        rows = []
        for found in objects:
            self.ids.append(found.id)
            self.has_ids = self.has_ids and found.has_id
            if found.parent >= 0:
                rows.append(self.row(found, self.ids[found.parent] if found.parent else None))
        return rows

    def row(self, found: Found, parent: UUID | None) -> Row:
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
        probability: float = F8.unpack_from(tail[2])[0]
        return Row(
            identity,
            kind,
            self._text(content[0]),
            None if content[1] is None else values.whole_number(content[1]),
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
            name, color = class_of(node)
            self.budget.spend(len(name), node)
            self.classes[id(node)] = name
            if color is not None:
                self.colors.setdefault(name, color)
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
            items = list_items(values.field(node, "list"))
            self.budget.spend(16 * len(items), node)
            return dict([self._measurement(item) for item in items])
        raise NodeError(f"{name} is not a measurement list that can be read", node)

    def _measurement(self, item: Content) -> tuple[str, float]:
        if not isinstance(item, JavaObject):
            raise NodeError(f"{type_name(item)} where a measurement should be", item)
        return self._text(values.field(item, "name")) or "", _plain(float(values.number(item)))

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


def class_of(node: Content) -> tuple[str, Color | None]:
    """Full name and colour of a PathClass node.

    Raises
    ------
    NodeError
        If it is none, or is its own ancestor.
    """
    parts: list[str] = []
    color: Color | None = None
    current = node
    while current is not None:
        if not isinstance(current, JavaObject) or current.desc.name != PATH_CLASS:
            raise NodeError(f"{type_name(current)} where a class should be", node)
        if current is node:
            packed = values.field(current, "colorRGB")
            color = None if packed is None else Color.from_argb(values.whole_number(packed))
        parts.append(text(values.field(current, "name")) or "")
        current = values.field(current, "parentClass")
        if len(parts) > MAX_CLASS_DEPTH:
            raise NodeError(f"A class is derived more than {MAX_CLASS_DEPTH} times", node)
    return ": ".join(reversed(parts)), color
