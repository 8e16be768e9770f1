"""Read HALO's XML (``.annotations``): layers of regions as in Aperio's, with the kinds of region in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from shapely.geometry import LineString, MultiPoint, Point, Polygon, box

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.layers import Hole, Region, add_regions, is_negative, layers, line_colour, vertices
from darefine_qupath.exchange.shapes import ellipse

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.annotations import RoiKind
    from darefine_qupath.exchange.imported import Imported

__all__ = ["is_halo", "read_halo"]

_FIELDS = ("layer", "comment")
_AREAS = ("Polygon", "Rectangle", "Ellipse", "Freehand")


def is_halo(root: Element) -> bool:
    """Whether ``<Annotations>`` is HALO's: its corners are ``<V>``, its kinds of region are words."""
    regions = [region for _, found in layers(root) for region in found]
    return any(region.find("Vertices/V") is not None for region in regions) or (
        bool(regions) and all(region.get("Type", "0").strip().isalpha() for region in regions)
    )


def read_halo(path: Path, root: Element, *, classes: Sequence[str] = (), class_from: Sequence[str] = ()) -> Imported:
    """Read the layers of a HALO file.

    Parameters
    ----------
    path : Path
        The file, for messages.
    root : Element
        ``<Annotations>``.
    classes : sequence of str, optional
        Class names of the project.
    class_from : sequence of str, optional
        Where the class stands, of ``layer`` (the default) and ``comment``.

    Returns
    -------
    Imported
        One annotation per region that is not a cut-out.

    Raises
    ------
    ExchangeError
        If there is no such field.
    """
    collector = Collector(path, classes, class_from=class_from, fields=_FIELDS)
    for index, (layer, elements) in enumerate(layers(root), 1):
        name = layer.get("Name", "").strip()
        _read_layer(collector, layer, elements, f"layer {index} ({name})" if name else f"layer {index}")
    return collector.result("HALO XML")


def _read_layer(collector: Collector, layer: Element, elements: Sequence[Element], layer_name: str) -> None:
    regions: list[Region] = []
    holes: list[Hole] = []
    for index, element in enumerate(elements, 1):
        item = f"region {index} of {layer_name}"
        with collector.item(item):
            drawn, roi = _geometry(element, vertices(element, item, "Vertices/V"), item)
            geometry = collector.shape(item, drawn)
            if geometry is None:
                continue
            if is_negative(element):
                holes.append(Hole(item, geometry))
                continue
            comment = _comment(element)
            choice = collector.choose(_fields(collector, layer, comment))
            collector.color(choice.name, line_colour(layer))
            regions.append(Region(item, geometry, roi, choice, comment))
    add_regions(collector, layer_name, regions, holes)


def _fields(collector: Collector, layer: Element, comment: str | None) -> dict[str, str | None]:
    fields = {"layer": layer.get("Name")}
    # A comment is a class only where the user says so.
    return fields | {"comment": comment} if "comment" in collector.fields.asked else fields


def _comment(element: Element) -> str | None:
    bodies = (comment.get("Body", "").strip() for comment in element.iterfind("Comments/Comment"))
    return next((body for body in bodies if body), None)


def _geometry(element: Element, corners: NDArray[np.float64], item: str) -> tuple[BaseGeometry, RoiKind | None]:
    kind, count = element.get("Type", "").strip(), len(corners)
    if kind == "Pin" or (kind in _AREAS and count == 1):
        return (Point(corners[0]) if count == 1 else MultiPoint(corners)), "Points"
    if kind in ("Ruler", "Arrow", "Line"):
        if count == 1:
            raise ExchangeError(f"{item} is a {kind} of one point")
        return LineString(corners), "Line" if count == 2 else "Polyline"
    if kind not in _AREAS:
        raise ExchangeError(f"{item} is of the unknown type {kind!r}")
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    if kind == "Ellipse" and count == 2:
        return ellipse(left, top, right, bottom), "Ellipse"
    if kind == "Rectangle" and count == 2:
        return box(left, top, right, bottom), "Rectangle"
    if count == 2:
        raise ExchangeError(f"{item} is a {kind} of 2 corners and encloses no area")
    return Polygon(corners), None
