"""Clip new predictions to what a pathologist drew or took over, and leave out what a pathologist rejected before.

`clip_to_review` holds the rule, `clip_predictions` the geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap, is_ignored
from darefine_qupath.polygons import GRID, ClassPolygon
from darefine_qupath.review.ownership import ImageObjects
from darefine_qupath.review.write_options import WriteOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry import Polygon
    from shapely.geometry.base import BaseGeometry

__all__ = ["ClippedPolygons", "areal", "clip_predictions", "clip_to_review", "smallest_part"]

_CLEARANCE = 2 * GRID
_REJECTED_FROM = 0.5


@dataclass(frozen=True, slots=True)
class ClippedPolygons:
    """What is left of new polygons.

    Attributes
    ----------
    polygons : tuple of ClassPolygon
        Whole, or the parts that remain.
    num_clipped : int
        Polygons that lost a part to a pathologist's objects.
    num_hidden : int
        Polygons of which nothing was left.
    num_rejected : int
        Polygons left out, or that lost a part, because a pathologist rejected their class at their place.
    """

    polygons: tuple[ClassPolygon, ...]
    num_clipped: int
    num_hidden: int
    num_rejected: int


def areal(geometry: BaseGeometry | None) -> BaseGeometry | None:
    """Part of a geometry that has an area, made valid; None where there is none."""
    if geometry is None or geometry.is_empty:
        return None
    valid = geometry if geometry.is_valid else shapely.make_valid(geometry)
    parts = [part for part in shapely.get_parts(valid) if part.geom_type in ("Polygon", "MultiPolygon")]
    area = shapely.union_all(parts) if len(parts) != 1 else parts[0]
    return area if area.area > 0 else None


def clip_predictions(
    polygons: Sequence[ClassPolygon],
    *,
    standing: Sequence[BaseGeometry],
    rejected: Mapping[int, Sequence[BaseGeometry]],
    min_area_px2: float,
    mpp: float | None = None,
) -> ClippedPolygons:
    """Clip new polygons.

    Parameters
    ----------
    polygons : sequence of ClassPolygon
        New predictions, in level-0 pixels.
    standing : sequence of shapely geometry
        What nothing may overlap; half a pixel of clearance makes up for rounding.
    rejected : mapping of int to sequence of shapely geometry
        By label, where that class was rejected: a polygon that lies there for the most part is left out, another
        loses what lies there.
    min_area_px2 : float
        Smaller parts of a clipped polygon are left out, in square level-0 pixels.
    mpp : float, optional
        Micrometres per level-0 pixel, for the areas.

    Returns
    -------
    ClippedPolygons
        Polygons that were not touched are the same objects as before.
    """
    if not polygons:
        return ClippedPolygons((), 0, 0, 0)
    shapes = np.array([item.geometry for item in polygons], np.object_)
    labels = np.array([item.label for item in polygons])
    refused = np.zeros(len(shapes), bool)
    for label, places in rejected.items():
        chosen = np.flatnonzero(labels == label)
        left = _without_rejected(shapes[chosen], places)
        refused[chosen] = left != shapes[chosen]
        shapes[chosen] = left
    hits = _overlaps(shapes, [shapely.buffer(shape, _CLEARANCE, join_style="mitre") for shape in standing])
    for index, blockers in hits.items():
        shapes[index] = _difference(shapes[index], blockers)
    kept: list[ClassPolygon] = []
    hidden = 0
    for index, item in enumerate(polygons):
        parts = [item] if shapes[index] is item.geometry else _parts(item, shapes[index], min_area_px2, mpp)
        hidden += not parts and not refused[index]
        kept.extend(parts)
    return ClippedPolygons(tuple(kept), len(hits), hidden, int(refused.sum()))


def _overlaps(shapes: NDArray[np.object_], others: Sequence[BaseGeometry]) -> dict[int, list[BaseGeometry]]:
    """By index of a shape, the others that it overlaps."""
    found: dict[int, list[BaseGeometry]] = {}
    if len(others):
        first, second = shapely.STRtree(shapes).query(list(others), predicate="intersects")
        for other, index in zip(first.tolist(), second.tolist(), strict=True):
            found.setdefault(index, []).append(others[other])
    return dict(sorted(found.items()))


def _without_rejected(shapes: NDArray[np.object_], places: Sequence[BaseGeometry]) -> NDArray[np.object_]:
    left = shapes.copy()
    for index, hits in _overlaps(shapes, places).items():
        place = shapely.union_all(hits)
        share = shapely.intersection(shapes[index], place).area / shapes[index].area
        if share >= _REJECTED_FROM:
            left[index] = shapely.Polygon()
        elif share > 0:
            left[index] = _difference(shapes[index], hits)
    return left


def _difference(shape: BaseGeometry, others: Sequence[BaseGeometry]) -> BaseGeometry:
    return shapely.difference(shape, shapely.union_all(others), grid_size=GRID)


def _parts(item: ClassPolygon, shape: BaseGeometry, smallest: float, mpp: float | None) -> list[ClassPolygon]:
    """Parts of a clipped polygon that are worth a look: neither small nor slivers."""
    width = np.sqrt(smallest) / 16
    parts: list[Polygon] = [
        part
        for part in shapely.get_parts(shape)
        if part.geom_type == "Polygon" and part.area >= smallest and not part.buffer(-width).is_empty
    ]
    return [
        replace(item, geometry=part, area_um2=None if mpp is None else part.area * mpp * mpp)
        for part in sorted(parts, key=lambda part: part.bounds)
    ]


_IGNORE_CLASS = "Ignore*"


def clip_to_review(
    polygons: Sequence[ClassPolygon], found: ImageObjects, classes: ClassMap, options: WriteOptions, mpp: float | None
) -> tuple[ClippedPolygons, tuple[str, ...]]:
    """Clip new predictions to what is a pathologist's in an image, and say what the user should know."""
    standing = _standing(found, options)
    rejected: dict[int, list[BaseGeometry]] = {}
    for item in found.predictions if options.remember_rejections else ():
        place = areal(item.written.record.geometry)
        # What a pathologist cut off from an object of ours was rejected as well.
        if (
            item.status in ("rejected", "reshaped")
            and place is not None
            and item.written.training_class in classes.names
        ):
            rejected.setdefault(classes.names.index(item.written.training_class), []).append(place)
    smallest = smallest_part(mpp, options)
    shapes = [shape for _, shape in standing]
    clipped = clip_predictions(polygons, standing=shapes, rejected=rejected, min_area_px2=smallest, mpp=mpp)
    return clipped, _covered_by_strangers(polygons, standing, classes)


def smallest_part(mpp: float | None, options: WriteOptions) -> float:
    """Square level-0 pixels below which what is left of a clipped polygon is left out."""
    return options.min_area_px2 if mpp is None else options.min_area_um2 / mpp**2


def _standing(found: ImageObjects, options: WriteOptions) -> list[tuple[str | None, BaseGeometry]]:
    """List what nothing may overlap, with its class."""
    theirs = [record for record in found.user_objects if _stands(record, options)]
    theirs += [item.current for item in found.adopted if item.current is not None]
    shapes = [(record.path_class, areal(record.geometry)) for record in theirs if record.plane[1:] == (0, 0)]
    return [(name, shape) for name, shape in shapes if shape is not None]


def _stands(record: Annotation, options: WriteOptions) -> bool:
    """Whether new predictions give way to an object that is not ours: a classified annotation, or ``Ignore*``."""
    name = record.path_class
    if record.kind != "annotation" or name is None or name in options.over:
        return False
    return name == _IGNORE_CLASS or not is_ignored(name)


def _covered_by_strangers(
    polygons: Sequence[ClassPolygon], standing: Sequence[tuple[str | None, BaseGeometry]], classes: ClassMap
) -> tuple[str, ...]:
    """Say so where annotations of a class that the model does not know hide most of a prediction."""
    shapes = np.array([item.geometry for item in polygons], np.object_)
    total = float(shapely.area(shapes).sum()) if len(shapes) else 0.0
    warnings = []
    for name in sorted({name for name, _ in standing if name is not None and not classes.knows(name)}):
        cover = shapely.union_all([shape for other, shape in standing if other == name])
        hidden = float(shapely.area(shapely.intersection(shapes, cover)).sum())
        if total and hidden > total / 2:
            warnings.append(
                f"Annotations of class {name!r} hide {hidden / total:.0%} of the prediction, which gives way to every "
                f"classified annotation; end the class name in '*' in QuPath, or let predictions lie over it"
            )
    return tuple(warnings)
