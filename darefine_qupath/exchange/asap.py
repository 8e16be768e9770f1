"""Read ASAP's XML: annotations of a type and a group, which is the class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from shapely.geometry import LineString, MultiPoint, Point, Polygon

from darefine_qupath.annotations import Annotation, RoiKind
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.class_fields import ClassChoice
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.exchange.values import hex_color, number

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.exchange.imported import Imported

__all__ = ["is_asap", "read_asap"]

_FIELDS = ("group", "name")
_AREAS = ("Polygon", "Spline", "Rectangle")


def is_asap(root: Element) -> bool:
    """Whether XML is ASAP's."""
    return root.tag == "ASAP_Annotations"


def read_asap(request: ReadRequest, root: Element) -> Imported:
    """Read the annotations of an ASAP file.

    Parameters
    ----------
    request : ReadRequest
        The file. The class stands in ``group`` (the default) or ``name``.
    root : Element
        ``<ASAP_Annotations>``.

    Returns
    -------
    Imported
        A spline becomes the polygon of its points.
    """
    collector = request.collector(*_FIELDS)
    for group in root.iterfind("AnnotationGroups/Group"):
        collector.color(collector.class_name(group.get("Name")), hex_color(group.get("Color")))
    for index, element in enumerate(root.iterfind("Annotations/Annotation")):
        name = (element.get("Name") or "").strip()
        item = f"annotation {index} ({name})" if name else f"annotation {index}"
        with collector.item(item):
            drawn, roi = _geometry(element, _points(element, item), item)
            geometry = collector.shape(item, drawn)
            if geometry is None:
                continue
            choice = _choice(collector, element, name)
            collector.color(choice.name, hex_color(element.get("Color")))
            record = Annotation(geometry=geometry, path_class=choice.name, name=name or None, roi=roi)
            collector.add(item, record, choice)
    return collector.result("ASAP XML")


def _choice(collector: Collector, element: Element, name: str) -> ClassChoice:
    group = element.get("PartOfGroup", "None")
    fields = {"group": None if group == "None" else group}
    # Every annotation has a name, which is a class only where the user says so.
    if "name" in collector.fields.asked:
        return collector.choose(fields | {"name": name})
    return collector.choose(fields, {} if fields["group"] or not name else {"name": name})


def _points(element: Element, item: str) -> NDArray[np.float64]:
    coordinates = sorted(
        element.iterfind("Coordinates/Coordinate"), key=lambda coordinate: number(coordinate.get("Order", "0"), item)
    )
    points = [(number(point.get("X"), item), number(point.get("Y"), item)) for point in coordinates]
    return np.array(points, np.float64).reshape(-1, 2)


def _geometry(element: Element, points: NDArray[np.float64], item: str) -> tuple[BaseGeometry, RoiKind | None]:
    kind = element.get("Type", "")
    if len(points) == 0:
        raise ExchangeError(f"{item} has no coordinates")
    if kind == "Dot":
        return Point(points[0]), "Points"
    if kind == "PointSet":
        return MultiPoint(points), "Points"
    if kind in ("Measurement", "Line") and len(points) > 1:
        return LineString(points), "Line" if len(points) == 2 else "Polyline"
    if kind not in _AREAS:
        raise ExchangeError(f"{item} is of the unknown type {kind!r}")
    if len(points) < 3:
        raise ExchangeError(f"{item} has {len(points)} corners and encloses no area")
    return Polygon(points), None
