"""Objects of an object stream that are kept as bytes: tens of thousands of detections differ in a few numbers only.

An object that many others resemble is described once by a `Template`: the bytes that they share (tags, handles of
classes, short blocks), and the gaps between them (numbers, texts, arrays of numbers). Bytes that fit a template decode
to the same tree but for what is in the gaps, so they need not be decoded before somebody asks: a `PackedObject` is a
`JavaObject` that holds its place in the file. When its `data` is looked at, its nodes are made anew around its gaps;
the template knows how, so that its bytes are never decoded one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from darefine_qupath.javaserial.nodes import (
    ARRAY_CODES,
    FIRST_HANDLE,
    I4,
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
    U4,
    WIDTHS,
    ClassDesc,
    Content,
    JavaArray,
    JavaEnum,
    JavaObject,
    JavaString,
    Stream,
)

__all__ = ["PackedObject", "Part", "Reference", "Template", "distinct_nodes", "template_of", "unpack"]

MIN_NODES, MAX_NODES = 6, 64
"""Nodes of an object that is worth a template: smaller ones gain nothing, larger ones are rarely alike."""

_SHORT_BLOCK = 4
"""Block data up to this size is shared: versions, and numbers of what follows."""
_MAX_DEPTH = 16


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


_Maker: TypeAlias = Callable[[list[bytes], list[Content]], Any]
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
        make: _Maker,
    ) -> None:
        self.data = data
        self.desc = desc
        self.parts = tuple(parts)
        self.end = end
        self.references = tuple(references)
        self.num_nodes = num_nodes
        self.classes = classes
        self.make = make

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
        """Decode for good, so that its nodes stay the same; gives those that it defines, itself first."""
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


class _IrregularError(Exception):
    """An object holds what a template cannot describe."""


class _Fixed(NamedTuple):
    """A value that all objects of a form share."""

    value: Content


_new_string = JavaString.__new__


def _tuple_maker(values: Sequence[_Maker | _Fixed]) -> _Maker:
    fixed = [value.value if isinstance(value, _Fixed) else None for value in values]
    makers = [(place, value) for place, value in enumerate(values) if not isinstance(value, _Fixed)]

    def make(gaps: list[bytes], nodes: list[Content]) -> tuple[Any, ...]:
        made = fixed.copy()
        for place, maker in makers:
            made[place] = maker(gaps, nodes)
        return tuple(made)

    return make


def _node_maker(kind: type[JavaObject | JavaArray], desc: ClassDesc, make_data: _Maker) -> _Maker:
    new = kind.__new__

    def make(gaps: list[bytes], nodes: list[Content]) -> JavaObject | JavaArray:
        node = new(kind)
        node.desc = desc
        nodes.append(node)
        node.data = make_data(gaps, nodes)
        return node

    return make


def _enum_maker(desc: ClassDesc, constant: _Maker | _Fixed) -> _Maker:
    def make(gaps: list[bytes], nodes: list[Content]) -> JavaEnum:
        node = JavaEnum.__new__(JavaEnum)
        node.desc = desc
        nodes.append(node)
        node.constant = constant.value if isinstance(constant, _Fixed) else constant(gaps, nodes)  # type: ignore[assignment]
        return node

    return make


def _string_maker(number: int) -> _Maker:
    def make(gaps: list[bytes], nodes: list[Content]) -> JavaString:
        node = _new_string(JavaString)
        node.raw = gaps[number][2:]
        node.is_long = False
        nodes.append(node)
        return node

    return make


def _bytes_maker(number: int, first: int = 0) -> _Maker:
    return lambda gaps, _: gaps[number][first:]


class _Outliner:
    """Follows one object through its bytes; tells what others of its form would share, and how to make one of them."""

    def __init__(self, data: bytes, nodes: Sequence[Content], first: int, number: int, start: int) -> None:
        self.data = data
        self.nodes = nodes
        self.first = first
        self.limit = number
        self.begin = self.position = start
        self.parts: list[Part] = []
        self.places: list[tuple[int, Content]] = []
        self.references: list[Reference] = []
        self.count = 0
        self.classes: set[str] = set()

    def gap(self, gap: int, size: int) -> int:
        """Begin the next part; gives the number of the gap."""
        literal = self.literal()
        self.parts.append(Part(literal, len(literal), gap))
        self.begin = self.position = self.position + size
        return len(self.parts) - 1

    def literal(self) -> bytes:
        part = len(self.parts)
        self.references += [Reference(part, place - self.begin, node) for place, node in self.places]
        self.places.clear()
        return self.data[self.begin : self.position]

    def reference(self) -> Content:
        number: int = U4.unpack_from(self.data, self.position + 1)[0] - FIRST_HANDLE + self.first
        if not self.first <= number < self.limit:
            raise _IrregularError
        node = self.nodes[number]
        self.places.append((self.position, node))
        self.position += 5
        return node

    def desc(self) -> ClassDesc:
        self.position += 1
        desc = self.reference() if self.data[self.position] == TC_REFERENCE else None
        if not isinstance(desc, ClassDesc):
            raise _IrregularError
        self.count += 1
        return desc

    def value(self, depth: int) -> _Maker | _Fixed:
        tag = self.data[self.position]
        if tag == TC_REFERENCE:
            return _Fixed(self.reference())
        if tag == TC_NULL:
            self.position += 1
            return _Fixed(None)
        if depth > _MAX_DEPTH or tag not in _OUTLINES:
            raise _IrregularError
        return _OUTLINES[tag](self, depth)

    def values(self, count: int, depth: int) -> list[_Maker | _Fixed]:
        """Follow `count` values, or those up to the end mark when negative."""
        values: list[_Maker | _Fixed] = []
        while count:
            if count < 0 and self.data[self.position] == TC_ENDBLOCKDATA:
                self.position += 1
                break
            values.append(self.value(depth))
            count -= 1
        return values

    def string(self, _: int) -> _Maker:
        self.count += 1
        self.position += 1
        return _string_maker(self.gap(0, 2 + int.from_bytes(self.data[self.position : self.position + 2], "big")))

    def block(self, _: int) -> _Maker | _Fixed:
        size = self.data[self.position + 1]
        self.position += 2
        if size > _SHORT_BLOCK:
            return _bytes_maker(self.gap(size, size))
        self.position += size
        return _Fixed(self.data[self.position - size : self.position])

    def array(self, depth: int) -> _Maker:
        desc = self.desc()
        self.classes.add(desc.name)
        code = desc.name[1:2]
        if code not in ARRAY_CODES:
            raise _IrregularError
        count = I4.unpack_from(self.data, self.position)[0]
        if code in WIDTHS:
            return _node_maker(JavaArray, desc, _bytes_maker(self.gap(-WIDTHS[code], 4 + count * WIDTHS[code]), 4))
        self.position += 4
        return _node_maker(JavaArray, desc, _tuple_maker(self.values(count, depth + 1)))

    def enum(self, depth: int) -> _Maker:
        return _enum_maker(self.desc(), self.value(depth + 1))

    def object(self, depth: int) -> _Maker:
        desc = self.desc()
        self.classes.add(desc.name)
        if desc.flags & SC_EXTERNALIZABLE and desc.flags & SC_BLOCK_DATA:
            return _node_maker(JavaObject, desc, _tuple_maker(self.values(-1, depth + 1)))
        if not desc.flags & SC_SERIALIZABLE or desc.flags & SC_ENUM:
            raise _IrregularError
        values: list[_Maker | _Fixed] = []
        for step in desc.steps:
            if step > 0:
                values.append(_bytes_maker(self.gap(step, step)))
            elif step < 0:
                values += self.values(-step, depth + 1)
            else:
                values.append(_tuple_maker(self.values(-1, depth + 1)))
        return _node_maker(JavaObject, desc, _tuple_maker(values))


_OUTLINES: dict[int, Callable[[_Outliner, int], _Maker | _Fixed]] = {
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
    data: bytes, nodes: Sequence[Content], *, first: int, number: int, start: int, end: int
) -> Template | None:
    """Make a template of an object that was decoded.

    Parameters
    ----------
    data : bytes
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
    outline = _Outliner(data, nodes, first, number, start)
    try:
        make = outline.value(0)
    except _IrregularError:
        return None
    desc = nodes[number].desc  # type: ignore[union-attr]
    ending = outline.literal()
    is_whole = outline.position == end and outline.count == len(nodes) - number
    if not is_whole or isinstance(make, _Fixed) or not isinstance(desc, ClassDesc):
        return None
    return Template(
        data,
        desc,
        parts=outline.parts,
        end=ending,
        references=outline.references,
        num_nodes=outline.count,
        classes=frozenset(outline.classes),
        make=make,
    )
