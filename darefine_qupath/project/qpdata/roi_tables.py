"""Gather the numbers and arrays of many ROIs in few large buffers, and hand them out in portions."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darefine_qupath.javaserial.descriptors import ClassDesc
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaObject
from darefine_qupath.javaserial.values import NodeError, type_name
from darefine_qupath.project.qpdata.schema import AREA, ELLIPSE, GEOMETRY, LINE, POINTS, POLYGON, POLYLINE, RECTANGLE

__all__ = ["BOUNDS_FIELDS", "RoiPart", "RoiTable"]


_ARRAY_CLASSES = {AREA: "[[F", GEOMETRY: "[B"}
_NUMPY_TYPES = {"B": "i1", "C": ">u2", "D": ">f8", "F": ">f4", "I": ">i4", "J": ">i8", "S": ">i2", "Z": "?"}
BOUNDS_FIELDS = ("x", "x2", "y", "y2")
# ROIs that are made at once, and bytes of their arrays.
_PORTION_ROIS, _PORTION_BYTES = 4096, 500_000
_FLOATS = (("x", "["), ("y", "["))
_BOUNDS = tuple((name, "D") for name in BOUNDS_FIELDS)
_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    RECTANGLE: _BOUNDS,
    ELLIPSE: _BOUNDS,
    LINE: _BOUNDS,
    POLYLINE: _FLOATS,
    POLYGON: _FLOATS,
    POINTS: _FLOATS,
    GEOMETRY: (("wkb", "["),),
    AREA: _FLOATS,
}


class RoiTable:
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
        self.columns = [_ArrayColumn() for _ in self.positions]
        self.dtype = np.dtype(
            [(field.name, _NUMPY_TYPES[field.code]) for field in desc.fields if field.code in _NUMPY_TYPES]
        )

    def take(self, node: JavaObject, slot: int) -> None:
        """Copy what a ROI holds; `slot` is its number in the batch."""
        self.slots.append(slot)
        self.numbers += node.data[0]
        for position, column in zip(self.positions, self.columns, strict=True):
            column.take(node.data[position], self.name, node)

    def parts(self) -> Iterator[RoiPart]:
        """Yield the ROIs in portions that take little memory."""
        count = len(self.slots)
        records = np.frombuffer(self.numbers, self.dtype)
        size = self.columns[0].ends()[1][1:] if self.columns else np.zeros(count, np.int64)
        portion = size // _PORTION_BYTES + np.arange(count) // _PORTION_ROIS
        bounds = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), count]
        arrays = zip(*(column.portions(bounds) for column in self.columns), strict=True) if self.columns else repeat(())
        for (first, end), columns in zip(pairwise(bounds), arrays, strict=False):
            yield RoiPart(self.name, self.slots[first:end].tolist(), records[first:end], columns)


class _ArrayColumn:
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


class RoiPart(NamedTuple):
    """Some ROIs of one kind: their numbers, one record each, and their arrays by field."""

    name: str
    slots: list[int]
    numbers: NDArray[Any]
    arrays: tuple[_Arrays, ...]
