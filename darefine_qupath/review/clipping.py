"""New predictions give way: to what a pathologist drew or took over, and where a pathologist rejected them before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import shapely

from darefine_qupath.polygons import GRID, ClassPolygon

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry import Polygon
    from shapely.geometry.base import BaseGeometry

__all__ = ["ClippedPolygons", "areal", "clip_predictions"]

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
    Yielded
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
