"""Read XML of layers and regions, as Aperio and HALO write it; negative regions cut holes into their layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, RoiKind
from darefine_qupath.classes import Color
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.class_fields import ClassChoice
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.shapes import snapped
from darefine_qupath.exchange.values import number

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

__all__ = ["LayerReader", "layers"]

_MAX_CUT = 200_000
"""Corners of the holes of all regions, on top of the file's own, up to which a layer is cut in seconds."""

_CUTS_PER_CORNER = 5
"""How often each corner may be cut out beside: each hole lies in a few regions."""

_STEP = 100


@dataclass(frozen=True)
class Region:
    """A region that is not a cut-out."""

    item: str
    geometry: BaseGeometry
    roi: RoiKind | None
    choice: ClassChoice
    name: str | None = None


@dataclass(frozen=True)
class Hole:
    """A region that is one."""

    item: str
    geometry: BaseGeometry


def layers(root: Element) -> Iterator[tuple[Element, list[Element]]]:
    """Give every layer with its own regions: those of a layer inside it are that one's."""
    found: list[tuple[Element, list[Element]]] = [(root, [])]
    waiting = [(root, found[0][1])]
    while waiting:
        element, regions = waiting.pop()
        if element.tag == "Region":
            regions.append(element)
            continue
        if element.tag == "Annotation":
            regions = []
            found.append((element, regions))
        waiting += [(child, regions) for child in reversed(element)]
    return iter(found if found[0][1] else found[1:])


class LayerReader(ABC):
    """Reads layers of regions; each program's own reader says how it names, draws and classifies them."""

    corner_tag: ClassVar[str]

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def read(self, root: Element) -> None:
        """Collect the regions of all layers, with the negative ones cut out of the others of their layer."""
        for index, (layer, elements) in enumerate(layers(root), 1):
            layer_name = self.layer_name(layer, index)
            regions: list[Region] = []
            holes: list[Hole] = []
            for position, element in enumerate(elements, 1):
                item = f"region {self.region_id(element) or position} of {layer_name}"
                with self.collector.item(item):
                    found = self._region(layer, element, item)
                    if isinstance(found, Region):
                        regions.append(found)
                    elif found is not None:
                        holes.append(found)
            _add_regions(self.collector, layer_name, regions, holes)

    def _region(self, layer: Element, element: Element, item: str) -> Region | Hole | None:
        drawn, roi = self.geometry(element, _corners(element, item, self.corner_tag), item)
        geometry = self.collector.shape(item, drawn)
        if geometry is None:
            return None
        if roi is None:
            geometry = self.mended(item, drawn, geometry)
        if _is_negative(element):
            return Hole(item, geometry)
        self.check(item, element, drawn)
        choice = self.collector.choose(self.fields(element, layer))
        self.collector.color(choice.name, _line_color(layer))
        return Region(item, geometry, roi, choice, self.remark(element))

    @abstractmethod
    def layer_name(self, layer: Element, index: int) -> str:
        """Name of a layer in messages."""

    def region_id(self, element: Element) -> str | None:  # noqa: ARG002
        """Id of a region in messages; None = its number in the layer."""
        return None

    @abstractmethod
    def geometry(
        self, element: Element, corners: NDArray[np.float64], item: str
    ) -> tuple[BaseGeometry, RoiKind | None]:
        """Shape of a region as it was drawn, and its kind in QuPath."""

    def mended(self, item: str, drawn: BaseGeometry, geometry: BaseGeometry) -> BaseGeometry:  # noqa: ARG002
        """Shape of a freehand region with what the program does wrong put right."""
        return geometry

    def check(self, item: str, element: Element, drawn: BaseGeometry) -> None:  # noqa: B027 - not every format can
        """Compare a region with what the file states about it."""

    @abstractmethod
    def fields(self, element: Element, layer: Element) -> Mapping[str, str | None]:
        """Texts that may be the class of a region, the best first."""

    @abstractmethod
    def remark(self, element: Element) -> str | None:
        """Name of a region in QuPath."""


def _is_negative(element: Element) -> bool:
    return element.get("NegativeROA", "").strip().casefold() in ("1", "true", "yes")


def _corners(element: Element, item: str, tag: str) -> NDArray[np.float64]:
    """Corners of a region, shape (N, 2)."""
    points = [(number(vertex.get("X"), item), number(vertex.get("Y"), item)) for vertex in element.iterfind(tag)]
    if not points:
        raise ExchangeError(f"{item} has no vertices")
    return np.array(points, np.float64)


def _add_regions(collector: Collector, layer_name: str, regions: Sequence[Region], holes: Sequence[Hole]) -> None:
    """Cut the holes of a layer, and take its regions in.

    Raises
    ------
    ExchangeError
        If the holes lie in so many regions at once that cutting would not end.
    """
    cut = _cut(collector, layer_name, regions, holes) if holes else regions
    for region in cut:
        record = Annotation(geometry=region.geometry, path_class=region.choice.name, name=region.name, roi=region.roi)
        collector.add(region.item, record, region.choice)


def _cut(collector: Collector, layer_name: str, regions: Sequence[Region], holes: Sequence[Hole]) -> Iterator[Region]:
    places, pairs = _meetings(collector, layer_name, regions, holes)
    is_used = np.zeros(len(holes), bool)
    is_used[pairs] = True
    for index in np.flatnonzero(~is_used).tolist():
        collector.refuse(holes[index].item, "is a negative region that cuts no other of its layer")
    collector.cut_outs += int(is_used.sum())
    begins = np.searchsorted(places, np.arange(len(regions) + 1))
    for place, region in enumerate(regions):
        inside = pairs[begins[place] : begins[place + 1]].tolist()
        if not inside:
            yield region
            continue
        left = None
        with collector.item(region.item):
            # One difference for all holes of a region: each one alone would copy all of its corners.
            left, _ = snapped(shapely.difference(region.geometry, _union([holes[index].geometry for index in inside])))
            if left is None:
                raise ExchangeError(f"{region.item} is wholly inside the negative {holes[inside[0]].item}")
        if left is not None:
            yield Region(region.item, left, None, region.choice, region.name)


def _union(shapes: Sequence[BaseGeometry]) -> BaseGeometry:
    return shapes[0] if len(shapes) == 1 else shapely.union_all(shapes)


def _meetings(
    collector: Collector, layer_name: str, regions: Sequence[Region], holes: Sequence[Hole]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Find which hole lies in which region: indices of the regions and of the holes, sorted by both."""
    areas = np.array([region.geometry if region.geometry.area > 0 else None for region in regions], object)
    tree = shapely.STRtree(areas)
    found: list[NDArray[np.intp]] = []
    sizes = shapely.get_num_coordinates([hole.geometry for hole in holes])
    left = _MAX_CUT + _CUTS_PER_CORNER * int(sizes.sum() + shapely.get_num_coordinates(areas).sum())
    for start in range(0, len(holes), _STEP):
        part = [hole.geometry for hole in holes[start : start + _STEP]]
        left -= int(sizes[start : start + _STEP][tree.query(part)[0]].sum())
        if left < 0:
            raise ExchangeError(
                f"{collector.path}: the negative regions of {layer_name} lie in so many others at once that cutting "
                f"them out would not end; divide the layer"
            )
        found.append(np.add(tree.query(part, predicate="intersects"), [[start], [0]]))
    hole, region = np.concatenate(found, axis=1)
    order = np.lexsort((hole, region))
    return region[order], hole[order]


def _line_color(layer: Element) -> Color | None:
    """Color of a layer's lines; a COLORREF of Windows has red in its lowest byte."""
    try:
        packed = int(layer.get("LineColor") or "")
    except ValueError:
        return None
    return Color(packed & 255, (packed >> 8) & 255, (packed >> 16) & 255)
