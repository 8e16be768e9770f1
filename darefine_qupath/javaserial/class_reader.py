"""Read the class descriptors and strings of a stream, and work out how objects of a class are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import deque
from typing import Any, NamedTuple

from darefine_qupath.errors import JavaStreamError
from darefine_qupath.javaserial.descriptors import AnyDesc, ClassDesc, Field, ProxyDesc, class_chain
from darefine_qupath.javaserial.nodes import Content
from darefine_qupath.javaserial.protocol import (
    DESC_HEAD,
    FIRST_HANDLE,
    I4,
    I8,
    MAX_SUPERCLASSES,
    U2,
    U4,
    WIDTHS,
    Flag,
    Tag,
)
from darefine_qupath.javaserial.strings import JavaString, modified_utf8, text_of

__all__ = ["ClassReader", "Layout", "layout_of"]

# Objects inside the annotation of a class descriptor inside such an object and so on; Java itself writes none.
_MAX_ANNOTATION_DEPTH = 16


class Layout(NamedTuple):
    """How objects of a class are read: by steps, or at once as numbers and then values."""

    steps: tuple[int, ...]
    leading: int
    """Bytes of numbers, where nothing but one run of values follows."""
    left: int
    """Values of that run; negative = up to the end mark."""


def layout_of(desc: AnyDesc, start: int) -> Layout:
    """Work out how objects of a class are read; `start` is where the first one stands, for errors."""
    if not desc.flags & (Flag.SERIALIZABLE | Flag.EXTERNALIZABLE) or desc.flags & Flag.ENUM:
        raise JavaStreamError(f"{desc.name} is not a class that has serialized objects", offset=start)
    if desc.flags & Flag.EXTERNALIZABLE:
        if not desc.flags & Flag.BLOCK_DATA:
            raise JavaStreamError(
                f"{desc.name} is externalized by stream protocol 1, whose objects only their own class can read",
                offset=start,
            )
        return Layout((), 0, -1)
    steps = desc.steps
    leading = steps[0] if steps and steps[0] > 0 else 0
    rest = steps[bool(leading) :]
    if len(rest) > 1 or rest == (0,):
        return Layout(steps, 0, 0)
    return Layout((), leading, -rest[0] if rest else 0)


class ClassReader(ABC):
    """Reads class descriptors and strings where they stand in the bytes.

    Parameters
    ----------
    data : bytes
        The stream.
    nodes : list
        Gets every node that has a handle.
    offsets : array or deque of int
        Gets where each of them begins.
    """

    def __init__(self, data: bytes, nodes: list[Content], offsets: array[int] | deque[int]) -> None:
        self.data = data
        self.pos = 0
        self.nodes = nodes
        self.offsets = offsets
        self.first = 0
        """Number of the node that has the first handle: moves at a reset."""
        self.annotation_depth = 0
        self.pool: dict[bytes, bytes] = {}
        self.described: dict[int, AnyDesc] = {}
        """Descriptors that were found complete, by the number of the node."""

    @abstractmethod
    def _values(self, count: int) -> list[Any]:
        """Read `count` values, or up to the end mark when negative."""

    @abstractmethod
    def _shared(self, number: int) -> Content:
        """Node that something refers to."""

    def _referred(self) -> Content:
        """Node that the handle at this place refers to."""
        number: int = U4.unpack_from(self.data, self.pos + 1)[0] - FIRST_HANDLE + self.first
        if not self.first <= number < len(self.nodes):
            raise JavaStreamError(f"Handle {number - self.first} refers to nothing read so far", offset=self.pos)
        self.pos += 5
        return self._shared(number)

    def _take(self, size: int) -> bytes:
        end = self.pos + size
        chunk = self.data[self.pos : end]
        if len(chunk) < size:
            raise IndexError
        self.pos = end
        return self.pool.setdefault(chunk, chunk) if size <= 16 else chunk

    def _register(self, node: Content, start: int) -> None:
        self.nodes.append(node)
        self.offsets.append(start)

    def _string(self, _: int = 0) -> JavaString:
        start = self.pos
        size = U2.unpack_from(self.data, start + 1)[0]
        self.pos = start + 3
        return self._finish_string(start, size, is_long=False)

    def _long_string(self, _: int = 0) -> JavaString:
        start = self.pos
        size = I8.unpack_from(self.data, start + 1)[0]
        if size < 0:
            raise JavaStreamError(f"String of negative length {size}", offset=start)
        self.pos = start + 9
        return self._finish_string(start, size, is_long=True)

    def _finish_string(self, start: int, size: int, *, is_long: bool) -> JavaString:
        string = JavaString.__new__(JavaString)
        string.raw = self._take(size)
        string.is_long = is_long
        self.nodes.append(string)
        self.offsets.append(start)
        return string

    def _string_or_handle(self) -> JavaString:
        tag, start = self.data[self.pos], self.pos
        if tag == Tag.STRING:
            return self._string()
        if tag == Tag.LONG_STRING:
            return self._long_string()
        node = self._referred() if tag == Tag.REFERENCE else None
        if not isinstance(node, JavaString):
            raise JavaStreamError("A string should stand here", offset=start)
        return node

    def _desc_value(self, _: int) -> AnyDesc:
        desc = self._desc()
        if desc is None:
            raise AssertionError  # the tag was that of a descriptor
        return desc

    def _desc_of(self, what: str, start: int) -> AnyDesc:
        """Descriptor of an object's class; not null, and complete."""
        number = -1
        if self.data[self.pos] == Tag.REFERENCE:
            number = U4.unpack_from(self.data, self.pos + 1)[0] - FIRST_HANDLE + self.first
            known = self.described.get(number)
            if known is not None:
                self.pos += 5
                return known
            desc = self._referred()
            if not isinstance(desc, (ClassDesc, ProxyDesc)):
                raise JavaStreamError(f"The class of {what} is not a class descriptor", offset=start)
        else:
            desc = self._desc()
        if desc is None or not desc.is_complete:
            raise JavaStreamError(f"The class of {what} is null or not yet described", offset=start)
        if number >= self.first:
            self.described[number] = desc
        return desc

    def _desc(self) -> AnyDesc | None:
        """Read a descriptor and those of its superclasses."""
        first: AnyDesc | None = None
        chain: list[AnyDesc] = []
        while True:
            tag, start = self.data[self.pos], self.pos
            desc: Content
            if tag == Tag.CLASS_DESC:
                desc = self._new_class_desc()
            elif tag == Tag.PROXY_CLASS_DESC:
                desc = self._new_proxy_desc()
            else:
                desc = self._known_desc(chain)
            if chain:
                chain[-1].parent = desc
            else:
                first = desc
            if desc is None or desc.is_complete:
                break
            chain.append(desc)
            if len(chain) > MAX_SUPERCLASSES:
                raise JavaStreamError(f"More than {MAX_SUPERCLASSES} superclasses", offset=start)
        for open_desc in chain:
            open_desc.is_complete = True
        return first

    def _known_desc(self, chain: list[AnyDesc]) -> AnyDesc | None:
        start = self.pos
        if self.data[start] == Tag.NULL:
            self.pos += 1
            return None
        desc = self._referred() if self.data[start] == Tag.REFERENCE else None
        if not isinstance(desc, (ClassDesc, ProxyDesc)) or not desc.is_complete:
            raise JavaStreamError("A class descriptor should stand here", offset=start)
        if chain and len(chain) + len(class_chain(desc)) > MAX_SUPERCLASSES:
            raise JavaStreamError(f"More than {MAX_SUPERCLASSES} superclasses", offset=start)
        return desc

    def _new_class_desc(self) -> ClassDesc:
        start = self.pos
        self.pos += 1
        name = self._utf()
        uid, flags, num_fields = DESC_HEAD.unpack_from(self.data, self.pos)
        desc = ClassDesc(name, uid, flags)
        desc.is_complete = False
        self._register(desc, start)
        self.pos += DESC_HEAD.size
        if flags & Flag.SERIALIZABLE and flags & Flag.EXTERNALIZABLE:
            raise JavaStreamError(f"{name} is both serializable and externalizable", offset=start)
        desc.fields = tuple([self._field() for _ in range(num_fields)])
        order = [field.code not in WIDTHS for field in desc.fields]
        if order != sorted(order):
            raise JavaStreamError(f"{name} has a primitive field after a reference", offset=start)
        desc.annotation = self._annotation()
        return desc

    def _field(self) -> Field:
        start = self.pos
        code = chr(self.data[start])
        self.pos += 1
        name = self._utf()
        if code in WIDTHS:
            return Field(code, name)
        if code in "[L":
            return Field(code, name, self._string_or_handle())
        raise JavaStreamError(f"Field {name!r} has the unknown type code {code!r}", offset=start)

    def _new_proxy_desc(self) -> ProxyDesc:
        start = self.pos
        self.pos += 1
        desc = ProxyDesc(())
        desc.is_complete = False
        self._register(desc, start)
        count = I4.unpack_from(self.data, self.pos)[0]
        self.pos += 4
        if not 0 <= count <= 0xFFFF:
            raise JavaStreamError(f"A proxy of {count} interfaces", offset=start)
        desc.interfaces = tuple([self._utf() for _ in range(count)])
        desc.annotation = self._annotation()
        return desc

    def _annotation(self) -> tuple[Content, ...]:
        if self.data[self.pos] == Tag.END_BLOCK_DATA:
            self.pos += 1
            return ()
        self.annotation_depth += 1
        if self.annotation_depth > _MAX_ANNOTATION_DEPTH:
            raise JavaStreamError("Class annotations are nested too deep", offset=self.pos)
        content = tuple(self._values(-1))
        self.annotation_depth -= 1
        return content

    def _utf(self) -> str:
        start = self.pos
        size = U2.unpack_from(self.data, start)[0]
        self.pos += 2
        raw = self._take(size)
        try:
            text = text_of(raw)
        except JavaStreamError as error:
            raise JavaStreamError(error.message, offset=start) from None
        if modified_utf8(text) != raw:
            raise JavaStreamError(f"The name {text!r} is not encoded as Java encodes it", offset=start)
        return text
