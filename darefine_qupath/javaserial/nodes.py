"""Represent a decoded object stream: objects, arrays, enum constants and the stream itself.

Values of the tree are None, `bytes` (one segment of block data), strings, class descriptors and the nodes below. A node
is equal to itself alone; what the stream refers to by a handle is the same Python object again.
"""

from __future__ import annotations

import gc
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from darefine_qupath.javaserial.descriptors import AnyDesc, ClassDesc, ProxyDesc, class_chain
from darefine_qupath.javaserial.protocol import WIDTHS, Flag
from darefine_qupath.javaserial.strings import JavaString

__all__ = [
    "Aborted",
    "Content",
    "JavaArray",
    "JavaClass",
    "JavaEnum",
    "JavaObject",
    "LongBlock",
    "Reset",
    "Stream",
    "TopLevel",
    "paused_garbage_collection",
]


_STRUCTS = {code: struct.Struct(f">{fmt}") for code, fmt in zip("BCDFIJSZ", "bHdfiqh?", strict=True)}


class LongBlock(bytes):
    """Block data of at most 255 bytes that the writer gave a four-byte length; Java itself never does."""

    __slots__ = ()


class JavaObject:
    """An object.

    Parameters
    ----------
    desc : ClassDesc or ProxyDesc
        Its class.
    data : tuple
        What an externalizable object wrote. Of others one item per step of the class (`ClassDesc.steps`), references
        one by one: `bytes` of primitives, a value, or a tuple of values for an annotation.

    Notes
    -----
    `get` and `put` are for the fields of classes that are not externalizable.
    """

    __slots__ = ("data", "desc")

    def __init__(self, desc: AnyDesc, data: Sequence[Any] = ()) -> None:
        self.desc = desc
        self.data: tuple[Any, ...] = tuple(data)

    @classmethod
    def of(cls, desc: AnyDesc, values: Mapping[str, Any]) -> JavaObject:
        """Lay out an object of a serializable class.

        Parameters
        ----------
        desc : ClassDesc or ProxyDesc
            Its class.
        values : mapping of str to value
            Fields by name (0 or null where left out), annotations by ``"@class name"``.
        """
        data: list[Any] = []
        for part in class_chain(desc):
            if not part.flags & Flag.SERIALIZABLE:
                continue
            numbers = [field for field in part.fields if field.code in WIDTHS]
            if numbers:
                data.append(b"".join([_STRUCTS[item.code].pack(values.get(item.name, 0)) for item in numbers]))
            data.extend(values.get(field.name) for field in part.fields if field.code not in WIDTHS)
            if part.flags & Flag.WRITE_METHOD:
                data.append(tuple(values.get(f"@{part.name}", ())))
        return cls(desc, data)

    def get(self, name: str) -> Any:  # noqa: ANN401 - a field holds whatever its type says
        """Value of a field, or of an annotation by ``"@class name"``.

        Raises
        ------
        KeyError
            If the class has no such field.
        """
        position, offset, code = self.desc.index[name]
        value = self.data[position]
        return _STRUCTS[code].unpack_from(value, offset)[0] if code in WIDTHS else value

    def put(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Set a field."""
        position, offset, code = self.desc.index[name]
        data = list(self.data)
        if code in WIDTHS:
            packed = bytearray(data[position])
            _STRUCTS[code].pack_into(packed, offset, value)
            data[position] = bytes(packed)
        else:
            data[position] = value
        self.data = tuple(data)

    def __repr__(self) -> str:
        return f"JavaObject({self.desc.name!r})"


class JavaArray:
    """An array.

    Parameters
    ----------
    desc : ClassDesc
        Its class, named ``[F``, ``[Ljava.lang.Object;`` and so on.
    data : bytes or tuple
        Big-endian bytes of primitives, or the elements.
    """

    __slots__ = ("data", "desc")

    def __init__(self, desc: AnyDesc, data: bytes | Sequence[Content] = ()) -> None:
        self.desc = desc
        self.data: bytes | tuple[Content, ...] = data if isinstance(data, bytes) else tuple(data)

    def __repr__(self) -> str:
        return f"JavaArray({self.desc.name!r})"


class JavaEnum:
    """An enum constant: its class and its name."""

    __slots__ = ("constant", "desc")

    def __init__(self, desc: AnyDesc, constant: JavaString) -> None:
        self.desc = desc
        self.constant = constant


class JavaClass:
    """A class itself, as an object."""

    __slots__ = ("desc",)

    def __init__(self, desc: AnyDesc) -> None:
        self.desc = desc


class Reset:
    """Mark at the top level: the writer forgot all handles."""

    __slots__ = ()


class Aborted:
    """Mark at the top level: the writer failed, and wrote the exception."""

    __slots__ = ("exception",)

    def __init__(self, exception: Content) -> None:
        self.exception = exception


Content: TypeAlias = bytes | JavaString | JavaObject | JavaArray | JavaEnum | JavaClass | ClassDesc | ProxyDesc | None
TopLevel: TypeAlias = Content | Reset | Aborted


class Stream:
    """A decoded stream.

    Parameters
    ----------
    contents : sequence
        The values at the top level.

    Attributes
    ----------
    contents : list
        The same, to be edited.
    nodes : list
        Every node that had a handle, in stream order.
    offsets : array of int
        Where in the file each of `nodes` stands.
    """

    __slots__ = ("contents", "nodes", "offsets")

    def __init__(self, contents: Iterable[TopLevel]) -> None:
        self.contents = list(contents)
        self.nodes: list[Content] = []
        self.offsets = array("Q")

    def offset_of(self, node: object) -> int | None:
        """Byte offset of a node in the file that was decoded; None for one that did not stand there."""
        for number, candidate in enumerate(self.nodes):
            if candidate is node:
                return self.offsets[number]
        return None


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Hold the cycle collector: hundreds of thousands of new nodes would make it walk all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
