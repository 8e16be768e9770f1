"""Read Aperio ImageScope's XML, which BACH uses too.

A layer (``Annotation``) holds regions (``Region``). A region's class is the value of its first attribute, else the name
that somebody gave its layer, else its text (which is as often a remark), else the description of its layer. A negative
region cuts a hole into the others of its layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import shapely
from shapely.geometry import LineString, MultiPoint, Point, Polygon, box

from darefine_qupath.annotations import RoiKind
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.imported import Note
from darefine_qupath.exchange.layers import LayerReader
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.exchange.shapes import crossings, ellipse, snapped

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.exchange.imported import Imported

__all__ = ["is_aperio", "read_aperio"]

# ImageScope's Region@Type. It also calls a freehand shape 1, so that two or four vertices make a rectangle.
_RECTANGLE, _ELLIPSE, _ARROW, _RULER, _COUNTER = "1", "2", "3", "4", "5"

_FIELDS = ("attribute", "layer", "text", "description")

# What programs call a layer that nobody gave a name.
_NAMELESS = re.compile(r"(layer|annotation|region)s?[\s_-]*\d*", re.IGNORECASE | re.ASCII)

_MPP_TOLERANCE = 0.01
_AREA_TOLERANCE = 0.005

_OVERSHOOT = 0.01
"""Share of a shape up to which a loop that runs the other way round is a slip of the pen at its end."""

_MAX_LOOPS = 1000


def is_aperio(root: Element) -> bool:
    """Whether XML is Aperio's, where it is not HALO's."""
    return root.tag == "Annotations"


def read_aperio(request: ReadRequest, root: Element) -> Imported:
    """Read the layers of an ImageScope file.

    Parameters
    ----------
    request : ReadRequest
        The file. The class stands in ``attribute``, ``layer``, ``text`` or ``description``.
    root : Element
        ``<Annotations>``.

    Returns
    -------
    Imported
        One annotation per region that is not a cut-out.
    """
    collector = request.collector(*_FIELDS)
    stated = _positive(root.get("MicronsPerPixel"))
    if request.mpp is not None and stated is not None and abs(stated / request.mpp - 1) > _MPP_TOLERANCE:
        collector.warnings.append(
            f"{request.path}: drawn at {stated:g} um/px, the image has {request.mpp:g}; coordinates were taken as they "
            f"are, check them"
        )
    _AperioLayers(collector, stated).read(root)
    return collector.result("Aperio XML", mpp=stated)


class _AperioLayers(LayerReader):
    corner_tag = "Vertices/Vertex"

    def __init__(self, collector: Collector, mpp: float | None) -> None:
        super().__init__(collector)
        self._mpp = mpp

    def layer_name(self, layer: Element, index: int) -> str:
        return f"layer {layer.get('Id') or index}"

    def region_id(self, element: Element) -> str | None:
        return element.get("Id")

    def geometry(
        self,
        element: Element,
        corners: NDArray[np.float64],
        item: str,  # noqa: ARG002
    ) -> tuple[BaseGeometry, RoiKind | None]:
        kind, count = element.get("Type", "0").strip(), len(corners)
        if kind == _COUNTER or count == 1:
            return (Point(corners[0]) if count == 1 else MultiPoint(corners)), "Points"
        (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        if kind == _ELLIPSE and count in (2, 4):
            return ellipse(left, top, right, bottom), "Ellipse"
        if kind == _RECTANGLE and count == 2:
            return box(left, top, right, bottom), "Rectangle"
        if kind in (_ARROW, _RULER) or count == 2:
            return LineString(corners), "Line" if count == 2 else "Polyline"
        return Polygon(corners), None

    def mended(self, item: str, drawn: BaseGeometry, geometry: BaseGeometry) -> BaseGeometry:
        """Drop what the pen enclosed the wrong way round when it overshot the start of the shape.

        ImageScope counts such a loop as negative. A larger one stays: somebody drew an eight.
        """
        if drawn.is_valid or crossings(drawn, _MAX_LOOPS) > _MAX_LOOPS:
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
        self.collector.repaired[-1] = Note(
            item=item, reason=f"crossed itself; the pen overshot, {lost:.0f} of {areas.sum():.0f} px^2 dropped"
        )
        return kept if kept is not None else geometry

    def check(self, item: str, element: Element, drawn: BaseGeometry) -> None:
        """Warn where the vertices do not enclose the area that the file states."""
        stated = _positive(element.get("AreaMicrons"))
        if stated is None or self._mpp is None or drawn.area == 0:
            return
        area = drawn.area * self._mpp**2
        if abs(area / stated - 1) > _AREA_TOLERANCE:
            self.collector.warnings.append(f"{item}: the file states {stated:.0f} um^2, its vertices {area:.0f}")

    def fields(self, element: Element, layer: Element) -> Mapping[str, str | None]:
        """Give what may be the class of a region; a layer's name that nobody gave comes last."""
        name = layer.get("Name", "").strip()
        fields = {
            "attribute": _attribute(element),
            "layer": name,
            "text": element.get("Text"),
            "description": _attribute(layer) or _description(layer),
        }
        if _NAMELESS.fullmatch(name):
            fields["layer"] = fields.pop("layer")
        return fields

    def remark(self, element: Element) -> str | None:
        return (element.get("Text") or "").strip() or None


def _winding(polygon: BaseGeometry, point: Point) -> int:
    """How often the boundary runs round a point, counter-clockwise in a frame whose y points up."""
    corners = shapely.get_coordinates(polygon.exterior) - (point.x, point.y)
    (x1, y1), (x2, y2) = corners[:-1].T, corners[1:].T
    left = x1 * y2 - x2 * y1
    return int(np.sum((y1 <= 0) & (y2 > 0) & (left > 0)) - np.sum((y1 > 0) & (y2 <= 0) & (left < 0)))


def _attribute(element: Element) -> str | None:
    """First attribute with a value."""
    values = (attribute.get("Value", "").strip() for attribute in element.iterfind("Attributes/Attribute"))
    return next((value for value in values if value), None)


def _description(layer: Element) -> str | None:
    """Name of a layer's first attribute, where somebody gave it one."""
    attribute = layer.find("Attributes/Attribute")
    name = "" if attribute is None else attribute.get("Name", "").strip()
    return name if name and name != "Description" else None


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
