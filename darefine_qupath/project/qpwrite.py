"""Edits of a ``data.qpdata`` file, new files, and the summary beside them.

An edit decodes the file's object stream, changes the nodes that the edit is about, and encodes the rest as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane, RoiKind
from darefine_qupath.classes import Colour
from darefine_qupath.errors import AnnotationError, ProjectFormatError, ProjectUnsupportedError
from darefine_qupath.project import files
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.javastream import (
    Content,
    JavaObject,
    JavaString,
    Stream,
    decode,
    encode,
    modified_utf8,
    no_collection,
)
from darefine_qupath.project.javautil import NodeError, hash_order
from darefine_qupath.project.qpnodes import (
    NodeBuilder,
    class_name,
    is_detection,
    probability_block,
    signed,
    uses_wide_list,
)
from darefine_qupath.project.qpread import EOF, HeldStream, ImageData, ObjectParts, objects_of
from darefine_qupath.project.rois import RoiBatch, RoiError, specs_of

__all__ = ["create", "edit", "expected", "stored", "stored_geometry", "summary"]

_KIND_CLASSES = {
    "annotation": "qupath.lib.objects.PathAnnotationObject",
    "detection": "qupath.lib.objects.PathDetectionObject",
    "cell": "qupath.lib.objects.PathCellObject",
    "tile": "qupath.lib.objects.PathTileObject",
}
_HEMATOXYLIN = (0.6511078257574492, 0.7011930431234068, 0.29049426072255424)
_EOSIN = (0.21589893562087106, 0.8011960501132093, 0.5580972485873467)
_DAB = (0.26916687204956063, 0.5682411743268502, 0.777593185920953)
_DEFAULT_STAINS = {
    "BRIGHTFIELD_H_E": ("H&E default", ("Hematoxylin", _HEMATOXYLIN), ("Eosin", _EOSIN)),
    "BRIGHTFIELD_H_DAB": ("H-DAB default", ("Hematoxylin", _HEMATOXYLIN), ("DAB", _DAB)),
    "BRIGHTFIELD_OTHER": ("H-DAB default", ("Hematoxylin", _HEMATOXYLIN), ("DAB", _DAB)),
}
_IMAGE_TYPES = (*_DEFAULT_STAINS, "FLUORESCENCE", "OTHER", "UNSET")
_SUMMARY_NAMES = {
    "annotation": "Annotations",
    "detection": "Detections",
    "cell": "Cells",
    "tile": "Tiles",
    "tma core": "TMA cores",
}


# -- what will be read back


def _same_geometry(ours: BaseGeometry | None, theirs: BaseGeometry | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours is theirs or bool(ours.equals_exact(theirs, 0) and ours.geom_type == theirs.geom_type)


def _same_roi(record: Annotation, former: Annotation | None) -> bool:
    return former is not None and record.plane == former.plane and _same_geometry(record.geometry, former.geometry)


def _same_numbers(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    return list(ours) == list(theirs) and np.array_equal([*ours.values()], [*theirs.values()], equal_nan=True)


def _is_wide(record: Annotation, former: Annotation | None) -> bool:
    """Whether measurements are stored as 64-bit numbers."""
    return not is_detection(record.kind) or (former is not None and uses_wide_list(former.measurements))


_PLAIN_BUILDER = NodeBuilder(Stream(()), is_modern=True, colours={})


_Shape = tuple[BaseGeometry, RoiKind | None, Plane]


def _round_trips(shapes: Sequence[_Shape]) -> list[tuple[RoiKind, BaseGeometry]]:
    """ROI types and geometries as they will be read back."""
    batch = RoiBatch()
    specs = specs_of([(geometry, wanted) for geometry, wanted, _ in shapes])
    for spec, (_, _, plane) in zip(specs, shapes, strict=True):
        batch.add(_PLAIN_BUILDER.roi(spec, plane))
    try:
        return [(roi.kind, roi.geometry) for roi in batch.build()]
    except RoiError as error:
        raise AnnotationError(error.message) from None


def _stored_numbers(measurements: Mapping[str, float], *, is_wide: bool) -> dict[str, float]:
    values = np.fromiter(measurements.values(), np.float64, len(measurements))
    if not is_wide:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32).astype(np.float64)
    return {
        name: math.nan if math.isnan(value) else value
        for name, value in zip(measurements, values.tolist(), strict=True)
    }


def stored(record: Annotation, former: Annotation | None = None) -> Annotation:
    """Record as it will be read back.

    Coordinates are at QuPath's precision, a polygon's also at that of 32-bit numbers; so are a detection's
    measurements.

    Parameters
    ----------
    record : Annotation
        New, or a replacement.
    former : Annotation, optional
        What it replaces: parts that are equal stay as they are in the file.

    Returns
    -------
    Annotation
        With the same parent.

    Raises
    ------
    AnnotationError
        If it cannot be stored.
    """
    return _stored([(record, former)])[0]


def _stored(pairs: Sequence[tuple[Annotation, Annotation | None]]) -> list[Annotation]:
    """Make of records, with what they replace, those that will be read back."""
    shapes = [_new_shapes(record, former) for record, former in pairs]
    made = iter(_round_trips([shape for own in shapes for shape in own if shape is not None]))
    stored_records = []
    for (record, former), (roi_shape, nucleus_shape) in zip(pairs, shapes, strict=True):
        roi, geometry = (record.roi, record.geometry) if former is None else (former.roi, former.geometry)
        if roi_shape is not None:
            roi, geometry = next(made)
        nucleus = record.nucleus if nucleus_shape is None else next(made)[1]
        stored_records.append(
            replace(
                _stored_values(record, former),
                geometry=geometry if record.geometry is not None else None,
                roi=roi if record.geometry is not None else None,
                plane=Plane() if record.geometry is None else record.plane,
                nucleus=nucleus if record.kind == "cell" else None,
            )
        )
    return stored_records


def _new_shapes(record: Annotation, former: Annotation | None) -> tuple[_Shape | None, _Shape | None]:
    """ROI and nucleus, where they are to be written."""
    is_kept = _same_roi(record, former)
    roi = None if record.geometry is None or is_kept else (record.geometry, record.roi, record.plane)
    if record.kind != "cell" or record.nucleus is None:
        return roi, None
    if is_kept and former is not None and _same_geometry(record.nucleus, former.nucleus):
        return roi, None
    return roi, (record.nucleus, None, record.plane)


def _stored_values(record: Annotation, former: Annotation | None) -> Annotation:
    measurements = record.measurements
    if former is None or not _same_numbers(measurements, former.measurements):
        measurements = _stored_numbers(measurements, is_wide=_is_wide(record, former))
    return replace(
        record,
        path_class=class_name(record.path_class),
        measurements=measurements,
        colour=None if record.colour is None else signed(record.colour),
        class_probability=math.nan if math.isnan(record.class_probability) else float(record.class_probability),
        is_missing=record.is_missing and record.kind == "tma core",
    )


def stored_geometry(record: Annotation) -> BaseGeometry | None:
    """Geometry of a new record as it will be read back."""
    return stored(record).geometry


def expected(data: ImageData, changes: Changes) -> list[Annotation]:
    """Every object as it must be read back after an edit.

    Parameters
    ----------
    data : ImageData
        Before the edit.
    changes : Changes
        The edit.

    Returns
    -------
    list of Annotation
        Objects that stay, exactly as they were and in the file's order; those that are replaced, and then the new
        ones, as they are stored.
    """
    parents = {record.id: record.parent for record in data.objects}
    gone = set(changes.remove)
    former = {record.id: record for record in data.objects}
    replaced = zip(changes.replace, _stored([(record, former[record.id]) for record in changes.replace]), strict=True)
    new = {record.id: kept for record, kept in replaced}

    def above(parent: UUID | None) -> UUID | None:
        while parent in gone:
            parent = parents[parent]
        return None if parent == data.root_id else parent

    objects = []
    for record in data.objects:
        if record.id not in gone:
            kept, parent = new.get(record.id, record), above(record.parent)
            objects.append(kept if kept.parent == parent else replace(kept, parent=parent))
    added = _stored([(record, None) for record in changes.add])
    return objects + [replace(record, parent=above(record.parent)) for record in added]


# -- edits


class _Editor:
    """One edit of one file's hierarchy."""

    def __init__(self, data: ImageData, held: HeldStream, colours: Mapping[str, Colour]) -> None:
        self.data = data
        stream, self.items = held
        is_modern = files.is_since(data.qupath_version or "", 0, 6)
        self.builder = NodeBuilder(stream, is_modern=is_modern, colours=colours)
        self.records = {record.id: record for record in data.objects}
        self.index = {identity: number for number, (_, identity, _) in enumerate(self.items)}
        self.numbers = {id(parts.node): number for number, (parts, _, _) in enumerate(self.items)}

    def apply(self, changes: Changes) -> None:
        for record in changes.replace:
            self._replace(self.items[self.index[record.id]][0], record, self.records[record.id])
        removed = {self.index[identity] for identity in changes.remove}
        owners = self._owners(removed)
        added = self._new_nodes(changes.add, removed, owners)
        for number in sorted({owners[number] for number in removed} | added.keys()):
            self._set_children(self._parts(number), [*self._kept_children(number, removed), *added.get(number, ())])
        for number in removed:
            # Something else may refer to it (connections between objects), and would bring its children back.
            self._set_children(self._parts(number), ())

    def _parts(self, number: int) -> ObjectParts:
        # Replacing changes what an object wrote, so the parts are found again.
        return ObjectParts(self.items[number][0].node)

    def _owners(self, removed: set[int]) -> list[int]:
        """For every object the nearest one above it that stays."""
        owners: list[int] = []
        for _, _, parent in self.items:
            owners.append(owners[parent] if parent in removed else parent)
        return owners

    def _kept_children(self, number: int, removed: set[int]) -> list[Content]:
        """Children that stay; those of a removed child take its place."""
        kept: list[Content] = []
        pending = list(reversed(self._parts(number).children))
        while pending:
            child = pending.pop()
            child_number = self.numbers[id(child)]
            if child_number in removed:
                pending.extend(reversed(self._parts(child_number).children))
            else:
                kept.append(child)
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
        nodes = {record.id: JavaObject(self.builder.desc(_KIND_CLASSES[record.kind])) for record in records}
        reached = [record for _, record in tops]
        for record in reached:
            reached.extend(below.get(record.id, ()))
        if len(reached) < len(records):
            raise AnnotationError("New objects cannot be each other's parents")
        for record, roi, nucleus in zip(reached, *self._new_rois(reached), strict=True):
            children = [nodes[child.id] for child in below.get(record.id, ())]
            is_wide = _is_wide(record, None)
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
        if record.colour != former.colour:
            content[1] = self.builder.colour(record.colour)
        if dict(record.metadata) != dict(former.metadata):
            content[2] = self.builder.metadata(record.metadata, record.id)
        if not _same_numbers(record.measurements, former.measurements):
            content[3] = self.builder.measurements(record.measurements, is_wide=_is_wide(record, former))
        self._replace_tail(content, parts.tail, record, former)
        parts.node.content = content

    def _replace_tail(self, content: list[Content], tail: int, record: Annotation, former: Annotation) -> None:
        if record.locked != former.locked:
            content[tail] = self.builder.boolean(record.locked)
        if class_name(record.path_class) != former.path_class:
            content[tail + 1] = self.builder.path_class(record.path_class)
        if not _same_roi(record, former):
            content[tail + 2] = self._roi(record.geometry, record.roi, record.plane)
        if record.kind == "cell" and not (_same_geometry(record.nucleus, former.nucleus) and _same_roi(record, former)):
            content[tail + 4] = self._roi(record.nucleus, None, record.plane)
        block: bytes = content[tail + 3]  # type: ignore[assignment]
        if not _same_numbers({"": record.class_probability}, {"": former.class_probability}):
            block = probability_block(record.class_probability) + block[8:]
        if record.kind == "tma core" and record.is_missing != former.is_missing:
            block = block[:8] + (b"\1" if record.is_missing else b"\0") + block[9:]
        content[tail + 3] = block


def _check_layout(parts: ObjectParts, record: Annotation, former: Annotation) -> None:
    moves = dict(record.metadata) == dict(former.metadata) and _same_numbers(record.measurements, former.measurements)
    if not parts.has_lock or (parts.layout != 3 and not moves):
        raise ProjectUnsupportedError(
            f"Object {record.id} is laid out as no known version of QuPath does; save the image in QuPath first"
        )


def _check_changes(data: ImageData, changes: Changes) -> None:
    where = data.path or "the image"
    if not data.has_ids:
        raise ProjectUnsupportedError(
            f"{where} was written by QuPath {data.qupath_version or 'before 0.4'}, whose objects have no identity; "
            f"open the image in QuPath 0.4 or later and save it first"
        )
    records = {record.id: record for record in data.objects}
    touched = [record.id for record in (*changes.add, *changes.replace)] + list(changes.remove)
    twice = _twice(touched)
    if twice:
        raise AnnotationError(f"The changes name object {twice[0]} more than once")
    shared = data.duplicates.intersection(touched + [record.parent for record in changes.add if record.parent])
    if shared:
        raise ProjectUnsupportedError(
            f"{where}: {len(shared)} of the objects to change share their identity with another one ({min(shared)} for "
            f"one); duplicate them in QuPath and delete the former ones"
        )
    _check_known(records, changes, where)
    _check_added(data, records, changes, where)
    _check_removed(data, records, changes, where)


def _twice(ids: Iterable[UUID]) -> list[UUID]:
    seen: set[UUID] = set()
    return [identity for identity in ids if identity in seen or seen.add(identity)]  # type: ignore[func-returns-value]


def _check_known(records: Mapping[UUID, Annotation], changes: Changes, where: object) -> None:
    for identity in (*(record.id for record in changes.replace), *changes.remove):
        if identity not in records:
            raise AnnotationError(f"{where} has no object {identity}; read it again")
    for record in changes.replace:
        former = records[record.id]
        if record.kind != former.kind:
            raise AnnotationError(f"Object {record.id} is a {former.kind} and cannot become a {record.kind}")
        if record.parent not in (None, former.parent):
            raise AnnotationError(
                f"Object {record.id} keeps its place below {former.parent or 'the root'} when replaced"
            )


def _check_added(data: ImageData, records: Mapping[UUID, Annotation], changes: Changes, where: object) -> None:
    new = {record.id for record in changes.add}
    for record in changes.add:
        if record.id in records or record.id == data.root_id:
            raise AnnotationError(f"{where} has an object {record.id} already")
        if record.kind not in _KIND_CLASSES:
            raise ProjectUnsupportedError(f"A {record.kind} cannot be added; make the TMA grid in QuPath")
        if record.parent is not None and record.parent not in records and record.parent not in new | {data.root_id}:
            raise AnnotationError(f"{where} has no object {record.parent} for {record.id} to stand below")


def _check_removed(data: ImageData, records: Mapping[UUID, Annotation], changes: Changes, where: object) -> None:
    cores = set(data.tma_grid.cores) if data.tma_grid else set()
    for identity in changes.remove:
        if identity in cores:
            name = records[identity].name or identity
            raise ProjectUnsupportedError(f"{where}: {name} is a core of the TMA grid; change the grid in QuPath")


def edit(data: ImageData, changes: Changes, colours: Mapping[str, Colour] | None = None) -> bytes:
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
    _check_changes(data, changes)
    with no_collection():
        # Editing changes the stream: whoever edits the same data again gets one of their own.
        stream, objects = data.held.pop() if data.held else HeldStream(decode(data.data, path=data.path), [])
        try:
            _Editor(data, HeldStream(stream, objects or objects_of(stream)), colours or {}).apply(changes)
        except NodeError as error:
            raise ProjectFormatError(error.message, path=data.path, offset=stream.offset_of(error.node)) from None
        return encode(stream)


# -- new files


def create(
    *,
    image_type: str,
    server: Mapping[str, Any] | None,
    entry_id: str,
    version: str,
    root_id: UUID | None = None,
) -> bytes:
    """Make the data of an image that has no objects yet.

    Parameters
    ----------
    image_type : str
        QuPath's ImageType; a brightfield type gets QuPath's default stains.
    server : mapping or None
        Builder of the image server, as in the project file.
    entry_id : str
        ``<project file>::<entry id>``.
    version : str
        QuPath version to write for.
    root_id : UUID, optional
        Identity of the root; random by default.

    Returns
    -------
    bytes
        A ``data.qpdata`` file.

    Raises
    ------
    ProjectUnsupportedError
        If QuPath has no such image type.
    """
    if image_type not in _IMAGE_TYPES:
        raise ProjectUnsupportedError(f"{image_type!r} is not an image type; give one of {', '.join(_IMAGE_TYPES)}")
    builder = NodeBuilder(Stream(()), is_modern=files.is_since(version, 0, 6), colours={})
    header = {"dataVersion": 3, "qupathVersion": version} | ({} if server is None else {"server": dict(server)})
    empty = JavaString("")
    locale = dict.fromkeys(("country", "extensions", "script", "variant"), empty) | {"language": JavaString("en")}
    title = modified_utf8("Data file version 3")
    root = builder.external(
        "qupath.lib.objects.PathRootObject",
        (None, None, builder.metadata({}, root_id or uuid4()), None, bytes(4)),
    )
    properties = builder.hash_map((JavaString("PROJECT_ENTRY_ID"), JavaString(entry_id)))
    return encode(
        Stream(
            (
                len(title).to_bytes(2, "big") + title,
                JavaString(files.json_bytes(header, pretty=False).decode()),
                builder.object("java.util.Locale", {"hashcode": -1, **locale}),
                builder.enum("qupath.lib.images.ImageData$ImageType", image_type),
                _stains(builder, image_type, version),
                builder.external("qupath.lib.plugins.workflow.Workflow", (bytes.fromhex("0000000100000000"),)),
                builder.object("qupath.lib.objects.hierarchy.PathObjectHierarchy", {"rootObject": root}),
                properties,
                JavaString(EOF),
            )
        )
    )


def _stains(builder: NodeBuilder, image_type: str, version: str) -> JavaObject | None:
    if image_type not in _DEFAULT_STAINS:
        return None
    name, *stains = _DEFAULT_STAINS[image_type]
    digits = "{!r}" if files.is_since(version, 0, 6) else "{:.8f}"
    parts = {"Name": name}
    for number, (stain, values) in enumerate(stains, 1):
        parts |= {f"Stain {number}": stain, f"Values {number}": " ".join(digits.format(value) for value in values)}
    parts["Background"] = " 255 255 255"
    described = ", ".join(f'"{key}" : "{value}"' for key, value in parts.items())
    content = ((1).to_bytes(4, "big"), JavaString(f"{{{described}}}"))
    return builder.external("qupath.lib.color.ColorDeconvolutionStains", content)


# -- summary


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Count, in the order in which Java's HashMap gives the names."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return {name: counts[name] for name in hash_order(counts)}


def summary(data: ImageData, *, size: tuple[int, int] | None = None, timestamp_ms: int) -> dict[str, Any]:
    """``summary.json`` of an image, as QuPath writes it.

    Parameters
    ----------
    data : ImageData
        The image.
    size : tuple of int, optional
        Width and height, where the file does not say.
    timestamp_ms : int
        Milliseconds since 1970.

    Returns
    -------
    dict
        Plain JSON values.
    """
    kinds = ["Root objects", *(_SUMMARY_NAMES[record.kind] for record in data.objects)]
    annotations = [record.path_class or "Unclassified" for record in data.objects if record.kind == "annotation"]
    detections = [record.path_class or "Unclassified" for record in data.objects if is_detection(record.kind)]
    server = _server_summary(data.server or {}, size)
    return {
        "timestamp": timestamp_ms,
        "imageType": data.image_type,
        **({} if server is None else {"server": server}),
        "hierarchy": {
            "nObjects": len(kinds),
            "objectTypeCounts": _counts(kinds),
            "annotationClassificationCounts": _counts(annotations),
            "detectionClassificationCounts": _counts(detections),
        },
    }


def _server_summary(server: Mapping[str, Any], size: tuple[int, int] | None) -> dict[str, int] | None:
    metadata = server.get("metadata")
    known = metadata if isinstance(metadata, Mapping) else {}
    width, height = size or (known.get("width"), known.get("height"))
    if not isinstance(width, int) or not isinstance(height, int):
        return None
    channels = known.get("channels")
    num_channels = len(channels) if isinstance(channels, list) else 3
    stack = {key: known[key] if isinstance(known.get(key), int) else 1 for key in ("sizeZ", "sizeT")}
    return {"width": width, "height": height, "sizeC": num_channels, **stack}
