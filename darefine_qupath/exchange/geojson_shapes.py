"""Turn the geometries of GeoJSON into shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import GeometryCollection, LineString, MultiLineString, MultiPoint, MultiPolygon, Point, Polygon
from shapely.geometry.base import BaseGeometry

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.values import short_json
from darefine_qupath.limits import spoken

__all__ = ["GEOMETRIES", "shape_of"]

GEOMETRIES = ("Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection")

_MAX_COLLECTIONS = 5
"""Levels of collections in collections."""


def shape_of(member: object, depth: int = 0) -> BaseGeometry:
    """Build the shape of a GeoJSON geometry.

    Raises
    ------
    ExchangeError
        If it is none, or damaged; the message follows the name of its object.
    """
    if not isinstance(member, dict) or member.get("type") not in GEOMETRIES:
        raise ExchangeError(f"has no geometry but {short_json(member)}")
    kind = str(member["type"])
    try:
        if kind != "GeometryCollection":
            return _BUILDERS[kind](member["coordinates"])
        if depth >= _MAX_COLLECTIONS:
            raise ValueError("collections in collections")
        return GeometryCollection([shape_of(part, depth + 1) for part in member["geometries"]])
    except ExchangeError:
        raise
    except KeyError as error:
        raise ExchangeError(f"has a geometry of type {kind} that is damaged ({error} is missing)") from error
    except (shapely.errors.ShapelyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise ExchangeError(f"has a geometry of type {kind} that is damaged ({spoken(error)})") from error


def _positions(value: Any) -> NDArray[np.float64]:  # noqa: ANN401 - JSON is any value
    """Corners of a list of positions, shape (N, 2); heights are left out."""
    if not isinstance(value, list):
        raise TypeError(f"{short_json(value)} is no list of positions")
    try:
        corners = np.array(value, np.float64)
    except ValueError:
        corners = _ragged(value)
    if len(value) == 0:
        return np.empty((0, 2))
    if corners.ndim != 2 or corners.shape[1] < 2:
        raise ValueError(f"{short_json(value)} is no list of positions")
    if not np.isfinite(corners).all():
        raise ExchangeError("has a coordinate that is not a number")
    return corners[:, :2]


def _ragged(value: list[Any]) -> NDArray[np.float64]:
    """Corners of positions of which some have a height, and some none."""
    try:
        return np.array([position[:2] for position in value], np.float64)
    except ValueError:
        raise ValueError(f"{short_json(value)} of other things than pairs of numbers") from None


def _polygon(rings: Any) -> Polygon:  # noqa: ANN401 - JSON is any value
    corners = [_positions(ring) for ring in rings]
    return Polygon(corners[0], corners[1:]) if corners else Polygon()


_BUILDERS: Mapping[str, Callable[[Any], BaseGeometry]] = {
    "Point": lambda value: Point(*_positions([value])) if value else Point(),
    "MultiPoint": lambda value: MultiPoint(_positions(value)),
    "LineString": lambda value: LineString(_positions(value)),
    "MultiLineString": lambda value: MultiLineString([_positions(part) for part in value]),
    "Polygon": _polygon,
    "MultiPolygon": lambda value: MultiPolygon([_polygon(part) for part in value]),
}
