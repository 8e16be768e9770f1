"""Choose the ROIs that QuPath would make of geometries, and lay out what to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import RoiKind
from darefine_qupath.errors import AnnotationError
from darefine_qupath.project.qpdata.geometries import ELLIPSE_CORNERS, ellipse_corners, round_geometries
from darefine_qupath.project.qpdata.schema import ELLIPSE, GEOMETRY, LINE, POINTS, POLYGON, POLYLINE, RECTANGLE

__all__ = ["RoiSpec", "specs_of"]


_PORTION_SHAPES = 256


class RoiSpec(NamedTuple):
    """A ROI to be written: class of its proxy, numbers and arrays by field name."""

    proxy: str
    numbers: dict[str, float]
    arrays: dict[str, bytes]


def specs_of(shapes: Sequence[tuple[BaseGeometry, RoiKind | None]]) -> list[RoiSpec]:
    """Choose the ROIs that QuPath itself would make of geometries.

    Parameters
    ----------
    shapes : sequence of (shapely geometry, str or None)
        Geometries in level-0 pixels, and the ROI type to keep where the geometry can be one.

    Returns
    -------
    list of RoiSpec
        What to write.

    Raises
    ------
    AnnotationError
        If a geometry is empty, invalid, of mixed types, or not finite.
    """
    specs: list[RoiSpec] = []
    for first in range(0, len(shapes), _PORTION_SHAPES):
        specs += _specs_of(shapes[first : first + _PORTION_SHAPES])
    return specs


def _specs_of(shapes: Sequence[tuple[BaseGeometry, RoiKind | None]]) -> list[RoiSpec]:
    geometries = np.empty(len(shapes), object)
    geometries[:] = [geometry for geometry, _ in shapes]
    coordinates, owners = shapely.get_coordinates(geometries, return_index=True)
    finite = np.isfinite(coordinates).all(axis=1)
    unfit = shapely.is_empty(geometries)
    unfit[owners[~finite]] = True
    for geometry in geometries[unfit][:1]:
        message = f"An object cannot have the {geometry.geom_type} {_short(geometry)}: it has no finite extent"
        raise AnnotationError(message)
    for geometry in geometries[~shapely.is_valid(geometries)][:1]:
        raise AnnotationError(
            f"The {geometry.geom_type} {_short(geometry)} is not valid ({shapely.is_valid_reason(geometry)}); "
            f"make it valid first"
        )
    stored = round_geometries(shapely.force_2d(geometries))
    return [_spec_of(geometry, wanted) for geometry, (_, wanted) in zip(stored.tolist(), shapes, strict=True)]


def _spec_of(geometry: BaseGeometry, wanted: RoiKind | None) -> RoiSpec:
    if geometry.is_empty:
        raise AnnotationError("An object is too small: nothing is left of it at QuPath's precision of 0.01 px")
    if wanted != "Geometry" and geometry.geom_type.startswith("Multi") and len(geometry.geoms) == 1:
        geometry = geometry.geoms[0]
    if wanted == "Geometry" and geometry.geom_type not in ("GeometryCollection", "LinearRing"):
        return _wkb_spec(geometry)
    chooser = _CHOOSERS.get(geometry.geom_type)
    if chooser is None:
        raise AnnotationError(f"An object cannot have a {geometry.geom_type}; give it parts of one type")
    return chooser(geometry, wanted)


def _short(geometry: BaseGeometry) -> str:
    return str(geometry.wkt)[:60]


def _wkb_spec(geometry: BaseGeometry, _: RoiKind | None = None) -> RoiSpec:
    blob = shapely.to_wkb(geometry, byte_order=0, output_dimension=2)
    return RoiSpec(GEOMETRY, {}, {"wkb": blob})


def _vertex_spec(proxy: str, vertices: NDArray[np.float64]) -> RoiSpec:
    x, y = np.ascontiguousarray(vertices.T, ">f4")
    return RoiSpec(proxy, {}, {"x": x.tobytes(), "y": y.tobytes()})


def _bounds_spec(proxy: str, x: float, y: float, x2: float, y2: float) -> RoiSpec:
    return RoiSpec(proxy, {"x": x, "x2": x2, "y": y, "y2": y2}, {})


def _polygon_spec(polygon: BaseGeometry, wanted: RoiKind | None) -> RoiSpec:
    if len(polygon.interiors):
        return _wkb_spec(polygon)
    vertices = shapely.get_coordinates(polygon)[:-1]
    left, top, right, bottom = polygon.bounds
    if wanted in (None, "Rectangle") and _is_box(vertices):
        return _bounds_spec(RECTANGLE, left, top, right, bottom)
    if wanted == "Ellipse" and len(vertices) == ELLIPSE_CORNERS:
        ellipse = shapely.Polygon(ellipse_corners(np.array([polygon.bounds])[:, [0, 2, 1, 3]])[0])
        if ellipse.hausdorff_distance(polygon) <= 0.02:
            return _bounds_spec(ELLIPSE, left, top, right, bottom)
    return _vertex_spec(POLYGON, vertices)


def _is_box(vertices: NDArray[np.float64]) -> bool:
    if len(vertices) != 4:
        return False
    steps = np.abs(np.diff(np.concatenate([vertices, vertices[:1]]), axis=0))
    # Every side runs along one axis, and the axes take turns.
    return bool(((steps > 0).sum(axis=1) == 1).all() and (steps[0] == steps[2]).all() and (steps[1] == steps[3]).all())


def _line_spec(line: BaseGeometry, wanted: RoiKind | None) -> RoiSpec:
    vertices = shapely.get_coordinates(line)
    if len(vertices) == 2 and wanted != "Polyline":
        return _bounds_spec(LINE, *vertices.ravel().tolist())
    return _vertex_spec(POLYLINE, vertices)


def _points_spec(points: BaseGeometry, _: RoiKind | None) -> RoiSpec:
    return _vertex_spec(POINTS, shapely.get_coordinates(points))


_CHOOSERS: dict[str, Callable[[BaseGeometry, RoiKind | None], RoiSpec]] = {
    "Polygon": _polygon_spec,
    "MultiPolygon": _wkb_spec,
    "LineString": _line_spec,
    "LinearRing": _line_spec,
    "MultiLineString": _wkb_spec,
    "Point": _points_spec,
    "MultiPoint": _points_spec,
}
