"""Hamamatsu's NDPA: shapes of NDP.view, in nanometres about the center of the glass slide.

The scanner notes in the slide how far the center of its image is from that of the glass; without it nobody can say
where a shape lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from shapely.geometry import LineString, Point, Polygon

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Colour
from darefine_qupath.errors import ClassMapError, ExchangeError
from darefine_qupath.exchange.records import Collector, ellipse, number

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.annotations import RoiKind
    from darefine_qupath.exchange.records import Imported

__all__ = ["GlassFrame", "is_ndpa", "read_ndpa"]

_FIELDS = ("title", "details")
_NM_PER_UM = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GlassFrame:
    """Where an image lies on its glass slide.

    Attributes
    ----------
    center_nm : tuple of float
        Center of the image by that of the glass, x and y in nanometres.
    size : tuple of int
        Width and height of the image in level-0 pixels.
    mpp : tuple of float
        Micrometres per pixel in x and y.
    """

    center_nm: tuple[float, float]
    size: tuple[int, int]
    mpp: tuple[float, float]

    @property
    def nm_per_px(self) -> NDArray[np.float64]:
        """Nanometres per pixel in x and y."""
        return np.array(self.mpp) * _NM_PER_UM

    def pixels(self, points_nm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Level-0 pixels of points, shape (N, 2), in nanometres about the center of the glass."""
        return (points_nm - self.center_nm) / self.nm_per_px + np.array(self.size) / 2


def is_ndpa(root: Element) -> bool:
    """Whether ``<annotations>`` is Hamamatsu's, and not CVAT's."""
    return root.tag == "annotations" and (len(root) == 0 or root.find("ndpviewstate") is not None)


def read_ndpa(
    path: Path,
    root: Element,
    frame: GlassFrame | None,
    *,
    classes: Sequence[str] = (),
    class_from: Sequence[str] = (),
) -> Imported:
    """Read the shapes of an NDPA file.

    Parameters
    ----------
    path : Path
        The file, for messages.
    root : Element
        ``<annotations>``.
    frame : GlassFrame or None
        Where the image lies on its glass; None where it does not say.
    classes : sequence of str, optional
        Class names of the project.
    class_from : sequence of str, optional
        Where the class stands, of ``title`` (the default) and ``details``.

    Returns
    -------
    Imported
        One annotation per shape.

    Raises
    ------
    ExchangeError
        If there is no such field, or the place of the image is not known.
    """
    if frame is None:
        raise ExchangeError(
            f"{path}: NDPA counts in nanometres from the center of the glass, and the image does not say where it lies "
            f"there (hamamatsu.XOffsetFromSlideCentre, hamamatsu.YOffsetFromSlideCentre and pixel size of an .ndpi "
            f"file); import it into a project of the original .ndpi slide, or export GeoJSON"
        )
    collector = Collector(path, classes, class_from=class_from, fields=_FIELDS)
    for index, state in enumerate(root.iterfind("ndpviewstate"), 1):
        title = (state.findtext("title") or "").strip()
        item = f"shape {state.get('id') or index}" + (f" ({title})" if title else "")
        with collector.item(item):
            _read_state(collector, item, state, frame)
    return collector.result("NDPA", mpp=sum(frame.mpp) / 2)


def _read_state(collector: Collector, item: str, state: Element, frame: GlassFrame) -> None:
    unit = (state.findtext("coordformat") or "nanometers").strip().lower()
    if unit not in ("nanometers", "nanometres"):
        raise ExchangeError(f"{item} counts in {unit!r}, and not in nanometres")
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
    collector.colour(choice.name, _colour(element.get("color")))
    name = (title or "").strip() or None
    collector.add(item, Annotation(geometry=geometry, path_class=choice.name, name=name, roi=roi), choice)


def _geometry(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    kind = element.get("type", "").strip().lower()
    read = _KINDS.get(kind)
    if read is None:
        raise ExchangeError(f"{item} is of the unknown type {kind!r}")
    return read(element, item, frame)


def _freehand(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    points = [_point(point, item) for point in element.iterfind("pointlist/point")]
    if not points:
        raise ExchangeError(f"{item} has no points")
    corners = frame.pixels(np.array(points, np.float64))
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
    left, top, right, bottom = frame.pixels(np.array([[x - radius, y - radius], [x + radius, y + radius]])).ravel()
    return ellipse(left, top, right, bottom), "Ellipse"


def _pin(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    return Point(frame.pixels(np.array([_point(element, item)]))[0]), "Points"


def _line(element: Element, item: str, frame: GlassFrame) -> tuple[BaseGeometry, RoiKind | None]:
    ends = [_point(element, item, str(end)) for end in (1, 2)]
    return LineString(frame.pixels(np.array(ends))), "Line"


_KINDS: dict[str, Callable[[Element, str, GlassFrame], tuple[BaseGeometry, RoiKind | None]]] = {
    "freehand": _freehand,
    "circle": _circle,
    "pin": _pin,
    "linearmeasure": _line,
    "pointer": _line,
}


def _point(element: Element, item: str, suffix: str = "") -> tuple[float, float]:
    return number(element.findtext(f"x{suffix}"), item), number(element.findtext(f"y{suffix}"), item)


def _colour(text: str | None) -> Colour | None:
    try:
        return Colour.from_hex((text or "").strip())
    except ClassMapError:
        return None
