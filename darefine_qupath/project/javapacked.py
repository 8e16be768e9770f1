"""Objects of an object stream that are kept as bytes: tens of thousands of detections differ in a few numbers only.

An object that many others resemble is described once by a `Template`: the bytes that they share (tags, handles of
classes, short blocks), and the gaps between them (numbers, texts, arrays of numbers). Bytes that fit a template decode
to the same tree but for what is in the gaps, so they need not be decoded before somebody asks: a `PackedObject` is a
`JavaObject` that holds its place in the file and decodes itself when its `data` is looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from darefine_qupath.project.javanodes import (
    ARRAY_CODES,
    FIRST_HANDLE,
    SC_BLOCK_DATA,
    SC_ENUM,
    SC_EXTERNALIZABLE,
    SC_SERIALIZABLE,
    TC_ARRAY,
    TC_BLOCKDATA,
    TC_ENDBLOCKDATA,
    TC_ENUM,
    TC_NULL,
    TC_OBJECT,
    TC_REFERENCE,
    TC_STRING,
    WIDTHS,
    ClassDesc,
    Content,
    JavaObject,
    Stream,
)

__all__ = ["PackedObject", "Part", "Reference", "Source", "Template", "distinct_nodes", "template_of", "unpack"]

MIN_NODES, MAX_NODES = 6, 64
"""Nodes of an object that is worth a template: smaller ones gain nothing, larger ones are rarely alike."""

_SHORT_BLOCK = 4
"""Block data up to this size is shared: versions, and numbers of what follows."""
_MAX_DEPTH = 16
_I4 = struct.Struct(">i")
_U4 = struct.Struct(">I")


class Part(NamedTuple):
    """Shared bytes, and the gap behind them.

    Attributes
    ----------
    literal : bytes
        What all have in common.
    length : int
        Its size.
    gap : int
        So many bytes; 0 = a text with its 2-byte size, negative = an array with its 4-byte size, of so wide numbers.
    """

    literal: bytes
    length: int
    gap: int


class Reference(NamedTuple):
    """A handle in the shared bytes: number of the part (the end is the last one), offset in it, number of the node."""

    part: int
    offset: int
    number: int


class Source:
    """Where packed objects come from.

    Parameters
    ----------
    data : bytes
        The file.
    open_object : callable
        Decodes the object at an offset: gives it, and all nodes that it defines.
    node : callable
        Node by number.
    """

    __slots__ = ("data", "node", "open_object")

    def __init__(
        self,
        data: bytes,
        open_object: Callable[[Template, int], tuple[JavaObject, list[Content]]],
        node: Callable[[int], Content],
    ) -> None:
        self.data = data
        self.open_object = open_object
        self.node = node


class Template:
    """What objects have in common.

    Attributes
    ----------
    desc : ClassDesc
        Their class.
    parts : tuple of Part
        In order.
    end : bytes
        Shared bytes at the end.
    references : tuple of Reference
        Handles in the shared bytes; none of them refers into the object itself.
    num_nodes : int
        Nodes that an object defines.
    classes : frozenset of str
        Classes of the objects and arrays among them.
    first : int
        Number of the node that has the first handle.
    source : Source
        The file.
    """

    __slots__ = ("classes", "desc", "end", "first", "num_nodes", "parts", "references", "source")

    def __init__(
        self,
        desc: ClassDesc,
        parts: Sequence[Part],
        end: bytes,
        references: Sequence[Reference],
        num_nodes: int,
        classes: frozenset[str],
        first: int,
        source: Source,
    ) -> None:
        self.desc = desc
        self.parts = tuple(parts)
        self.end = end
        self.references = tuple(references)
        self.num_nodes = num_nodes
        self.classes = classes
        self.first = first
        self.source = source

    def fit(self, data: bytes, start: int) -> int:
        """Offset behind the object that begins at `start`; -1 when it is of another form."""
        position = start
        try:
            for literal, length, gap in self.parts:
                if not data.startswith(literal, position):
                    return -1
                position += length
                if gap > 0:
                    position += gap
                elif gap == 0:
                    position += 2 + (data[position] << 8 | data[position + 1])
                else:
                    count = _I4.unpack_from(data, position)[0]
                    if count < 0:
                        return -1
                    position += 4 - count * gap
        except (IndexError, struct.error):
            return -1
        return position + len(self.end) if data.startswith(self.end, position) else -1

    def gaps(self, start: int, last: int | None = None) -> list[bytes]:
        """Bytes in the gaps of an object that fits, sizes included; those up to number `last`."""
        data, position = self.source.data, start
        found = []
        for _, length, gap in self.parts if last is None else self.parts[: last + 1]:
            first = position + length
            if gap > 0:
                position = first + gap
            elif gap == 0:
                position = first + 2 + (data[first] << 8 | data[first + 1])
            else:
                position = first + 4 - _I4.unpack_from(data, first)[0] * gap
            found.append(data[first:position])
        return found


class PackedObject(JavaObject):
    """An object that is decoded when its `data` is looked at, anew each time; setting `data` keeps what was set.

    Attributes
    ----------
    template : Template
        Its form.
    start : int
        Where it begins in the file.
    number : int
        Number of its node.
    """

    __slots__ = ("_own", "number", "start", "template")

    def __init__(self, template: Template, start: int, number: int) -> None:
        self.desc = template.desc
        self.template = template
        self.start = start
        self.number = number
        self._own: tuple[Any, ...] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it still is what stands in the file."""
        return self._own is None

    @property
    def data(self) -> tuple[Any, ...]:
        """As of any object; nodes in it are new ones until it is opened."""
        if self._own is not None:
            return self._own
        return self.template.source.open_object(self.template, self.start)[0].data

    @data.setter
    def data(self, values: tuple[Any, ...]) -> None:
        self._own = values

    def open(self) -> list[Content]:
        """Decode for good, so that its nodes stay the same; gives those that it defines, itself first."""
        if self._own is not None:
            return []
        node, nodes = self.template.source.open_object(self.template, self.start)
        self._own = node.data
        return [self, *nodes[1:]]

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.template.fit(self.template.source.data, self.start)

    def gap(self, number: int) -> bytes:
        """One part of what it does not share with others of its form, its size included."""
        return self.template.gaps(self.start, number)[-1]

    @property
    def gaps(self) -> list[bytes]:
        """All that it does not share with others of its form."""
        return self.template.gaps(self.start)


class _IrregularError(Exception):
    """An object holds what a template cannot describe."""


class _Outliner:
    """Follows one object through its bytes, and tells what others of its form would share."""

    def __init__(self, data: bytes, nodes: Sequence[Content], first: int, number: int, start: int) -> None:
        self.data = data
        self.nodes = nodes
        self.first = first
        self.limit = number
        self.begin = self.position = start
        self.parts: list[Part] = []
        self.places: list[tuple[int, int]] = []
        self.references: list[Reference] = []
        self.count = 0
        self.classes: set[str] = set()

    def gap(self, gap: int, size: int) -> None:
        literal = self.literal()
        self.parts.append(Part(literal, len(literal), gap))
        self.begin = self.position = self.position + size

    def literal(self) -> bytes:
        part = len(self.parts)
        self.references += [Reference(part, place - self.begin, number) for place, number in self.places]
        self.places.clear()
        return self.data[self.begin : self.position]

    def reference(self) -> Content:
        number: int = _U4.unpack_from(self.data, self.position + 1)[0] - FIRST_HANDLE + self.first
        if not self.first <= number < self.limit:
            raise _IrregularError
        self.places.append((self.position, number))
        self.position += 5
        return self.nodes[number]

    def desc(self) -> ClassDesc:
        self.position += 1
        desc = self.reference() if self.data[self.position] == TC_REFERENCE else None
        if not isinstance(desc, ClassDesc):
            raise _IrregularError
        self.count += 1
        return desc

    def value(self, depth: int) -> None:
        tag = self.data[self.position]
        if tag == TC_REFERENCE:
            self.reference()
        elif tag == TC_NULL:
            self.position += 1
        elif depth > _MAX_DEPTH or tag not in _OUTLINES:
            raise _IrregularError
        else:
            _OUTLINES[tag](self, depth)

    def values(self, count: int, depth: int) -> None:
        """Follow `count` values, or those up to the end mark when negative."""
        while count:
            if count < 0 and self.data[self.position] == TC_ENDBLOCKDATA:
                self.position += 1
                return
            self.value(depth)
            count -= 1

    def string(self, _: int) -> None:
        self.count += 1
        self.position += 1
        self.gap(0, 2 + int.from_bytes(self.data[self.position : self.position + 2], "big"))

    def block(self, _: int) -> None:
        size = self.data[self.position + 1]
        self.position += 2
        if size <= _SHORT_BLOCK:
            self.position += size
        else:
            self.gap(size, size)

    def array(self, depth: int) -> None:
        name = self.desc().name
        self.classes.add(name)
        code = name[1:2]
        if code not in ARRAY_CODES:
            raise _IrregularError
        count = _I4.unpack_from(self.data, self.position)[0]
        if code in WIDTHS:
            self.gap(-WIDTHS[code], 4 + count * WIDTHS[code])
        else:
            self.position += 4
            self.values(count, depth + 1)

    def enum(self, depth: int) -> None:
        self.desc()
        self.value(depth + 1)

    def object(self, depth: int) -> None:
        desc = self.desc()
        self.classes.add(desc.name)
        if desc.flags & SC_EXTERNALIZABLE and desc.flags & SC_BLOCK_DATA:
            self.values(-1, depth + 1)
            return
        if not desc.flags & SC_SERIALIZABLE or desc.flags & SC_ENUM:
            raise _IrregularError
        for step in desc.steps:
            if step > 0:
                self.gap(step, step)
            else:
                self.values(-step or -1, depth + 1)


_OUTLINES: dict[int, Callable[[_Outliner, int], None]] = {
    TC_OBJECT: _Outliner.object,
    TC_ARRAY: _Outliner.array,
    TC_STRING: _Outliner.string,
    TC_BLOCKDATA: _Outliner.block,
    TC_ENUM: _Outliner.enum,
}


def unpack(stream: Stream, java_class: str) -> None:
    """Open every packed object that defines an object of a class, so that it is among the stream's nodes."""
    for place, node in list(distinct_nodes(stream)):
        if isinstance(node, PackedObject) and node.is_packed and java_class in node.template.classes:
            stream.nodes[place : place + node.template.num_nodes] = node.open()


def distinct_nodes(stream: Stream) -> Iterator[tuple[int, Content]]:
    """Nodes of a stream with their numbers, each once; those inside a packed object are left out."""
    nodes = stream.nodes
    place = 0
    while place < len(nodes):
        node = nodes[place]
        yield place, node
        place += node.template.num_nodes if isinstance(node, PackedObject) and node.is_packed else 1


def template_of(
    source: Source, nodes: Sequence[Content], *, first: int, number: int, start: int, end: int
) -> Template | None:
    """Make a template of an object that was decoded.

    Parameters
    ----------
    source : Source
        The file.
    nodes : sequence of nodes
        All that were read so far.
    first : int
        Number of the node that has the first handle.
    number : int
        Number of the object.
    start, end : int
        Its place in the file.

    Returns
    -------
    Template or None
        None where others could not be alike: it defines classes, refers to itself, or holds long texts.
    """
    outline = _Outliner(source.data, nodes, first, number, start)
    try:
        outline.value(0)
    except _IrregularError:
        return None
    desc = nodes[number].desc  # type: ignore[union-attr]
    ending = outline.literal()
    if outline.position != end or outline.count != len(nodes) - number or not isinstance(desc, ClassDesc):
        return None
    return Template(
        desc, outline.parts, ending, outline.references, outline.count, frozenset(outline.classes), first, source
    )
