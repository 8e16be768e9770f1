"""QuPath's ROIs in an object stream, and the geometries they stand for.

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
from darefine_qupath.errors import AnnotationError
from darefine_qupath.project.javastream import AnyDesc, ClassDesc, Content, JavaArray, JavaObject
from darefine_qupath.project.javautil import NodeError, type_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PROXIES", "RoiBatch", "RoiRecord", "RoiSpec", "fill", "precise", "spec_of"]

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
_LEGACY_JTS = f"{_ROI}GeometryROI{_PROXY}"

_NUMPY_TYPES = {"B": "i1", "C": ">u2", "D": ">f8", "F": ">f4", "I": ">i4", "J": ">i8", "S": ">i2", "Z": "?"}
_BOUNDS_FIELDS = ("x", "x2", "y", "y2")
_ELLIPSE_CORNERS = 100
# Polygons that cross themselves more often than this (and than once in two vertices) are damaged; their parts would
# fill memory.
_MAX_CROSSINGS = 20_000
_MAX_WKB_DEPTH = 8


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
    rounded: NDArray[np.float64] = np.floor(coordinates * 100 + 0.5) / 100
    return rounded


class _Kind:
    """The ROIs of one class descriptor, gathered to be made at once."""

    __slots__ = ("desc", "dtype", "name", "nodes", "slots")

    def __init__(self, desc: ClassDesc, node: JavaObject) -> None:
        self.desc = desc
        self.name = desc.name
        self.nodes: list[JavaObject] = []
        self.slots: list[int] = []
        if desc.parent is not None:
            raise NodeError(f"{desc.name} has a superclass", node)
        codes = {field.name: field.code for field in desc.fields}
        wanted = dict.fromkeys("ctz", "I") | dict(_FIELDS[desc.name])
        for name, code in wanted.items():
            if codes.get(name) != code:
                raise NodeError(f"{desc.name} has no field {name!r} of type {code!r}", node)
        self.dtype = np.dtype(
            [(field.name, _NUMPY_TYPES[field.code]) for field in desc.fields if field.code in _NUMPY_TYPES]
        )

    def numbers(self) -> NDArray[Any]:
        """Primitive fields of all nodes, one record each."""
        return np.frombuffer(b"".join([node.data[0] for node in self.nodes]), self.dtype)

    def column(self, name: str) -> list[Any]:
        """Return a reference field of all nodes."""
        position = self.desc.index[name][0]
        return [node.data[position] for node in self.nodes]


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
    """Turns the ROIs of many objects into geometries, all of a kind at once.

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
        self._count = 0
        self._budget = budget
        self._num_vertices = self._crossings = 0
        self._makers: dict[RoiKind, Callable[[_Kind], Sequence[BaseGeometry]]] = {
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
        kind.nodes.append(node)
        kind.slots.append(self._count)
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
        return kind

    def build(self) -> list[RoiRecord]:
        """Make every ROI.

        Returns
        -------
        list of RoiRecord
            In the order of `add`.

        Raises
        ------
        NodeError
            If a ROI has coordinates that are not numbers, or broken ones.
        """
        records: list[RoiRecord | None] = [None] * self._count
        planes: dict[tuple[int, int, int], Plane] = {}
        for kind in self._kinds.values():
            name = PROXIES[kind.name]
            geometries = self._makers[name](kind)
            numbers = kind.numbers()
            keys = zip(numbers["c"].tolist(), numbers["z"].tolist(), numbers["t"].tolist(), strict=True)
            for slot, key, geometry in zip(kind.slots, keys, geometries, strict=True):
                plane = planes.get(key) or planes.setdefault(key, Plane(*key))
                records[slot] = RoiRecord(name, plane, geometry)
        return [record for record in records if record is not None]

    def _spend(self, size: int, node: JavaObject) -> None:
        if self._budget is not None:
            self._budget -= size
            if self._budget < 0:
                raise NodeError("The ROIs have more coordinates than the file has room for", node)

    def _bounds(self, kind: _Kind) -> NDArray[np.float64]:
        """Rows of x, x2, y, y2, not rounded."""
        numbers = kind.numbers()
        bounds = np.stack([numbers[name] for name in _BOUNDS_FIELDS], axis=1).astype(np.float64)
        self._check_finite(kind, bounds, np.arange(len(bounds)))
        return bounds

    @staticmethod
    def _check_finite(kind: _Kind, values: NDArray[np.float64], owner: NDArray[np.intp]) -> None:
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            node = kind.nodes[int(owner[int(np.argmin(finite))])]
            raise NodeError("A ROI has a coordinate that is not a finite number", node)

    def _rectangles(self, kind: _Kind) -> Sequence[BaseGeometry]:
        bounds = self._bounds(kind)
        empty = (bounds[:, 1] <= bounds[:, 0]) | (bounds[:, 3] <= bounds[:, 2])
        left, right, top, bottom = precise(bounds).T
        boxes = shapely.box(left, top, right, bottom)
        return _blank(boxes, empty)

    def _ellipses(self, kind: _Kind) -> Sequence[BaseGeometry]:
        bounds = self._bounds(kind)
        empty = (bounds[:, 1] <= bounds[:, 0]) | (bounds[:, 3] <= bounds[:, 2])
        corners = precise(_ellipse_corners(bounds))
        polygons = np.empty(len(bounds), object)
        polygons[~empty] = shapely.polygons(corners[~empty])
        return _blank(polygons, empty)

    def _lines(self, kind: _Kind) -> Sequence[BaseGeometry]:
        ends = precise(self._bounds(kind)[:, [0, 2, 1, 3]]).reshape(-1, 2, 2)
        lines: Sequence[BaseGeometry] = shapely.linestrings(ends)
        return lines

    def _vertices(self, kind: _Kind) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Return the rounded vertices of all nodes, and how many each has."""
        columns = []
        for name in ("x", "y"):
            arrays = kind.column(name)
            for array, node in zip(arrays, kind.nodes, strict=True):
                if not isinstance(array, JavaArray) or array.desc.name != "[F":
                    raise NodeError(f"{type_name(array)} where the {name} of a ROI should be", node)
            columns.append([array.data for array in arrays])
        sizes = np.array([len(data) for data in columns[0]], np.intp)
        for size, data, node in zip(sizes.tolist(), columns[1], kind.nodes, strict=True):
            if len(data) != size:
                raise NodeError(f"A ROI has {size // 4} x and {len(data) // 4} y coordinates", node)
            self._spend(size, node)
        self._num_vertices += int(sizes.sum()) // 4
        xy = [np.frombuffer(b"".join(column), ">f4") for column in columns]
        vertices = np.stack(xy, axis=1).astype(np.float64)
        counts = sizes // 4
        self._check_finite(kind, vertices, np.repeat(np.arange(len(counts)), counts))
        return precise(vertices), counts

    def _polylines(self, kind: _Kind) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(kind)
        lines = np.full(len(counts), shapely.LineString(), object)
        usable = counts >= 2
        owners = np.repeat(np.cumsum(usable) - 1, counts)
        kept = np.repeat(usable, counts)
        if usable.any():
            lines[usable] = shapely.linestrings(vertices[kept], indices=owners[kept])
        return lines.tolist()

    def _points(self, kind: _Kind) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(kind)
        groups = np.split(vertices, np.cumsum(counts)[:-1])
        return [shapely.Point(group[0]) if len(group) == 1 else shapely.MultiPoint(group) for group in groups]

    def _polygons(self, kind: _Kind) -> Sequence[BaseGeometry]:
        vertices, counts = self._vertices(kind)
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
            polygons[index] = self._fill([ring], kind.nodes[index])
        return polygons.tolist()

    def _geometries(self, kind: _Kind) -> Sequence[BaseGeometry]:
        if kind.name == _AREA:
            return [self._area(kind, node) for node in kind.nodes]
        blobs: list[bytes] = []
        for array, node in zip(kind.column("wkb"), kind.nodes, strict=True):
            if not isinstance(array, JavaArray) or not isinstance(array.data, bytes) or array.desc.name != "[B":
                raise NodeError(f"{type_name(array)} where the geometry of a ROI should be", node)
            self._spend(len(array.data), node)
            _check_wkb(array.data, node)
            blobs.append(array.data)
        geometries = _from_wkb(blobs, kind.nodes)
        records: Sequence[BaseGeometry] = (_rounded(geometries) if self._rounds_all else geometries).tolist()
        return records

    def _area(self, kind: _Kind, node: JavaObject) -> BaseGeometry:
        columns = [node.data[kind.desc.index[name][0]] for name in ("x", "y")]
        if any(not isinstance(column, JavaArray) or column.desc.name != "[[F" for column in columns):
            raise NodeError("An area ROI without coordinates", node)
        xs, ys = (column.data for column in columns)
        if len(xs) != len(ys):
            raise NodeError(f"An area ROI has {len(xs)} x and {len(ys)} y arrays", node)
        return self._fill([ring for x, y in zip(xs, ys, strict=True) if len(ring := self._ring(x, y, node)) >= 3], node)

    def _fill(self, rings: Sequence[NDArray[np.float64]], node: JavaObject) -> BaseGeometry:
        if not rings:
            return shapely.Polygon()
        starts, ends = _edges(rings)
        limit = _MAX_CROSSINGS + self._num_vertices // 2 - self._crossings
        self._crossings += _count_crossings(starts, ends, limit)
        if self._crossings > _MAX_CROSSINGS + self._num_vertices // 2:
            raise NodeError(f"Polygons cross themselves more than {self._crossings} times", node)
        return _fill_edges(starts, ends)

    def _ring(self, x: Content, y: Content, node: JavaObject) -> NDArray[np.float64]:
        columns = []
        for array in (x, y):
            if not isinstance(array, JavaArray) or array.desc.name != "[F":
                raise NodeError(f"{type_name(array)} where coordinates should be", node)
            columns.append(array.numpy())
        if len(columns[0]) != len(columns[1]):
            raise NodeError(f"A ring has {len(columns[0])} x and {len(columns[1])} y coordinates", node)
        self._spend(4 * len(columns[0]), node)
        vertices = np.stack(columns, axis=1).astype(np.float64)
        if not np.isfinite(vertices).all():
            raise NodeError("A ROI has a coordinate that is not a finite number", node)
        return precise(vertices)


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


def _from_wkb(blobs: Sequence[bytes], nodes: Sequence[JavaObject]) -> NDArray[Any]:
    try:
        geometries: NDArray[Any] = shapely.force_2d(shapely.from_wkb(blobs))
    except shapely.GEOSException as error:
        if len(blobs) == 1:
            raise NodeError(f"A geometry ROI cannot be read: {error}", nodes[0]) from None
        return np.concatenate([_from_wkb([blob], [node]) for blob, node in zip(blobs, nodes, strict=True)])
    coordinates, owners = shapely.get_coordinates(geometries, return_index=True)
    finite = np.isfinite(coordinates).all(axis=1)
    if not finite.all():
        raise NodeError(
            "A ROI has a coordinate that is not a finite number", nodes[int(owners[int(np.argmin(finite))])]
        )
    return geometries


def _rounded(geometries: NDArray[Any]) -> NDArray[Any]:
    """Geometries at QuPath's precision; parts that fall together there are dissolved."""
    rounded: NDArray[Any] = shapely.transform(geometries, precise)
    broken = ~shapely.is_valid(rounded) & shapely.is_valid(geometries)
    if broken.any():
        rounded[broken] = shapely.transform(shapely.set_precision(geometries[broken], 0.01), precise)
    return rounded


def _check_wkb(blob: bytes, node: JavaObject) -> None:
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
                    raise NodeError("A geometry ROI is nested too deep", node)
            if position > len(blob):
                raise IndexError
    except (IndexError, ValueError):
        raise NodeError("The geometry of a ROI is damaged", node) from None


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


def spec_of(geometry: BaseGeometry, wanted: RoiKind | None = None) -> RoiSpec:
    """Choose the ROI that QuPath itself would make of a geometry.

    Parameters
    ----------
    geometry : shapely geometry
        In level-0 pixels.
    wanted : str, optional
        ROI type to keep where the geometry can be one.

    Returns
    -------
    RoiSpec
        What to write.

    Raises
    ------
    AnnotationError
        If the geometry is empty, invalid, of mixed types, or not finite.
    """
    if geometry.is_empty or not np.isfinite(shapely.get_coordinates(geometry)).all():
        raise AnnotationError(
            f"An object cannot have the {geometry.geom_type} {_short(geometry)}: it has no finite extent"
        )
    _check_valid(geometry)
    geometry = _rounded(np.array([shapely.force_2d(geometry)]))[0]
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


def _check_valid(geometry: BaseGeometry) -> None:
    if not geometry.is_valid:
        raise AnnotationError(
            f"The {geometry.geom_type} {_short(geometry)} is not valid ({shapely.is_valid_reason(geometry)}); "
            f"make it valid first"
        )


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
