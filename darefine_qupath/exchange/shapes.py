"""Bring shapes to QuPath's precision and make them valid, at a cost that is known before."""

from __future__ import annotations

import math

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiLineString, MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

__all__ = ["crossings", "ellipse", "on_grid", "polygons_of", "signed_area", "snapped"]

_ELLIPSE_CORNERS = 100
_PRECISION = 0.01

_POLYGON = 3
"""GEOS's number of polygons; those of collections and of multiple shapes are larger."""

_PAIRS = 8_000_000
"""Pairs of segments compared at a time, at most: all of a shape of 100,000 corners would be 10^10."""

_FREE_PAIRS = 20
"""Neighbors of a segment that cost nothing: any shape has them."""

_PAIRS_PER_CROSSING = 200
"""Pairs of segments that take as long to compare as a crossing takes to repair."""


def snapped(geometry: BaseGeometry) -> tuple[BaseGeometry | None, bool]:
    """Bring a geometry to QuPath's precision, and make it valid there.

    Parameters
    ----------
    geometry : shapely geometry
        In level-0 pixels.

    Returns
    -------
    shapely geometry or None
        On a grid of 0.01 px, valid; None where an areal geometry has no area, or a line no length.
    bool
        Whether it was not valid. A ring that crosses itself keeps all that it encloses, as QuPath fills it.
    """
    if geometry.geom_type == "GeometryCollection":
        # Only what has an area is a shape; polygons that overlap become one.
        geometry = MultiPolygon(polygons_of(geometry))
    rounded = shapely.transform(geometry, on_grid)
    if geometry.geom_type in ("LineString", "MultiLineString"):
        return _with_length(rounded), False
    if geometry.geom_type not in ("Polygon", "MultiPolygon", "GeometryCollection"):
        return (None if rounded.is_empty else rounded), False
    repaired = not rounded.is_valid
    if repaired:
        fixed = shapely.make_valid(rounded, method="structure", keep_collapsed=False)
        rounded = shapely.set_precision(fixed, _PRECISION)
    polygons = [part for part in polygons_of(rounded) if part.area > 0]
    if not polygons:
        return None, repaired
    return (polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)), repaired


def _with_length(lines: BaseGeometry) -> BaseGeometry | None:
    """Lines without those whose points are all the same, a ruler's, say; None where none is left."""
    if lines.is_valid and not lines.is_empty:
        return lines
    parts = [part for part in shapely.get_parts(lines) if part.length > 0]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else MultiLineString(parts)


def crossings(geometry: BaseGeometry, most: int) -> float:
    """How often the rings of a shape meet, other than from corner to corner; stops counting beyond `most`.

    Pairs of segments that only lie near each other count for the time that it takes to look at them.
    """
    starts, ends = _segments(geometry)
    if len(starts) == 0:
        return 0.0
    tree = shapely.STRtree(shapely.linestrings(np.stack([starts, ends], axis=1)))
    count, step = 0.0, max(_PAIRS // len(starts), 8)
    for first in range(0, len(starts), step):
        # Their boxes meet; each pair is found from both sides, and once is enough.
        one, other = tree.query(tree.geometries[first : first + step])
        one, other = one[other > one + first] + first, other[other > one + first]
        met = _meet(starts[one], ends[one], starts[other], ends[other])
        looked_at = min(step, len(starts) - first)
        # Each meets the next one.
        count += max(int(met.sum()) - looked_at, 0)
        count += max(len(one) - _FREE_PAIRS * looked_at, 0) / _PAIRS_PER_CROSSING
        if count > most:
            break
    return count


def _segments(geometry: BaseGeometry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of each segment of the rings of a shape, shape (N, 2); where the pen stood still is none."""
    corners, ring = shapely.get_coordinates(shapely.get_rings(polygons_of(geometry)), return_index=True)
    is_segment = (ring[:-1] == ring[1:]) & (corners[:-1] != corners[1:]).any(axis=1)
    return corners[:-1][is_segment], corners[1:][is_segment]


def _meet(
    a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64], d: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether the segments a-b and c-d, whose boxes meet, do so too."""
    across = _side(a, b, c) * _side(a, b, d) <= 0
    return np.asarray(across & (_side(c, d, a) * _side(c, d, b) <= 0))


def _side(a: NDArray[np.float64], b: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    along, to = b - a, point - a
    return np.sign(along[:, 0] * to[:, 1] - along[:, 1] * to[:, 0])


def polygons_of(geometry: BaseGeometry) -> list[BaseGeometry]:
    """Polygons of a geometry, those in collections of collections too."""
    parts = shapely.get_parts([geometry])
    while (shapely.get_type_id(parts) > _POLYGON).any():
        parts = shapely.get_parts(parts)
    return list(parts[shapely.get_type_id(parts) == _POLYGON])


def on_grid(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates at QuPath's precision of 0.01 px."""
    # Halves upwards, as Java rounds.
    return np.asarray(np.floor(coordinates * 100 + 0.5) / 100)


def ellipse(left: float, top: float, right: float, bottom: float) -> Polygon:
    """Ellipse in a rectangle, as the polygon of 100 corners that QuPath makes of it."""
    angles = np.arange(_ELLIPSE_CORNERS) * (2 * math.pi / _ELLIPSE_CORNERS)
    x = (left + right) / 2 + (right - left) / 2 * np.cos(angles)
    y = (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angles)
    return Polygon(np.column_stack([x, y]))


def signed_area(geometry: BaseGeometry) -> float:
    """Area by the corners in their order; a part that runs the other way round counts against the rest."""
    total = 0.0
    for polygon in shapely.get_parts(geometry):
        if polygon.geom_type == "Polygon":
            rings = [polygon.exterior, *polygon.interiors]
            areas = [_ring_area(shapely.get_coordinates(ring)) for ring in rings]
            total += abs(areas[0]) - sum(abs(area) for area in areas[1:])
    return total


def _ring_area(points: NDArray[np.float64]) -> float:
    moved = points - points[0]
    return float(np.sum(moved[:-1, 0] * moved[1:, 1] - moved[1:, 0] * moved[:-1, 1]) / 2)
