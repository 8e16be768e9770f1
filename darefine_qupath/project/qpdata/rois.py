"""Read QuPath's ROIs as the geometries that they stand for.

A geometry is what QuPath's own ``ROI.getGeometry`` gives: coordinates rounded to 0.01 px (but before QuPath 0.6 those
of a ROI that holds a geometry of its own), an ellipse as a polygon of 100 corners, a polygon that crosses itself as the
area that the non-zero winding rule fills. What is written is rounded first, and valid at that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Plane, RoiKind
from darefine_qupath.javaserial.descriptors import AnyDesc, ClassDesc
from darefine_qupath.javaserial.nodes import JavaObject
from darefine_qupath.javaserial.values import NodeError
from darefine_qupath.project.qpdata.geometries import (
    MAX_CROSSINGS,
    ellipse_corners,
    filled_area,
    round_coordinates,
    round_geometries,
)
from darefine_qupath.project.qpdata.roi_tables import BOUNDS_FIELDS, RoiPart, RoiTable
from darefine_qupath.project.qpdata.schema import AREA, LEGACY_GEOMETRY, ROI_KINDS
from darefine_qupath.project.qpdata.wkb import check_wkb

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RoiBatch", "RoiError", "RoiRecord"]


class RoiRecord(NamedTuple):
    """A ROI as read.

    Attributes
    ----------
    kind : str
        QuPath's ROI type.
    plane : Plane
        Channel, z-slice, time point.
    geometry : shapely geometry
        In level-0 pixels.
    """

    kind: RoiKind
    plane: Plane
    geometry: BaseGeometry


class RoiError(Exception):
    """A ROI's numbers make no geometry.

    Parameters
    ----------
    message : str
        What is wrong.
    slot : int
        Which ROI of the batch, as `RoiBatch.add` numbered it.
    """

    def __init__(self, message: str, slot: int) -> None:
        super().__init__(message)
        self.message = message
        self.slot = slot


class RoiBatch:
    """Turns the ROIs of many objects into geometries, many of a kind at once.

    Parameters
    ----------
    budget : int, optional
        Bytes of coordinates at most; ROIs may share arrays, and a damaged file must not multiply them.
    rounds_all : bool, optional
        Whether geometries of their own are rounded too, as since QuPath 0.6.
    """

    def __init__(self, budget: int | None = None, *, rounds_all: bool = True) -> None:
        self._rounds_all = rounds_all
        self._kinds: dict[int, RoiTable] = {}
        self._descs: list[AnyDesc] = []
        self._count = 0
        self._budget = budget
        self._num_vertices = self._crossings = 0
        self._makers: dict[RoiKind, Callable[[RoiPart], Sequence[BaseGeometry]]] = {
            "Rectangle": self._rectangles,
            "Ellipse": self._ellipses,
            "Line": self._lines,
            "Polyline": self._polylines,
            "Polygon": self._polygons,
            "Points": self._points,
            "Geometry": self._geometries,
        }

    def add(self, node: JavaObject) -> int:
        """Take a ROI in; the number is its index in what `build` gives.

        Raises
        ------
        NodeError
            If it is not a ROI that can be read.
        """
        kind = self._kinds.get(id(node.desc)) or self._new_kind(node)
        kind.take(node, self._count)
        if self._budget is not None and kind.columns and len(kind.columns[0].data) > self._budget:
            raise NodeError("The ROIs have more coordinates than the file has room for", node)
        self._count += 1
        return self._count - 1

    def _new_kind(self, node: JavaObject) -> RoiTable:
        desc: AnyDesc = node.desc
        if desc.name == LEGACY_GEOMETRY:
            raise NodeError(
                f"{desc.name} holds a geometry of a foreign library, as QuPath wrote before 0.2; "
                f"open and save the image in QuPath once",
                node,
            )
        if desc.name not in ROI_KINDS or not isinstance(desc, ClassDesc) or desc.is_externalizable:
            raise NodeError(f"{desc.name} is not a ROI that can be read", node)
        kind = self._kinds[id(desc)] = RoiTable(desc, node)
        # Kept, so that no other descriptor can come to have its id.
        self._descs.append(desc)
        return kind

    def build(self) -> list[RoiRecord]:
        """Make every ROI.

        Returns
        -------
        list of RoiRecord
            In the order of `add`.

        Raises
        ------
        RoiError
            If a ROI has coordinates that are not numbers, or broken ones.
        """
        with np.errstate(all="ignore"):
            return self._build()

    def _build(self) -> list[RoiRecord]:
        records: list[Any] = [None] * self._count
        planes: dict[tuple[int, int, int], Plane] = {}
        for kind in self._kinds.values():
            name = ROI_KINDS[kind.name]
            for part in kind.parts():
                geometries = self._makers[name](part)
                keys = zip(*(part.numbers[axis].tolist() for axis in "czt"), strict=True)
                for slot, key, geometry in zip(part.slots, keys, geometries, strict=True):
                    plane = planes.get(key) or planes.setdefault(key, Plane(*key))
                    records[slot] = RoiRecord(name, plane, geometry)
        return records

    def _bounds(self, part: RoiPart) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Rows of x, x2, y, y2, not rounded, and which of them hold nothing."""
        bounds = np.stack([part.numbers[name] for name in BOUNDS_FIELDS], axis=1).astype(np.float64)
        _check_finite(bounds, part.slots)
        return bounds, (bounds[:, 1] <= bounds[:, 0]) | (bounds[:, 3] <= bounds[:, 2])

    def _rectangles(self, part: RoiPart) -> Sequence[BaseGeometry]:
        bounds, empty = self._bounds(part)
        left, right, top, bottom = round_coordinates(bounds).T
        return _blank(shapely.box(left, top, right, bottom), empty)

    def _ellipses(self, part: RoiPart) -> Sequence[BaseGeometry]:
        bounds, empty = self._bounds(part)
        corners = round_coordinates(ellipse_corners(bounds))
        polygons = np.empty(len(bounds), object)
        polygons[~empty] = shapely.polygons(corners[~empty])
        return _blank(polygons, empty)

    def _lines(self, part: RoiPart) -> Sequence[BaseGeometry]:
        ends = round_coordinates(self._bounds(part)[0][:, [0, 2, 1, 3]]).reshape(-1, 2, 2)
        lines: Sequence[BaseGeometry] = shapely.linestrings(ends)
        return lines

    def _vertices(self, part: RoiPart) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Return the rounded vertices of all rings, and how many each has."""
        x, y = part.arrays
        owners = np.repeat(np.arange(len(part.slots)), x.rings)
        if not np.array_equal(x.rings, y.rings):
            raise RoiError("A ROI has more x than y arrays, or fewer", part.slots[_first(x.rings != y.rings)])
        if not np.array_equal(x.sizes, y.sizes):
            ring = _first(x.sizes != y.sizes)
            message = f"A ROI has {x.sizes[ring] // 4} x and {y.sizes[ring] // 4} y coordinates"
            raise RoiError(message, part.slots[int(owners[ring])])
        vertices = np.stack([np.frombuffer(axis.data, ">f4") for axis in part.arrays], axis=1).astype(np.float64)
        counts = (x.sizes // 4).astype(np.intp)
        self._num_vertices += len(vertices)
        _check_finite(vertices, part.slots, np.repeat(owners, counts))
        return round_coordinates(vertices), counts

    def _polylines(self, part: RoiPart) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        lines = np.full(len(counts), shapely.LineString(), object)
        usable = counts >= 2
        if usable.any():
            owners = np.repeat(np.cumsum(usable) - 1, counts)
            kept = np.repeat(usable, counts)
            lines[usable] = shapely.linestrings(vertices[kept], indices=owners[kept])
        return lines.tolist()

    def _points(self, part: RoiPart) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        groups = np.split(vertices, np.cumsum(counts)[:-1])
        return [shapely.Point(group[0]) if len(group) == 1 else shapely.MultiPoint(group) for group in groups]

    def _polygons(self, part: RoiPart) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        polygons = np.full(len(counts), shapely.Polygon(), object)
        usable = counts >= 3
        kept = np.repeat(usable, counts)
        if usable.any():
            owners = np.repeat(np.cumsum(usable) - 1, counts)
            rings = shapely.linearrings(vertices[kept], indices=owners[kept])
            polygons[usable] = shapely.polygons(rings)
        ends = np.cumsum(counts)
        for index in np.flatnonzero(~shapely.is_valid(polygons)).tolist():
            ring = vertices[ends[index] - counts[index] : ends[index]]
            polygons[index] = self._fill([ring], part.slots[index])
        return polygons.tolist()

    def _geometries(self, part: RoiPart) -> Sequence[BaseGeometry]:
        if part.name == AREA:
            return self._areas(part)
        blobs = part.arrays[0].split()
        for blob, slot in zip(blobs, part.slots, strict=True):
            try:
                check_wkb(blob)
            except ValueError as error:
                raise RoiError(str(error), slot) from None
        geometries = _from_wkb(blobs, part.slots)
        records: Sequence[BaseGeometry] = (round_geometries(geometries) if self._rounds_all else geometries).tolist()
        return records

    def _areas(self, part: RoiPart) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        rings = [ring if len(ring) >= 3 else ring[:0] for ring in np.split(vertices, np.cumsum(counts)[:-1])]
        ends = np.cumsum(part.arrays[0].rings).tolist()
        starts = [0, *ends[:-1]]
        return [
            self._fill([ring for ring in rings[start:end] if len(ring)], slot)
            for start, end, slot in zip(starts, ends, part.slots, strict=True)
        ]

    def _fill(self, rings: Sequence[NDArray[np.float64]], slot: int) -> BaseGeometry:
        limit = MAX_CROSSINGS + self._num_vertices // 2
        try:
            filled, crossings = filled_area(rings, max_crossings=limit - self._crossings)
        except ValueError:
            raise RoiError(f"Polygons cross themselves more than {limit} times", slot) from None
        self._crossings += crossings
        return filled


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _check_finite(values: NDArray[np.float64], slots: Sequence[int], owner: NDArray[np.intp] | None = None) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        slot = slots[row if owner is None else int(owner[row])]
        raise RoiError("A ROI has a coordinate that is not a finite number", slot)


def _blank(polygons: NDArray[Any], empty: NDArray[np.bool_]) -> Sequence[BaseGeometry]:
    polygons[empty] = shapely.Polygon()
    geometries: Sequence[BaseGeometry] = polygons.tolist()
    return geometries


def _from_wkb(blobs: Sequence[bytes], slots: Sequence[int]) -> NDArray[Any]:
    try:
        geometries: NDArray[Any] = shapely.force_2d(shapely.from_wkb(blobs))
    except shapely.GEOSException as error:
        if len(blobs) == 1:
            raise RoiError(f"A geometry ROI cannot be read: {error}", slots[0]) from None
        return np.concatenate([_from_wkb([blob], [slot]) for blob, slot in zip(blobs, slots, strict=True)])
    coordinates, owners = shapely.get_coordinates(geometries, return_index=True)
    _check_finite(coordinates, slots, owners)
    return geometries
