"""Make geometries as QuPath makes them: its precision, its ellipses, the area that crossing edges fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

__all__ = [
    "ELLIPSE_CORNERS",
    "MAX_CROSSINGS",
    "ellipse_corners",
    "filled_area",
    "round_coordinates",
    "round_geometries",
]

# Polygons that cross themselves more often than this (and than once in two vertices) are damaged; their parts would
# fill memory.
MAX_CROSSINGS = 20_000


def filled_area(rings: Sequence[NDArray[np.float64]], *, max_crossings: int) -> tuple[BaseGeometry, int]:
    """Area that the non-zero winding rule fills, as Java's ``Area`` of a path does.

    Parameters
    ----------
    rings : sequence of ndarray of float, shape (n, 2)
        Corners, at least 3 a ring; the last one need not repeat the first.
    max_crossings : int
        How often edges may cross.

    Returns
    -------
    Polygon or MultiPolygon
        Valid; empty where nothing is filled.
    int
        How often edges cross.

    Raises
    ------
    ValueError
        If the rings cross so often that the parts would not fit into memory.
    """
    if not rings:
        return shapely.Polygon(), 0
    starts, ends = _edges(rings)
    crossings = _count_crossings(starts, ends, max_crossings)
    if crossings > max_crossings:
        raise ValueError(f"{len(starts)} edges cross more than {max_crossings} times")
    return _fill_edges(starts, ends), crossings


def _edges(rings: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    closed = [np.concatenate([ring, ring[:1]]) for ring in rings]
    return np.concatenate([ring[:-1] for ring in closed]), np.concatenate([ring[1:] for ring in closed])


def _fill_edges(starts: NDArray[np.float64], ends: NDArray[np.float64]) -> BaseGeometry:
    lines = shapely.union_all(shapely.linestrings(np.stack([starts, ends], axis=1)))
    faces = shapely.get_parts(shapely.polygonize([lines]))
    if not len(faces):
        return shapely.Polygon()
    points = shapely.get_coordinates(shapely.point_on_surface(faces))
    filled: BaseGeometry = shapely.union_all(faces[_winding(points, starts, ends) != 0])
    return filled


def _count_crossings(starts: NDArray[np.float64], ends: NDArray[np.float64], limit: int) -> int:
    """Pairs of edges that meet, those of neighbours not counted; stops soon after `limit`."""
    count = len(starts)
    segments = shapely.linestrings(np.stack([starts, ends], axis=1))
    tree = shapely.STRtree(segments)
    step = max(1, 2_000_000 // count)
    crossings = 0
    for first in range(0, count, step):
        part = segments[first : first + step]
        # An edge meets itself and its two neighbours; every other pair is found from both sides.
        crossings += max(0, tree.query(part, predicate="intersects").shape[1] - 3 * len(part))
        if crossings > 2 * limit:
            break
    return crossings // 2


def _winding(points: NDArray[np.float64], starts: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.intp]:
    """Winding number of the edges around every point."""
    numbers = np.zeros(len(points), np.intp)
    step = max(1, 1_000_000 // len(starts))
    for first in range(0, len(points), step):
        x, y = points[first : first + step, :1], points[first : first + step, 1:]
        upward = (starts[:, 1] <= y) & (ends[:, 1] > y)
        downward = (starts[:, 1] > y) & (ends[:, 1] <= y)
        side = (ends[:, 0] - starts[:, 0]) * (y - starts[:, 1]) - (x - starts[:, 0]) * (ends[:, 1] - starts[:, 1])
        numbers[first : first + step] = (upward & (side > 0)).sum(axis=1) - (downward & (side < 0)).sum(axis=1)
    return numbers


ELLIPSE_CORNERS = 100


def round_coordinates(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to QuPath's 0.01 px, halves upwards as Java does."""
    with np.errstate(over="ignore"):
        round_geometries: NDArray[np.float64] = np.floor(coordinates * 100 + 0.5) / 100
    # Numbers as large as that are whole anyway.
    return np.where(np.abs(coordinates) < 1e13, round_geometries, coordinates)


def ellipse_corners(bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners of ellipses in boxes of x, x2, y, y2."""
    angles = np.arange(ELLIPSE_CORNERS) * (2 * np.pi / ELLIPSE_CORNERS)
    radius_x, radius_y = (bounds[:, 1] - bounds[:, 0]) / 2, (bounds[:, 3] - bounds[:, 2]) / 2
    x = np.outer(radius_x, np.cos(angles)) + (bounds[:, 0] + radius_x)[:, None]
    y = np.outer(radius_y, np.sin(angles)) + (bounds[:, 2] + radius_y)[:, None]
    return np.stack([x, y], axis=2)


def round_geometries(geometries: NDArray[Any]) -> NDArray[Any]:
    """Geometries at QuPath's precision; parts that fall together there are dissolved."""
    made: NDArray[Any] = shapely.transform(geometries, round_coordinates)
    broken = ~shapely.is_valid(made) & shapely.is_valid(geometries)
    if broken.any():
        made[broken] = shapely.transform(shapely.set_precision(geometries[broken], 0.01), round_coordinates)
    return made
