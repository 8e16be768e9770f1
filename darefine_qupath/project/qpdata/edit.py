"""Edits of a ``data.qpdata`` file: what an edit is not about stays as it was, and what was made is compared with it.

A file is opened as a `Document`, in which most objects are bytes that nobody looked at. An edit changes the nodes that
it is about; the rest is written as it stands, with the handles that it has then. The new file is opened in turn, and
`verify` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Kind, Plane, RoiKind
from darefine_qupath.classes import Color
from darefine_qupath.errors import AnnotationError, ProjectFormatError, ProjectUnsupportedError, ProjectWriteError
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.decode import decode
from darefine_qupath.javaserial.descriptors import ClassDesc, ProxyDesc
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import (
    Aborted,
    Content,
    JavaArray,
    JavaClass,
    JavaEnum,
    JavaObject,
    paused_garbage_collection,
)
from darefine_qupath.javaserial.packed import PackedObject, Template, distinct_nodes
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError
from darefine_qupath.project import qpproj, staging
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.build import NodeBuilder, class_name, probability_block
from darefine_qupath.project.qpdata.create import (
    KIND_CLASSES,
    needs_wide_list,
    same_geometry,
    same_numbers,
    same_roi,
    stored_records,
)
from darefine_qupath.project.qpdata.items import complete_items, root_of
from darefine_qupath.project.qpdata.objects import KINDS, PATH_CLASS, Found, ObjectParts, Reader, class_of, walk
from darefine_qupath.project.qpdata.properties import beside, set_properties
from darefine_qupath.project.qpdata.read import ImageData, duplicates_of, open_compact, read, reading, roi_batch
from darefine_qupath.project.qpdata.rois import RoiError, specs_of

__all__ = ["Document", "Edited", "edit", "verify"]

# Objects that are read back at once.
_PORTION = 256


class Edited(NamedTuple):
    """A new file, and the objects that were added or replaced as they must be read back from it."""

    content: bytes
    touched: list[Annotation]


class Document:
    """A ``data.qpdata`` file opened to be edited or compared.

    Parameters
    ----------
    data : bytes
        The whole file.
    path : Path, optional
        Named in errors.

    Attributes
    ----------
    found : list of Found
        Objects of the hierarchy, parents before children; the root comes first.

    Raises
    ------
    ProjectFormatError
        If the file is damaged; names file and offset.
    """

    def __init__(self, data: bytes, *, path: Path | None = None) -> None:
        self.data = data
        self.path = path
        try:
            with reading(path), paused_garbage_collection():
                self.stream = open_compact(data)
                self._items = complete_items(self.stream, data, path)
                self.found: list[Found] = list(walk(root_of(self._items), self._items.server_text))
        except NodeError as error:
            raise self._named(error) from None

    @cached_property
    def index(self) -> dict[UUID, int]:
        """Number of an object, by identity."""
        return {item.id: number for number, item in enumerate(self.found)}

    def _named(self, error: NodeError) -> ProjectFormatError:
        """Error with the place of its node, which only the whole tree tells."""
        try:
            read(self.data, path=self.path)
        except ProjectFormatError as found:
            return found
        numbers = [number for number, node in distinct_nodes(self.stream) if node is error.node]
        offset = decode(self.data).offsets[numbers[0]] if numbers else 4
        return ProjectFormatError(error.message, path=self.path, offset=offset)

    @property
    def qupath_version(self) -> str | None:
        """Version of QuPath that wrote the file."""
        return self._items.qupath_version

    @property
    def image_type(self) -> str:
        """QuPath's ImageType."""
        return self._items.image_type

    @property
    def server(self) -> Mapping[str, Any] | None:
        """The image server's builder."""
        return self._items.server

    @property
    def properties(self) -> Mapping[str, Any]:
        """Image properties."""
        return self._items.properties

    @property
    def num_objects(self) -> int:
        """Objects, the root not counted."""
        return len(self.found) - 1

    @property
    def has_ids(self) -> bool:
        """Whether every object's identity is in the file."""
        return all(item.has_id for item in self.found)

    @cached_property
    def duplicates(self) -> frozenset[UUID]:
        """Identities that more than one object has."""
        if len(self.index) == len(self.found):
            return frozenset()
        return duplicates_of([item.id for item in self.found])

    @cached_property
    def colors(self) -> dict[str, Color]:
        """Colours of the path classes in the file, by full name."""
        nodes = (node for _, node in distinct_nodes(self.stream))
        classes = [node for node in nodes if isinstance(node, JavaObject) and node.desc.name == PATH_CLASS]
        try:
            with reading(self.path):
                found = dict(reversed([class_of(node) for node in classes]))
        except NodeError as error:
            raise self._named(error) from None
        return {name: color for name, color in found.items() if color is not None}

    @property
    def tally(self) -> list[tuple[Kind, str | None]]:
        """Kind and class of every object but the root."""
        known: dict[Template, tuple[Kind, str | None]] = {}
        tally = []
        for item in self.found[1:]:
            node = item.node
            if isinstance(node, PackedObject) and node.is_packed:
                if node.template not in known:
                    known[node.template] = self._kind_and_class(node)
                tally.append(known[node.template])
            else:
                tally.append(self._kind_and_class(node))
        return tally

    def _kind_and_class(self, node: JavaObject) -> tuple[Kind, str | None]:
        kind = KINDS.get(node.desc.name)
        parts = ObjectParts(node)
        place = parts.tail + parts.has_lock
        if kind is None or place >= len(parts.content):
            raise self._named(NodeError(f"{node.desc.name} is not a kind of object that can be read", node))
        path_class = parts.content[place]
        return kind, None if path_class is None else class_of(path_class)[0] or None

    def kind(self, number: int) -> Kind | None:
        """Kind of an object; None of one that cannot be read."""
        return KINDS.get(self.found[number].node.desc.name)

    def parent(self, number: int) -> UUID | None:
        """Identity of the object above; None = the root."""
        above = self.found[number].parent
        return self.found[above].id if above > 0 else None

    def cores(self) -> dict[UUID, JavaObject]:
        """Cores of the TMA grid."""
        hierarchy = self._items.hierarchy
        grid = None if hierarchy is None else values.field(hierarchy, "tmaGrid")
        if grid is None:
            return {}
        cores = {id(core) for core in values.list_items(values.field(grid, "cores"))}
        return {item.id: item.node for item in self.found if id(item.node) in cores}

    def records(self, numbers: Sequence[int]) -> list[Annotation]:
        """Make records of some of the objects."""
        rois = roi_batch(self._items, self.data)
        reader = Reader(len(self.data), rois)
        try:
            with reading(self.path):
                rows = [reader.row(self.found[number], self.parent(number)) for number in numbers]
                shapes = rois.build()
        except NodeError as error:
            raise self._named(error) from None
        except RoiError as error:
            raise self._named(NodeError(error.message, None)) from None
        return [row.record(shapes) for row in rows]

    def edit(self, changes: Changes, colors: Mapping[str, Color]) -> Edited:
        """Apply changes; only once, since they change the nodes.

        Raises
        ------
        AnnotationError
            If an object to replace or remove is not there, one to add is, or a record cannot be stored.
        ProjectUnsupportedError
            If the file's objects have no identities, or those that are named are not the only ones of that identity.
        """
        _check_changes(self, changes)
        with paused_garbage_collection():
            former = self.records([self.index[record.id] for record in changes.replace])
            try:
                with reading(self.path):
                    editor = _Editor(self, colors)
                    editor.apply(changes, former)
                    if changes.properties:
                        set_properties(self.stream, changes.properties, editor.builder)
            except NodeError as error:
                raise self._named(error) from None
            replaced = [replace(record, parent=old.parent) for record, old in zip(changes.replace, former, strict=True)]
            pairs = [*zip(replaced, former, strict=True), *((record, None) for record in changes.add)]
            return Edited(encode(self.stream), editor.placed(stored_records(pairs), changes))


class _Editor:
    """One edit of one file's hierarchy."""

    def __init__(self, document: Document, colors: Mapping[str, Color]) -> None:
        self.items = document.found
        self.index = document.index
        is_modern = qpproj.is_since(document.qupath_version or "", 0, 6)
        self.builder = NodeBuilder(document.stream, is_modern=is_modern, colors=colors)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Numbers of objects by the ids of their nodes."""
        return {id(item.node): number for number, item in enumerate(self.items)}

    def apply(self, changes: Changes, former: Sequence[Annotation]) -> None:
        for record, before in zip(changes.replace, former, strict=True):
            self._replace(self._parts(self.index[record.id]), record, before)
        removed = {self.index[identity] for identity in changes.remove}
        owners = _owners(self.items, removed)
        added = self._new_nodes(changes.add, removed, owners)
        for number in sorted({owners[number] for number in removed} | added.keys()):
            self._set_children(self._parts(number), [*self._kept_children(number, removed), *added.get(number, ())])
        for number in removed:
            # Something else may refer to it (connections between objects), and would bring its children back.
            if not _is_packed(self.items[number].node):
                self._set_children(self._parts(number), ())

    def _parts(self, number: int) -> ObjectParts:
        # Replacing changes what an object wrote, so the parts are found again.
        return ObjectParts(self.items[number].node)

    def placed(self, records: Sequence[Annotation], changes: Changes) -> list[Annotation]:
        """Place records below the nearest object above them that stays."""
        gone = {self.index[identity] for identity in changes.remove}
        owners = _owners(self.items, gone)

        def above(parent: UUID | None) -> UUID | None:
            number = self.index.get(parent, -1) if parent is not None else 0
            if number < 0:
                return parent
            number = owners[number] if number in gone else number
            return self.items[number].id if number > 0 else None

        return [replace(record, parent=above(record.parent)) for record in records]

    def _kept_children(self, number: int, removed: set[int]) -> list[Content]:
        """Children that stay; those of a removed child take its place."""
        if not removed:
            return list(self._parts(number).children)
        kept: list[Content] = []
        pending = list(reversed(self._parts(number).children))
        while pending:
            child = pending.pop()
            child_number = self.numbers[id(child)]
            if child_number not in removed:
                kept.append(child)
            elif not _is_packed(child):  # a packed one has no children
                pending.extend(reversed(self._parts(child_number).children))
        return kept

    @staticmethod
    def _set_children(parts: ObjectParts, children: Sequence[Content]) -> None:
        content = parts.node.content
        block = content[parts.first_child - 1]
        count = block[:-4] + len(children).to_bytes(4, "big")  # type: ignore[index]
        parts.node.content = (*content[: parts.first_child - 1], count, *children, *content[parts.tail :])

    def _new_nodes(
        self, records: Sequence[Annotation], removed: set[int], owners: Sequence[int]
    ) -> dict[int, list[Content]]:
        """Nodes of new objects, by the object of the file they stand below."""
        below: dict[UUID, list[Annotation]] = {}
        tops: list[tuple[int, Annotation]] = []
        new = {record.id for record in records}
        for record in records:
            if record.parent in new:
                below.setdefault(record.parent, []).append(record)
            else:
                number = 0 if record.parent is None else self.index[record.parent]
                tops.append((owners[number] if number in removed else number, record))
        nodes = {record.id: JavaObject(self.builder.desc(KIND_CLASSES[record.kind])) for record in records}
        reached = [record for _, record in tops]
        for record in reached:
            reached.extend(below.get(record.id, ()))
        if len(reached) < len(records):
            raise AnnotationError("New objects cannot be each other's parents")
        for record, roi, nucleus in zip(reached, *self._new_rois(reached), strict=True):
            children = [nodes[child.id] for child in below.get(record.id, ())]
            is_wide = needs_wide_list(record, None)
            nodes[record.id].content = self.builder.path_object(record, roi, nucleus, children, is_wide=is_wide)
        added: dict[int, list[Content]] = {}
        for number, record in tops:
            added.setdefault(number, []).append(nodes[record.id])
        return added

    def _new_rois(self, records: Sequence[Annotation]) -> tuple[list[JavaObject | None], list[JavaObject | None]]:
        """ROIs and nuclei of new objects."""
        planes = [record.plane for record in records]
        nuclei = [record.nucleus if record.kind == "cell" else None for record in records]
        return (
            self._rois([(record.geometry, record.roi) for record in records], planes),
            self._rois([(nucleus, None) for nucleus in nuclei], planes),
        )

    def _rois(
        self, shapes: Sequence[tuple[BaseGeometry | None, RoiKind | None]], planes: Sequence[Plane]
    ) -> list[JavaObject | None]:
        specs = iter(specs_of([(geometry, wanted) for geometry, wanted in shapes if geometry is not None]))
        return [
            None if geometry is None else self.builder.roi(next(specs), plane)
            for (geometry, _), plane in zip(shapes, planes, strict=True)
        ]

    def _roi(self, geometry: BaseGeometry | None, wanted: RoiKind | None, plane: Plane) -> JavaObject | None:
        return self._rois([(geometry, wanted)], [plane])[0]

    def _replace(self, parts: ObjectParts, record: Annotation, former: Annotation) -> None:
        _check_layout(parts, record, former)
        content = list(parts.node.content)
        if record.name != former.name:
            content[0] = None if record.name is None else JavaString(record.name)
        if record.color != former.color:
            content[1] = self.builder.color(record.color)
        if dict(record.metadata) != dict(former.metadata):
            content[2] = self.builder.metadata(record.metadata, record.id)
        if not same_numbers(record.measurements, former.measurements):
            content[3] = self.builder.measurements(record.measurements, is_wide=needs_wide_list(record, former))
        self._replace_tail(content, parts.tail, record, former)
        parts.node.content = content

    def _replace_tail(self, content: list[Content], tail: int, record: Annotation, former: Annotation) -> None:
        if record.locked != former.locked:
            content[tail] = self.builder.boolean(record.locked)
        if class_name(record.path_class) != former.path_class:
            content[tail + 1] = self.builder.path_class(record.path_class)
        if not same_roi(record, former):
            content[tail + 2] = self._roi(record.geometry, record.roi, record.plane)
        if record.kind == "cell" and not (same_geometry(record.nucleus, former.nucleus) and same_roi(record, former)):
            content[tail + 4] = self._roi(record.nucleus, None, record.plane)
        block: bytes = content[tail + 3]  # type: ignore[assignment]
        if not same_numbers({"": record.class_probability}, {"": former.class_probability}):
            block = probability_block(record.class_probability) + block[8:]
        if record.kind == "tma core" and record.is_missing != former.is_missing:
            block = block[:8] + (b"\1" if record.is_missing else b"\0") + block[9:]
        content[tail + 3] = block


def _check_layout(parts: ObjectParts, record: Annotation, former: Annotation) -> None:
    moves = dict(record.metadata) == dict(former.metadata) and same_numbers(record.measurements, former.measurements)
    if not parts.has_lock or (parts.layout != 3 and not moves):
        raise ProjectUnsupportedError(
            f"Object {record.id} is laid out as no known version of QuPath does; save the image in QuPath first"
        )


def _check_changes(document: Document, changes: Changes) -> None:
    where = document.path or "the image"
    if not document.has_ids:
        raise ProjectUnsupportedError(
            f"{where} was written by QuPath {document.qupath_version or 'before 0.4'}, whose objects have no identity; "
            f"open the image in QuPath 0.4 or later and save it first"
        )
    touched = [record.id for record in (*changes.add, *changes.replace)] + list(changes.remove)
    twice = _twice(touched)
    if twice:
        raise AnnotationError(f"The changes name object {twice[0]} more than once")
    shared = document.duplicates.intersection(touched + [record.parent for record in changes.add if record.parent])
    if shared:
        raise ProjectUnsupportedError(
            f"{where}: {len(shared)} of the objects to change share their identity with another one ({min(shared)} for "
            f"one); duplicate them in QuPath and delete the former ones"
        )
    _check_numbers((*changes.add, *changes.replace))
    _check_known(document, changes, where)
    _check_added(document, changes, where)
    _check_removed(document, changes, where)


def _check_numbers(records: Iterable[Annotation]) -> None:
    for record in records:
        if not all(-(1 << 31) <= number < 1 << 31 for number in record.plane):
            raise AnnotationError(f"Object {record.id} is on plane {tuple(record.plane)}, which QuPath cannot hold")


def _twice(ids: Iterable[UUID]) -> list[UUID]:
    seen: set[UUID] = set()
    return [identity for identity in ids if identity in seen or seen.add(identity)]  # type: ignore[func-returns-value]


def _check_known(document: Document, changes: Changes, where: object) -> None:
    for identity in (*(record.id for record in changes.replace), *changes.remove):
        # The root is no object that anybody sees.
        if document.index.get(identity, 0) == 0:
            raise AnnotationError(f"{where} has no object {identity}; read it again")
    for record in changes.replace:
        number = document.index[record.id]
        kind, parent = document.kind(number), document.parent(number)
        if record.kind != kind:
            raise AnnotationError(f"Object {record.id} is a {kind} and cannot become a {record.kind}")
        if record.parent not in (None, parent):
            raise AnnotationError(f"Object {record.id} keeps its place below {parent or 'the root'} when replaced")


def _check_added(document: Document, changes: Changes, where: object) -> None:
    new = {record.id for record in changes.add}
    for record in changes.add:
        if record.id in document.index:
            raise AnnotationError(f"{where} has an object {record.id} already")
        if record.kind not in KIND_CLASSES:
            raise ProjectUnsupportedError(f"A {record.kind} cannot be added; make the TMA grid in QuPath")
        if record.parent is not None and record.parent not in document.index and record.parent not in new:
            raise AnnotationError(f"{where} has no object {record.parent} for {record.id} to stand below")


def _check_removed(document: Document, changes: Changes, where: object) -> None:
    cores = document.cores() if changes.remove else {}
    for identity in changes.remove:
        if identity in cores:
            name = values.text(ObjectParts(cores[identity]).content[0]) or identity
            raise ProjectUnsupportedError(f"{where}: {name} is a core of the TMA grid; change the grid in QuPath")


def edit(data: ImageData, changes: Changes, colors: Mapping[str, Color] | None = None) -> bytes:
    """Apply changes to the objects of a file.

    Parameters
    ----------
    data : ImageData
        What `read` gave.
    changes : Changes
        Objects to add, replace and remove. A new object whose parent is removed stands below that one's parent.
    colours : mapping of str to Colour, optional
        Of classes that the file does not have yet.

    Returns
    -------
    bytes
        The new file; all that the changes are not about is as it was.

    Raises
    ------
    AnnotationError
        If an object to replace or remove is not there, one to add is, or a record cannot be stored.
    ProjectUnsupportedError
        If the file's objects have no identities, or those that are named are not the only ones of that identity.
    """
    if changes.is_empty:
        return data.data
    return Document(data.data, path=data.path).edit(changes, colors or {}).content


# -- what was made


def verify(before: Document, changes: Changes, touched: Sequence[Annotation], after: Document, *, path: Path) -> None:
    """Compare a file that was made with the one that it was made of, object by object.

    Every object that the changes are not about must be there, in its order and below the same object, and hold the
    same values down to the last byte; so must all that stands beside the objects. Those that were added or replaced
    must be read back as `touched`.

    Parameters
    ----------
    before : Document
        The former file; opened anew, since an edit changes the nodes.
    changes : Changes
        The edit.
    touched : sequence of Annotation
        Objects that were replaced, and then the new ones, as they are stored.
    after : Document
        The new file.
    path : Path
        Named in errors.

    Raises
    ------
    ProjectWriteError
        If anything differs; says what.
    """
    try:
        with reading(path):
            difference = _difference(before, changes, after)
    except NodeError as error:
        raise ProjectWriteError(f"{path}: {error.message}; nothing was changed") from None
    if difference is not None:
        raise ProjectWriteError(f"{path}: {difference}; nothing was changed")
    wanted = {record.id for record in touched}
    numbers = {item.id: number for number, item in enumerate(after.found) if item.id in wanted}
    for first in range(0, len(touched), _PORTION):
        portion = touched[first : first + _PORTION]
        staging.verify_objects(portion, after.records([numbers[record.id] for record in portion]), path=path)


def _difference(before: Document, changes: Changes, after: Document) -> str | None:
    """Find what should have stayed and did not; None where all did."""
    gone, new = set(changes.remove), {record.id for record in changes.add}
    removed = {number for number, item in enumerate(before.found) if item.id in gone}
    owners = _owners(before.found, removed)
    ours = [number for number in range(len(before.found)) if number not in removed]
    theirs = [item for item in after.found if item.id not in new]
    if len(after.found) != len(ours) + len(new) or len(theirs) != len(ours):
        return f"{len(ours) + len(new) - 1} objects were written and {after.num_objects} read back"
    replaced = {record.id for record in changes.replace}
    comparison = _Comparison()
    for number, two in zip(ours, theirs, strict=True):
        one = before.found[number]
        if one.id != two.id:
            return "objects came back in another order"
        if number and before.found[owners[number]].id != after.found[two.parent].id:
            return f"object {one.id} came back below another one"
        if one.id not in replaced and not comparison.same_object(one.node, two.node):
            return f"object {one.id} came back changed"
    # Connections and the TMA grid refer to objects, which may have other children now, or be other ones.
    for number, two in zip(ours, theirs, strict=True):
        one = before.found[number]
        if one.id in replaced or not _is_packed(one.node):
            comparison.take_as_same(one.node, two.node)
    if not comparison.same(_beside(before, changes), _beside(after, changes)):
        return "what stands beside the objects came back changed"
    wrong = [name for name, value in changes.properties.items() if after.properties.get(name) != value]
    return f"the image property {wrong[0]!r} came back wrong" if wrong else None


def _beside(document: Document, changes: Changes) -> tuple[Any, ...]:
    return beside(document.stream, changes.properties) if changes.properties else tuple(document.stream.contents)


def _owners(found: Sequence[Found], removed: set[int]) -> list[int]:
    """For every object the nearest one above it that stays."""
    owners: list[int] = []
    for item in found:
        owners.append(owners[item.parent] if item.parent in removed else item.parent)
    return owners


class _Comparison:
    """Compares nodes of two streams by what they hold, and by what they share."""

    def __init__(self) -> None:
        self.partners: dict[int, object] = {}
        """Nodes of the other stream, by ids of those of the one that were found the same."""
        self.kept: list[object] = []
        """Nodes that were compared: while they live, none of their ids is given away."""
        self.forms: dict[tuple[Template, Template], bool] = {}

    def take_as_same(self, one: object, two: object) -> None:
        """Do not look into these again."""
        self.partners[id(one)] = two

    def same_object(self, one: JavaObject, two: JavaObject) -> bool:
        """Whether objects of the hierarchy are the same but for their children."""
        if _is_packed(one) and _is_packed(two) and self._same_form(one.template, two.template):  # type: ignore[attr-defined]
            return bool(one.gaps == two.gaps)  # type: ignore[attr-defined]
        return self.same((one.desc, _own(one)), (two.desc, _own(two)))

    def _same_form(self, one: Template, two: Template) -> bool:
        known = self.forms.get((one, two))
        if known is None:
            known = self.forms[one, two] = (
                _blanked(one) == _blanked(two)
                and len(one.references) == len(two.references)
                and all(
                    ours[:2] == theirs[:2] and self.same(ours.node, theirs.node)
                    for ours, theirs in zip(one.references, two.references, strict=True)
                )
            )
        return known

    def same(self, one: object, two: object) -> bool:
        """Whether values are the same, and all that they refer to."""
        pending = [(one, two)]
        while pending:
            ours, theirs = pending.pop()
            if isinstance(ours, tuple):
                if not isinstance(theirs, tuple) or len(ours) != len(theirs):
                    return False
                pending.extend(zip(ours, theirs, strict=True))
            elif ours is None or isinstance(ours, (bytes, str, int)):
                if ours.__class__ is not theirs.__class__ or ours != theirs:
                    return False
            elif id(ours) in self.partners:
                if self.partners[id(ours)] is not theirs:
                    return False
            else:
                self.partners[id(ours)] = theirs
                self.kept += (ours, theirs)
                if _node_class(ours) is not _node_class(theirs):
                    return False
                pending.append((_values_of(ours), _values_of(theirs)))
        return True


def _is_packed(node: object) -> bool:
    return isinstance(node, PackedObject) and node.is_packed


def _own(node: JavaObject) -> tuple[Any, ...]:
    """Leave out the children of an object, and their number."""
    parts = ObjectParts(node)
    content = parts.content
    count: bytes = content[parts.first_child - 1]
    return (*content[: parts.first_child - 1], count[:-4], *content[parts.tail :])


def _blanked(template: Template) -> list[tuple[bytes, int]]:
    """Shared bytes without the handles in them."""
    literals = [bytearray(part.literal) for part in template.parts] + [bytearray(template.end)]
    for part, offset, _ in template.references:
        literals[part][offset + 1 : offset + 5] = bytes(4)
    gaps = [*(part.gap for part in template.parts), 0]
    return [(bytes(literal), gap) for literal, gap in zip(literals, gaps, strict=True)]


def _node_class(node: object) -> type:
    return JavaObject if isinstance(node, JavaObject) else node.__class__


def _values_of(node: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any node
    """All that makes a node what it is."""
    if isinstance(node, JavaString):
        return node.raw, node.is_long
    if isinstance(node, (JavaObject, JavaArray)):
        return node.desc, node.data
    if isinstance(node, JavaEnum):
        return node.desc, node.constant
    if isinstance(node, JavaClass):
        return (node.desc,)
    if isinstance(node, ClassDesc):
        fields = tuple((item.code, item.name, item.type) for item in node.fields)
        return node.name, node.uid, node.flags, fields, node.parent, node.annotation
    if isinstance(node, ProxyDesc):
        return node.interfaces, node.parent, node.annotation
    return (node.exception,) if isinstance(node, Aborted) else ()
