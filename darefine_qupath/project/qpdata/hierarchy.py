"""Walk the hierarchy of a file: where the parts of an object stand, and whose identity it has."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaObject
from darefine_qupath.javaserial.packed import PackedObject, Template
from darefine_qupath.javaserial.protocol import I4
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, text, type_name
from darefine_qupath.project.qpdata.schema import BOOLEAN, METADATA, OBJECT_ID

__all__ = ["HierarchyObject", "ObjectParts", "duplicates_of", "walk"]


_ID_NAMESPACE = uuid5(NAMESPACE_URL, "darefine_qupath/objects-without-id")


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
        if kind == METADATA:
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
            if isinstance(value, JavaObject) and value.desc.name == METADATA:
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
        return isinstance(first, JavaObject) and first.desc.name == BOOLEAN


def _stored_id(metadata: JavaObject) -> UUID | None:
    content = metadata.data
    if len(content) != 3 or content[1].__class__ is not JavaArray or content[2].__class__ is not JavaArray:
        raise NodeError("Object metadata is not laid out as a map of strings", metadata)
    keys: Any = content[1].data
    values: Any = content[2].data
    if isinstance(keys, bytes) or isinstance(values, bytes) or len(keys) != len(values):
        raise NodeError("Object metadata has more keys than values, or fewer", metadata)
    for key, value in zip(reversed(keys), reversed(values), strict=True):
        if isinstance(key, JavaString) and key.raw == OBJECT_ID.encode():
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


class HierarchyObject(NamedTuple):
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


def walk(root: JavaObject, salt: str) -> Iterator[HierarchyObject]:
    """Every object of a hierarchy, parents before children.

    Parameters
    ----------
    root : JavaObject
        Comes first.
    salt : str
        What identities of objects that have none are derived from, beside their position.

    Yields
    ------
    HierarchyObject
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
            yield HierarchyObject(node, identity, parent, has_id=True)
            continue
        parts = ObjectParts(node)
        if parts.num_children:
            if is_packed:
                # Its children must be the same nodes from now on.
                node.open()  # type: ignore[attr-defined]
                parts = ObjectParts(node)
            pending.extend([(child, number) for child in reversed(parts.children)])
        identity = parts.id
        yield HierarchyObject(node, identity or uuid5(_ID_NAMESPACE, f"{salt}#{number}"), parent, identity is not None)


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


def remaining_parents(found: Sequence[HierarchyObject], removed: set[int]) -> list[int]:
    """For every object the nearest one above it that stays."""
    parents: list[int] = []
    for item in found:
        parents.append(parents[item.parent] if item.parent in removed else item.parent)
    return parents


def duplicates_of(ids: Sequence[UUID]) -> frozenset[UUID]:
    """Identities that occur more than once."""
    if len(set(ids)) == len(ids):
        return frozenset()
    seen: set[UUID] = set()
    return frozenset(identity for identity in ids if identity in seen or seen.add(identity))  # type: ignore[func-returns-value]
