"""Read Hamamatsu's NDPA: shapes of NDP.view, in nanometers about the center of the glass slide.

The scanner notes in the slide how far the center of its image is from that of the glass; without it nobody can say
where a shape lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shapely.geometry import LineString, Point, Polygon

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.exchange.shapes import ellipse
from darefine_qupath.exchange.values import hex_color, number
from darefine_qupath.geometry import GlassFrame

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.annotations import RoiKind
    from darefine_qupath.exchange.imported import Imported

__all__ = ["is_ndpa", "read_ndpa"]

_FIELDS = ("title", "details")


def is_ndpa(root: Element) -> bool:
    """Whether ``<annotations>`` is Hamamatsu's, and not CVAT's."""
    return root.tag == "annotations" and (len(root) == 0 or root.find("ndpviewstate") is not None)


def read_ndpa(request: ReadRequest, root: Element) -> Imported:
    """Read the shapes of an NDPA file.

    Parameters
    ----------
    request : ReadRequest
        The file; its `glass` says where the image lies. The class stands in ``title`` (the default) or ``details``.
    root : Element
        ``<annotations>``.

    Returns
    -------
    Imported
        One annotation per shape.

    Raises
    ------
    ExchangeError
        If the place of the image on its glass is not known.
    """
    frame = None if request.glass is None else request.glass()
    if frame is None:
        raise ExchangeError(
            f"{request.path}: NDPA counts in nanometers from the center of the glass, and the image does not say where "
            f"it lies there (hamamatsu.XOffsetFromSlideCentre, hamamatsu.YOffsetFromSlideCentre and pixel size of an "
            f".ndpi file); import it into a project of the original .ndpi slide, or export GeoJSON"
        )
    collector = request.collector(*_FIELDS)
    for index, state in enumerate(root.iterfind("ndpviewstate"), 1):
        title = (state.findtext("title") or "").strip()
        item = f"shape {state.get('id') or index}" + (f" ({title})" if title else "")
        with collector.item(item):
            _read_state(collector, item, state, frame)
    return collector.result("NDPA", mpp=sum(frame.pixel) / 2)


def _read_state(collector: Collector, item: str, state: Element, frame: GlassFrame) -> None:
    unit = (state.findtext("coordformat") or "nanometers").strip().lower()
    if unit not in ("nanometers", "nanometres"):
        raise ExchangeError(f"{item} counts in {unit!r}, and not in nanometers")
    element = state.find("annotation")
    if element is None:
        raise ExchangeError(f"{item} is a view without a shape")
    drawn, roi = _geometry(element, item, frame)
    geometry = collector.shape(item, drawn)
    if geometry is None:
        return
    title, details = (state.findtext(field) for field in _FIELDS)
    fields = {"title": title, "details": details}
    if "details" not in collector.fields.asked:
        # A remark; a class only where the user says so.
        fields.pop("details")
    choice = collector.choose(fields)
    collector.color(choice.name, hex_color(element.get("color")))
    name = (title or "").strip() or None
    collector.add(item, Annotation(geometry=geometry, path_class=choice.name, name=name, roi=roi), choice)


def _geometry(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    kind = element.get("type", "").strip().lower()
    read = _KINDS.get(kind)
    if read is None:
        raise ExchangeError(f"{item} is of the unknown type {kind!r}")
    return read(element, item, frame)


def _freehand(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    corners = [frame.place(*_point(point, item)) for point in element.iterfind("pointlist/point")]
    if not corners:
        raise ExchangeError(f"{item} has no points")
    if len(corners) == 1:
        return Point(corners[0]), "Points"
    if len(corners) == 2 or not _is_closed(element):
        return LineString(corners), "Line" if len(corners) == 2 else "Polyline"
    return Polygon(corners), None


def _is_closed(element: Element) -> bool:
    closed = element.findtext("closed")
    if closed is None:
        return element.get("displayname") != "AnnotateFreehandLine"
    return closed.strip().lower() in ("1", "true")


def _circle(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    (x, y), radius = _point(element, item), number(element.findtext("radius"), item)
    return ellipse(*frame.place(x - radius, y - radius), *frame.place(x + radius, y + radius)), "Ellipse"


def _pin(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    return Point(frame.place(*_point(element, item))), "Points"


def _line(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    return LineString([frame.place(*_point(element, item, str(end))) for end in (1, 2)]), "Line"


_KINDS: dict[str, Callable[[Element, str, GlassFrame], tuple[BaseGeometry, RoiKind | None]]] = {
    "freehand": _freehand,
    "circle": _circle,
    "pin": _pin,
    "linearmeasure": _line,
    "pointer": _line,
}


def _point(element: Element, item: str, suffix: str = "") -> tuple[float, float]:
    return number(element.findtext(f"x{suffix}"), item), number(element.findtext(f"y{suffix}"), item)
