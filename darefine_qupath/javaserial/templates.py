"""Find what objects that resemble each other share: follow one that was decoded, and make a `Template` of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from darefine_qupath.javaserial.descriptors import ClassDesc
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaEnum, JavaObject
from darefine_qupath.javaserial.packed import Maker, Part, Reference, Template
from darefine_qupath.javaserial.protocol import ARRAY_CODES, FIRST_HANDLE, I4, U4, WIDTHS, Flag, Tag
from darefine_qupath.javaserial.strings import JavaString

__all__ = ["MAX_NODES", "MIN_NODES", "template_of"]

# Nodes of an object that is worth a template: smaller ones gain nothing, larger ones are rarely alike.
MIN_NODES, MAX_NODES = 6, 64


# Block data up to this size is shared: versions, and numbers of what follows.
_SHORT_BLOCK = 4
_MAX_DEPTH = 16


class _IrregularError(Exception):
    """An object holds what a template cannot describe."""


class _Fixed(NamedTuple):
    """A value that all objects of a form share."""

    value: Content


_new_string = JavaString.__new__


def _tuple_maker(values: Sequence[Maker | _Fixed]) -> Maker:
    fixed = [value.value if isinstance(value, _Fixed) else None for value in values]
    makers = [(place, value) for place, value in enumerate(values) if not isinstance(value, _Fixed)]

    def make(gaps: list[bytes], nodes: list[Content]) -> tuple[Any, ...]:
        made = fixed.copy()
        for place, maker in makers:
            made[place] = maker(gaps, nodes)
        return tuple(made)

    return make


def _node_maker(kind: type[JavaObject | JavaArray], desc: ClassDesc, make_data: Maker) -> Maker:
    new = kind.__new__

    def make(gaps: list[bytes], nodes: list[Content]) -> JavaObject | JavaArray:
        node = new(kind)
        node.desc = desc
        nodes.append(node)
        node.data = make_data(gaps, nodes)
        return node

    return make


def _enum_maker(desc: ClassDesc, constant: Maker | _Fixed) -> Maker:
    def make(gaps: list[bytes], nodes: list[Content]) -> JavaEnum:
        node = JavaEnum.__new__(JavaEnum)
        node.desc = desc
        nodes.append(node)
        node.constant = constant.value if isinstance(constant, _Fixed) else constant(gaps, nodes)  # type: ignore[assignment]
        return node

    return make


def _string_maker(number: int) -> Maker:
    def make(gaps: list[bytes], nodes: list[Content]) -> JavaString:
        node = _new_string(JavaString)
        node.raw = gaps[number][2:]
        node.is_long = False
        nodes.append(node)
        return node

    return make


def _bytes_maker(number: int, first: int = 0) -> Maker:
    return lambda gaps, _: gaps[number][first:]


class _Outliner:
    """Follows one object through its bytes: what others of its form would share, and how to make one of them."""

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
        desc = self.reference() if self.data[self.position] == Tag.REFERENCE else None
        if not isinstance(desc, ClassDesc):
            raise _IrregularError
        self.count += 1
        return desc

    def value(self, depth: int) -> Maker | _Fixed:
        tag = self.data[self.position]
        if tag == Tag.REFERENCE:
            return _Fixed(self.reference())
        if tag == Tag.NULL:
            self.position += 1
            return _Fixed(None)
        if depth > _MAX_DEPTH or tag not in _OUTLINES:
            raise _IrregularError
        return _OUTLINES[tag](self, depth)

    def values(self, count: int, depth: int) -> list[Maker | _Fixed]:
        """Follow `count` values, or those up to the end mark when negative."""
        values: list[Maker | _Fixed] = []
        while count:
            if count < 0 and self.data[self.position] == Tag.END_BLOCK_DATA:
                self.position += 1
                break
            values.append(self.value(depth))
            count -= 1
        return values

    def string(self, _: int) -> Maker:
        self.count += 1
        self.position += 1
        return _string_maker(self.gap(0, 2 + int.from_bytes(self.data[self.position : self.position + 2], "big")))

    def block(self, _: int) -> Maker | _Fixed:
        size = self.data[self.position + 1]
        self.position += 2
        if size > _SHORT_BLOCK:
            return _bytes_maker(self.gap(size, size))
        self.position += size
        return _Fixed(self.data[self.position - size : self.position])

    def array(self, depth: int) -> Maker:
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

    def enum(self, depth: int) -> Maker:
        return _enum_maker(self.desc(), self.value(depth + 1))

    def object(self, depth: int) -> Maker:
        desc = self.desc()
        self.classes.add(desc.name)
        if desc.flags & Flag.EXTERNALIZABLE and desc.flags & Flag.BLOCK_DATA:
            return _node_maker(JavaObject, desc, _tuple_maker(self.values(-1, depth + 1)))
        if not desc.flags & Flag.SERIALIZABLE or desc.flags & Flag.ENUM:
            raise _IrregularError
        values: list[Maker | _Fixed] = []
        for step in desc.steps:
            if step > 0:
                values.append(_bytes_maker(self.gap(step, step)))
            elif step < 0:
                values += self.values(-step, depth + 1)
            else:
                values.append(_tuple_maker(self.values(-1, depth + 1)))
        return _node_maker(JavaObject, desc, _tuple_maker(values))


_OUTLINES: dict[int, Callable[[_Outliner, int], Maker | _Fixed]] = {
    Tag.OBJECT: _Outliner.object,
    Tag.ARRAY: _Outliner.array,
    Tag.STRING: _Outliner.string,
    Tag.BLOCK_DATA: _Outliner.block,
    Tag.ENUM: _Outliner.enum,
}


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
