"""Work out how records are read back once stored: at QuPath's precision, and at that of 32-bit numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import UUID

import numpy as np
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane, RoiKind
from darefine_qupath.errors import AnnotationError
from darefine_qupath.javaserial.nodes import Stream
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.build import NodeBuilder, class_name, is_detection, signed
from darefine_qupath.project.qpdata.compare import same_geometry, same_numbers, same_roi
from darefine_qupath.project.qpdata.read import ImageData
from darefine_qupath.project.qpdata.roi_specs import specs_of
from darefine_qupath.project.qpdata.rois import RoiBatch, RoiError

__all__ = ["expected_objects", "needs_wide_list", "stored_record", "stored_records"]


def needs_wide_list(record: Annotation, former: Annotation | None) -> bool:
    """Whether measurements are stored as 64-bit numbers."""
    if not is_detection(record.kind):
        return True
    numbers = {} if former is None else former.measurements
    return not same_numbers(_stored_numbers(numbers, is_wide=False), numbers)


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


def stored_record(record: Annotation, former: Annotation | None = None) -> Annotation:
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
    """Give many records, each with what it replaces, as they will be read back; see `stored_record`."""
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


def expected_objects(data: ImageData, changes: Changes) -> list[Annotation]:
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
