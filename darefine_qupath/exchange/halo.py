"""Read HALO's XML (``.annotations``): layers of regions as in Aperio's, with the kinds of region in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from shapely.geometry import LineString, MultiPoint, Point, Polygon, box

from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.layers import LayerReader, layers
from darefine_qupath.exchange.request import ReadRequest
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
    """Whether XML is HALO's: its corners are ``<V>``, its kinds of region are words."""
    if root.tag != "Annotations":
        return False
    regions = [region for _, found in layers(root) for region in found]
    return any(region.find("Vertices/V") is not None for region in regions) or (
        bool(regions) and all(region.get("Type", "0").strip().isalpha() for region in regions)
    )


def read_halo(request: ReadRequest, root: Element) -> Imported:
    """Read the layers of a HALO file.

    Parameters
    ----------
    request : ReadRequest
        The file. The class stands in ``layer`` (the default) or ``comment``.
    root : Element
        ``<Annotations>``.

    Returns
    -------
    Imported
        One annotation per region that is not a cut-out.
    """
    collector = request.collector(*_FIELDS)
    _HaloLayers(collector).read(root)
    return collector.result("HALO XML")


class _HaloLayers(LayerReader):
    corner_tag = "Vertices/V"

    def layer_name(self, layer: Element, index: int) -> str:
        name = layer.get("Name", "").strip()
        return f"layer {index} ({name})" if name else f"layer {index}"

    def fields(self, element: Element, layer: Element) -> Mapping[str, str | None]:
        """Give the layer's name; a comment is a class only where the user says so."""
        fields = {"layer": layer.get("Name")}
        return fields | {"comment": self.remark(element)} if "comment" in self.collector.fields.asked else fields

    def remark(self, element: Element) -> str | None:
        bodies = (comment.get("Body", "").strip() for comment in element.iterfind("Comments/Comment"))
        return next((body for body in bodies if body), None)

    def geometry(
        self, element: Element, corners: NDArray[np.float64], item: str
    ) -> tuple[BaseGeometry, RoiKind | None]:
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
