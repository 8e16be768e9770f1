"""Read the objects of a hierarchy as records."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from uuid import UUID

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Color
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaObject
from darefine_qupath.javaserial.protocol import F8
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, list_items, text, type_name
from darefine_qupath.project.qpdata.hierarchy import HierarchyObject, ObjectParts
from darefine_qupath.project.qpdata.rois import RoiBatch, RoiRecord
from darefine_qupath.project.qpdata.schema import (
    BOOLEAN,
    DEFAULT_LIST,
    DOUBLE_LIST,
    FLOAT_LIST,
    KIND_CLASSES,
    OBJECT_ID,
    PATH_CLASS,
)

__all__ = ["KINDS", "MAX_CLASS_DEPTH", "ObjectReader", "ObjectRow", "class_of"]

KINDS: dict[str, Kind] = {java_class: kind for kind, java_class in KIND_CLASSES.items()}
_NUMERIC_LISTS = {FLOAT_LIST: ("[F", 4, "f"), DOUBLE_LIST: ("[D", 8, "d")}
MAX_CLASS_DEPTH = 64


class _Budget:
    """Keeps a damaged file, whose handles may refer to one value a million times, from growing in memory."""

    def __init__(self, size: int) -> None:
        self.left = 8 * size + 1_000_000

    def spend(self, size: int, node: object) -> None:
        self.left -= size
        if self.left < 0:
            raise NodeError("Values are shared so often that they would not fit into memory", node)


class ObjectRow(NamedTuple):
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


class ObjectReader:
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

    def rows(self, objects: Iterable[HierarchyObject]) -> list[ObjectRow]:
        """Rows of all objects but the root, parents before children."""
        rows = []
        for found in objects:
            self.ids.append(found.id)
            self.has_ids = self.has_ids and found.has_id
            if found.parent >= 0:
                rows.append(self.row(found, self.ids[found.parent] if found.parent else None))
        return rows

    def row(self, found: HierarchyObject, parent: UUID | None) -> ObjectRow:
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
        if tail and isinstance(tail[0], JavaObject) and tail[0].desc.name == BOOLEAN:
            locked = tail[0].data[0] != b"\0"
            tail = tail[1:]
        if len(tail) < 3 or not isinstance(tail[2], bytes) or len(tail[2]) < 8:
            raise NodeError(f"{node.desc.name} ends before its class and ROI", node)
        probability: float = F8.unpack_from(tail[2])[0]
        return ObjectRow(
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
        if name == DEFAULT_LIST and isinstance(node, JavaObject):
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
