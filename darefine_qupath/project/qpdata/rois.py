"""QuPath's ROIs in an object stream, and the geometries they stand for.

A geometry is what QuPath's own ``ROI.getGeometry`` gives: coordinates rounded to 0.01 px (but before QuPath 0.6 those
of a ROI that holds a geometry of its own), an ellipse as a polygon of 100 corners, a polygon that crosses itself as the
area that the non-zero winding rule fills. What is written is rounded first, and valid at that precision.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Plane, RoiKind
from darefine_qupath.errors import AnnotationError
from darefine_qupath.javaserial.descriptors import AnyDesc, ClassDesc
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaObject
from darefine_qupath.javaserial.values import NodeError, type_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PROXIES", "RoiBatch", "RoiError", "RoiRecord", "RoiSpec", "fill", "precise", "specs_of"]

_ROI = "qupath.lib.roi."
_PROXY = "$SerializationProxy"
PROXIES: dict[str, RoiKind] = {
    f"{_ROI}RectangleROI{_PROXY}": "Rectangle",
    f"{_ROI}EllipseROI{_PROXY}": "Ellipse",
    f"{_ROI}LineROI{_PROXY}": "Line",
    f"{_ROI}PolylineROI{_PROXY}": "Polyline",
    f"{_ROI}PolygonROI{_PROXY}": "Polygon",
    f"{_ROI}PointsROI{_PROXY}": "Points",
    f"{_ROI}GeometryROI$WKBSerializationProxy": "Geometry",
    f"{_ROI}AreaROI{_PROXY}": "Geometry",
}
_AREA = f"{_ROI}AreaROI{_PROXY}"
_ARRAY_CLASSES = {_AREA: "[[F", f"{_ROI}GeometryROI$WKBSerializationProxy": "[B"}
_LEGACY_JTS = f"{_ROI}GeometryROI{_PROXY}"

_NUMPY_TYPES = {"B": "i1", "C": ">u2", "D": ">f8", "F": ">f4", "I": ">i4", "J": ">i8", "S": ">i2", "Z": "?"}
_BOUNDS_FIELDS = ("x", "x2", "y", "y2")
_ELLIPSE_CORNERS = 100
# Polygons that cross themselves more often than this (and than once in two vertices) are damaged; their parts would
# fill memory.
_MAX_CROSSINGS = 20_000
_MAX_WKB_DEPTH = 8
# ROIs that are made at once; geometries that are rounded at once.
_PORTION_ROIS, _PORTION_BYTES, _PORTION_SHAPES = 4096, 500_000, 256


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


class RoiSpec(NamedTuple):
    """A ROI to be written: class of its proxy, numbers and arrays by field name."""

    proxy: str
    numbers: dict[str, float]
    arrays: dict[str, bytes]


def precise(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to QuPath's 0.01 px, halves upwards as Java does."""
    with np.errstate(over="ignore"):
        rounded: NDArray[np.float64] = np.floor(coordinates * 100 + 0.5) / 100
    # Numbers as large as that are whole anyway.
    return np.where(np.abs(coordinates) < 1e13, rounded, coordinates)


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


class _Kind:
    """The ROIs of one class descriptor, gathered to be made at once.

    What they hold is copied into few large buffers, so that the nodes, and the memory between them, can go.
    """

    __slots__ = ("columns", "dtype", "name", "numbers", "positions", "slots")

    def __init__(self, desc: ClassDesc, node: JavaObject) -> None:
        self.name = desc.name
        self.slots = array("Q")
        self.numbers = bytearray()
        if desc.parent is not None:
            raise NodeError(f"{desc.name} has a superclass", node)
        codes = {field.name: field.code for field in desc.fields}
        wanted = dict.fromkeys("ctz", "I") | dict(_FIELDS[desc.name])
        for name, code in wanted.items():
            if codes.get(name) != code:
                raise NodeError(f"{desc.name} has no field {name!r} of type {code!r}", node)
        if len(codes) < len(desc.fields):
            raise NodeError(f"{desc.name} has two fields of one name", node)
        self.positions = [desc.index[name][0] for name, code in _FIELDS[desc.name] if code == "["]
        self.columns = [_Column() for _ in self.positions]
        self.dtype = np.dtype(
            [(field.name, _NUMPY_TYPES[field.code]) for field in desc.fields if field.code in _NUMPY_TYPES]
        )

    def take(self, node: JavaObject, slot: int) -> None:
        self.slots.append(slot)
        self.numbers += node.data[0]
        for position, column in zip(self.positions, self.columns, strict=True):
            column.take(node.data[position], self.name, node)

    def parts(self) -> Iterator[_Part]:
        """Yield the ROIs in portions that take little memory."""
        count = len(self.slots)
        records = np.frombuffer(self.numbers, self.dtype)
        size = self.columns[0].ends()[1][1:] if self.columns else np.zeros(count, np.int64)
        portion = size // _PORTION_BYTES + np.arange(count) // _PORTION_ROIS
        bounds = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), count]
        arrays = zip(*(column.portions(bounds) for column in self.columns), strict=True) if self.columns else repeat(())
        for (first, end), columns in zip(pairwise(bounds), arrays, strict=False):
            yield _Part(self.name, self.slots[first:end].tolist(), records[first:end], columns)


class _Column:
    """Arrays of one field, one behind the other; the ring arrays of an area ROI are several to an item."""

    __slots__ = ("data", "rings", "sizes")

    def __init__(self) -> None:
        self.data = bytearray()
        self.sizes = array("Q")
        self.rings = array("Q")
        """Arrays of each item."""

    def take(self, value: Content, owner: str, node: JavaObject) -> None:
        wanted = _ARRAY_CLASSES.get(owner, "[F")
        if not isinstance(value, JavaArray) or value.desc.name != wanted:
            raise NodeError(f"{type_name(value)} where the coordinates of a ROI should be", node)
        if wanted != "[[F":
            self.rings.append(1)
            self.data += value.data  # type: ignore[arg-type]
            self.sizes.append(len(value.data))
            return
        self._take_rings(value, node)

    def _take_rings(self, value: JavaArray, node: JavaObject) -> None:
        parts = value.data
        self.rings.append(len(parts))
        for part in parts:
            if not isinstance(part, JavaArray) or not isinstance(part.data, bytes) or part.desc.name != "[F":
                raise NodeError(f"{type_name(value)} without the coordinates of a ROI", node)
            self.data += part.data
            self.sizes.append(len(part.data))

    def ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the arrays of each item end: in `sizes`, and in `data`; both begin with 0."""
        in_sizes = np.concatenate([[0], np.cumsum(np.array(self.rings, np.int64))])
        in_data = np.concatenate([[0], np.cumsum(np.array(self.sizes, np.int64))])[in_sizes]
        return in_sizes, in_data

    def portions(self, bounds: Sequence[int]) -> Iterator[_Arrays]:
        """Arrays of the items between each two of `bounds`."""
        in_sizes, in_data = self.ends()
        for first, end in pairwise(bounds):
            sizes = np.array(self.sizes[in_sizes[first] : in_sizes[end]], np.int64)
            rings = np.array(self.rings[first:end], np.int64)
            yield _Arrays(bytes(self.data[in_data[first] : in_data[end]]), sizes, rings)


class _Arrays(NamedTuple):
    """Arrays of one field of some ROIs."""

    data: bytes
    sizes: NDArray[np.int64]
    rings: NDArray[np.int64]

    def split(self) -> list[bytes]:
        """Each array by itself."""
        ends = np.cumsum(self.sizes).tolist()
        return [self.data[end - size : end] for end, size in zip(ends, self.sizes.tolist(), strict=True)]


class _Part(NamedTuple):
    """Some ROIs of one kind: their numbers, one record each, and their arrays by field."""

    name: str
    slots: list[int]
    numbers: NDArray[Any]
    arrays: tuple[_Arrays, ...]


_FLOATS = (("x", "["), ("y", "["))
_BOUNDS = tuple((name, "D") for name in _BOUNDS_FIELDS)
_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    f"{_ROI}RectangleROI{_PROXY}": _BOUNDS,
    f"{_ROI}EllipseROI{_PROXY}": _BOUNDS,
    f"{_ROI}LineROI{_PROXY}": _BOUNDS,
    f"{_ROI}PolylineROI{_PROXY}": _FLOATS,
    f"{_ROI}PolygonROI{_PROXY}": _FLOATS,
    f"{_ROI}PointsROI{_PROXY}": _FLOATS,
    f"{_ROI}GeometryROI$WKBSerializationProxy": (("wkb", "["),),
    _AREA: _FLOATS,
}


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
        self._kinds: dict[int, _Kind] = {}
        self._descs: list[AnyDesc] = []
        self._count = 0
        self._budget = budget
        self._num_vertices = self._crossings = 0
        self._makers: dict[RoiKind, Callable[[_Part], Sequence[BaseGeometry]]] = {
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

    def _new_kind(self, node: JavaObject) -> _Kind:
        desc: AnyDesc = node.desc
        if desc.name == _LEGACY_JTS:
            raise NodeError(
                f"{desc.name} holds a geometry of a foreign library, as QuPath wrote before 0.2; "
                f"open and save the image in QuPath once",
                node,
            )
        if desc.name not in PROXIES or not isinstance(desc, ClassDesc) or desc.is_externalizable:
            raise NodeError(f"{desc.name} is not a ROI that can be read", node)
        kind = self._kinds[id(desc)] = _Kind(desc, node)
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
            name = PROXIES[kind.name]
            for part in kind.parts():
                geometries = self._makers[name](part)
                keys = zip(*(part.numbers[axis].tolist() for axis in "czt"), strict=True)
                for slot, key, geometry in zip(part.slots, keys, geometries, strict=True):
                    plane = planes.get(key) or planes.setdefault(key, Plane(*key))
                    records[slot] = RoiRecord(name, plane, geometry)
        return records

    def _bounds(self, part: _Part) -> NDArray[np.float64]:
        """Rows of x, x2, y, y2, not rounded."""
        bounds = np.stack([part.numbers[name] for name in _BOUNDS_FIELDS], axis=1).astype(np.float64)
        _check_finite(bounds, part.slots)
        return bounds

    def _rectangles(self, part: _Part) -> Sequence[BaseGeometry]:
        bounds = self._bounds(part)
        empty = (bounds[:, 1] <= bounds[:, 0]) | (bounds[:, 3] <= bounds[:, 2])
        left, right, top, bottom = precise(bounds).T
        return _blank(shapely.box(left, top, right, bottom), empty)

    def _ellipses(self, part: _Part) -> Sequence[BaseGeometry]:
        bounds = self._bounds(part)
        empty = (bounds[:, 1] <= bounds[:, 0]) | (bounds[:, 3] <= bounds[:, 2])
        corners = precise(_ellipse_corners(bounds))
        polygons = np.empty(len(bounds), object)
        polygons[~empty] = shapely.polygons(corners[~empty])
        return _blank(polygons, empty)

    def _lines(self, part: _Part) -> Sequence[BaseGeometry]:
        ends = precise(self._bounds(part)[:, [0, 2, 1, 3]]).reshape(-1, 2, 2)
        lines: Sequence[BaseGeometry] = shapely.linestrings(ends)
        return lines

    def _vertices(self, part: _Part) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Return the rounded vertices of all rings, and how many each has."""
        x, y = part.arrays
        owners = np.repeat(np.arange(len(part.slots)), x.rings)
        if not np.array_equal(x.rings, y.rings):
            raise RoiError("A ROI has not as many x as y arrays", part.slots[_first(x.rings != y.rings)])
        if not np.array_equal(x.sizes, y.sizes):
            ring = _first(x.sizes != y.sizes)
            message = f"A ROI has {x.sizes[ring] // 4} x and {y.sizes[ring] // 4} y coordinates"
            raise RoiError(message, part.slots[int(owners[ring])])
        vertices = np.stack([np.frombuffer(axis.data, ">f4") for axis in part.arrays], axis=1).astype(np.float64)
        counts = (x.sizes // 4).astype(np.intp)
        self._num_vertices += len(vertices)
        _check_finite(vertices, part.slots, np.repeat(owners, counts))
        return precise(vertices), counts

    def _polylines(self, part: _Part) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        lines = np.full(len(counts), shapely.LineString(), object)
        usable = counts >= 2
        if usable.any():
            owners = np.repeat(np.cumsum(usable) - 1, counts)
            kept = np.repeat(usable, counts)
            lines[usable] = shapely.linestrings(vertices[kept], indices=owners[kept])
        return lines.tolist()

    def _points(self, part: _Part) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        groups = np.split(vertices, np.cumsum(counts)[:-1])
        return [shapely.Point(group[0]) if len(group) == 1 else shapely.MultiPoint(group) for group in groups]

    def _polygons(self, part: _Part) -> Sequence[BaseGeometry]:
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

    def _geometries(self, part: _Part) -> Sequence[BaseGeometry]:
        if part.name == _AREA:
            return self._areas(part)
        blobs = part.arrays[0].split()
        for blob, slot in zip(blobs, part.slots, strict=True):
            _check_wkb(blob, slot)
        geometries = _from_wkb(blobs, part.slots)
        records: Sequence[BaseGeometry] = (_rounded(geometries) if self._rounds_all else geometries).tolist()
        return records

    def _areas(self, part: _Part) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(part)
        rings = [ring if len(ring) >= 3 else ring[:0] for ring in np.split(vertices, np.cumsum(counts)[:-1])]
        ends = np.cumsum(part.arrays[0].rings).tolist()
        starts = [0, *ends[:-1]]
        return [
            self._fill([ring for ring in rings[start:end] if len(ring)], slot)
            for start, end, slot in zip(starts, ends, part.slots, strict=True)
        ]

    def _fill(self, rings: Sequence[NDArray[np.float64]], slot: int) -> BaseGeometry:
        if not rings:
            return shapely.Polygon()
        starts, ends = _edges(rings)
        limit = _MAX_CROSSINGS + self._num_vertices // 2
        self._crossings += _count_crossings(starts, ends, limit - self._crossings)
        if self._crossings > limit:
            raise RoiError(f"Polygons cross themselves more than {limit} times", slot)
        return _fill_edges(starts, ends)


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _check_finite(values: NDArray[np.float64], slots: Sequence[int], owner: NDArray[np.intp] | None = None) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        slot = slots[row if owner is None else int(owner[row])]
        raise RoiError("A ROI has a coordinate that is not a finite number", slot)


def _ellipse_corners(bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners of ellipses in boxes of x, x2, y, y2."""
    angles = np.arange(_ELLIPSE_CORNERS) * (2 * np.pi / _ELLIPSE_CORNERS)
    radius_x, radius_y = (bounds[:, 1] - bounds[:, 0]) / 2, (bounds[:, 3] - bounds[:, 2]) / 2
    x = np.outer(radius_x, np.cos(angles)) + (bounds[:, 0] + radius_x)[:, None]
    y = np.outer(radius_y, np.sin(angles)) + (bounds[:, 2] + radius_y)[:, None]
    return np.stack([x, y], axis=2)


def _blank(polygons: NDArray[Any], empty: NDArray[np.bool_]) -> Sequence[BaseGeometry]:
    polygons[empty] = shapely.Polygon()
    geometries: Sequence[BaseGeometry] = polygons.tolist()
    return geometries


def fill(rings: Sequence[NDArray[np.float64]], *, max_crossings: int = _MAX_CROSSINGS) -> BaseGeometry:
    """Area that the non-zero winding rule fills, as Java's ``Area`` of a path does.

    Parameters
    ----------
    rings : sequence of ndarray of float, shape (n, 2)
        Corners, at least 3 a ring; the last one need not repeat the first.
    max_crossings : int, optional
        How often edges may cross.

    Returns
    -------
    Polygon or MultiPolygon
        Valid; empty where nothing is filled.

    Raises
    ------
    ValueError
        If the rings cross so often that the parts would not fit into memory.
    """
    if not rings:
        return shapely.Polygon()
    starts, ends = _edges(rings)
    if _count_crossings(starts, ends, max_crossings) > max_crossings:
        raise ValueError(f"{len(starts)} edges cross more than {max_crossings} times")
    return _fill_edges(starts, ends)


def _edges(rings: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    closed = [np.concatenate([ring, ring[:1]]) for ring in rings]
    return np.concatenate([ring[:-1] for ring in closed]), np.concatenate([ring[1:] for ring in closed])


def _fill_edges(starts: NDArray[np.float64], ends: NDArray[np.float64]) -> BaseGeometry:
    lines = shapely.union_all(shapely.linestrings(np.stack([starts, ends], axis=1)))
    faces = shapely.get_parts(shapely.polygonize([lines]))
    if not len(faces):
        return shapely.Polygon()
    points = shapely.get_coordinates(shapely.point_on_surface(faces))
    filled: BaseGeometry = shapely.union_all(faces[_winding(points, starts, ends) != 0])
    return filled


def _count_crossings(starts: NDArray[np.float64], ends: NDArray[np.float64], limit: int) -> int:
    """Pairs of edges that meet, those of neighbours not counted; stops soon after `limit`."""
    count = len(starts)
    segments = shapely.linestrings(np.stack([starts, ends], axis=1))
    tree = shapely.STRtree(segments)
    step = max(1, 2_000_000 // count)
    crossings = 0
    for first in range(0, count, step):
        part = segments[first : first + step]
        # An edge meets itself and its two neighbours; every other pair is found from both sides.
        crossings += max(0, tree.query(part, predicate="intersects").shape[1] - 3 * len(part))
        if crossings > 2 * limit:
            break
    return crossings // 2


def _winding(points: NDArray[np.float64], starts: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.intp]:
    """Winding number of the edges around every point."""
    numbers = np.zeros(len(points), np.intp)
    step = max(1, 1_000_000 // len(starts))
    for first in range(0, len(points), step):
        x, y = points[first : first + step, :1], points[first : first + step, 1:]
        upward = (starts[:, 1] <= y) & (ends[:, 1] > y)
        downward = (starts[:, 1] > y) & (ends[:, 1] <= y)
        side = (ends[:, 0] - starts[:, 0]) * (y - starts[:, 1]) - (x - starts[:, 0]) * (ends[:, 1] - starts[:, 1])
        numbers[first : first + step] = (upward & (side > 0)).sum(axis=1) - (downward & (side < 0)).sum(axis=1)
    return numbers


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


def _rounded(geometries: NDArray[Any]) -> NDArray[Any]:
    """Geometries at QuPath's precision; parts that fall together there are dissolved."""
    rounded: NDArray[Any] = shapely.transform(geometries, precise)
    broken = ~shapely.is_valid(rounded) & shapely.is_valid(geometries)
    if broken.any():
        rounded[broken] = shapely.transform(shapely.set_precision(geometries[broken], 0.01), precise)
    return rounded


def _check_wkb(blob: bytes, slot: int) -> None:
    """Refuse bytes that a reader in C would follow too deep or beyond their end."""
    position = 0
    pending = [1]
    try:
        while pending:
            if pending[-1] == 0:
                pending.pop()
                continue
            pending[-1] -= 1
            position, children = _wkb_header(blob, position)
            if children:
                pending.append(children)
                if len(pending) > _MAX_WKB_DEPTH:
                    raise RoiError("A geometry ROI is nested too deep", slot)
            if position > len(blob):
                raise IndexError
    except (IndexError, ValueError):
        raise RoiError("The geometry of a ROI is damaged", slot) from None


def _wkb_header(blob: bytes, position: int) -> tuple[int, int]:
    """Position behind a geometry (or behind the head of one with parts), and the number of parts."""
    order = "big" if blob[position] == 0 else "little"

    def uint(at: int) -> int:
        if at + 4 > len(blob):
            raise IndexError
        return int.from_bytes(blob[at : at + 4], order)  # type: ignore[arg-type]

    code = uint(position + 1)
    dimensions = 2 + bool(code & 0x80000000) + bool(code & 0x40000000)
    shape = code & 0x0FFFFFFF
    dimensions += (0, 1, 1, 2)[shape // 1000] if shape < 4000 else 0
    position += 9 if code & 0x20000000 else 5
    kind = shape % 1000
    if kind == 1:
        return position + 8 * dimensions, 0
    count = uint(position)
    position += 4
    if kind == 2:
        return position + 8 * dimensions * count, 0
    if kind == 3:
        for _ in range(count):
            position += 4 + 8 * dimensions * uint(position)
        return position, 0
    if kind in (4, 5, 6, 7):
        return position, count
    raise ValueError(kind)


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
    rounded = _rounded(shapely.force_2d(geometries))
    return [_spec_of(geometry, wanted) for geometry, (_, wanted) in zip(rounded.tolist(), shapes, strict=True)]


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
    return RoiSpec(f"{_ROI}GeometryROI$WKBSerializationProxy", {}, {"wkb": blob})


def _vertex_spec(shape: str, vertices: NDArray[np.float64]) -> RoiSpec:
    x, y = np.ascontiguousarray(vertices.T, ">f4")
    return RoiSpec(f"{_ROI}{shape}{_PROXY}", {}, {"x": x.tobytes(), "y": y.tobytes()})


def _bounds_spec(shape: str, x: float, y: float, x2: float, y2: float) -> RoiSpec:
    return RoiSpec(f"{_ROI}{shape}{_PROXY}", {"x": x, "x2": x2, "y": y, "y2": y2}, {})


def _polygon_spec(polygon: BaseGeometry, wanted: RoiKind | None) -> RoiSpec:
    if len(polygon.interiors):
        return _wkb_spec(polygon)
    vertices = shapely.get_coordinates(polygon)[:-1]
    left, top, right, bottom = polygon.bounds
    if wanted in (None, "Rectangle") and _is_box(vertices):
        return _bounds_spec("RectangleROI", left, top, right, bottom)
    if wanted == "Ellipse" and len(vertices) == _ELLIPSE_CORNERS:
        ellipse = shapely.Polygon(_ellipse_corners(np.array([polygon.bounds])[:, [0, 2, 1, 3]])[0])
        if ellipse.hausdorff_distance(polygon) <= 0.02:
            return _bounds_spec("EllipseROI", left, top, right, bottom)
    return _vertex_spec("PolygonROI", vertices)


def _is_box(vertices: NDArray[np.float64]) -> bool:
    if len(vertices) != 4:
        return False
    steps = np.abs(np.diff(np.concatenate([vertices, vertices[:1]]), axis=0))
    # Every side runs along one axis, and the axes take turns.
    return bool(((steps > 0).sum(axis=1) == 1).all() and (steps[0] == steps[2]).all() and (steps[1] == steps[3]).all())


def _line_spec(line: BaseGeometry, wanted: RoiKind | None) -> RoiSpec:
    vertices = shapely.get_coordinates(line)
    if len(vertices) == 2 and wanted != "Polyline":
        return _bounds_spec("LineROI", *vertices.ravel().tolist())
    return _vertex_spec("PolylineROI", vertices)


def _points_spec(points: BaseGeometry, _: RoiKind | None) -> RoiSpec:
    return _vertex_spec("PointsROI", shapely.get_coordinates(points))


_CHOOSERS: dict[str, Callable[[BaseGeometry, RoiKind | None], RoiSpec]] = {
    "Polygon": _polygon_spec,
    "MultiPolygon": _wkb_spec,
    "LineString": _line_spec,
    "LinearRing": _line_spec,
    "MultiLineString": _wkb_spec,
    "Point": _points_spec,
    "MultiPoint": _points_spec,
}
