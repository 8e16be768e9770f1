"""Aperio ImageScope XML, BACH's among it.

A layer (``Annotation``) holds regions (``Region``). A region's class is the value of its first attribute, else its
text, else the name or description of its layer. A negative region cuts a hole into the others of its layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
from shapely.geometry import LineString, MultiPoint, Point, Polygon, box

from darefine_qupath.annotations import Annotation, RoiKind
from darefine_qupath.classes import Colour
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.records import Collector, Note, ellipse, number, snapped

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.exchange.records import Imported

__all__ = ["read_aperio"]

# ImageScope's Region@Type. It also calls a freehand shape 1, so that two or four vertices make a rectangle.
_RECTANGLE, _ELLIPSE, _ARROW, _RULER, _COUNTER = "1", "2", "3", "4", "5"

_MPP_TOLERANCE = 0.01
_AREA_TOLERANCE = 0.005

_OVERSHOOT = 0.01
"""Share of a shape up to which a loop that runs the other way round is a slip of the pen at its end."""

_MAX_LOOPS = 1000


@dataclass
class _Region:
    item: str
    geometry: BaseGeometry
    roi: RoiKind | None
    path_class: str | None
    name: str | None


def read_aperio(path: Path, root: Element, *, mpp: float | None = None, classes: Sequence[str] = ()) -> Imported:
    """Read the layers of an ImageScope file.

    Parameters
    ----------
    path : Path
        The file, for messages.
    root : Element
        ``<Annotations>``.
    mpp : float, optional
        Micrometres per pixel of the image.
    classes : sequence of str, optional
        Class names of the project.

    Returns
    -------
    Imported
        One annotation per region that is not a cut-out.

    Raises
    ------
    ExchangeError
        If the file is HALO's, which has the same root.
    """
    if root.find(".//Vertices/V") is not None:
        raise ExchangeError(
            f"{path}: annotations of HALO (corners are <V>, not <Vertex>), whose XML is not read; export them "
            f"from HALO as GeoJSON"
        )
    collector = Collector(path, classes)
    stated = _positive(root.get("MicronsPerPixel"))
    if mpp is not None and stated is not None and abs(stated / mpp - 1) > _MPP_TOLERANCE:
        collector.warnings.append(
            f"{path}: drawn at {stated:g} um/px, the image has {mpp:g}; coordinates were taken as they are, check them"
        )
    for index, layer in enumerate(root.iter("Annotation"), 1):
        _read_layer(collector, layer, f"layer {layer.get('Id') or index}", stated)
    return collector.result("Aperio XML", mpp=stated)


def _read_layer(collector: Collector, layer: Element, layer_name: str, mpp: float | None) -> None:
    fallback = layer.get("Name") or _attribute(layer) or _description(layer)
    positive: list[_Region] = []
    negative: list[tuple[str, BaseGeometry]] = []
    for index, element in enumerate(layer.iter("Region"), 1):
        item = f"region {element.get('Id') or index} of {layer_name}"
        try:
            vertices = _vertices(element, item)
        except ExchangeError as error:
            collector.refuse(item, str(error).removeprefix(f"{item} "))
            continue
        drawn, roi = _geometry(element, vertices)
        geometry = collector.shape(item, drawn)
        if geometry is None:
            continue
        if roi is None:
            geometry = _without_overshoot(collector, item, drawn, geometry)
        if element.get("NegativeROA", "0").strip() == "1":
            negative.append((item, geometry))
            continue
        _check_area(collector, item, element, drawn, mpp)
        path_class = collector.class_name(_attribute(element) or element.get("Text") or fallback)
        collector.colour(path_class, _colour(layer.get("LineColor")))
        name = (element.get("Text") or "").strip() or None
        positive.append(_Region(item, geometry, roi, path_class, name))
    for item, hole in negative:
        _cut(collector, positive, item, hole)
    for region in positive:
        if not region.geometry.is_empty:
            read = Annotation(geometry=region.geometry, path_class=region.path_class, name=region.name, roi=region.roi)
            collector.add(region.item, read)


def _cut(collector: Collector, regions: Sequence[_Region], item: str, hole: BaseGeometry) -> None:
    cut = [region for region in regions if region.geometry.area > 0 and region.geometry.intersects(hole)]
    if not cut:
        collector.refuse(item, "is a negative region that cuts no other of its layer")
        return
    collector.cut_outs += 1
    for region in cut:
        left, _ = snapped(shapely.difference(region.geometry, hole))
        if left is None:
            collector.refuse(region.item, f"is wholly inside the negative {item}")
        region.geometry = left if left is not None else Polygon()
        region.roi = None


def _geometry(element: Element, vertices: NDArray[np.float64]) -> tuple[BaseGeometry, RoiKind | None]:
    kind, count = element.get("Type", "0").strip(), len(vertices)
    if kind == _COUNTER or count == 1:
        return (Point(vertices[0]) if count == 1 else MultiPoint(vertices)), "Points"
    (left, top), (right, bottom) = vertices.min(axis=0).tolist(), vertices.max(axis=0).tolist()
    if kind == _ELLIPSE and count in (2, 4):
        return ellipse(left, top, right, bottom), "Ellipse"
    if kind == _RECTANGLE and count == 2:
        return box(left, top, right, bottom), "Rectangle"
    if kind in (_ARROW, _RULER) or count == 2:
        return LineString(vertices), "Line" if count == 2 else "Polyline"
    return Polygon(vertices), None


def _without_overshoot(collector: Collector, item: str, drawn: BaseGeometry, geometry: BaseGeometry) -> BaseGeometry:
    """Drop what the pen enclosed the wrong way round when it overshot the start of the shape.

    ImageScope counts such a loop as negative. A larger one stays: somebody drew an eight.
    """
    if drawn.is_valid:
        return geometry
    loops = shapely.get_parts(shapely.polygonize([shapely.node(drawn.exterior)]))
    if not 1 < len(loops) <= _MAX_LOOPS:
        return geometry
    turns = np.array([_winding(drawn, loop.representative_point()) for loop in loops])
    areas = shapely.area(loops)
    is_backwards = turns * np.sign((turns * areas).sum()) < 0
    lost = areas[is_backwards].sum()
    if not 0 < lost <= _OVERSHOOT * areas.sum():
        return geometry
    kept, _ = snapped(shapely.union_all(loops[(turns != 0) & ~is_backwards]))
    collector.repaired[-1] = Note(
        item=item, reason=f"crossed itself; the pen overshot, {lost:.0f} of {areas.sum():.0f} px^2 dropped"
    )
    return kept if kept is not None else geometry


def _winding(polygon: BaseGeometry, point: Point) -> int:
    """How often the boundary runs round a point, counter-clockwise in a frame whose y points up."""
    corners = shapely.get_coordinates(polygon.exterior) - (point.x, point.y)
    (x1, y1), (x2, y2) = corners[:-1].T, corners[1:].T
    left = x1 * y2 - x2 * y1
    return int(np.sum((y1 <= 0) & (y2 > 0) & (left > 0)) - np.sum((y1 > 0) & (y2 <= 0) & (left < 0)))


def _vertices(element: Element, item: str) -> NDArray[np.float64]:
    points = [
        (number(vertex.get("X"), item), number(vertex.get("Y"), item)) for vertex in element.iterfind("Vertices/Vertex")
    ]
    if not points:
        raise ExchangeError(f"{item} has no vertices")
    return np.array(points, np.float64)


def _check_area(collector: Collector, item: str, element: Element, drawn: BaseGeometry, mpp: float | None) -> None:
    """Warn where the vertices do not enclose the area that the file states."""
    stated = _positive(element.get("AreaMicrons"))
    if stated is None or mpp is None or drawn.area == 0:
        return
    if abs(drawn.area * mpp**2 / stated - 1) > _AREA_TOLERANCE:
        collector.warnings.append(f"{item}: the file states {stated:.0f} um^2, its vertices {drawn.area * mpp**2:.0f}")


def _attribute(element: Element) -> str | None:
    """First attribute with a value."""
    values = (attribute.get("Value", "").strip() for attribute in element.iterfind("Attributes/Attribute"))
    return next((value for value in values if value), None)


def _description(layer: Element) -> str | None:
    """Name of a layer's first attribute, where somebody gave it one."""
    attribute = layer.find("Attributes/Attribute")
    name = "" if attribute is None else attribute.get("Name", "").strip()
    return name if name and name != "Description" else None


def _colour(text: str | None) -> Colour | None:
    try:
        packed = int(text or "")
    except ValueError:
        return None
    # Windows' COLORREF: red in the lowest byte.
    return Colour(packed & 255, (packed >> 8) & 255, (packed >> 16) & 255)


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
