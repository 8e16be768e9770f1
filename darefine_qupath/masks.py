"""Paint the annotations of an image into masks of labels, and say which annotations label nothing.

`LabelPainter` applies the label rules of a `ClassMap` to the annotations of one image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, Plane, class_counts
from darefine_qupath.classes import IGNORE, REGION, ClassMap, is_ignored
from darefine_qupath.errors import AnnotationError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rasterio.transform import Affine
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.geometry import Box

__all__ = ["LabelPainter", "count_unlearnable", "unlearnable", "unlearnable_words"]

_FEW_VERTICES = 64
"""Vertices up to which a shape is drawn without being cut to the box first."""


class LabelPainter:
    """Paint the labels of one image into any box of it.

    The rules: the deeper object in the hierarchy wins; between siblings the smaller one; holes are holes; lines and
    points label nothing unless a stroke width is given; ``Ignore*`` wins over everything; where ``Region*``
    annotations exist only their inside counts. A pixel belongs to the shape that holds its centre.

    Parameters
    ----------
    annotations : iterable of Annotation
        All annotations of the image; other kinds of object and unclassified annotations label nothing.
    class_map : ClassMap
        Names to labels.
    stroke_px : float, optional
        Width in level-0 pixels at which lines and points are drawn; 0 leaves them out.

    Attributes
    ----------
    class_map : ClassMap
        Names to labels.

    Raises
    ------
    ClassMapError
        If an annotation has a class that the map does not know.
    AnnotationError
        If a coordinate is not finite.
    """

    def __init__(self, annotations: Iterable[Annotation], class_map: ClassMap, *, stroke_px: float = 0.0) -> None:
        objects = list(annotations)
        records = [record for record in objects if record.kind == "annotation"]
        class_map.check(class_counts(records))
        self.class_map = class_map
        # Other kinds of object count too: an annotation in a TMA core lies one step deeper than one beside it.
        depth = _hierarchy_depths(objects)
        regions, ignored = [], []
        labelled: list[tuple[int, float, int, BaseGeometry]] = []
        for record in records:
            if record.path_class is None:
                continue
            shape = _labelled_area(record, stroke_px)
            if shape is None:
                continue
            if record.path_class == REGION:
                regions.append(shape)
            elif is_ignored(record.path_class):
                ignored.append(shape)
            else:
                labelled.append((depth[record.id], -shape.area, class_map.label(record.path_class), shape))
        labelled.sort(key=lambda item: item[:2])
        self._regions = _ShapeLayer(regions, [0] * len(regions))
        self._ignored = _ShapeLayer(ignored, [0] * len(ignored))
        self._labelled = _ShapeLayer([item[3] for item in labelled], [item[2] for item in labelled])

    @property
    def has_regions(self) -> bool:
        """Whether ``Region*`` annotations say where to look."""
        return bool(self._regions.shapes)

    def touches(self, box: Box) -> bool:
        """Whether an annotation that may label pixels meets the box; what is unlabelled does not count.

        Parameters
        ----------
        box : Box
            In level-0 pixels.

        Returns
        -------
        bool
            False only where `paint` gives nothing but `IGNORE` and the label of unlabelled pixels.
        """
        window = shapely.box(*box.bounds)
        if self._regions.shapes and not self._regions.meets(window):
            return False
        inside_region = bool(self._regions.shapes) and self.class_map.region_unlabelled_label != IGNORE
        return inside_region or self._labelled.meets(window)

    def paint(self, box: Box, size: tuple[int, int], *, image_size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Paint the labels of `box` at `size`.

        Parameters
        ----------
        box : Box
            In level-0 pixels; may overhang the image.
        size : tuple of int
            Width and height of the mask.
        image_size : tuple of int, optional
            Width and height of the image; what lies outside becomes `IGNORE`.

        Returns
        -------
        ndarray of uint8, shape (height, width)
            Labels; `IGNORE` where nothing is known.
        """
        transform = _transform(box, size)
        shape = (size[1], size[0])
        mask = np.full(shape, self.class_map.unlabelled_label, np.uint8)
        if self._regions.shapes:
            inside = self._regions.burn(box, np.full(shape, IGNORE, np.uint8), transform) != IGNORE
            mask = np.where(inside, np.uint8(self.class_map.region_unlabelled_label), np.uint8(IGNORE))
            mask = np.where(inside, self._labelled.burn(box, mask, transform), np.uint8(IGNORE))
        else:
            mask = self._labelled.burn(box, mask, transform)
        if self._ignored.shapes:
            mask[self._ignored.burn(box, np.full(shape, IGNORE, np.uint8), transform) != IGNORE] = IGNORE
        if image_size is not None:
            _blank_outside(mask, transform, image_size)
        return mask


def unlearnable(
    annotation: Annotation, image_size: tuple[int, int] | None = None, *, stroke_px: float = 0.0
) -> str | None:
    """Say why an annotation gives no pixel a label; None where it does.

    Parameters
    ----------
    annotation : Annotation
        The annotation.
    image_size : tuple of int, optional
        Width and height of its image.
    stroke_px : float, optional
        As for `LabelPainter`.

    Returns
    -------
    str or None
        The reason, in words that follow a number of objects.
    """
    if annotation.path_class is None:
        return "without a class"
    if annotation.plane[1:] != Plane()[1:]:
        return "on another plane than z = 0, t = 0"
    try:
        shape = _labelled_area(annotation, stroke_px)
    except AnnotationError:
        return "with coordinates that are not numbers"
    if shape is None:
        return "without an area (a line or points)"
    return "outside the image" if image_size is not None and _is_outside(shape, image_size) else None


def _is_outside(shape: BaseGeometry, image_size: tuple[int, int]) -> bool:
    left, top, right, bottom = shape.bounds
    if left >= 0 and top >= 0 and right <= image_size[0] and bottom <= image_size[1]:
        return False
    return bool(shapely.intersection(shape, shapely.box(0, 0, *image_size)).area == 0)


def count_unlearnable(annotations: Iterable[Annotation], image_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Count annotations of an image that cannot train, by reason; see `unlearnable`.

    Other kinds of object, and what darefine itself puts there (containers of predictions, marks that say where to
    look), do not count.
    """
    counts: dict[str, int] = {}
    for record in annotations:
        is_counted = record.kind == "annotation" and not _is_container_or_mark(record)
        reason = unlearnable(record, image_size) if is_counted else None
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))


def _is_container_or_mark(record: Annotation) -> bool:
    return record.path_class is None and not {"darefine.run", "darefine.place"}.isdisjoint(record.metadata)


def unlearnable_words(counts: Mapping[str, int]) -> str:
    """One line on annotations that cannot train; empty where there are none."""
    if not counts:
        return ""
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items())
    return f"{sum(counts.values())} objects cannot train: {reasons}"


@dataclass(frozen=True)
class _ShapeLayer:
    """Shapes with their labels, found by place and drawn one over the other."""

    shapes: Sequence[BaseGeometry]
    labels: Sequence[int]
    tree: shapely.STRtree = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", shapely.STRtree(list(self.shapes)))
        shapely.prepare(list(self.shapes))

    def meets(self, window: BaseGeometry) -> bool:
        """Whether a shape meets the window."""
        return len(self.tree.query(window, predicate="intersects")) > 0

    def burn(self, box: Box, canvas: NDArray[np.uint8], transform: Affine) -> NDArray[np.uint8]:
        """Draw the labels of the shapes in a box on a canvas."""
        window = shapely.box(*box.bounds)
        hits = sorted(int(index) for index in self.tree.query(window))
        whole = [index for index in hits if shapely.contains(self.shapes[index], window)]
        if whole:
            # Whatever lies below the topmost shape that covers the whole box cannot be seen.
            canvas[:] = self.labels[whole[-1]]
            hits = [index for index in hits if index > whole[-1]]
        # Two mask pixels more, so that no edge that the clipping draws comes near the box.
        margin = 2 * math.ceil(max(transform.a, transform.e))
        parts = ((_clipped(self.shapes[index], box.grow(margin)), self.labels[index]) for index in hits)
        visible = [(part, label) for part, label in parts if not part.is_empty]
        if visible:
            _burn(visible, canvas, transform)
        return canvas


# rasterio takes longer to load than a project to read, and most of what uses records draws no mask.


def _transform(box: Box, size: tuple[int, int]) -> Affine:
    from rasterio.transform import Affine  # noqa: PLC0415

    return Affine(box.width / size[0], 0, box.x, 0, box.height / size[1], box.y)


def _burn(shapes: Iterable[tuple[BaseGeometry, int]], canvas: NDArray[np.uint8], transform: Affine) -> None:
    from rasterio.features import rasterize as burn  # noqa: PLC0415

    burn(shapes, out=canvas, transform=transform)


def _clipped(shape: BaseGeometry, window: Box) -> BaseGeometry:
    """Cut a shape to a window: drawing costs time per vertex, and most of a large outline is elsewhere."""
    if shapely.get_num_coordinates(shape) <= _FEW_VERTICES:
        return shape
    part = shapely.clip_by_rect(shape, *window.bounds)
    return part if part.is_empty or (part.is_valid and part.geom_type in ("Polygon", "MultiPolygon")) else shape


def _hierarchy_depths(records: Sequence[Annotation]) -> dict[UUID, int]:
    parents = {record.id: record.parent for record in records}
    depths: dict[UUID, int] = {}
    for record in records:
        depth, above, seen = 0, record.parent, {record.id}
        while above is not None and above not in seen:
            seen.add(above)
            depth, above = depth + 1, parents.get(above)
        depths[record.id] = depth
    return depths


def _labelled_area(record: Annotation, stroke_px: float) -> BaseGeometry | None:
    """Return the area that an annotation labels; None where it has none, or lies on a plane that is not looked at."""
    if record.plane[1:] != Plane()[1:]:
        return None
    return _areal(record.geometry) if stroke_px <= 0 else _stroked(record.geometry, stroke_px)


def _stroked(geometry: BaseGeometry | None, stroke_px: float) -> BaseGeometry | None:
    if geometry is None or geometry.is_empty:
        return None
    return _areal(geometry if geometry.area > 0 else geometry.buffer(stroke_px / 2))


def _blank_outside(mask: NDArray[np.uint8], transform: Affine, image_size: tuple[int, int]) -> None:
    columns = transform.c + (np.arange(mask.shape[1]) + 0.5) * transform.a
    rows = transform.f + (np.arange(mask.shape[0]) + 0.5) * transform.e
    mask[:, (columns < 0) | (columns >= image_size[0])] = IGNORE
    mask[(rows < 0) | (rows >= image_size[1]), :] = IGNORE


def _areal(geometry: BaseGeometry | None) -> BaseGeometry | None:
    """Return the polygonal part of a geometry, made valid; None where nothing has an area."""
    if geometry is None or geometry.is_empty:
        return None
    if not np.isfinite(shapely.get_coordinates(geometry)).all():
        raise AnnotationError(f"A {geometry.geom_type} has coordinates that are not finite; draw it again")
    valid = geometry if geometry.is_valid else shapely.make_valid(geometry)
    if valid.geom_type not in ("Polygon", "MultiPolygon"):
        # make_valid leaves lines beside the polygons where an outline ran back over itself.
        valid = shapely.union_all([part for part in shapely.get_parts(valid) if part.area > 0])
    return valid if valid.area > 0 else None
