"""New ``data.qpdata`` files, records as they will be read back, and the summary beside a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import numpy as np
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane, RoiKind
from darefine_qupath.errors import AnnotationError, ProjectUnsupportedError
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import JavaObject, Stream
from darefine_qupath.javaserial.strings import JavaString, modified_utf8
from darefine_qupath.javaserial.values import hash_order
from darefine_qupath.project import qpproj
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.build import (
    NodeBuilder,
    class_name,
    is_detection,
    signed,
    uses_wide_list,
)
from darefine_qupath.project.qpdata.items import EOF
from darefine_qupath.project.qpdata.read import ImageData
from darefine_qupath.project.qpdata.rois import RoiBatch, RoiError, specs_of

if TYPE_CHECKING:
    from darefine_qupath.project.qpdata.edit import Document

__all__ = [
    "KIND_CLASSES",
    "create",
    "expected",
    "needs_wide_list",
    "same_geometry",
    "same_numbers",
    "same_roi",
    "stored",
    "stored_geometry",
    "stored_records",
    "summary",
]

KIND_CLASSES = {
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


def same_geometry(ours: BaseGeometry | None, theirs: BaseGeometry | None) -> bool:
    """Whether geometries have the same coordinates in the same order."""
    if ours is None or theirs is None:
        return ours is theirs
    return ours is theirs or bool(ours.equals_exact(theirs, 0) and ours.geom_type == theirs.geom_type)


def same_roi(record: Annotation, former: Annotation | None) -> bool:
    """Whether a record has the ROI that its former one had."""
    return former is not None and record.plane == former.plane and same_geometry(record.geometry, former.geometry)


def same_numbers(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Whether measurements are the same, in the same order; NaN equals NaN."""
    return list(ours) == list(theirs) and np.array_equal([*ours.values()], [*theirs.values()], equal_nan=True)


def needs_wide_list(record: Annotation, former: Annotation | None) -> bool:
    """Whether measurements are stored as 64-bit numbers."""
    return not is_detection(record.kind) or (former is not None and uses_wide_list(former.measurements))


_PLAIN_BUILDER = NodeBuilder(Stream(()), is_modern=True, colors={})


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
    return stored_records([(record, former)])[0]


def stored_records(pairs: Sequence[tuple[Annotation, Annotation | None]]) -> list[Annotation]:
    """As `stored`, of records with what they replace; all at once."""
    shapes = [_new_shapes(record, former) for record, former in pairs]
    made = iter(_round_trips([shape for own in shapes for shape in own if shape is not None]))
    kept = []
    for (record, former), (roi_shape, nucleus_shape) in zip(pairs, shapes, strict=True):
        roi, geometry = (record.roi, record.geometry) if former is None else (former.roi, former.geometry)
        if roi_shape is not None:
            roi, geometry = next(made)
        nucleus = record.nucleus if nucleus_shape is None else next(made)[1]
        kept.append(
            replace(
                _stored_values(record, former),
                geometry=geometry if record.geometry is not None else None,
                roi=roi if record.geometry is not None else None,
                plane=Plane() if record.geometry is None else record.plane,
                nucleus=nucleus if record.kind == "cell" else None,
            )
        )
    return kept


def _new_shapes(record: Annotation, former: Annotation | None) -> tuple[_Shape | None, _Shape | None]:
    """ROI and nucleus, where they are to be written."""
    is_kept = same_roi(record, former)
    roi = None if record.geometry is None or is_kept else (record.geometry, record.roi, record.plane)
    if record.kind != "cell" or record.nucleus is None:
        return roi, None
    if is_kept and former is not None and same_geometry(record.nucleus, former.nucleus):
        return roi, None
    return roi, (record.nucleus, None, record.plane)


def _stored_values(record: Annotation, former: Annotation | None) -> Annotation:
    measurements = record.measurements
    if former is None or not same_numbers(measurements, former.measurements):
        measurements = _stored_numbers(measurements, is_wide=needs_wide_list(record, former))
    return replace(
        record,
        path_class=class_name(record.path_class),
        measurements=measurements,
        color=None if record.color is None else signed(record.color),
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
    replaced = zip(
        changes.replace, stored_records([(record, former[record.id]) for record in changes.replace]), strict=True
    )
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
    added = stored_records([(record, None) for record in changes.add])
    return objects + [replace(record, parent=above(record.parent)) for record in added]


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
    builder = NodeBuilder(Stream(()), is_modern=qpproj.is_since(version, 0, 6), colors={})
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
                JavaString(qpproj.json_bytes(header, pretty=False).decode()),
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
    digits = "{!r}" if qpproj.is_since(version, 0, 6) else "{:.8f}"
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


def summary(data: ImageData | Document, *, size: tuple[int, int] | None = None, timestamp_ms: int) -> dict[str, Any]:
    """``summary.json`` of an image, as QuPath writes it.

    Parameters
    ----------
    data : ImageData or Document
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
    tally = data.tally
    kinds = ["Root objects", *(_SUMMARY_NAMES[kind] for kind, _ in tally)]
    annotations = [path_class or "Unclassified" for kind, path_class in tally if kind == "annotation"]
    detections = [path_class or "Unclassified" for kind, path_class in tally if is_detection(kind)]
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
