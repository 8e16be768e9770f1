"""Decode an object stream to a tree of nodes."""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from darefine_qupath.errors import JavaStreamError
from darefine_qupath.javaserial.class_reader import ClassReader, Layout, layout_of
from darefine_qupath.javaserial.descriptors import AnyDesc
from darefine_qupath.javaserial.nodes import (
    Aborted,
    Content,
    JavaArray,
    JavaClass,
    JavaEnum,
    JavaObject,
    LongBlock,
    Reset,
    Stream,
    TopLevel,
    paused_garbage_collection,
)
from darefine_qupath.javaserial.packed import PackedObject, Template
from darefine_qupath.javaserial.protocol import ARRAY_CODES, FIRST_HANDLE, I4, MAGIC, U4, WIDTHS, Flag, Tag
from darefine_qupath.javaserial.templates import MAX_NODES, MIN_NODES, template_of

__all__ = ["decode", "decode_until"]

# Forms of one class that are tried on each of its objects; and objects that are looked at for a new form.
_MAX_TEMPLATES, _MAX_ATTEMPTS = 12, 48


_new_object = JavaObject.__new__
_new_array = JavaArray.__new__


class _Frame:
    """An object or array whose values are being read."""

    __slots__ = ("data", "left", "node", "number", "out", "start", "step", "steps")

    def __init__(self, node: JavaObject | JavaArray | None, steps: tuple[int, ...], left: int, start: int = 0) -> None:
        self.node = node
        self.steps = steps
        self.step = 0
        self.start = start  # in the file, where the object may give a template
        self.number = 0
        self.left = left  # values to read in this step; negative = up to the end mark
        self.data: list[Any] = []
        self.out = self.data  # where they go


class _Decoder(ClassReader):
    """Reads values from bytes; nesting stands on a list, not on Python's stack."""

    def __init__(self, data: bytes, *, is_compact: bool = False) -> None:
        stream = Stream(())
        stream.offsets = array("I" if len(data) < 1 << 32 else "Q")
        super().__init__(data, stream.nodes, deque(maxlen=0) if is_compact else stream.offsets)
        self.stream = stream
        self.layouts: dict[AnyDesc, Layout] = {}
        """Of the classes that were found fit to have objects."""
        self.opened: _Frame | None = None
        """What the reader called last has begun and not finished."""
        self.is_compact = is_compact
        self.is_enough: Callable[[TopLevel], bool] = lambda _: False
        self.templates: dict[AnyDesc, list[Template]] = {}
        self.attempts: dict[AnyDesc, int] = {}

    def run(self) -> Stream:
        if self.data[:4] != MAGIC:
            raise JavaStreamError(f"Not a Java object stream: it begins with {self.data[:4].hex(' ')!r}", offset=0)
        self.pos = 4
        while self.pos < len(self.data):
            self.stream.contents.append(self._top_level())
            if self.is_enough(self.stream.contents[-1]):
                break
        return self.stream

    def _top_level(self) -> TopLevel:
        tag = self.data[self.pos]
        if tag == Tag.RESET:
            self.pos += 1
            self._forget()
            return Reset()
        if tag == Tag.EXCEPTION:
            self.pos += 1
            self._forget()
            exception = self._value()
            self._forget()
            return Aborted(exception)
        if tag in (Tag.BLOCK_DATA, Tag.BLOCK_DATA_LONG):
            block: bytes = _READERS[tag](self, -1)
            return block
        return self._value()

    def _forget(self) -> None:
        self.first = len(self.nodes)
        self.described.clear()
        self.templates.clear()

    def _value(self) -> Content:
        value: Content = self._values(1)[0]
        return value

    def _values(self, count: int) -> list[Any]:  # noqa: C901 - the loop that everything goes through is one piece
        """Read `count` values, or up to the end mark when negative."""
        data, readers, nodes, uint = self.data, _READERS, self.nodes, U4.unpack_from
        lowest, offset, shared = self.first, FIRST_HANDLE - self.first, self._shared
        root = frame = _Frame(None, (), count)
        stack: list[_Frame] = []
        while True:
            out, left = frame.out, frame.left
            while left:
                tag = data[self.pos]
                if tag == Tag.REFERENCE:
                    number = uint(data, self.pos + 1)[0] - offset
                    if not lowest <= number < len(nodes):
                        self._referred()
                    out.append(shared(number) if nodes[number].__class__ is PackedObject else nodes[number])
                    self.pos += 5
                elif tag == Tag.NULL:
                    out.append(None)
                    self.pos += 1
                elif tag == Tag.END_BLOCK_DATA and left < 0:
                    self.pos += 1
                    break
                else:
                    out.append(readers[tag](self, left))
                    if self.opened is not None:
                        # Its place is taken already; what it holds comes next.
                        frame.left = left - 1
                        stack.append(frame)
                        frame, self.opened = self.opened, None
                        out, left = frame.out, frame.left
                        continue
                left -= 1
            if not self._next_step(frame):
                if frame is root:
                    return root.data
                if frame.start:
                    self._learn(frame)
                frame = stack.pop()

    def _next_step(self, frame: _Frame) -> bool:
        """Begin what comes next in an object; False when it is complete."""
        data, steps = frame.data, frame.steps
        if not steps:
            if frame.node is not None:
                frame.node.data = tuple(data)
            return False
        if frame.out is not data:
            data.append(tuple(frame.out))
        while frame.step < len(steps):
            step = steps[frame.step]
            frame.step += 1
            if step > 0:
                data.append(self._take(step))
                frame.out = data
                continue
            frame.out = data if step else []
            frame.left = -step or -1
            return True
        if frame.node is not None:
            frame.node.data = tuple(data)
        return False

    def _shared(self, number: int) -> Content:
        """Node that something else refers to; the object that it is in is decoded once and for all."""
        node = self.nodes[number]
        if isinstance(node, PackedObject) and node.number != number:
            for place, inner in enumerate(node.open(), node.number):
                self.nodes[place] = inner
            return self.nodes[number]
        return node

    def _packed(self, desc: AnyDesc, start: int) -> PackedObject | None:
        """Object of a form that is known, left as it is."""
        templates = self.templates.get(desc, ())
        for place, template in enumerate(templates):
            end = template.fit(start)
            if end >= 0:
                if place:  # most objects are like the one before
                    templates.insert(0, templates.pop(place))  # type: ignore[union-attr]
                node = PackedObject(template, start, len(self.nodes))
                self.nodes.extend([node] * template.num_nodes)
                self.pos = end
                return node
        return None

    def _learn(self, frame: _Frame) -> None:
        """Make a template of an object that was just read, where it is worth it."""
        if not MIN_NODES <= len(self.nodes) - frame.number <= MAX_NODES:
            return
        desc = frame.node.desc  # type: ignore[union-attr]
        self.attempts[desc] = self.attempts.get(desc, 0) + 1
        template = template_of(
            self.data, self.nodes, first=self.first, number=frame.number, start=frame.start, end=self.pos
        )
        if template is not None:
            self.templates.setdefault(desc, []).append(template)

    def _may_learn(self, desc: AnyDesc) -> bool:
        return (
            self.attempts.get(desc, 0) < _MAX_ATTEMPTS
            and len(self.templates.get(desc, ())) < _MAX_TEMPLATES
            and self.annotation_depth == 0
        )

    def _unknown(self, left: int) -> None:
        tag = self.data[self.pos]
        wanted = "a value" if left > 0 else "a value or an end mark"
        raise JavaStreamError(f"Byte 0x{tag:02x} where {wanted} should begin", offset=self.pos)

    def _nested_mark(self, _: int) -> None:
        what = "a reset" if self.data[self.pos] == Tag.RESET else "an exception (the writer failed here)"
        raise JavaStreamError(f"There is {what} inside an object", offset=self.pos)

    def _block(self, left: int) -> bytes:
        if left > 0:
            self._unknown(left)
        size = self.data[self.pos + 1]
        self.pos += 2
        return self._take(size)

    def _long_block(self, left: int) -> bytes:
        if left > 0:
            self._unknown(left)
        size = I4.unpack_from(self.data, self.pos + 1)[0]
        if size < 0:
            raise JavaStreamError(f"Block data of negative size {size}", offset=self.pos)
        self.pos += 5
        chunk = self._take(size)
        return chunk if size > 255 else LongBlock(chunk)

    def _object(self, _: int) -> JavaObject:
        start = self.pos
        self.pos = start + 1
        desc = self._desc_of("an object", start)
        layout = self.layouts.get(desc)
        if layout is None:
            layout = self.layouts[desc] = layout_of(desc, start)
        if desc in self.templates and (packed := self._packed(desc, start)) is not None:
            return packed
        steps, leading, left = layout
        node = _new_object(JavaObject)
        node.desc = desc
        self.nodes.append(node)
        self.offsets.append(start)
        if leading and not left:
            node.data = (self._take(leading),)
            return node
        node.data = ()
        if left:
            frame = self.opened = _Frame(node, steps, left)
            if leading:
                frame.data.append(self._take(leading))
            elif self.is_compact and left < 0 and self._may_learn(desc):
                frame.start, frame.number = start, len(self.nodes) - 1
        elif steps:
            frame = _Frame(node, steps, 0)
            if self._next_step(frame):
                self.opened = frame
        return node

    def _array(self, _: int) -> JavaArray:
        start = self.pos
        self.pos += 1
        desc = self._desc_of("an array", start)
        code = desc.name[1:2]
        if desc.name[0:1] != "[" or code not in ARRAY_CODES:
            raise JavaStreamError(f"An array of class {desc.name!r}", offset=start)
        node = _new_array(JavaArray)
        node.desc = desc
        node.data = ()
        self.nodes.append(node)
        self.offsets.append(start)
        size = I4.unpack_from(self.data, self.pos)[0]
        if size < 0:
            raise JavaStreamError(f"An array of {size} elements", offset=start)
        self.pos += 4
        if code in WIDTHS:
            node.data = self._take(size * WIDTHS[code])
        elif size:
            self.opened = _Frame(node, (), size)
        return node

    def _class(self, _: int) -> JavaClass:
        start = self.pos
        self.pos += 1
        node = JavaClass(self._desc_of("a class", start))
        self._register(node, start)
        return node

    def _enum(self, _: int) -> JavaEnum:
        start = self.pos
        self.pos += 1
        desc = self._desc_of("an enum constant", start)
        if not desc.flags & Flag.ENUM:
            raise JavaStreamError(f"{desc.name} is not an enum", offset=start)
        node = JavaEnum.__new__(JavaEnum)
        node.desc = desc
        self._register(node, start)
        node.constant = self._string_or_handle()
        return node


_Reading = Callable[[_Decoder, int], Any]
_TAG_READERS: dict[int, _Reading] = {
    Tag.CLASS_DESC: _Decoder._desc_value,
    Tag.PROXY_CLASS_DESC: _Decoder._desc_value,
    Tag.OBJECT: _Decoder._object,
    Tag.STRING: _Decoder._string,
    Tag.LONG_STRING: _Decoder._long_string,
    Tag.ARRAY: _Decoder._array,
    Tag.CLASS: _Decoder._class,
    Tag.ENUM: _Decoder._enum,
    Tag.BLOCK_DATA: _Decoder._block,
    Tag.BLOCK_DATA_LONG: _Decoder._long_block,
    Tag.RESET: _Decoder._nested_mark,
    Tag.EXCEPTION: _Decoder._nested_mark,
}
_READERS: list[_Reading] = [_TAG_READERS.get(tag, _Decoder._unknown) for tag in range(256)]


def decode(data: bytes, *, is_compact: bool = False) -> Stream:
    """Decode an object stream.

    Parameters
    ----------
    data : bytes
        The whole stream.
    is_compact : bool, optional
        Leave objects that are like others as bytes until they are looked at; such nodes live as long as the stream.

    Returns
    -------
    Stream
        `encode` gives the identical bytes back.

    Raises
    ------
    JavaStreamError
        If it is not a stream, ends early, or holds what protocol 2 does not allow; with the byte offset.
    """
    decoder = _Decoder(bytes(data), is_compact=is_compact)
    try:
        with paused_garbage_collection():
            return decoder.run()
    except (IndexError, struct.error):
        raise JavaStreamError("The object stream ends early", offset=len(data)) from None
    except JavaStreamError as error:
        offset = decoder.pos if error.offset is None else error.offset
        raise JavaStreamError(error.message, offset=offset) from None


def decode_until(data: bytes, is_wanted: Callable[[TopLevel], bool]) -> TopLevel:
    """Decode the beginning of a stream, up to a value that is wanted.

    Parameters
    ----------
    data : bytes
        As much of the stream as there is.
    is_wanted : callable
        Called with every value at the top level.

    Returns
    -------
    TopLevel
        The first one; None where these bytes end before it, or are no stream.
    """
    decoder = _Decoder(data, is_compact=True)
    decoder.is_enough = is_wanted
    try:
        with paused_garbage_collection():
            found = decoder.run().contents[-1:]
    except (IndexError, struct.error, JavaStreamError):
        return None
    return found[0] if found and is_wanted(found[0]) else None
