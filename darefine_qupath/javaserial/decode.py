"""Java's object serialization stream, decoded to a tree; see `javastream`."""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from darefine_qupath.errors import ProjectFormatError
from darefine_qupath.javaserial.nodes import (
    ARRAY_CODES,
    DESC_HEAD,
    FIRST_HANDLE,
    I4,
    I8,
    MAGIC,
    MAX_SUPERCLASSES,
    SC_BLOCK_DATA,
    SC_ENUM,
    SC_EXTERNALIZABLE,
    SC_SERIALIZABLE,
    TC_ARRAY,
    TC_BLOCKDATA,
    TC_BLOCKDATALONG,
    TC_CLASS,
    TC_CLASSDESC,
    TC_ENDBLOCKDATA,
    TC_ENUM,
    TC_EXCEPTION,
    TC_LONGSTRING,
    TC_NULL,
    TC_OBJECT,
    TC_PROXYCLASSDESC,
    TC_REFERENCE,
    TC_RESET,
    TC_STRING,
    U2,
    U4,
    WIDTHS,
    Aborted,
    AnyDesc,
    ClassDesc,
    Content,
    Field,
    JavaArray,
    JavaClass,
    JavaEnum,
    JavaObject,
    JavaString,
    LongBlock,
    ProxyDesc,
    Reset,
    Stream,
    TopLevel,
    lineage,
    modified_utf8,
    paused_garbage_collection,
    text_of,
)
from darefine_qupath.javaserial.packed import MAX_NODES, MIN_NODES, PackedObject, Template, template_of

__all__ = ["decode", "first_of"]

# Objects inside the annotation of a class descriptor inside such an object and so on; Java itself writes none.
_MAX_ANNOTATION_DEPTH = 16
# Forms of one class that are tried on each of its objects; and objects that are looked at for a new form.
_MAX_TEMPLATES, _MAX_ATTEMPTS = 12, 48


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


class _Decoder:
    """Reads values from bytes; nesting stands on a list, not on Python's stack."""

    def __init__(self, data: bytes, *, is_compact: bool = False) -> None:
        self.data = data
        self.pos = 0
        self.stream = Stream(())
        self.stream.offsets = array("I" if len(data) < 1 << 32 else "Q")
        self.nodes = self.stream.nodes
        self.offsets: array[int] | deque[int] = deque(maxlen=0) if is_compact else self.stream.offsets
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
        self.is_compact = is_compact
        self.is_enough: Callable[[TopLevel], bool] = lambda _: False
        self.templates: dict[AnyDesc, list[Template]] = {}
        self.attempts: dict[AnyDesc, int] = {}

    def run(self) -> Stream:
        if self.data[:4] != MAGIC:
            raise ProjectFormatError(f"Not a Java object stream: it begins with {self.data[:4].hex(' ')!r}", offset=0)
        self.pos = 4
        while self.pos < len(self.data):
            self.stream.contents.append(self._top_level())
            if self.is_enough(self.stream.contents[-1]):
                break
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
                if tag == TC_REFERENCE:
                    number = uint(data, self.pos + 1)[0] - offset
                    if not lowest <= number < len(nodes):
                        self._referred()
                    out.append(shared(number) if nodes[number].__class__ is PackedObject else nodes[number])
                    self.pos += 5
                elif tag == TC_NULL:
                    out.append(None)
                    self.pos += 1
                elif tag == TC_ENDBLOCKDATA and left < 0:
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

    def _referred(self) -> Content:
        """Node that the handle at this place refers to."""
        number: int = U4.unpack_from(self.data, self.pos + 1)[0] - FIRST_HANDLE + self.first
        if not self.first <= number < len(self.nodes):
            raise ProjectFormatError(f"Handle {number - self.first} refers to nothing read so far", offset=self.pos)
        self.pos += 5
        return self._shared(number)

    def _shared(self, number: int) -> Content:
        """Node that something else refers to: what it is in must not be decoded anew each time."""
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
        size = I4.unpack_from(self.data, self.pos + 1)[0]
        if size < 0:
            raise ProjectFormatError(f"Block data of negative size {size}", offset=self.pos)
        self.pos += 5
        chunk = self._take(size)
        return chunk if size > 255 else LongBlock(chunk)

    def _string(self, _: int = 0) -> JavaString:
        start = self.pos
        size = U2.unpack_from(self.data, start + 1)[0]
        self.pos = start + 3
        return self._finish_string(start, size, is_long=False)

    def _long_string(self, _: int = 0) -> JavaString:
        start = self.pos
        size = I8.unpack_from(self.data, start + 1)[0]
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

    def _may_learn(self, desc: AnyDesc) -> bool:
        return (
            self.attempts.get(desc, 0) < _MAX_ATTEMPTS
            and len(self.templates.get(desc, ())) < _MAX_TEMPLATES
            and self.annotation_depth == 0
        )

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
        if desc.name[0:1] != "[" or code not in ARRAY_CODES:
            raise ProjectFormatError(f"An array of class {desc.name!r}", offset=start)
        node = _new_array(JavaArray)
        node.desc = desc
        node.data = ()
        self.nodes.append(node)
        self.offsets.append(start)
        size = I4.unpack_from(self.data, self.pos)[0]
        if size < 0:
            raise ProjectFormatError(f"An array of {size} elements", offset=start)
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
            number = U4.unpack_from(self.data, self.pos + 1)[0] - FIRST_HANDLE + self.first
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
            if len(chain) > MAX_SUPERCLASSES:
                raise ProjectFormatError(f"More than {MAX_SUPERCLASSES} superclasses", offset=start)
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
        if chain and len(chain) + len(lineage(desc)) > MAX_SUPERCLASSES:
            raise ProjectFormatError(f"More than {MAX_SUPERCLASSES} superclasses", offset=start)
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
        if flags & SC_SERIALIZABLE and flags & SC_EXTERNALIZABLE:
            raise ProjectFormatError(f"{name} is both serializable and externalizable", offset=start)
        desc.fields = tuple([self._field() for _ in range(num_fields)])
        order = [field.code not in WIDTHS for field in desc.fields]
        if order != sorted(order):
            raise ProjectFormatError(f"{name} has a primitive field after a reference", offset=start)
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
        raise ProjectFormatError(f"Field {name!r} has the unknown type code {code!r}", offset=start)

    def _new_proxy_desc(self) -> ProxyDesc:
        start = self.pos
        self.pos += 1
        desc = ProxyDesc(())
        desc.is_complete = False
        self._register(desc, start)
        count = I4.unpack_from(self.data, self.pos)[0]
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
        size = U2.unpack_from(self.data, start)[0]
        self.pos += 2
        raw = self._take(size)
        try:
            text = text_of(raw)
        except ProjectFormatError as error:
            raise ProjectFormatError(error.message, offset=start) from None
        if modified_utf8(text) != raw:
            raise ProjectFormatError(f"The name {text!r} is not encoded as Java encodes it", offset=start)
        return text


_Reading = Callable[[_Decoder, int], Any]
_TAG_READERS: dict[int, _Reading] = {
    TC_CLASSDESC: _Decoder._desc_value,
    TC_PROXYCLASSDESC: _Decoder._desc_value,
    TC_OBJECT: _Decoder._object,
    TC_STRING: _Decoder._string,
    TC_LONGSTRING: _Decoder._long_string,
    TC_ARRAY: _Decoder._array,
    TC_CLASS: _Decoder._class,
    TC_ENUM: _Decoder._enum,
    TC_BLOCKDATA: _Decoder._block,
    TC_BLOCKDATALONG: _Decoder._long_block,
    TC_RESET: _Decoder._nested_mark,
    TC_EXCEPTION: _Decoder._nested_mark,
}
_READERS: list[_Reading] = [_TAG_READERS.get(tag, _Decoder._unknown) for tag in range(256)]


def decode(data: bytes, *, path: Path | None = None, is_compact: bool = False) -> Stream:
    """Decode an object stream.

    Parameters
    ----------
    data : bytes
        The whole stream.
    path : Path, optional
        Named in errors.
    is_compact : bool, optional
        Leave objects that are like others as bytes until they are looked at; such nodes live as long as the stream.

    Returns
    -------
    Stream
        `encode` gives the identical bytes back.

    Raises
    ------
    ProjectFormatError
        If it is not a stream, ends early, or holds what protocol 2 does not allow; with the byte offset.
    """
    decoder = _Decoder(bytes(data), is_compact=is_compact)
    try:
        with paused_garbage_collection():
            return decoder.run()
    except (IndexError, struct.error):
        raise ProjectFormatError("The object stream ends early", path=path, offset=len(data)) from None
    except ProjectFormatError as error:
        offset = decoder.pos if error.offset is None else error.offset
        raise ProjectFormatError(error.message, path=path, offset=offset) from None


def first_of(data: bytes, is_wanted: Callable[[TopLevel], bool]) -> TopLevel:
    """Decode the beginning of a stream, up to a value that is wanted.

    Parameters
    ----------
    data : bytes
        As much of the stream as there is.
    is_wanted : callable
        Told every value at the top.

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
    except (IndexError, struct.error, ProjectFormatError):
        return None
    return found[0] if found and is_wanted(found[0]) else None
