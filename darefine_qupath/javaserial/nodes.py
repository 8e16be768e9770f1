"""The nodes of a decoded object stream: what an object, an array, a string or a class descriptor of Java is here.

Values of the tree are None, `bytes` (one segment of block data), and the node classes below. A node is equal to itself
alone; what the stream refers to by a handle is the same Python object again.
"""

from __future__ import annotations

import gc
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from darefine_qupath.errors import ProjectFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = [
    "ARRAY_CODES",
    "DESC_HEAD",
    "F8",
    "FIRST_HANDLE",
    "I4",
    "I8",
    "MAGIC",
    "MAX_SUPERCLASSES",
    "REFERENCE",
    "SC_BLOCK_DATA",
    "SC_ENUM",
    "SC_EXTERNALIZABLE",
    "SC_SERIALIZABLE",
    "SC_WRITE_METHOD",
    "TC_ARRAY",
    "TC_BLOCKDATA",
    "TC_BLOCKDATALONG",
    "TC_CLASS",
    "TC_CLASSDESC",
    "TC_ENDBLOCKDATA",
    "TC_ENUM",
    "TC_EXCEPTION",
    "TC_LONGSTRING",
    "TC_NULL",
    "TC_OBJECT",
    "TC_PROXYCLASSDESC",
    "TC_REFERENCE",
    "TC_RESET",
    "TC_STRING",
    "U2",
    "U4",
    "WIDTHS",
    "Aborted",
    "AnyDesc",
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
    "TopLevel",
    "lineage",
    "modified_utf8",
    "paused_garbage_collection",
    "text_of",
]

MAGIC = b"\xac\xed\x00\x05"

U2, I4, U4, I8, F8 = (struct.Struct(f">{fmt}") for fmt in "HiIqd")
DESC_HEAD = struct.Struct(">qBH")
"""What follows a class descriptor's name: serial version UID, flags, number of fields."""
REFERENCE = struct.Struct(">BI")
"""TC_REFERENCE and a handle."""

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

FIRST_HANDLE = 0x7E0000
WIDTHS = {"B": 1, "C": 2, "D": 8, "F": 4, "I": 4, "J": 8, "S": 2, "Z": 1}
ARRAY_CODES = {*WIDTHS, "[", "L"}
_STRUCTS = {code: struct.Struct(f">{fmt}") for code, fmt in zip("BCDFIJSZ", "bHdfiqh?", strict=True)}
_DTYPES = {"B": "i1", "C": ">u2", "D": ">f8", "F": ">f4", "I": ">i4", "J": ">i8", "S": ">i2", "Z": "?"}

# No Java class has so many superclasses; the limit keeps the cost of a hostile chain linear.
MAX_SUPERCLASSES = 256


def modified_utf8(text: str) -> bytes:
    """Encode text as Java does: NUL as two bytes, a character beyond the BMP as two surrogates of three bytes."""
    if text.isascii() and "\0" not in text:
        return text.encode("ascii")
    units = memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")
    # The native order of the cast is little-endian on every platform NumPy and GEOS wheels are built for.
    return "".join(map(chr, units)).encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")


def text_of(raw: bytes) -> str:
    """Text of modified UTF-8; raises `ProjectFormatError` where the bytes are none."""
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
        return text_of(self.raw)

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
        for part in lineage(desc):
            if not part.flags & SC_SERIALIZABLE:
                continue
            numbers = [field for field in part.fields if field.code in WIDTHS]
            if numbers:
                data.append(b"".join([_STRUCTS[item.code].pack(values.get(item.name, 0)) for item in numbers]))
            data.extend(values.get(field.name) for field in part.fields if field.code not in WIDTHS)
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


def lineage(desc: AnyDesc) -> list[AnyDesc]:
    """List a class descriptor and those of its superclasses, the topmost first."""
    chain: list[AnyDesc] = []
    current: AnyDesc | None = desc
    while current is not None:
        chain.append(current)
        if len(chain) > MAX_SUPERCLASSES:
            raise ProjectFormatError(f"{desc.name} has more than {MAX_SUPERCLASSES} superclasses")
        current = current.parent
    return chain[::-1]


def _layout(desc: AnyDesc) -> Iterator[int]:
    if desc.is_externalizable:
        return
    for part in lineage(desc):
        if not part.flags & SC_SERIALIZABLE:
            continue
        size = sum(WIDTHS.get(field.code, 0) for field in part.fields)
        if size:
            yield size
        references = sum(field.code not in WIDTHS for field in part.fields)
        if references:
            yield -references
        if part.flags & SC_WRITE_METHOD:
            yield 0


def _field_index(desc: AnyDesc) -> dict[str, tuple[int, int, str]]:
    index: dict[str, tuple[int, int, str]] = {}
    position = 0
    for part in lineage(desc):
        if not part.flags & SC_SERIALIZABLE:
            continue
        offset = 0
        for field in part.fields:
            if field.code in WIDTHS:
                index[field.name] = (position, offset, field.code)
                offset += WIDTHS[field.code]
        position += bool(offset)
        for field in part.fields:
            if field.code not in WIDTHS:
                index[field.name] = (position, 0, field.code)
                position += 1
        if part.flags & SC_WRITE_METHOD:
            index[f"@{part.name}"] = (position, 0, "@")
            position += 1
    return index


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
