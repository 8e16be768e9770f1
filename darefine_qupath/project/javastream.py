"""Java's object serialization stream, decoded to a tree and encoded back to the identical bytes.

The module knows the stream protocol (Java Object Serialization Specification, section 6, protocol version 2) and no
class of any program: no class is loaded and nothing is run, an object is its class descriptor and its data. What the
stream refers to by a handle is, in the tree, the same Python object again; handles are numbered anew in the order in
which nodes are written. That is what makes an edited tree a right stream: when the object that first held a class
descriptor or a string is taken out, the definition moves to the first use that is left.

Values of the tree are None, `bytes` (one segment of block data), and the node classes below. A node is equal to itself
alone.
"""

from __future__ import annotations

import gc
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from darefine_qupath.errors import ProjectFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Aborted",
    "ClassDesc",
    "Content",
    "Field",
    "JavaArray",
    "JavaClass",
    "JavaEnum",
    "JavaObject",
    "JavaString",
    "LongBlock",
    "ProxyDesc",
    "Reset",
    "Stream",
    "decode",
    "encode",
    "modified_utf8",
    "no_collection",
]

MAGIC = b"\xac\xed\x00\x05"

TC_NULL = 0x70
TC_REFERENCE = 0x71
TC_CLASSDESC = 0x72
TC_OBJECT = 0x73
TC_STRING = 0x74
TC_ARRAY = 0x75
TC_CLASS = 0x76
TC_BLOCKDATA = 0x77
TC_ENDBLOCKDATA = 0x78
TC_RESET = 0x79
TC_BLOCKDATALONG = 0x7A
TC_EXCEPTION = 0x7B
TC_LONGSTRING = 0x7C
TC_PROXYCLASSDESC = 0x7D
TC_ENUM = 0x7E

SC_WRITE_METHOD = 0x01
SC_SERIALIZABLE = 0x02
SC_EXTERNALIZABLE = 0x04
SC_BLOCK_DATA = 0x08
SC_ENUM = 0x10

_FIRST_HANDLE = 0x7E0000
_WIDTHS = {"B": 1, "C": 2, "D": 8, "F": 4, "I": 4, "J": 8, "S": 2, "Z": 1}
_ARRAY_CODES = {*_WIDTHS, "[", "L"}
_STRUCTS = {code: struct.Struct(f">{fmt}") for code, fmt in zip("BCDFIJSZ", "bHdfiqh?", strict=True)}
_DTYPES = {"B": "i1", "C": ">u2", "D": ">f8", "F": ">f4", "I": ">i4", "J": ">i8", "S": ">i2", "Z": "?"}

# No Java class has so many superclasses; the limit keeps the cost of a hostile chain linear.
_MAX_SUPERCLASSES = 256
# Objects inside the annotation of a class descriptor inside such an object and so on; Java itself writes none.
_MAX_ANNOTATION_DEPTH = 16

_U2 = struct.Struct(">H")
_I4 = struct.Struct(">i")
_U4 = struct.Struct(">I")
_I8 = struct.Struct(">q")
_DESC_HEAD = struct.Struct(">qBH")
_REFERENCE = struct.Struct(">BI")


def modified_utf8(text: str) -> bytes:
    """Encode text as Java does: NUL as two bytes, a character beyond the BMP as two surrogates of three bytes."""
    if text.isascii() and "\0" not in text:
        return text.encode("ascii")
    units = memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")
    # The native order of the cast is little-endian on every platform NumPy and GEOS wheels are built for.
    return "".join(map(chr, units)).encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")


def _text_of(raw: bytes) -> str:
    if raw.isascii():
        return raw.decode("ascii")
    if max(raw) >= 0xF0:
        raise ProjectFormatError(f"{raw[:40]!r} is not modified UTF-8")
    try:
        text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise ProjectFormatError(f"{raw[:40]!r} is not modified UTF-8") from None
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


class LongBlock(bytes):
    """Block data of at most 255 bytes that the writer gave a four-byte length; Java itself never does."""

    __slots__ = ()


class JavaString:
    """A string object.

    Parameters
    ----------
    text : str
        Its text.

    Attributes
    ----------
    raw : bytes
        Modified UTF-8, as in the stream.
    is_long : bool
        Whether its length has eight bytes; Java does so from 65,536 bytes on.
    """

    __slots__ = ("is_long", "raw")

    def __init__(self, text: str) -> None:
        self.raw = modified_utf8(text)
        self.is_long = len(self.raw) > 0xFFFF

    @classmethod
    def of_raw(cls, raw: bytes, *, is_long: bool = False) -> JavaString:
        """Make a string of bytes that stand in a stream."""
        string = cls.__new__(cls)
        string.raw = raw
        string.is_long = is_long
        return string

    @property
    def text(self) -> str:
        """Text; raises `ProjectFormatError` where the bytes are not modified UTF-8."""
        return _text_of(self.raw)

    def __repr__(self) -> str:
        return f"JavaString({self.raw[:40]!r})"


class Field(NamedTuple):
    """A field of a class: type code (one of ``BCDFIJSZ[L``), name, and the type string of a reference."""

    code: str
    name: str
    type: JavaString | None = None


class ClassDesc:
    """A class descriptor.

    Parameters
    ----------
    name : str
        Binary name of the class.
    uid : int
        serialVersionUID, signed.
    flags : int
        ``SC_`` flags.
    fields : sequence of Field
        Primitives before references, as Java orders them.
    parent : ClassDesc, ProxyDesc or None
        Descriptor of the nearest serializable superclass.
    annotation : sequence of Content
        What ``annotateClass`` wrote; Java's own streams leave it empty.
    """

    __slots__ = ("_index", "_steps", "annotation", "fields", "flags", "is_complete", "name", "parent", "uid")

    def __init__(
        self,
        name: str,
        uid: int,
        flags: int,
        fields: Sequence[Field] = (),
        parent: AnyDesc | None = None,
        annotation: Sequence[Content] = (),
    ) -> None:
        self.name = name
        self.uid = uid
        self.flags = flags
        self.fields = tuple(fields)
        self.parent = parent
        self.annotation: tuple[Content, ...] = tuple(annotation)
        self.is_complete = True
        self._steps: tuple[int, ...] | None = None
        self._index: dict[str, tuple[int, int, str]] | None = None

    @property
    def is_externalizable(self) -> bool:
        """Whether objects write themselves as they please, fields or not."""
        return bool(self.flags & SC_EXTERNALIZABLE)

    @property
    def steps(self) -> tuple[int, ...]:
        """How the data of an object is laid out, superclass first.

        A positive number is so many bytes of primitives, a negative one so many references, and 0 is an annotation:
        content up to an end mark. Externalizable objects have no layout.
        """
        if self._steps is None:
            self._steps = tuple(_layout(self))
        return self._steps

    @property
    def index(self) -> dict[str, tuple[int, int, str]]:
        """Where a field stands: name to (position in the object's data, byte offset there, type code).

        A field of a subclass hides one of the same name. The annotation of class ``C`` is named ``"@C"``.
        """
        if self._index is None:
            self._index = _field_index(self)
        return self._index

    def __repr__(self) -> str:
        return f"ClassDesc({self.name!r})"


class ProxyDesc:
    """Descriptor of a dynamic proxy class: the names of its interfaces."""

    __slots__ = ("annotation", "interfaces", "is_complete", "parent")

    def __init__(
        self, interfaces: Sequence[str], parent: AnyDesc | None = None, annotation: Sequence[Content] = ()
    ) -> None:
        self.interfaces = tuple(interfaces)
        self.parent = parent
        self.annotation: tuple[Content, ...] = tuple(annotation)
        self.is_complete = True

    name = "a dynamic proxy"
    flags = SC_SERIALIZABLE
    fields: tuple[Field, ...] = ()
    is_externalizable = False

    @property
    def steps(self) -> tuple[int, ...]:
        """As of a class: that of the superclass, since a proxy has no fields of its own."""
        return () if self.parent is None else tuple(_layout(self))

    @property
    def index(self) -> dict[str, tuple[int, int, str]]:
        """As of a class."""
        return _field_index(self)


AnyDesc: TypeAlias = ClassDesc | ProxyDesc


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
    `content` is all that an object of an externalizable class has; `get` and `put` are for the fields of the others.
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
        for part in _lineage(desc):
            if not part.flags & SC_SERIALIZABLE:
                continue
            numbers = [field for field in part.fields if field.code in _WIDTHS]
            if numbers:
                data.append(b"".join([_STRUCTS[item.code].pack(values.get(item.name, 0)) for item in numbers]))
            data.extend(values.get(field.name) for field in part.fields if field.code not in _WIDTHS)
            if part.flags & SC_WRITE_METHOD:
                data.append(tuple(values.get(f"@{part.name}", ())))
        return cls(desc, data)

    @property
    def content(self) -> tuple[Content, ...]:
        """What an externalizable object wrote."""
        return self.data

    @content.setter
    def content(self, values: Sequence[Content]) -> None:
        self.data = tuple(values)

    def get(self, name: str) -> Any:  # noqa: ANN401 - a field holds whatever its type says
        """Value of a field, or of an annotation by ``"@class name"``.

        Raises
        ------
        KeyError
            If the class has no such field.
        """
        position, offset, code = self.desc.index[name]
        value = self.data[position]
        return _STRUCTS[code].unpack_from(value, offset)[0] if code in _WIDTHS else value

    def put(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Set a field."""
        position, offset, code = self.desc.index[name]
        data = list(self.data)
        if code in _WIDTHS:
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

    @property
    def code(self) -> str:
        """Type code of the elements."""
        return self.desc.name[1]

    def numpy(self) -> NDArray[Any]:
        """Elements of a primitive array, in the stream's byte order; a view, not a copy."""
        if not isinstance(self.data, bytes):
            raise ProjectFormatError(f"{self.desc.name} is not an array of numbers")
        return np.frombuffer(self.data, _DTYPES[self.code])

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


def _lineage(desc: AnyDesc) -> list[AnyDesc]:
    chain: list[AnyDesc] = []
    current: AnyDesc | None = desc
    while current is not None:
        chain.append(current)
        if len(chain) > _MAX_SUPERCLASSES:
            raise ProjectFormatError(f"{desc.name} has more than {_MAX_SUPERCLASSES} superclasses")
        current = current.parent
    return chain[::-1]


def _layout(desc: AnyDesc) -> Iterator[int]:
    if desc.is_externalizable:
        return
    for part in _lineage(desc):
        if not part.flags & SC_SERIALIZABLE:
            continue
        size = sum(_WIDTHS.get(field.code, 0) for field in part.fields)
        if size:
            yield size
        references = sum(field.code not in _WIDTHS for field in part.fields)
        if references:
            yield -references
        if part.flags & SC_WRITE_METHOD:
            yield 0


def _field_index(desc: AnyDesc) -> dict[str, tuple[int, int, str]]:
    index: dict[str, tuple[int, int, str]] = {}
    position = 0
    for part in _lineage(desc):
        if not part.flags & SC_SERIALIZABLE:
            continue
        offset = 0
        for field in part.fields:
            if field.code in _WIDTHS:
                index[field.name] = (position, offset, field.code)
                offset += _WIDTHS[field.code]
        position += bool(offset)
        for field in part.fields:
            if field.code not in _WIDTHS:
                index[field.name] = (position, 0, field.code)
                position += 1
        if part.flags & SC_WRITE_METHOD:
            index[f"@{part.name}"] = (position, 0, "@")
            position += 1
    return index


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold the cycle collector: hundreds of thousands of new nodes would make it walk all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Layout(NamedTuple):
    """How objects of a class are read: by steps, or at once as numbers and then values."""

    steps: tuple[int, ...]
    leading: int
    """Bytes of numbers, where nothing but one run of values follows."""
    left: int
    """Values of that run; negative = up to the end mark."""


_new_object = JavaObject.__new__
_new_array = JavaArray.__new__


class _Frame:
    """An object or array whose values are being read."""

    __slots__ = ("data", "left", "node", "out", "step", "steps")

    def __init__(self, node: JavaObject | JavaArray | None, steps: tuple[int, ...], left: int) -> None:
        self.node = node
        self.steps = steps
        self.step = 0
        self.left = left  # values to read in this step; negative = up to the end mark
        self.data: list[Any] = []
        self.out = self.data  # where they go


class _Decoder:
    """Reads values from bytes; nesting stands on a list, not on Python's stack."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0
        self.stream = Stream(())
        self.stream.offsets = array("I" if len(data) < 1 << 32 else "Q")
        self.nodes = self.stream.nodes
        self.offsets = self.stream.offsets
        self.first = 0
        """Number of the node that has the first handle: moves at a reset."""
        self.annotation_depth = 0
        self.pool: dict[bytes, bytes] = {}
        self.layouts: dict[AnyDesc, _Layout] = {}
        """Of the classes that were found fit to have objects."""
        self.described: dict[int, AnyDesc] = {}
        """Descriptors that were found complete, by the number of the node."""
        self.opened: _Frame | None = None
        """What the reader called last has begun and not finished."""
        self.readers: list[Callable[[int], Any]] = [self._unknown] * 256
        self.readers[TC_CLASSDESC] = self.readers[TC_PROXYCLASSDESC] = self._desc_value
        self.readers[TC_OBJECT] = self._object
        self.readers[TC_STRING] = self._string
        self.readers[TC_LONGSTRING] = self._long_string
        self.readers[TC_ARRAY] = self._array
        self.readers[TC_CLASS] = self._class
        self.readers[TC_ENUM] = self._enum
        self.readers[TC_BLOCKDATA] = self._block
        self.readers[TC_BLOCKDATALONG] = self._long_block
        self.readers[TC_RESET] = self.readers[TC_EXCEPTION] = self._nested_mark

    def run(self) -> Stream:
        if self.data[:4] != MAGIC:
            raise ProjectFormatError(f"Not a Java object stream: it begins with {self.data[:4].hex(' ')!r}", offset=0)
        self.pos = 4
        while self.pos < len(self.data):
            self.stream.contents.append(self._top_level())
        return self.stream

    def _top_level(self) -> TopLevel:
        tag = self.data[self.pos]
        if tag == TC_RESET:
            self.pos += 1
            self._forget()
            return Reset()
        if tag == TC_EXCEPTION:
            self.pos += 1
            self._forget()
            exception = self._value()
            self._forget()
            return Aborted(exception)
        if tag in (TC_BLOCKDATA, TC_BLOCKDATALONG):
            block: bytes = self.readers[tag](-1)
            return block
        return self._value()

    def _forget(self) -> None:
        self.first = len(self.nodes)
        self.described.clear()

    def _value(self) -> Content:
        value: Content = self._values(1)[0]
        return value

    def _values(self, count: int) -> list[Any]:
        """Read `count` values, or up to the end mark when negative."""
        data, readers, nodes, uint = self.data, self.readers, self.nodes, _U4.unpack_from
        lowest, offset = self.first, _FIRST_HANDLE - self.first
        root = frame = _Frame(None, (), count)
        stack: list[_Frame] = []
        while True:
            out, left = frame.out, frame.left
            while left:
                tag = data[self.pos]
                if tag == TC_REFERENCE:
                    number = uint(data, self.pos + 1)[0] - offset
                    if not lowest <= number < len(nodes):
                        self._referred()
                    out.append(nodes[number])
                    self.pos += 5
                elif tag == TC_NULL:
                    out.append(None)
                    self.pos += 1
                elif tag == TC_ENDBLOCKDATA and left < 0:
                    self.pos += 1
                    break
                else:
                    out.append(readers[tag](left))
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

    def _referred(self) -> Content:
        """Node that the handle at this place refers to."""
        number: int = _U4.unpack_from(self.data, self.pos + 1)[0] - _FIRST_HANDLE + self.first
        if not self.first <= number < len(self.nodes):
            raise ProjectFormatError(f"Handle {number - self.first} refers to nothing read so far", offset=self.pos)
        self.pos += 5
        return self.nodes[number]

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

    def _unknown(self, left: int) -> None:
        tag = self.data[self.pos]
        wanted = "a value" if left > 0 else "a value or an end mark"
        raise ProjectFormatError(f"Byte 0x{tag:02x} where {wanted} should begin", offset=self.pos)

    def _nested_mark(self, _: int) -> None:
        what = "a reset" if self.data[self.pos] == TC_RESET else "an exception (the writer failed here)"
        raise ProjectFormatError(f"There is {what} inside an object", offset=self.pos)

    def _block(self, left: int) -> bytes:
        if left > 0:
            self._unknown(left)
        size = self.data[self.pos + 1]
        self.pos += 2
        return self._take(size)

    def _long_block(self, left: int) -> bytes:
        if left > 0:
            self._unknown(left)
        size = _I4.unpack_from(self.data, self.pos + 1)[0]
        if size < 0:
            raise ProjectFormatError(f"Block data of negative size {size}", offset=self.pos)
        self.pos += 5
        chunk = self._take(size)
        return chunk if size > 255 else LongBlock(chunk)

    def _string(self, _: int = 0) -> JavaString:
        start = self.pos
        size = _U2.unpack_from(self.data, start + 1)[0]
        self.pos = start + 3
        return self._finish_string(start, size, is_long=False)

    def _long_string(self, _: int = 0) -> JavaString:
        start = self.pos
        size = _I8.unpack_from(self.data, start + 1)[0]
        if size < 0:
            raise ProjectFormatError(f"String of negative length {size}", offset=start)
        self.pos = start + 9
        return self._finish_string(start, size, is_long=True)

    def _finish_string(self, start: int, size: int, *, is_long: bool) -> JavaString:
        string = JavaString.__new__(JavaString)
        string.raw = self._take(size)
        string.is_long = is_long
        self.nodes.append(string)
        self.offsets.append(start)
        return string

    def _object(self, _: int) -> JavaObject:
        start = self.pos
        self.pos = start + 1
        desc = self._desc_of("an object", start)
        layout = self.layouts.get(desc)
        if layout is None:
            layout = self.layouts[desc] = self._layout_of(desc, start)
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
        elif steps:
            frame = _Frame(node, steps, 0)
            if self._next_step(frame):
                self.opened = frame
        return node

    @staticmethod
    def _layout_of(desc: AnyDesc, start: int) -> _Layout:
        if not desc.flags & (SC_SERIALIZABLE | SC_EXTERNALIZABLE) or desc.flags & SC_ENUM:
            raise ProjectFormatError(f"{desc.name} is not a class that has serialized objects", offset=start)
        if desc.flags & SC_EXTERNALIZABLE:
            if not desc.flags & SC_BLOCK_DATA:
                raise ProjectFormatError(
                    f"{desc.name} is externalized by stream protocol 1, whose objects only their own class can read",
                    offset=start,
                )
            return _Layout((), 0, -1)
        steps = desc.steps
        leading = steps[0] if steps and steps[0] > 0 else 0
        rest = steps[bool(leading) :]
        if len(rest) > 1 or rest == (0,):
            return _Layout(steps, 0, 0)
        return _Layout((), leading, -rest[0] if rest else 0)

    def _array(self, _: int) -> JavaArray:
        start = self.pos
        self.pos += 1
        desc = self._desc_of("an array", start)
        code = desc.name[1:2]
        if desc.name[0:1] != "[" or code not in _ARRAY_CODES:
            raise ProjectFormatError(f"An array of class {desc.name!r}", offset=start)
        node = _new_array(JavaArray)
        node.desc = desc
        node.data = ()
        self.nodes.append(node)
        self.offsets.append(start)
        size = _I4.unpack_from(self.data, self.pos)[0]
        if size < 0:
            raise ProjectFormatError(f"An array of {size} elements", offset=start)
        self.pos += 4
        if code in _WIDTHS:
            node.data = self._take(size * _WIDTHS[code])
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
        if not desc.flags & SC_ENUM:
            raise ProjectFormatError(f"{desc.name} is not an enum", offset=start)
        node = JavaEnum.__new__(JavaEnum)
        node.desc = desc
        self._register(node, start)
        node.constant = self._string_or_handle()
        return node

    def _string_or_handle(self) -> JavaString:
        tag, start = self.data[self.pos], self.pos
        if tag == TC_STRING:
            return self._string()
        if tag == TC_LONGSTRING:
            return self._long_string()
        node = self._referred() if tag == TC_REFERENCE else None
        if not isinstance(node, JavaString):
            raise ProjectFormatError("A string should stand here", offset=start)
        return node

    def _desc_value(self, _: int) -> AnyDesc:
        desc = self._desc()
        if desc is None:
            raise AssertionError  # the tag was that of a descriptor
        return desc

    def _desc_of(self, what: str, start: int) -> AnyDesc:
        """Descriptor of an object's class; not null, and complete."""
        number = -1
        if self.data[self.pos] == TC_REFERENCE:
            number = _U4.unpack_from(self.data, self.pos + 1)[0] - _FIRST_HANDLE + self.first
            known = self.described.get(number)
            if known is not None:
                self.pos += 5
                return known
            desc = self._referred()
            if not isinstance(desc, (ClassDesc, ProxyDesc)):
                raise ProjectFormatError(f"The class of {what} is not a class descriptor", offset=start)
        else:
            desc = self._desc()
        if desc is None or not desc.is_complete:
            raise ProjectFormatError(f"The class of {what} is null or not yet described", offset=start)
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
            if tag == TC_CLASSDESC:
                desc = self._new_class_desc()
            elif tag == TC_PROXYCLASSDESC:
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
            if len(chain) > _MAX_SUPERCLASSES:
                raise ProjectFormatError(f"More than {_MAX_SUPERCLASSES} superclasses", offset=start)
        for open_desc in chain:
            open_desc.is_complete = True
        return first

    def _known_desc(self, chain: list[AnyDesc]) -> AnyDesc | None:
        start = self.pos
        if self.data[start] == TC_NULL:
            self.pos += 1
            return None
        desc = self._referred() if self.data[start] == TC_REFERENCE else None
        if not isinstance(desc, (ClassDesc, ProxyDesc)) or not desc.is_complete:
            raise ProjectFormatError("A class descriptor should stand here", offset=start)
        if chain and len(chain) + len(_lineage(desc)) > _MAX_SUPERCLASSES:
            raise ProjectFormatError(f"More than {_MAX_SUPERCLASSES} superclasses", offset=start)
        return desc

    def _new_class_desc(self) -> ClassDesc:
        start = self.pos
        self.pos += 1
        name = self._utf()
        uid, flags, num_fields = _DESC_HEAD.unpack_from(self.data, self.pos)
        desc = ClassDesc(name, uid, flags)
        desc.is_complete = False
        self._register(desc, start)
        self.pos += _DESC_HEAD.size
        if flags & SC_SERIALIZABLE and flags & SC_EXTERNALIZABLE:
            raise ProjectFormatError(f"{name} is both serializable and externalizable", offset=start)
        desc.fields = tuple([self._field() for _ in range(num_fields)])
        order = [field.code not in _WIDTHS for field in desc.fields]
        if order != sorted(order):
            raise ProjectFormatError(f"{name} has a primitive field after a reference", offset=start)
        desc.annotation = self._annotation()
        return desc

    def _field(self) -> Field:
        start = self.pos
        code = chr(self.data[start])
        self.pos += 1
        name = self._utf()
        if code in _WIDTHS:
            return Field(code, name)
        if code in "[L":
            return Field(code, name, self._string_or_handle())
        raise ProjectFormatError(f"Field {name!r} has the unknown type code {code!r}", offset=start)

    def _new_proxy_desc(self) -> ProxyDesc:
        start = self.pos
        self.pos += 1
        desc = ProxyDesc(())
        desc.is_complete = False
        self._register(desc, start)
        count = _I4.unpack_from(self.data, self.pos)[0]
        self.pos += 4
        if not 0 <= count <= 0xFFFF:
            raise ProjectFormatError(f"A proxy of {count} interfaces", offset=start)
        desc.interfaces = tuple([self._utf() for _ in range(count)])
        desc.annotation = self._annotation()
        return desc

    def _annotation(self) -> tuple[Content, ...]:
        if self.data[self.pos] == TC_ENDBLOCKDATA:
            self.pos += 1
            return ()
        self.annotation_depth += 1
        if self.annotation_depth > _MAX_ANNOTATION_DEPTH:
            raise ProjectFormatError("Class annotations are nested too deep", offset=self.pos)
        content = tuple(self._values(-1))
        self.annotation_depth -= 1
        return content

    def _utf(self) -> str:
        start = self.pos
        size = _U2.unpack_from(self.data, start)[0]
        self.pos += 2
        raw = self._take(size)
        try:
            text = _text_of(raw)
        except ProjectFormatError as error:
            raise ProjectFormatError(error.message, offset=start) from None
        if modified_utf8(text) != raw:
            raise ProjectFormatError(f"The name {text!r} is not encoded as Java encodes it", offset=start)
        return text


def decode(data: bytes, *, path: Path | None = None) -> Stream:
    """Decode an object stream.

    Parameters
    ----------
    data : bytes
        The whole stream.
    path : Path, optional
        Named in errors.

    Returns
    -------
    Stream
        `encode` gives the identical bytes back.

    Raises
    ------
    ProjectFormatError
        If it is not a stream, ends early, or holds what protocol 2 does not allow; with the byte offset.
    """
    decoder = _Decoder(bytes(data))
    try:
        with no_collection():
            return decoder.run()
    except (IndexError, struct.error):
        raise ProjectFormatError("The object stream ends early", path=path, offset=len(data)) from None
    except ProjectFormatError as error:
        offset = decoder.pos if error.offset is None else error.offset
        raise ProjectFormatError(error.message, path=path, offset=offset) from None
    finally:
        # Bound methods make a cycle, which would keep the whole tree until the collector comes round.
        decoder.readers.clear()


class _End:
    """Stands behind what an externalizable object wrote."""


_END: tuple[Any, ...] = (_End(),)


class _Encoder:
    """Writes values; nesting stands on a list of iterators, not on Python's stack."""

    def __init__(self) -> None:
        self.out = bytearray(MAGIC)
        self.handles: dict[int, int] = {}
        self.leading: dict[AnyDesc, int | None] = {}
        self.writers: dict[type, Callable[[Any], Iterator[Content] | None]] = {
            bytes: self._block,
            LongBlock: self._long_block,
            JavaString: self._string,
            JavaObject: self._object,
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
                self.out.append(TC_RESET)
                self.handles.clear()
            elif isinstance(value, Aborted):
                self.out.append(TC_EXCEPTION)
                self.handles.clear()
                self._values((value.exception,))
                self.handles.clear()
            else:
                self._values((value,))
        return bytes(self.out)

    def _values(self, values: Iterable[Content]) -> None:
        out, handles, writers = self.out, self.handles, self.writers
        stack = [iter(values)]
        while stack:
            for value in stack[-1]:
                if value is None:
                    out.append(TC_NULL)
                    continue
                handle = handles.get(id(value))
                if handle is not None:
                    out += _REFERENCE.pack(TC_REFERENCE, handle)
                    continue
                nested = writers[value.__class__](value)
                if nested is not None:
                    stack.append(nested)
                    break
            else:
                stack.pop()

    def _register(self, node: object) -> None:
        self.handles[id(node)] = _FIRST_HANDLE + len(self.handles)

    def _block(self, block: bytes) -> None:
        if len(block) > 255:
            self._long_block(block)
        else:
            self.out.append(TC_BLOCKDATA)
            self.out.append(len(block))
            self.out += block

    def _long_block(self, block: bytes) -> None:
        self.out.append(TC_BLOCKDATALONG)
        self.out += _I4.pack(len(block))
        self.out += block

    def _string(self, string: JavaString) -> None:
        self._register(string)
        if string.is_long:
            self.out.append(TC_LONGSTRING)
            self.out += _I8.pack(len(string.raw))
        else:
            self.out.append(TC_STRING)
            self.out += _U2.pack(len(string.raw))
        self.out += string.raw

    def _string_or_handle(self, string: JavaString) -> None:
        handle = self.handles.get(id(string))
        if handle is None:
            self._string(string)
        else:
            self.out += _REFERENCE.pack(TC_REFERENCE, handle)

    def _end(self, _: _End) -> None:
        self.out.append(TC_ENDBLOCKDATA)

    def _object(self, node: JavaObject) -> Iterator[Content]:
        self.out.append(TC_OBJECT)
        desc, data = node.desc, node.data
        self._desc(desc)
        self._register(node)
        if desc.flags & SC_EXTERNALIZABLE:
            return chain(data, _END)
        if desc not in self.leading:
            self.leading[desc] = _leading_numbers(desc)
        leading = self.leading[desc]
        if leading is None:
            return self._object_data(node)
        if leading:
            self.out += data[0]
        return iter(data[leading:])

    def _object_data(self, node: JavaObject) -> Iterator[Content]:
        out = self.out
        values = iter(node.data)
        for step in node.desc.steps:
            if step > 0:
                out += next(values)
            elif step == 0:
                yield from next(values)
                out.append(TC_ENDBLOCKDATA)
            else:
                for _ in range(-step):
                    yield next(values)

    def _array(self, node: JavaArray) -> Iterator[Content] | None:
        self.out.append(TC_ARRAY)
        self._desc(node.desc)
        self.handles[id(node)] = _FIRST_HANDLE + len(self.handles)
        if isinstance(node.data, bytes):
            self.out += _I4.pack(len(node.data) // _WIDTHS[node.desc.name[1]])
            self.out += node.data
            return None
        self.out += _I4.pack(len(node.data))
        return iter(node.data)

    def _enum(self, node: JavaEnum) -> None:
        self.out.append(TC_ENUM)
        self._desc(node.desc)
        self._register(node)
        self._string_or_handle(node.constant)

    def _class(self, node: JavaClass) -> None:
        self.out.append(TC_CLASS)
        self._desc(node.desc)
        self._register(node)

    def _desc_value(self, desc: AnyDesc) -> None:
        self._desc(desc)

    def _desc(self, desc: AnyDesc | None) -> None:
        handle = self.handles.get(id(desc))
        if handle is not None:
            self.out += _REFERENCE.pack(TC_REFERENCE, handle)
        else:
            self._new_desc(desc)

    def _new_desc(self, desc: AnyDesc | None) -> None:
        while desc is not None:
            handle = self.handles.get(id(desc))
            if handle is not None:
                self.out += _REFERENCE.pack(TC_REFERENCE, handle)
                return
            if isinstance(desc, ClassDesc):
                self._class_desc(desc)
            else:
                self._proxy_desc(desc)
            self._values(desc.annotation)
            self.out.append(TC_ENDBLOCKDATA)
            desc = desc.parent
        self.out.append(TC_NULL)

    def _class_desc(self, desc: ClassDesc) -> None:
        self.out.append(TC_CLASSDESC)
        self._utf(desc.name)
        self._register(desc)
        self.out += _DESC_HEAD.pack(desc.uid, desc.flags, len(desc.fields))
        for field in desc.fields:
            self.out.append(ord(field.code))
            self._utf(field.name)
            if field.type is not None:
                self._string_or_handle(field.type)

    def _proxy_desc(self, desc: ProxyDesc) -> None:
        self.out.append(TC_PROXYCLASSDESC)
        self._register(desc)
        self.out += _I4.pack(len(desc.interfaces))
        for name in desc.interfaces:
            self._utf(name)

    def _utf(self, text: str) -> None:
        raw = modified_utf8(text)
        self.out += _U2.pack(len(raw))
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
    with no_collection():
        data = encoder.run(stream.contents)
    encoder.writers.clear()
    return data
