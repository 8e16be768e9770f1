"""Encode a tree of nodes to an object stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from darefine_qupath.javaserial.descriptors import AnyDesc, ClassDesc, ProxyDesc
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
from darefine_qupath.javaserial.protocol import DESC_HEAD, FIRST_HANDLE, I4, I8, MAGIC, REFERENCE, U2, WIDTHS, Flag, Tag
from darefine_qupath.javaserial.strings import JavaString, modified_utf8

__all__ = ["encode"]


class _End:
    """Stands behind what an externalizable object wrote."""


_END: tuple[Any, ...] = (_End(),)


class _Encoder:
    """Writes values; nesting stands on a list of iterators, not on Python's stack."""

    def __init__(self) -> None:
        self.out = bytearray(MAGIC)
        self.pieces: list[bytes | memoryview] = []
        """What comes before `out`."""
        self.copied: tuple[bytes, int, int] | None = None
        """Bytes of a file that come next, and stay as they are: its data, first, end."""
        self.handles: dict[int, int] = {}
        self.count = 0
        """Nodes that have a handle; those inside an object that stays bytes are not among `handles`."""
        self.patched: dict[Template, list[bytes] | None] = {}
        """Literals of templates with the handles that nodes have now; None where they have not changed."""
        self.leading: dict[AnyDesc, int | None] = {}
        self.writers: dict[type, Callable[[Any], Iterator[Content] | None]] = {
            bytes: self._block,
            LongBlock: self._long_block,
            JavaString: self._string,
            JavaObject: self._object,
            PackedObject: self._packed,
            JavaArray: self._array,
            JavaEnum: self._enum,
            JavaClass: self._class,
            ClassDesc: self._desc_value,
            ProxyDesc: self._desc_value,
            _End: self._end,
        }

    def run(self, contents: Iterable[TopLevel]) -> bytes:
        for value in contents:
            if isinstance(value, Reset):
                self.out.append(Tag.RESET)
                self._forget()
            elif isinstance(value, Aborted):
                self.out.append(Tag.EXCEPTION)
                self._forget()
                self._values((value.exception,))
                self._forget()
            else:
                self._values((value,))
        self._copy_out()
        self.pieces.append(bytes(self.out))
        return b"".join(self.pieces)

    def _copy(self, data: bytes, start: int, end: int) -> None:
        """Copy bytes of a file; what lies side by side there is copied at once."""
        copied = self.copied
        if not self.out and copied is not None and copied[0] is data and copied[2] == start:
            self.copied = (data, copied[1], end)
            return
        self._copy_out()
        if self.out:
            self.pieces.append(bytes(self.out))
            self.out.clear()
        self.copied = (data, start, end)

    def _copy_out(self) -> None:
        if self.copied is not None:
            data, start, end = self.copied
            self.pieces.append(memoryview(data)[start:end])
            self.copied = None

    def _values(self, values: Iterable[Content]) -> None:
        out, handles, writers = self.out, self.handles, self.writers
        stack = [iter(values)]
        while stack:
            for value in stack[-1]:
                if value is None:
                    out.append(Tag.NULL)
                    continue
                handle = handles.get(id(value))
                if handle is not None:
                    out += REFERENCE.pack(Tag.REFERENCE, handle)
                    continue
                nested = writers[value.__class__](value)
                if nested is not None:
                    stack.append(nested)
                    break
            else:
                stack.pop()

    def _forget(self) -> None:
        self.handles.clear()
        self.patched.clear()
        self.count = 0

    def _register(self, node: object) -> None:
        self.handles[id(node)] = FIRST_HANDLE + self.count
        self.count += 1

    def _block(self, block: bytes) -> None:
        if len(block) > 255:
            self._long_block(block)
        else:
            self.out.append(Tag.BLOCK_DATA)
            self.out.append(len(block))
            self.out += block

    def _long_block(self, block: bytes) -> None:
        self.out.append(Tag.BLOCK_DATA_LONG)
        self.out += I4.pack(len(block))
        self.out += block

    def _string(self, string: JavaString) -> None:
        self._register(string)
        if string.is_long:
            self.out.append(Tag.LONG_STRING)
            self.out += I8.pack(len(string.raw))
        else:
            self.out.append(Tag.STRING)
            self.out += U2.pack(len(string.raw))
        self.out += string.raw

    def _string_or_handle(self, string: JavaString) -> None:
        handle = self.handles.get(id(string))
        if handle is None:
            self._string(string)
        else:
            self.out += REFERENCE.pack(Tag.REFERENCE, handle)

    def _end(self, _: _End) -> None:
        self.out.append(Tag.END_BLOCK_DATA)

    def _object(self, node: JavaObject) -> Iterator[Content]:
        self.out.append(Tag.OBJECT)
        desc, data = node.desc, node.data
        self._desc(desc)
        self._register(node)
        if desc.flags & Flag.EXTERNALIZABLE:
            return chain(data, _END)
        if desc not in self.leading:
            self.leading[desc] = _leading_numbers(desc)
        leading = self.leading[desc]
        if leading is None:
            return self._object_data(node)
        if leading:
            self.out += data[0]
        return iter(data[leading:])

    def _packed(self, node: PackedObject) -> Iterator[Content] | None:
        template = node.template
        if node.is_packed and template not in self.patched and not self._patch(template):
            # It holds the first use that is left of a class, say: from now on it is an object like any other.
            node.open()
        if not node.is_packed:
            return self._object(node)
        self.handles[id(node)] = FIRST_HANDLE + self.count
        self.count += template.num_nodes
        literals = self.patched[template]
        if literals is None:
            self._copy(template.data, node.start, node.end)
            return None
        for literal, gap in zip(literals, node.gaps, strict=False):
            self.out += literal
            self.out += gap
        self.out += literals[-1]
        return None

    def _patch(self, template: Template) -> bool:
        """Find the present handles of what a template refers to; False where something is not written yet."""
        literals = template.literals()
        for part, offset, node in template.references:
            handle = self.handles.get(id(node))
            if handle is None:
                return False
            REFERENCE.pack_into(literals[part], offset, Tag.REFERENCE, handle)
        is_same = literals == template.literals()
        self.patched[template] = None if is_same else [bytes(literal) for literal in literals]
        return True

    def _object_data(self, node: JavaObject) -> Iterator[Content]:
        out = self.out
        values = iter(node.data)
        for step in node.desc.steps:
            if step > 0:
                out += next(values)
            elif step == 0:
                yield from next(values)
                out.append(Tag.END_BLOCK_DATA)
            else:
                for _ in range(-step):
                    yield next(values)

    def _array(self, node: JavaArray) -> Iterator[Content] | None:
        self.out.append(Tag.ARRAY)
        self._desc(node.desc)
        self._register(node)
        if isinstance(node.data, bytes):
            self.out += I4.pack(len(node.data) // WIDTHS[node.desc.name[1]])
            self.out += node.data
            return None
        self.out += I4.pack(len(node.data))
        return iter(node.data)

    def _enum(self, node: JavaEnum) -> None:
        self.out.append(Tag.ENUM)
        self._desc(node.desc)
        self._register(node)
        self._string_or_handle(node.constant)

    def _class(self, node: JavaClass) -> None:
        self.out.append(Tag.CLASS)
        self._desc(node.desc)
        self._register(node)

    def _desc_value(self, desc: AnyDesc) -> None:
        self._desc(desc)

    def _desc(self, desc: AnyDesc | None) -> None:
        handle = self.handles.get(id(desc))
        if handle is not None:
            self.out += REFERENCE.pack(Tag.REFERENCE, handle)
        else:
            self._new_desc(desc)

    def _new_desc(self, desc: AnyDesc | None) -> None:
        while desc is not None:
            handle = self.handles.get(id(desc))
            if handle is not None:
                self.out += REFERENCE.pack(Tag.REFERENCE, handle)
                return
            if isinstance(desc, ClassDesc):
                self._class_desc(desc)
            else:
                self._proxy_desc(desc)
            self._values(desc.annotation)
            self.out.append(Tag.END_BLOCK_DATA)
            desc = desc.parent
        self.out.append(Tag.NULL)

    def _class_desc(self, desc: ClassDesc) -> None:
        self.out.append(Tag.CLASS_DESC)
        self._utf(desc.name)
        self._register(desc)
        self.out += DESC_HEAD.pack(desc.uid, desc.flags, len(desc.fields))
        for field in desc.fields:
            self.out.append(ord(field.code))
            self._utf(field.name)
            if field.type is not None:
                self._string_or_handle(field.type)

    def _proxy_desc(self, desc: ProxyDesc) -> None:
        self.out.append(Tag.PROXY_CLASS_DESC)
        self._register(desc)
        self.out += I4.pack(len(desc.interfaces))
        for name in desc.interfaces:
            self._utf(name)

    def _utf(self, text: str) -> None:
        raw = modified_utf8(text)
        self.out += U2.pack(len(raw))
        self.out += raw


def _leading_numbers(desc: AnyDesc) -> int | None:
    """How many parts of numbers stand before nothing but references; None for any other layout."""
    steps = desc.steps
    leading = int(bool(steps) and steps[0] > 0)
    return leading if all(step < 0 for step in steps[leading:]) else None


def encode(stream: Stream) -> bytes:
    """Encode a stream; of one that `decode` gave, the bytes it was decoded from.

    Parameters
    ----------
    stream : Stream
        Nodes that occur twice are written once and referred to by handle afterwards.

    Returns
    -------
    bytes
        Stream protocol version 2.
    """
    encoder = _Encoder()
    with paused_garbage_collection():
        data = encoder.run(stream.contents)
    # Bound methods make a cycle, which would keep what was written until the next garbage collection.
    encoder.writers.clear()
    return data
