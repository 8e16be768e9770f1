"""Apply changes to a ``data.qpdata`` file: everything else stays as it was.

A file is opened as a `Document`, in which most objects are bytes that were not decoded. An edit changes only the nodes
of what it changes; the rest is written as it stands, with the handles that it has then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple
from uuid import UUID

from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane, RoiKind
from darefine_qupath.classes import Color
from darefine_qupath.errors import AnnotationError, ProjectUnsupportedError
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import Content, JavaObject, paused_garbage_collection
from darefine_qupath.javaserial.packed import is_packed
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError
from darefine_qupath.project import servers
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.build import NodeBuilder, class_name, probability_block
from darefine_qupath.project.qpdata.compare import same_geometry, same_numbers, same_roi, same_value
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.hierarchy import ObjectParts, duplicates_of, remaining_parents
from darefine_qupath.project.qpdata.properties import set_properties
from darefine_qupath.project.qpdata.read import naming_file
from darefine_qupath.project.qpdata.roi_specs import specs_of
from darefine_qupath.project.qpdata.schema import KIND_CLASSES
from darefine_qupath.project.qpdata.stored import needs_wide_list, stored_records

__all__ = ["EditedFile", "edit_document"]


class EditedFile(NamedTuple):
    """A new file, and the objects that were added or replaced as they must be read back from it."""

    content: bytes
    touched: list[Annotation]


def edit_document(document: Document, changes: Changes, colors: Mapping[str, Color]) -> EditedFile:
    """Apply changes to the objects and properties of a file; only once to a document, since its nodes change.

    Parameters
    ----------
    document : Document
        The file.
    changes : Changes
        Objects to add, replace and remove. A new object whose parent is removed stands below that one's parent.
    colors : mapping of str to Color
        Of classes that the file does not have yet.

    Returns
    -------
    Edited
        The new file; everything that the changes do not name is as it was.

    Raises
    ------
    AnnotationError
        If an object to replace or remove is not there, one to add is, or a record cannot be stored.
    ProjectUnsupportedError
        If the file's objects have no identities, or those that are named are not the only ones of that identity.
    """
    _check_changes(document, changes)
    with paused_garbage_collection():
        former = document.records([document.index[record.id] for record in changes.replace])
        try:
            with naming_file(document.path):
                editor = _Editor(document, colors)
                editor.apply(changes, former)
                if changes.properties:
                    set_properties(document.stream, changes.properties, editor.builder)
        except NodeError as error:
            raise document.located(error) from None
        replaced = [replace(record, parent=old.parent) for record, old in zip(changes.replace, former, strict=True)]
        pairs = [*zip(replaced, former, strict=True), *((record, None) for record in changes.add)]
        return EditedFile(encode(document.stream), editor.placed(stored_records(pairs), changes))


class _Editor:
    """One edit of one file's hierarchy."""

    def __init__(self, document: Document, colors: Mapping[str, Color]) -> None:
        self.objects = document.objects
        self.index = document.index
        is_modern = servers.is_since(document.items.qupath_version or "", 0, 6)
        self.builder = NodeBuilder(document.stream, is_modern=is_modern, colors=colors)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Numbers of objects by the ids of their nodes."""
        return {id(item.node): number for number, item in enumerate(self.objects)}

    def apply(self, changes: Changes, former: Sequence[Annotation]) -> None:
        for record, before in zip(changes.replace, former, strict=True):
            self._replace(self._parts(self.index[record.id]), record, before)
        removed = {self.index[identity] for identity in changes.remove}
        parents = remaining_parents(self.objects, removed)
        added = self._new_nodes(changes.add, removed, parents)
        for number in sorted({parents[number] for number in removed} | added.keys()):
            self._set_children(self._parts(number), [*self._kept_children(number, removed), *added.get(number, ())])
        for number in removed:
            # Something else may refer to it (connections between objects), and would bring its children back.
            if not is_packed(self.objects[number].node):
                self._set_children(self._parts(number), ())

    def _parts(self, number: int) -> ObjectParts:
        # Replacing changes what an object wrote, so the parts are found again.
        return ObjectParts(self.objects[number].node)

    def placed(self, records: Sequence[Annotation], changes: Changes) -> list[Annotation]:
        """Place records below the nearest object above them that stays."""
        gone = {self.index[identity] for identity in changes.remove}
        parents = remaining_parents(self.objects, gone)

        def above(parent: UUID | None) -> UUID | None:
            number = self.index.get(parent, -1) if parent is not None else 0
            if number < 0:
                return parent
            number = parents[number] if number in gone else number
            return self.objects[number].id if number > 0 else None

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
            elif not is_packed(child):  # a packed one has no children
                pending.extend(reversed(self._parts(child_number).children))
        return kept

    @staticmethod
    def _set_children(parts: ObjectParts, children: Sequence[Content]) -> None:
        content = parts.node.data
        block = content[parts.first_child - 1]
        count = block[:-4] + len(children).to_bytes(4, "big")
        parts.node.data = (*content[: parts.first_child - 1], count, *children, *content[parts.tail :])

    def _new_nodes(
        self, records: Sequence[Annotation], removed: set[int], parents: Sequence[int]
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
                tops.append((parents[number] if number in removed else number, record))
        nodes = {record.id: JavaObject(self.builder.desc(KIND_CLASSES[record.kind])) for record in records}
        reached = [record for _, record in tops]
        for record in reached:
            reached.extend(below.get(record.id, ()))
        if len(reached) < len(records):
            raise AnnotationError("New objects cannot be each other's parents")
        for record, roi, nucleus in zip(reached, *self._new_rois(reached), strict=True):
            children = [nodes[child.id] for child in below.get(record.id, ())]
            is_wide = needs_wide_list(record, None)
            nodes[record.id].data = self.builder.path_object(record, roi, nucleus, children, is_wide=is_wide)
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
        content = list(parts.node.data)
        if record.name != former.name:
            content[0] = None if record.name is None else JavaString(record.name)
        if record.color != former.color:
            content[1] = self.builder.color(record.color)
        if dict(record.metadata) != dict(former.metadata):
            content[2] = self.builder.metadata(record.metadata, record.id)
        if not same_numbers(record.measurements, former.measurements):
            content[3] = self.builder.measurements(record.measurements, is_wide=needs_wide_list(record, former))
        self._replace_tail(content, parts.tail, record, former)
        parts.node.data = tuple(content)

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
        if not same_value(record.class_probability, former.class_probability):
            block = probability_block(record.class_probability) + block[8:]
        if record.kind == "tma core" and record.is_missing != former.is_missing:
            block = block[:8] + (b"\1" if record.is_missing else b"\0") + block[9:]
        content[tail + 3] = block


def _check_layout(parts: ObjectParts, record: Annotation, former: Annotation) -> None:
    keeps_values = dict(record.metadata) == dict(former.metadata) and same_numbers(
        record.measurements, former.measurements
    )
    if not parts.has_lock or (parts.layout != 3 and not keeps_values):
        raise ProjectUnsupportedError(
            f"Object {record.id} is laid out as no known version of QuPath does; save the image in QuPath first"
        )


def _check_changes(document: Document, changes: Changes) -> None:
    where = document.path or "the image"
    if not document.has_ids:
        raise ProjectUnsupportedError(
            f"{where} was written by QuPath {document.items.qupath_version or 'before 0.4'}, whose objects have no "
            f"identity; open the image in QuPath 0.4 or later and save it first"
        )
    touched = [record.id for record in (*changes.add, *changes.replace)] + list(changes.remove)
    twice = duplicates_of(touched)
    if twice:
        raise AnnotationError(f"The changes name object {min(twice)} more than once")
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
        if record.kind == "tma core":
            raise ProjectUnsupportedError(f"A {record.kind} cannot be added; make the TMA grid in QuPath")
        if record.parent is not None and record.parent not in document.index and record.parent not in new:
            raise AnnotationError(f"{where} has no object {record.parent} for {record.id} to stand below")


def _check_removed(document: Document, changes: Changes, where: object) -> None:
    cores = document.cores() if changes.remove else {}
    for identity in changes.remove:
        if identity in cores:
            name = values.text(ObjectParts(cores[identity]).content[0]) or identity
            raise ProjectUnsupportedError(f"{where}: {name} is a core of the TMA grid; change the grid in QuPath")
