"""Describe Java classes: their fields, their superclasses, and how the data of their objects is laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from darefine_qupath.errors import JavaStreamError
from darefine_qupath.javaserial.protocol import MAX_SUPERCLASSES, WIDTHS, Flag
from darefine_qupath.javaserial.strings import JavaString

__all__ = ["AnyDesc", "ClassDesc", "Field", "ProxyDesc", "class_chain"]


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
        As in `Flag`.
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
        annotation: Sequence[Any] = (),
    ) -> None:
        self.name = name
        self.uid = uid
        self.flags = flags
        self.fields = tuple(fields)
        self.parent = parent
        self.annotation: tuple[Any, ...] = tuple(annotation)
        self.is_complete = True
        self._steps: tuple[int, ...] | None = None
        self._index: dict[str, tuple[int, int, str]] | None = None

    @property
    def is_externalizable(self) -> bool:
        """Whether objects write themselves as they please, fields or not."""
        return bool(self.flags & Flag.EXTERNALIZABLE)

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
        self, interfaces: Sequence[str], parent: AnyDesc | None = None, annotation: Sequence[Any] = ()
    ) -> None:
        self.interfaces = tuple(interfaces)
        self.parent = parent
        self.annotation: tuple[Any, ...] = tuple(annotation)
        self.is_complete = True

    name = "a dynamic proxy"
    flags = Flag.SERIALIZABLE
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


def class_chain(desc: AnyDesc) -> list[AnyDesc]:
    """List a class descriptor and those of its superclasses, the topmost first."""
    chain: list[AnyDesc] = []
    current: AnyDesc | None = desc
    while current is not None:
        chain.append(current)
        if len(chain) > MAX_SUPERCLASSES:
            raise JavaStreamError(f"{desc.name} has more than {MAX_SUPERCLASSES} superclasses")
        current = current.parent
    return chain[::-1]


def _layout(desc: AnyDesc) -> Iterator[int]:
    if desc.is_externalizable:
        return
    for part in class_chain(desc):
        if not part.flags & Flag.SERIALIZABLE:
            continue
        size = sum(WIDTHS.get(field.code, 0) for field in part.fields)
        if size:
            yield size
        references = sum(field.code not in WIDTHS for field in part.fields)
        if references:
            yield -references
        if part.flags & Flag.WRITE_METHOD:
            yield 0


def _field_index(desc: AnyDesc) -> dict[str, tuple[int, int, str]]:
    index: dict[str, tuple[int, int, str]] = {}
    position = 0
    for part in class_chain(desc):
        if not part.flags & Flag.SERIALIZABLE:
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
        if part.flags & Flag.WRITE_METHOD:
            index[f"@{part.name}"] = (position, 0, "@")
            position += 1
    return index
