"""Annotation records, and how they become masks.

A record is what every engine and importer gives and takes; no engine object leaks out. `LabelPainter` applies the
label rules of a `ClassMap` to the annotations of one image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import UUID, uuid4

import numpy as np
import shapely

from darefine_qupath.classes import IGNORE, REGION, ClassMap, is_ignored
from darefine_qupath.errors import AnnotationError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rasterio.transform import Affine
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.geometry import Box

__all__ = [
    "ANNOTATOR",
    "NOBODY",
    "Annotation",
    "Kind",
    "LabelPainter",
    "Plane",
    "RoiKind",
    "annotator_of",
    "annotators_in",
    "by_annotators",
    "class_counts",
    "count_unlearnable",
    "rasterize",
    "unlearnable",
    "unlearnable_words",
]

Kind = Literal["annotation", "detection", "cell", "tile", "tma core"]
RoiKind = Literal["Rectangle", "Ellipse", "Line", "Polyline", "Polygon", "Points", "Geometry"]

ANNOTATOR = "darefine.annotator"
"""Metadata that says who drew an object, where it was imported with that."""

NOBODY = "-"
"""Names, among annotators, the objects that have none: what was drawn in QuPath, say."""

_FEW_VERTICES = 64


class Plane(NamedTuple):
    """Image plane of an object: channel (-1 = all), z-slice and time point."""

    c: int = -1
    z: int = 0
    t: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One object of an image.

    Attributes
    ----------
    geometry : shapely geometry or None
        In level-0 pixels, as QuPath's own ``getGeometry`` gives it; None for an object without a ROI.
    path_class : str or None
        Full class name (``"Tumor: Positive"``); None = unclassified.
    id : UUID
        Identity in the project.
    kind : str
        ``"annotation"``, ``"detection"``, ``"cell"``, ``"tile"`` or ``"tma core"``.
    name : str or None
        As shown in QuPath.
    locked : bool
        Locked in QuPath.
    parent : UUID or None
        The object it lies below; None = the root.
    measurements : mapping of str to float
        In order.
    metadata : mapping of str to str
        Without the identity.
    roi : str or None
        QuPath's ROI type; None on a new record lets the geometry decide.
    plane : Plane
        Where it lies in a stack.
    colour : int or None
        Colour of this one object (ARGB), over that of its class.
    class_probability : float
        NaN = not set.
    nucleus : shapely geometry or None
        Of a cell.
    is_missing : bool
        Of a TMA core.
    """

    geometry: BaseGeometry | None
    path_class: str | None = None
    id: UUID = field(default_factory=uuid4)
    kind: Kind = "annotation"
    name: str | None = None
    locked: bool = False
    parent: UUID | None = None
    measurements: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    roi: RoiKind | None = None
    plane: Plane = Plane()
    color: int | None = None
    class_probability: float = math.nan
    nucleus: BaseGeometry | None = None
    is_missing: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether all is the same; two probabilities that are not set are, which dataclasses deny since Python 3.13."""
        return _values(self) == _values(other) if isinstance(other, Annotation) else NotImplemented

    @property
    def area(self) -> float:
        """Area in square level-0 pixels, exact for an ellipse (its geometry is a 100-cornered polygon)."""
        if self.geometry is None:
            return 0.0
        if self.roi == "Ellipse":
            left, top, right, bottom = self.geometry.bounds
            return float(math.pi * (right - left) * (bottom - top) / 4)
        return float(self.geometry.area)


# Tuples take a value for equal to itself, and every NaN of a record is `math.nan`.
_values = attrgetter(*(item.name for item in fields(Annotation)))


def class_counts(annotations: Iterable[Annotation]) -> dict[str, int]:
    """Annotations per class, unclassified ones left out; sorted by name."""
    counts: dict[str, int] = {}
    for annotation in annotations:
        if annotation.path_class is not None:
            counts[annotation.path_class] = counts.get(annotation.path_class, 0) + 1
    return dict(sorted(counts.items()))


def annotator_of(annotation: Annotation) -> str | None:
    """Who drew an annotation, where it says so."""
    return annotation.metadata.get(ANNOTATOR) or None


def by_annotators(annotations: Iterable[Annotation], names: Sequence[str]) -> tuple[Annotation, ...]:
    """Annotations of some annotators, `NOBODY` for those that have none; all of them where no name is given.

    What bounds the work (``Region*``, ``Ignore*``) and has no annotator counts for every one.
    """
    return tuple(
        record
        for record in annotations
        if not names
        or (annotator_of(record) or NOBODY) in names
        or (_is_bound(record) and annotator_of(record) is None)
    )


def annotators_in(annotations: Iterable[Annotation]) -> set[str]:
    """Whose classes the annotations of an image hold, `NOBODY` among them; ``Region*`` and ``Ignore*`` are nobody's."""
    return {
        annotator_of(record) or NOBODY
        for record in annotations
        if record.kind == "annotation"
        and record.path_class is not None
        and not _is_bound(record)
        and "darefine.run" not in record.metadata
    }


def _is_bound(record: Annotation) -> bool:
    return record.path_class is not None and (record.path_class == REGION or is_ignored(record.path_class))


def _areal(geometry: BaseGeometry | None) -> BaseGeometry | None:
    """Polygonal part of a geometry, made valid; None where nothing has an area."""
    if geometry is None or geometry.is_empty:
        return None
    if not np.isfinite(shapely.get_coordinates(geometry)).all():
        raise AnnotationError(f"A {geometry.geom_type} has coordinates that are not finite; draw it again")
    valid = geometry if geometry.is_valid else shapely.make_valid(geometry)
    if valid.geom_type not in ("Polygon", "MultiPolygon"):
        # make_valid leaves lines beside the polygons where an outline ran back over itself.
        valid = shapely.union_all([part for part in shapely.get_parts(valid) if part.area > 0])
    return valid if valid.area > 0 else None


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
        shape = _labelling(annotation, stroke_px)
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
        is_counted = record.kind == "annotation" and not _is_furniture(record)
        reason = unlearnable(record, image_size) if is_counted else None
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))


def _is_furniture(record: Annotation) -> bool:
    return record.path_class is None and not {"darefine.run", "darefine.place"}.isdisjoint(record.metadata)


def unlearnable_words(counts: Mapping[str, int]) -> str:
    """One line on annotations that cannot train; empty where there are none."""
    if not counts:
        return ""
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items())
    return f"{sum(counts.values())} objects cannot train: {reasons}"


class LabelPainter:
    """Paints the labels of one image into any box of it.

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
    num_skipped : int
        Annotations with a class that label nothing all the same: without an area, or not on the plane z = 0, t = 0.

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
        self.num_skipped = 0
        # Other kinds of object count too: an annotation in a TMA core lies one step deeper than one beside it.
        depth = _depths(objects)
        regions, ignored = [], []
        labelled: list[tuple[int, float, int, BaseGeometry]] = []
        for record in records:
            if record.path_class is None:
                continue
            shape = _labelling(record, stroke_px)
            if shape is None:
                self.num_skipped += 1
            elif record.path_class == REGION:
                regions.append(shape)
            elif is_ignored(record.path_class):
                ignored.append(shape)
            else:
                labelled.append((depth[record.id], -shape.area, class_map.label(record.path_class), shape))
        labelled.sort(key=lambda item: item[:2])
        self._regions = _Layer(regions, [0] * len(regions))
        self._ignored = _Layer(ignored, [0] * len(ignored))
        self._labelled = _Layer([item[3] for item in labelled], [item[2] for item in labelled])

    @property
    def is_empty(self) -> bool:
        """Whether no annotation gives any pixel a label."""
        return not self._labelled.shapes and (
            not self._regions.shapes or self.class_map.region_unlabelled_label == IGNORE
        )

    @property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """Bounds of all that is labelled, in level-0 pixels."""
        shapes = [*self._labelled.shapes, *self._regions.shapes]
        if not shapes:
            return None
        left, top, right, bottom = (float(value) for value in shapely.total_bounds(shapes))
        return left, top, right, bottom

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
        """Labels of `box`, drawn at `size`.

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


@dataclass(frozen=True)
class _Layer:
    shapes: Sequence[BaseGeometry]
    labels: Sequence[int]
    tree: shapely.STRtree = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", shapely.STRtree(list(self.shapes)))
        shapely.prepare(list(self.shapes))

    def meets(self, window: BaseGeometry) -> bool:
        return len(self.tree.query(window, predicate="intersects")) > 0

    def burn(self, box: Box, canvas: NDArray[np.uint8], transform: Affine) -> NDArray[np.uint8]:
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


def _depths(records: Sequence[Annotation]) -> dict[UUID, int]:
    parents = {record.id: record.parent for record in records}
    depths: dict[UUID, int] = {}
    for record in records:
        depth, above, seen = 0, record.parent, {record.id}
        while above is not None and above not in seen:
            seen.add(above)
            depth, above = depth + 1, parents.get(above)
        depths[record.id] = depth
    return depths


def _labelling(record: Annotation, stroke_px: float) -> BaseGeometry | None:
    """Area that an annotation labels; None where it has none, or lies on a plane that is not looked at."""
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


def rasterize(
    annotations: Iterable[Annotation], class_map: ClassMap, *, box: Box, downsample: float
) -> NDArray[np.uint8]:
    """Mask of a box at a downsample; see `LabelPainter` for the rules.

    Parameters
    ----------
    annotations : iterable of Annotation
        All annotations of the image.
    class_map : ClassMap
        Names to labels.
    box : Box
        In level-0 pixels.
    downsample : float
        Level-0 pixels per mask pixel.

    Returns
    -------
    ndarray of uint8, shape (height, width)
        Labels.
    """
    if not downsample > 0:
        raise AnnotationError(f"A downsample must be positive, got {downsample}")
    size = (max(1, round(box.width / downsample)), max(1, round(box.height / downsample)))
    return LabelPainter(annotations, class_map).paint(box, size)
