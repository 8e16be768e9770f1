"""Build nodes of QuPath's classes, and reuse those that a stream has already."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import numpy as np

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Color, default_color
from darefine_qupath.errors import AnnotationError
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.descriptors import ClassDesc, Field
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaEnum, JavaObject, Stream
from darefine_qupath.javaserial.packed import distinct_nodes
from darefine_qupath.javaserial.protocol import (
    F8,
)
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import hash_order, table_size
from darefine_qupath.project.qpdata.objects import MAX_CLASS_DEPTH, class_of
from darefine_qupath.project.qpdata.roi_specs import RoiSpec
from darefine_qupath.project.qpdata.schema import (
    BOOLEAN,
    DEFAULT_LIST,
    FLOAT_LIST,
    INTEGER,
    MEASUREMENT,
    METADATA,
    OBJECT_ARRAY,
    OBJECT_ID,
    PATH_CLASS,
    SCHEMA,
)

__all__ = ["NodeBuilder", "class_name", "is_detection", "probability_block", "signed"]

_NOT_SET = bytes.fromhex("7ff8000000000000")
"""Class probability of an object that has none."""
# Java makes the integers from -128 to 127 once.
_SHARED_INTEGERS = range(-128, 128)


def is_detection(kind: Kind) -> bool:
    """Whether QuPath keeps the measurements of such objects in a compact list."""
    return kind in ("detection", "cell", "tile")


def signed(argb: int) -> int:
    """Colour as the signed 32-bit number that Java has."""
    return ((argb & 0xFFFFFFFF) ^ (1 << 31)) - (1 << 31)


def class_name(name: str | None) -> str | None:
    """Class name as QuPath would read it back.

    Raises
    ------
    AnnotationError
        If a part of it is empty, or it has too many.
    """
    if not name:
        return None
    parts = [part.strip() for part in name.split(":")]
    if len(parts) > MAX_CLASS_DEPTH:
        raise AnnotationError(
            f"The class name {name[:40]!r}... has {len(parts)} parts; QuPath derives a class at most "
            f"{MAX_CLASS_DEPTH - 1} times"
        )
    if not all(parts) or "\n" in name:
        raise AnnotationError(f"{name!r} is not a class name; QuPath joins the parts of a derived class with ': '")
    return ": ".join(parts)


class NodeBuilder:
    """Makes nodes, and uses those that a stream has already.

    Parameters
    ----------
    stream : Stream
        Whose class descriptors, path classes and shared values are used.
    is_modern : bool
        Whether the writer is QuPath 0.6 or later.
    colors : mapping of str to Color
        For path classes that the stream does not have.
    """

    def __init__(self, stream: Stream, *, is_modern: bool, colors: Mapping[str, Color]) -> None:
        self._is_modern = is_modern
        self._colors = colors
        self._descs: dict[str, ClassDesc] = {}
        self._types: dict[str, JavaString] = {}
        self._integers: dict[int, JavaObject] = {}
        self._booleans: dict[bool, JavaObject] = {}
        self._classes: dict[str, JavaObject] = {}
        self._strings: dict[str, JavaString] = {}
        self._lists: dict[tuple[str, ...], tuple[JavaObject, JavaObject]] = {}
        nodes = [node for _, node in distinct_nodes(stream)]
        for node in nodes:
            if isinstance(node, ClassDesc):
                self._note_desc(node)
        self._note_objects(nodes)

    def _note_objects(self, nodes: Sequence[Content]) -> None:
        object_id = OBJECT_ID.encode()
        for node in nodes:
            if node.__class__ is JavaString and node.raw == object_id:
                self._strings[OBJECT_ID] = node
                break
        integer, boolean, path_class = map(self._descs.get, (INTEGER, BOOLEAN, PATH_CLASS))
        wanted = {integer, boolean, path_class}
        for found in [node for node in nodes if isinstance(node, JavaObject) and node.desc in wanted]:
            if found.desc is path_class:
                self._classes.setdefault(class_of(found)[0], found)
            elif found.desc is boolean:
                self._booleans.setdefault(bool(values.number(found)), found)
            elif (value := values.whole_number(found)) in _SHARED_INTEGERS:
                self._integers.setdefault(value, found)

    def _note_desc(self, desc: ClassDesc) -> None:
        self._descs.setdefault(desc.name, desc)
        for field in desc.fields:
            if field.type is not None:
                self._types.setdefault(field.type.text, field.type)

    def desc(self, name: str) -> ClassDesc:
        """Class descriptor by name."""
        if name not in self._descs:
            flags, uid, parent, fields = SCHEMA[name]
            self._descs[name] = ClassDesc(
                name,
                uid,
                flags,
                [self._field(*field.split(" ")) for field in fields.split(", ") if field],
                None if parent is None else self.desc(parent),
            )
        return self._descs[name]

    def _field(self, kind: str, name: str) -> Field:
        is_number = len(kind) == 1
        return Field(kind[0], name, None if is_number else self._types.setdefault(kind, JavaString(kind)))

    def object(self, name: str, values: Mapping[str, Any] | None = None) -> JavaObject:
        """Object of a serializable class."""
        return JavaObject.of(self.desc(name), values or {})

    def external(self, name: str, content: Sequence[Content] = ()) -> JavaObject:
        """Object of an externalizable class."""
        return JavaObject(self.desc(name), content)

    def shared_string(self, text: str) -> JavaString:
        """One string node for a text that many objects have: a measurement's name, a metadata key."""
        return self._strings.setdefault(text, JavaString(text))

    def integer(self, value: int) -> JavaObject:
        """Integer; a small one is shared."""
        node = self._integers.get(value) or self.object(INTEGER, {"value": value})
        if value in _SHARED_INTEGERS:
            self._integers[value] = node
        return node

    def boolean(self, value: bool) -> JavaObject:
        """Boolean; there are two."""
        if value not in self._booleans:
            self._booleans[value] = self.object(BOOLEAN, {"value": value})
        return self._booleans[value]

    def enum(self, name: str, constant: str) -> JavaEnum:
        """Enum constant."""
        return JavaEnum(self.desc(name), JavaString(constant))

    def path_class(self, name: str | None) -> JavaObject | None:
        """Path class by full name; classes are shared by all objects."""
        name = class_name(name)
        if name is None:
            return None
        if name not in self._classes:
            above, _, part = name.rpartition(": ")
            parent = self.path_class(above)
            color = self._colors.get(name) or default_color(name)
            values = {"colorRGB": self.integer(color.argb), "name": JavaString(part), "parentClass": parent}
            self._classes[name] = self.object(PATH_CLASS, values)
        return self._classes[name]

    def metadata(self, metadata: Mapping[str, str], identity: UUID | None) -> JavaObject:
        """Metadata map, the identity last.

        Raises
        ------
        AnnotationError
            If the metadata has an identity of its own.
        """
        if OBJECT_ID in metadata:
            raise AnnotationError(
                f"{OBJECT_ID!r} cannot be a metadata key of an object: it names the object's identity"
            )
        pairs = {str(key): str(value) for key, value in metadata.items()}
        if identity is not None:
            pairs[OBJECT_ID] = str(identity)
        array = self.desc(OBJECT_ARRAY)
        keys = JavaArray(array, [self.shared_string(key) for key in pairs])
        values = JavaArray(array, [JavaString(value) for value in pairs.values()])
        return self.external(METADATA, (self.integer(1), keys, values))

    def measurements(self, measurements: Mapping[str, float], *, is_wide: bool) -> JavaObject | None:
        """Measurement list: of 64-bit numbers, or the compact one of 32-bit numbers; null when there are none."""
        if not measurements:
            return None
        if is_wide:
            items = [
                self.object(MEASUREMENT, {"value": value, "name": self.shared_string(name)})
                for name, value in measurements.items()
            ]
            return self.object(DEFAULT_LIST, {"list": self._array_list(items)})
        names, index = self._names(tuple(measurements))
        with np.errstate(over="ignore"):
            values = np.fromiter(measurements.values(), np.float64, len(measurements)).astype(">f4")
        array = JavaArray(self.desc("[F"), values.tobytes())
        return self.object(FLOAT_LIST, {"isClosed": True, "map": index, "names": names, "values": array})

    def _array_list(self, items: Sequence[Content]) -> JavaObject:
        count = len(items).to_bytes(4, "big")
        return self.object("java.util.ArrayList", {"size": len(items), "@java.util.ArrayList": (count, *items)})

    def _names(self, names: tuple[str, ...]) -> tuple[JavaObject, JavaObject]:
        """List of names and map of their positions, which objects with the same measurements share."""
        if names not in self._lists:
            strings = [self.shared_string(name) for name in names]
            positions = {name: self.integer(position) for position, name in enumerate(names)}
            entries = [part for name in hash_order(names) for part in (self.shared_string(name), positions[name])]
            self._lists[names] = (self._fixed_list(strings), self.hash_map(entries))
        return self._lists[names]

    def _fixed_list(self, items: Sequence[Content]) -> JavaObject:
        if self._is_modern:
            count = len(items).to_bytes(4, "big")
            return self.object("java.util.CollSer", {"tag": 1, "@java.util.CollSer": (count, *items)})
        backing = self._array_list(items)
        return self.object("java.util.Collections$UnmodifiableList", {"c": backing, "list": backing})

    def hash_map(self, entries: Sequence[Content]) -> JavaObject:
        """HashMap of keys and values in turn, in the order of Java's buckets."""
        count = len(entries) // 2
        buckets = table_size(count)
        head = struct.pack(">ii", buckets, count)
        values = {"loadFactor": 0.75, "threshold": buckets * 3 // 4, "@java.util.HashMap": (head, *entries)}
        return self.object("java.util.HashMap", values)

    def roi(self, spec: RoiSpec, plane: Plane) -> JavaObject:
        """ROI."""
        arrays = {
            name: JavaArray(self.desc("[B" if name == "wkb" else "[F"), data) for name, data in spec.arrays.items()
        }
        return self.object(spec.proxy, {**plane._asdict(), **spec.numbers, **arrays})

    def color(self, argb: int | None) -> JavaObject | None:
        """Colour of one object."""
        return None if argb is None else self.integer(signed(argb))

    def path_object(
        self, record: Annotation, roi: Content, nucleus: Content, children: Sequence[Content], *, is_wide: bool
    ) -> tuple[Content, ...]:
        """Lay out what an object with a ROI writes."""
        tail = probability_block(record.class_probability)
        if record.kind == "tma core":
            tail += b"\1" if record.is_missing else b"\0"
        content: tuple[Content, ...] = (
            None if record.name is None else JavaString(record.name),
            self.color(record.color),
            self.metadata(record.metadata, record.id),
            self.measurements(record.measurements, is_wide=is_wide),
            len(children).to_bytes(4, "big"),
            *children,
            self.boolean(record.locked),
            self.path_class(record.path_class),
            roi,
            tail,
        )
        return (*content, nucleus) if record.kind == "cell" else content


def probability_block(probability: float) -> bytes:
    """Eight bytes of a class probability."""
    return _NOT_SET if math.isnan(probability) else F8.pack(probability)
