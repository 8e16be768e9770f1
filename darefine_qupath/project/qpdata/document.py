"""Open a ``data.qpdata`` file to be edited or compared: most of its objects stay bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from uuid import UUID

from darefine_qupath.annotations import Annotation, Kind
from darefine_qupath.classes import Color
from darefine_qupath.errors import ProjectFormatError
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.decode import decode
from darefine_qupath.javaserial.nodes import JavaObject, paused_garbage_collection
from darefine_qupath.javaserial.packed import PackedObject, Template, distinct_nodes
from darefine_qupath.javaserial.values import NodeError
from darefine_qupath.project.qpdata.hierarchy import HierarchyObject, ObjectParts, duplicates_of, walk
from darefine_qupath.project.qpdata.items import read_items, root_of
from darefine_qupath.project.qpdata.objects import KINDS, ObjectReader, class_of
from darefine_qupath.project.qpdata.read import decode_compact, naming_file, read_image_data, roi_batch
from darefine_qupath.project.qpdata.rois import RoiError
from darefine_qupath.project.qpdata.schema import PATH_CLASS

__all__ = ["Document"]


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
    items : Items
        What stands beside the objects.
    objects : list of HierarchyObject
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
            with naming_file(path), paused_garbage_collection():
                self.stream = decode_compact(data)
                self.items = read_items(self.stream, data, path)
                self.objects: list[HierarchyObject] = list(walk(root_of(self.items), self.items.server_text))
        except NodeError as error:
            raise self.located(error) from None

    @cached_property
    def index(self) -> dict[UUID, int]:
        """Number of an object, by identity."""
        return {item.id: number for number, item in enumerate(self.objects)}

    def located(self, error: NodeError) -> ProjectFormatError:
        """Add the file and the offset of the node to an error; only the whole tree knows the offset."""
        try:
            read_image_data(self.data, path=self.path)
        except ProjectFormatError as found:
            return found
        numbers = [number for number, node in distinct_nodes(self.stream) if node is error.node]
        offset = decode(self.data).offsets[numbers[0]] if numbers else 4
        return ProjectFormatError(error.message, path=self.path, offset=offset)

    @property
    def num_objects(self) -> int:
        """Objects, the root not counted."""
        return len(self.objects) - 1

    @property
    def has_ids(self) -> bool:
        """Whether every object's identity is in the file."""
        return all(item.has_id for item in self.objects)

    @cached_property
    def duplicates(self) -> frozenset[UUID]:
        """Identities that more than one object has."""
        return duplicates_of([item.id for item in self.objects])

    @cached_property
    def colors(self) -> dict[str, Color]:
        """Colours of the path classes in the file, by full name."""
        nodes = (node for _, node in distinct_nodes(self.stream))
        classes = [node for node in nodes if isinstance(node, JavaObject) and node.desc.name == PATH_CLASS]
        try:
            with naming_file(self.path):
                found = dict(reversed([class_of(node) for node in classes]))
        except NodeError as error:
            raise self.located(error) from None
        return {name: color for name, color in found.items() if color is not None}

    @property
    def tally(self) -> list[tuple[Kind, str | None]]:
        """Kind and class of every object but the root."""
        known: dict[Template, tuple[Kind, str | None]] = {}
        tally = []
        for item in self.objects[1:]:
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
            raise self.located(NodeError(f"{node.desc.name} is not a kind of object that can be read", node))
        path_class = parts.content[place]
        return kind, None if path_class is None else class_of(path_class)[0] or None

    def kind(self, number: int) -> Kind | None:
        """Kind of an object; None of one that cannot be read."""
        return KINDS.get(self.objects[number].node.desc.name)

    def parent(self, number: int) -> UUID | None:
        """Identity of the object above; None = the root."""
        above = self.objects[number].parent
        return self.objects[above].id if above > 0 else None

    def cores(self) -> dict[UUID, JavaObject]:
        """Cores of the TMA grid."""
        hierarchy = self.items.hierarchy
        grid = None if hierarchy is None else values.field(hierarchy, "tmaGrid")
        if grid is None:
            return {}
        cores = {id(core) for core in values.list_items(values.field(grid, "cores"))}
        return {item.id: item.node for item in self.objects if id(item.node) in cores}

    def records(self, numbers: Sequence[int]) -> list[Annotation]:
        """Make records of some of the objects."""
        rois = roi_batch(self.items, self.data)
        reader = ObjectReader(len(self.data), rois)
        try:
            with naming_file(self.path):
                rows = [reader.row(self.objects[number], self.parent(number)) for number in numbers]
                shapes = rois.build()
        except NodeError as error:
            raise self.located(error) from None
        except RoiError as error:
            raise self.located(NodeError(error.message, None)) from None
        return [row.record(shapes) for row in rows]
