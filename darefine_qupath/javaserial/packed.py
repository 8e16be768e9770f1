"""Keep objects as bytes until they are looked at: tens of thousands of detections differ in a few numbers only.

An object that many others resemble is described once by a `Template`: the bytes that they share (tags, handles of
classes, short blocks), and the gaps between them (numbers, texts, arrays of numbers). Bytes that fit a template decode
to the same tree but for what is in the gaps, so they are decoded only when somebody asks: a `PackedObject` is a
`JavaObject` that holds its place in the file. When its `data` is looked at, its nodes are made anew around its gaps;
the template knows how, so that its bytes are never decoded one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from darefine_qupath.javaserial.descriptors import ClassDesc
from darefine_qupath.javaserial.nodes import Content, JavaObject, Stream
from darefine_qupath.javaserial.protocol import I4

__all__ = ["Maker", "PackedObject", "Part", "Reference", "Template", "distinct_nodes", "unpack"]


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
    """A handle in the shared bytes: number of the part (the end is the last one), offset in it, node it refers to."""

    part: int
    offset: int
    node: Content


Maker: TypeAlias = Callable[[list[bytes], list[Content]], Any]
"""Makes a value out of what is in the gaps, and appends the nodes that it makes to a list."""


class Template:
    """What objects have in common.

    Attributes
    ----------
    data : bytes
        The file.
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
    make : callable
        Makes an object of this form: takes the bytes in its gaps, and a list that its nodes are appended to.
    """

    __slots__ = ("classes", "data", "desc", "end", "make", "num_nodes", "parts", "references")

    def __init__(
        self,
        data: bytes,
        desc: ClassDesc,
        *,
        parts: Sequence[Part],
        end: bytes,
        references: Sequence[Reference],
        num_nodes: int,
        classes: frozenset[str],
        make: Maker,
    ) -> None:
        self.data = data
        self.desc = desc
        self.parts = tuple(parts)
        self.end = end
        self.references = tuple(references)
        self.num_nodes = num_nodes
        self.classes = classes
        self.make = make

    def literals(self) -> list[bytearray]:
        """Copy the shared bytes: before each gap, and at the end."""
        return [*(bytearray(part.literal) for part in self.parts), bytearray(self.end)]

    def fit(self, start: int) -> int:
        """Offset behind the object that begins at `start`; -1 when it is of another form."""
        data, position = self.data, start
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
                    count = I4.unpack_from(data, position)[0]
                    if count < 0:
                        return -1
                    position += 4 - count * gap
        except (IndexError, struct.error):
            return -1
        return position + len(self.end) if data.startswith(self.end, position) else -1

    def gaps(self, start: int, last: int | None = None) -> list[bytes]:
        """Bytes in the gaps of an object that fits, sizes included; those up to number `last`."""
        data, position = self.data, start
        found = []
        for _, length, gap in self.parts if last is None else self.parts[: last + 1]:
            first = position + length
            if gap > 0:
                position = first + gap
            elif gap == 0:
                position = first + 2 + (data[first] << 8 | data[first + 1])
            else:
                position = first + 4 - I4.unpack_from(data, first)[0] * gap
            found.append(data[first:position])
        return found


class PackedObject(JavaObject):
    """An object whose `data` is made when it is looked at, anew each time; setting `data` keeps what was set.

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
        return self._made([]).data

    @data.setter
    def data(self, values: tuple[Any, ...]) -> None:
        self._own = values

    def open(self) -> list[Content]:
        """Decode once and for all, so that its nodes stay the same; return those that it defines, itself first."""
        if self._own is not None:
            return []
        nodes: list[Content] = []
        self._own = self._made(nodes).data
        return [self, *nodes[1:]]

    def _made(self, nodes: list[Content]) -> JavaObject:
        node: JavaObject = self.template.make(self.gaps, nodes)
        return node

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.template.fit(self.start)

    def gap(self, number: int) -> bytes:
        """One part of what it does not share with others of its form, its size included."""
        return self.template.gaps(self.start, number)[-1]

    @property
    def gaps(self) -> list[bytes]:
        """All that it does not share with others of its form."""
        return self.template.gaps(self.start)


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


def is_packed(node: object) -> bool:
    return isinstance(node, PackedObject) and node.is_packed
