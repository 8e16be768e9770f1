"""From a label map to class polygons that share their borders exactly.

The map is sieved, traced with 4-connectivity, rounded by less than half a map pixel, and simplified as a coverage
(Visvalingam-Whyatt on the shared borders, `shapely.coverage_simplify`), so neighbours have the same border to the
last bit: no gap, no overlap. Three facts make that hold from the first pixel to QuPath's file:

* Every border point is a corner of the pixel lattice moved by less than half a pixel, the same for both neighbours.
  Lattice edges that share no end lie a whole pixel apart on one axis, so borders moved that little cannot cross.
* Points are rounded to quarters of a level-0 pixel *before* they are simplified, and simplification only leaves
  points out. A quarter is a multiple of QuPath's precision (0.01 px) and exact in the float32 that QuPath stores
  plain polygons in, so what is valid here is valid there.
* The map is worked on in blocks whose outline stays as it is. Pieces are joined across the cuts, and a region that
  would get more vertices than QuPath handles well stays cut, its pieces sharing straight borders exactly.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import shapely
from rasterio import features
from rasterio.windows import Window
from shapely.geometry import Polygon

from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FEWEST_VERTICES", "GRID", "ClassPolygon", "Dataset", "Layer", "snap", "vectorise"]

_log = logging.getLogger(__name__)

GRID = 0.25
"""Spacing in level-0 pixels that every vertex lies on: exact in QuPath's 0.01 px and in its float32."""

FEWEST_VERTICES = 400
"""A region is split into pieces of no fewer vertices than this."""

IN_MEMORY_PIXELS = 1 << 30
"""Above this size the sieved map lies in a temporary file instead of in memory."""

_FLOAT32_EXACT = 1 << 22
_PASSES = 4
_SIEVES = 4
_THIN_FROM_PX = 16
# rasterio and shapely silence warnings around some calls, which is not safe between threads: filters stay changed.
_WARNINGS = threading.Lock()


class _Scratch(threading.local):
    """Memory that a thread uses again and again: fresh pages cost more than the sums that are put into them."""

    def __init__(self) -> None:
        self._kept: dict[type, NDArray[Any]] = {}

    def room(self, shape: tuple[int, int], dtype: type) -> NDArray[Any]:
        """Array of any content, until the thread asks for one of this type again."""
        size = shape[0] * shape[1]
        if dtype not in self._kept or self._kept[dtype].size < size:
            self._kept[dtype] = np.empty(size, dtype)
        return self._kept[dtype][:size].reshape(shape)


_SCRATCH = _Scratch()


class Dataset(Protocol):
    """What is used of an open rasterio dataset; the first band is read."""

    @property
    def width(self) -> int:
        """Columns."""

    @property
    def height(self) -> int:
        """Rows."""

    def read(self, indexes: int, *, window: Window) -> NDArray[Any]:
        """Pixels of one band inside a window."""


Layer: TypeAlias = "NDArray[Any] | Dataset | Callable[[Box], NDArray[Any]]"
"""A map as an array, an open rasterio dataset, or a function from a `Box` in map pixels to an array."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassPolygon:
    """One connected region of one class, or a piece of a region that was split.

    Attributes
    ----------
    label : int
        Class label.
    geometry : Polygon
        In level-0 pixels, on quarters of a pixel; valid, holes kept.
    area_um2 : float or None
        Area in square micrometres; None while the pixel size is unknown.
    confidence, margin, entropy : float or None
        Means over the region's pixels of the map, 0 to 1 where the layer is; None where no layer was given.
    runner_up : int or None
        The class that comes second on most pixels.
    runner_up_share : float or None
        Share of the pixels on which it does.
    """

    label: int
    geometry: Polygon
    area_um2: float | None = None
    confidence: float | None = None
    margin: float | None = None
    entropy: float | None = None
    runner_up: int | None = None
    runner_up_share: float | None = None


def snap(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round level-0 coordinates to `GRID`."""
    return np.round(values / GRID) * GRID


def vectorise(
    labels: Layer,
    *,
    box: Box,
    mpp: float | None = None,
    size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    simplify_um: float | None = None,
    min_area_um2: float | None = 1000.0,
    min_hole_um2: float | None = None,
    simplify_px: float = 1.5,
    min_area_px: float = 64.0,
    min_hole_px: float | None = None,
    leave_out: Iterable[int] = (),
    max_vertices: int | None = 20_000,
    confidence: Layer | None = None,
    margin: Layer | None = None,
    entropy: Layer | None = None,
    runner_up: Layer | None = None,
    smooth: bool = True,
    block_px: int = 2048,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ClassPolygon, ...]:
    """Turn a label map into class polygons without gap or overlap.

    Parameters
    ----------
    labels : ndarray of uint8 of shape (height, width), rasterio dataset, or callable
        Label per map pixel, `IGNORE` where there is nothing. A callable takes a `Box` in map pixels and needs `size`.
    box : Box
        What the map covers, in level-0 pixels; may overhang the image.
    mpp : float, optional
        Micrometres per level-0 pixel. Without it the ``_px`` settings hold and areas in um^2 are None.
    size : tuple of int, optional
        Width and height of the map, for a callable.
    image_size : tuple of int, optional
        Width and height of the image at level 0; nothing is given back outside.
    simplify_um, simplify_px : float, optional
        Detail that is left out: square root of the area of a bump, in micrometres, or in map pixels where
        `simplify_um` is None.
    min_area_um2, min_area_px : float, optional
        Smaller regions go to their largest neighbour; in um^2, or in map pixels where `min_area_um2` is None.
    min_hole_um2, min_hole_px : float, optional
        Smaller holes of a region are filled, whatever is in them. As large as the smallest region by default, and
        never smaller: a region that is left out leaves no hole.
    leave_out : iterable of int, optional
        Labels that get no polygon (Normal, background); they shape the others' borders all the same.
    max_vertices : int, optional
        A region with more is split along straight lines; None never splits.
    confidence, margin, entropy, runner_up : as `labels`, optional
        Maps of the same size. Integer types are taken as 0 to their largest value; `runner_up` holds labels.
    smooth : bool, optional
        Round the stair steps of the pixels, by less than half a map pixel.
    block_px : int, optional
        Side of the blocks in map pixels; bounds the memory.
    threads : int, optional
        Blocks worked on at a time.
    progress : callable, optional
        Called with the number of blocks done and of all blocks.

    Returns
    -------
    tuple of ClassPolygon
        By label, then from top to bottom.

    Raises
    ------
    PolygonError
        If the map is not of labels, the layers differ in size, or a setting makes no sense.
    """
    source = _Source.of(labels, size)
    scale = (box.width / source.width, box.height / source.height)
    plan = _Plan(
        box=box,
        scale=scale,
        columns=_inside(source.width, box.x, scale[0], None if image_size is None else image_size[0]),
        rows=_inside(source.height, box.y, scale[1], None if image_size is None else image_size[1]),
        image_size=image_size,
        tolerance=_length(simplify_um, simplify_px, mpp, scale),
        min_area_px=_pixels(min_area_um2, min_area_px, mpp, scale),
        smooth=smooth,
        max_vertices=max_vertices,
        leave_out=frozenset(leave_out) | {IGNORE},
        layers={
            name: _Source.of(layer, (source.width, source.height))
            for name, layer in (("confidence", confidence), ("margin", margin), ("entropy", entropy))
            if layer is not None
        },
        runner_up=None if runner_up is None else _Source.of(runner_up, (source.width, source.height)),
    )
    plan.check(source, block_px)
    if plan.columns[0] >= plan.columns[1] or plan.rows[0] >= plan.rows[1]:
        return ()
    hole = min_hole_um2 if mpp is not None and min_hole_um2 is not None else None
    hole_px = _pixels(hole, min_hole_px or 0.0, mpp, scale)
    with tempfile.TemporaryDirectory(prefix="darefine-") as scratch:
        sieved = _sieve(source, plan, Path(scratch))
        pool = _work(sieved, plan, block_px, threads, progress)
        # A map in a temporary file is let go of before its folder goes.
        del sieved
    polygons = _joined(pool, plan, mpp, threads)
    if polygons and hole_px > plan.min_area_px:
        polygons = _without_holes(polygons, hole_px * scale[0] * scale[1], mpp)
    return tuple(sorted(polygons, key=lambda item: (item.label, item.geometry.bounds[1], item.geometry.bounds[0])))


def _length(um: float | None, px: float, mpp: float | None, scale: tuple[float, float]) -> float:
    """Tolerance in level-0 pixels."""
    value = um / mpp if um is not None and mpp is not None else px * math.sqrt(scale[0] * scale[1])
    if not value >= 0:
        raise PolygonError(f"A border cannot be simplified by {value} px; give 0 or more")
    return value


def _pixels(um2: float | None, px: float, mpp: float | None, scale: tuple[float, float]) -> float:
    """Area in map pixels."""
    if mpp is not None and not mpp > 0:
        raise PolygonError(f"{mpp} micrometres per pixel make no sense; give the slide's mpp")
    value = um2 / (mpp * mpp * scale[0] * scale[1]) if um2 is not None and mpp is not None else px
    if not value >= 0:
        raise PolygonError(f"A smallest area of {value} map pixels makes no sense; give 0 or more")
    return value


def _inside(count: int, start: int, scale: float, limit: int | None) -> tuple[int, int]:
    """First and last column (or row) of the map that touch the image."""
    if limit is None:
        return 0, count
    first = max(0, math.floor(-start / scale)) if start < 0 else 0
    return first, min(count, math.ceil((limit - start) / scale))


@dataclass(frozen=True)
class _Source:
    """A layer of the map, read by window."""

    width: int
    height: int
    read: Callable[[Box], NDArray[Any]]

    @classmethod
    def of(cls, layer: Layer, size: tuple[int, int] | None) -> _Source:
        if isinstance(layer, np.ndarray):
            if layer.ndim != 2 or 0 in layer.shape:
                raise PolygonError(f"A map has rows and columns, this one has the shape {layer.shape}")
            array = layer
            found = cls(layer.shape[1], layer.shape[0], lambda at: array[at.y : at.bottom, at.x : at.right])
        elif callable(layer):
            if size is None:
                raise PolygonError("A map that is given as a function needs its size (width, height)")
            found = cls(*size, layer)
        else:
            dataset = layer
            found = cls(
                layer.width,
                layer.height,
                lambda at: dataset.read(1, window=Window(at.x, at.y, at.width, at.height)),
            )
        if size is not None and (found.width, found.height) != tuple(size):
            raise PolygonError(f"A layer is {found.width} x {found.height}, the map is {size[0]} x {size[1]}")
        return found


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything the blocks need to know; lengths in level-0 pixels, areas in map pixels."""

    box: Box
    scale: tuple[float, float]
    columns: tuple[int, int]
    rows: tuple[int, int]
    image_size: tuple[int, int] | None
    tolerance: float
    min_area_px: float
    smooth: bool
    max_vertices: int | None
    leave_out: frozenset[int]
    layers: Mapping[str, _Source]
    runner_up: _Source | None

    def check(self, source: _Source, block_px: int) -> None:
        """Refuse what cannot be done."""
        if min(self.scale) < 2 * GRID:
            raise PolygonError(
                f"The map of {source.width} x {source.height} covers only {self.box.width} x {self.box.height} level-0 "
                f"pixels; it must not be finer than {2 * GRID} level-0 pixels per map pixel"
            )
        if max(abs(value) for value in self.box.bounds) >= _FLOAT32_EXACT:
            raise PolygonError(f"{self.box} reaches beyond {_FLOAT32_EXACT} pixels, where QuPath loses precision")
        if self.max_vertices is not None and self.max_vertices < FEWEST_VERTICES:
            raise PolygonError(
                f"At most {self.max_vertices} vertices per polygon are too few; allow {FEWEST_VERTICES} or more"
            )
        if block_px < 16:
            raise PolygonError(f"Blocks of {block_px} map pixels are too small; use 16 or more")

    @property
    def limit(self) -> float:
        """How far in map pixels a border point may move, its rounding to the grid included."""
        return min(0.45, 0.5 - 0.6 * GRID / min(self.scale))

    def place(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Level-0 place, on the grid and inside the image, of points in map pixels."""
        placed = snap(points * self.scale + (self.box.x, self.box.y))
        if self.image_size is not None:
            np.clip(placed, 0, self.image_size, out=placed)
        return placed


def _sieve(source: _Source, plan: _Plan, scratch: Path) -> NDArray[np.uint8]:
    """Map inside the image with regions below the smallest area given to their largest neighbour."""
    width, height = plan.columns[1] - plan.columns[0], plan.rows[1] - plan.rows[0]
    large = width * height > IN_MEMORY_PIXELS
    current = _read_all(source, plan, _canvas((height, width), scratch / "labels" if large else None))
    threshold = min(math.ceil(plan.min_area_px), current.size - 1)
    if threshold < 2:
        return current
    other = _canvas((height, width), scratch / "sieved" if large else None)
    for _ in range(_SIEVES):
        with _WARNINGS:
            features.sieve(current, threshold, out=other, connectivity=4)
        current, other = other, current
        # One pass leaves a small region whose neighbours are all small. Few of them are better dealt with one by one,
        # when they are known; many are not.
        if _changed(current, other) < current.size // 100:
            break
    return current


def _canvas(shape: tuple[int, int], path: Path | None) -> NDArray[np.uint8]:
    return np.empty(shape, np.uint8) if path is None else np.memmap(path, np.uint8, "w+", shape=shape)


def _changed(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    rows = range(0, len(first), 512)
    return sum(int(np.count_nonzero(first[row : row + 512] != second[row : row + 512])) for row in rows)


def _read_all(source: _Source, plan: _Plan, canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = canvas.shape
    step = max(1, (1 << 24) // width)
    for row in range(0, height, step):
        count = min(step, height - row)
        strip = source.read(Box(plan.columns[0], plan.rows[0] + row, width, count))
        if strip.dtype != np.uint8 or strip.shape != (count, width):
            raise PolygonError(
                f"A label map is uint8 and {width} wide here, rows {row} to {row + count} are {strip.dtype} of shape "
                f"{strip.shape}"
            )
        canvas[row : row + count] = strip
    return canvas


# A piece is one connected region of one label inside one block.
@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Pieces of one block: outlines in level-0 pixels, sums over their map pixels, and where they meet the cuts."""

    labels: NDArray[np.int64]
    outlines: NDArray[np.object_]
    pixels: NDArray[np.int64]
    bounds: NDArray[np.int64]
    seeds: NDArray[np.int64]
    sums: Mapping[str, NDArray[np.float64]]
    seconds: NDArray[np.int64]
    borders: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Keys of unit edges on the block's outline and the piece inside: left and top side, right and bottom side."""


def _work(
    sieved: NDArray[np.uint8], plan: _Plan, block_px: int, threads: int, progress: Callable[[int, int], None] | None
) -> _Pool:
    """Pieces of all blocks, none of a region below the smallest area."""
    blocks = list(_blocks(sieved.shape[1], sieved.shape[0], block_px))
    found: dict[Box, list[_Pieces]] = {}
    todo = blocks
    with ThreadPoolExecutor(max(1, threads)) as workers:
        while todo:
            parts = workers.map(lambda block: list(_block(sieved, block, plan)), todo)
            for block, part in zip(todo, parts, strict=True):
                found[block] = part
                if progress is not None:
                    progress(len(found), len(blocks))
            pool = _Pool.of([part for block in blocks for part in found[block]])
            changed = [_give_away(sieved, *place) for place in _left_over(pool, plan)]
            todo = [block for block in blocks if any(at is not None and block.intersection(at) for at in changed)]
    return pool


def _left_over(pool: _Pool, plan: _Plan) -> list[tuple[tuple[int, int], Box]]:
    """Find the regions below the smallest area: a pixel (row, column) and the bounds in map pixels of each."""
    regions = _Sets(len(pool.labels), pool.pixels.tolist())
    for first, second, _ in pool.pairs.tolist():
        regions.unite(first, second)
    found = []
    for members in regions.members(np.ones(len(pool.labels), bool)):
        if pool.pixels[members].sum() < plan.min_area_px:
            left, top = pool.bounds[members, :2].min(axis=0).tolist()
            right, bottom = pool.bounds[members, 2:].max(axis=0).tolist()
            row, column = pool.seeds[members[0]].tolist()
            found.append(((row, column), Box(left, top, right - left, bottom - top)))
    return found


def _give_away(sieved: NDArray[np.uint8], seed: tuple[int, int], bounds: Box) -> Box | None:
    """Give the region of a pixel to the label it shares the longest border with; None where it is alone."""
    at = bounds.grow(1).intersection(Box(0, 0, sieved.shape[1], sieved.shape[0]))
    assert at is not None
    window = sieved[at.y : at.bottom, at.x : at.right]
    same = window == window[seed[0] - at.y, seed[1] - at.x]
    region = np.zeros_like(same)
    region[seed[0] - at.y, seed[1] - at.x] = True
    while True:
        grown = _neighbours(region).any(axis=0) & same | region
        if np.array_equal(grown, region):
            break
        region = grown
    around = [window[side & ~region] for side in _neighbours(region)]
    shares = np.bincount(np.concatenate(around), minlength=1)
    if not shares.any():
        return None
    window[region] = shares.argmax()
    return at


def _neighbours(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels above, below, left and right of those in a region; shape (4, height, width)."""
    sides = np.zeros((4, *region.shape), bool)
    sides[0, :-1], sides[1, 1:] = region[1:], region[:-1]
    sides[2, :, :-1], sides[3, :, 1:] = region[:, 1:], region[:, :-1]
    return sides


def _blocks(width: int, height: int, side: int) -> Iterator[Box]:
    """Blocks of nearly the same size, none larger than `side`."""
    down, across = math.ceil(height / side), math.ceil(width / side)
    rows = [height * index // down for index in range(down + 1)]
    columns = [width * index // across for index in range(across + 1)]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            yield Box(left, top, right - left, bottom - top)


def _block(sieved: NDArray[np.uint8], block: Box, plan: _Plan) -> Iterator[_Pieces]:
    """Pieces of a block, or of its quarters where one has more vertices than a polygon may have."""
    window = np.ascontiguousarray(sieved[block.y : block.bottom, block.x : block.right])
    rings = _trace(window)
    pixels = rings.pixels
    touching = (rings.bounds == (0, 0, block.width, block.height)).any(axis=1)
    if (~touching & (pixels < plan.min_area_px)).any():
        # A region that is left over: it will be given away, and the block is done again.
        outlines = np.full(len(pixels), None, np.object_)
    else:
        outlines = _outlines(rings, window, block, plan)
    heavy = shapely.get_num_coordinates(outlines) > (plan.max_vertices or math.inf)
    heavy &= ~np.isin(rings.labels, list(plan.leave_out))
    if heavy.any() and min(block.size) >= 16:
        for quarter in _blocks(block.width, block.height, math.ceil(max(block.size) / 2)):
            yield from _block(sieved, quarter.shift(block.x, block.y), plan)
        return
    yield _Pieces(
        labels=rings.labels,
        outlines=outlines,
        pixels=pixels,
        bounds=rings.bounds + np.array([block.x, block.y, block.x, block.y]),
        seeds=rings.seeds + np.array([block.y, block.x]),
        sums=_layer_sums(rings, block, plan),
        seconds=_second_counts(rings, block, plan),
        borders=_borders(rings, block, sieved.shape),
    )


@dataclass(frozen=True)
class _Rings:
    """Borders of a block's pieces as closed walks on the lattice of pixel corners, one unit a step.

    The first ring of a piece is its outside, the others are holes; the last point of a ring steps back to the first.
    """

    points: NDArray[np.int32]
    starts: NDArray[np.int64]
    first: NDArray[np.bool_]
    piece: NDArray[np.int64]
    labels: NDArray[np.int64]
    ends: NDArray[np.int64] = field(init=False)
    down: NDArray[np.int32] = field(init=False)
    """Rows that the step from a point goes down: 1, 0 or -1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", np.append(self.starts[1:], len(self.points)) - 1)
        object.__setattr__(self, "down", self.step(self.points[:, 1]) - self.points[:, 1])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Points per ring."""
        return self.ends - self.starts + 1

    def step(self, values: NDArray[Any]) -> NDArray[Any]:
        """Value of the next point of the same ring, per point."""
        following = np.empty_like(values)
        following[:-1] = values[1:]
        following[self.ends] = values[self.starts]
        return following

    def step_back(self, values: NDArray[Any]) -> NDArray[Any]:
        """Value of the point before, per point."""
        before = np.empty_like(values)
        before[1:] = values[:-1]
        before[self.starts] = values[self.ends]
        return before

    def zone_sums(self, layer: NDArray[Any]) -> NDArray[np.float64]:
        """Sum of a layer over the pixels of every piece.

        Green's theorem on the lattice: a sum over a region is the sum of row-wise running totals along its upright
        edges, taken down one side and up the other. No pixel needs to know its piece.
        """
        dtype = np.uint32 if layer.dtype == np.uint8 else np.float64
        totals = _SCRATCH.room((layer.shape[0], layer.shape[1] + 1), dtype)
        totals[:, 0] = 0
        np.cumsum(layer, axis=1, out=totals[:, 1:], dtype=dtype)
        upright = np.flatnonzero(self.down)
        down = self.down[upright]
        rows = self.points[upright, 1] - (down < 0)
        values = totals[rows, self.points[upright, 0]] * (np.repeat(self.turn, self.sizes)[upright] * down)
        owner = np.repeat(self.piece, self.sizes)[upright]
        return np.asarray(np.bincount(owner, values, minlength=len(self.labels)), np.float64)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Left, top, right and bottom per piece."""
        starts = self.starts[self.first]
        low, high = np.minimum.reduceat(self.points, starts), np.maximum.reduceat(self.points, starts)
        return np.concatenate([low, high], axis=1).astype(np.int64)

    @property
    def seeds(self) -> NDArray[np.int64]:
        """Row and column of a pixel per piece: the one below the leftmost of its topmost corners."""
        starts = self.starts[self.first]
        place = self.points[:, 1].astype(np.int64) << 32 | self.points[:, 0]
        lowest = np.minimum.reduceat(place, starts)
        return np.stack([lowest >> 32, lowest & 0xFFFFFFFF], axis=1)

    @property
    def turn(self) -> NDArray[np.float64]:
        """Per ring, what makes the area to its left positive for an outside and negative for a hole."""
        return np.asarray(np.where(self.first, 1.0, -1.0) * np.sign(self._areas), np.float64)

    @property
    def pixels(self) -> NDArray[np.int64]:
        """Pixels per piece."""
        areas = np.where(self.first, 1, -1) * np.abs(self._areas)
        return np.add.reduceat(areas, np.flatnonzero(self.first))

    @property
    def _areas(self) -> NDArray[np.int64]:
        """Signed area per ring."""
        return np.add.reduceat(self.down * self.points[:, 0].astype(np.int64), self.starts)


def _trace(window: NDArray[np.uint8]) -> _Rings:
    corners: list[tuple[float, float]] = []
    sizes: list[int] = []
    counts: list[int] = []
    labels: list[int] = []
    with _WARNINGS:
        traced = list(features.shapes(window, connectivity=4))
    for shape, value in traced:
        rings = shape["coordinates"]
        for ring in rings:
            corners.extend(ring)
            sizes.append(len(ring))
        counts.append(len(rings))
        labels.append(int(value))
    flat = np.fromiter(chain.from_iterable(corners), np.float64, 2 * len(corners)).astype(np.int32).reshape(-1, 2)
    points, lengths = _densified(flat, np.asarray(sizes))
    first = np.zeros(len(sizes), bool)
    first[np.cumsum([0, *counts[:-1]])] = True
    return _Rings(
        points, np.cumsum(np.append(0, lengths[:-1])), first, np.repeat(np.arange(len(counts)), counts),
        np.asarray(labels, np.int64),
    )  # fmt: skip


def _densified(corners: NDArray[np.int32], sizes: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Every lattice point along closed rings of upright and level edges, and the points per ring."""
    ends = np.cumsum(sizes) - 1
    delta = np.diff(corners, axis=0, append=corners[-1:])
    delta[ends] = 0  # the last corner of a ring repeats its first
    lengths = np.abs(delta).sum(axis=1)
    index = np.repeat(np.arange(len(corners)), lengths)
    along = np.arange(len(index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    points = corners[index] + np.sign(delta)[index] * along[:, None].astype(np.int32)
    return points, np.add.reduceat(lengths, ends - sizes + 1)


def _outlines(rings: _Rings, window: NDArray[np.uint8], block: Box, plan: _Plan) -> NDArray[np.object_]:
    """Simplified outline per piece in level-0 pixels."""
    fixed = _fixed(rings.points, window)
    origin = (block.x + plan.columns[0], block.y + plan.rows[0])
    # Rounding and thinning keep the topology but for contrived maps, so what comes out is checked; on the bare lattice
    # nothing can go wrong.
    for smooth in (True, False) if plan.smooth else (False,):
        moved = _smoothed(rings, fixed, plan.limit) if smooth else rings.points.astype(np.float64)
        keep = _thinned(rings, fixed) if smooth and plan.min_area_px >= _THIN_FROM_PX else np.ones(len(moved), bool)
        outlines = _simplified(_polygons(rings, plan.place(moved + origin), keep), plan.tolerance)
        if outlines is not None:
            return outlines
    raise PolygonError(f"No valid outlines for the map pixels of {block}; please report this with the map")


def _simplified(outlines: NDArray[np.object_], tolerance: float) -> NDArray[np.object_] | None:
    try:
        if tolerance > 0:
            outlines = shapely.coverage_simplify(outlines, tolerance, simplify_boundary=False)
    except shapely.errors.GEOSException:
        return None
    with _WARNINGS:
        return outlines if shapely.is_valid(outlines).all() else None


def _fixed(points: NDArray[np.int32], window: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Points that stay where they are: on the block's outline, and where three or more borders meet."""
    height, width = window.shape
    x, y = points[:, 0], points[:, 1]
    fixed = (x == 0) | (x == width) | (y == 0) | (y == height)
    inner = np.flatnonzero(~fixed)
    x, y = x[inner], y[inner]
    across, above, left, here = window[y - 1, x - 1], window[y - 1, x], window[y, x - 1], window[y, x]
    arms = (across != above).astype(np.int8) + (above != here) + (here != left) + (left != across)
    fixed[inner] = arms > 2
    return np.asarray(fixed, np.bool_)


def _smoothed(rings: _Rings, fixed: NDArray[np.bool_], limit: float) -> NDArray[np.float64]:
    """Points pulled towards their neighbours on the border, each by less than `limit` from its lattice place."""
    home = rings.points.astype(np.float64)
    pull = np.where(fixed, 0.0, 0.25)[:, None]
    moved = home.copy()
    for _ in range(_PASSES):
        # Before plus after is the same sum whichever way the ring runs: both neighbours get the same bits.
        moved += (rings.step_back(moved) + rings.step(moved) - 2 * moved) * pull
        np.clip(moved, home - limit, home + limit, out=moved)
    return moved


def _thinned(rings: _Rings, fixed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every second point, by a rule that both neighbours of a border follow: the parity of its lattice place."""
    return np.asarray(fixed | (rings.points.sum(axis=1) % 2 == 0), np.bool_)


def _polygons(rings: _Rings, placed: NDArray[np.float64], keep: NDArray[np.bool_]) -> NDArray[np.object_]:
    sizes = np.add.reduceat(keep.astype(np.int64), rings.starts)
    kept = placed[keep]
    offsets = np.append(0, np.cumsum(sizes + 1))
    closed = np.insert(kept, np.cumsum(sizes), kept[np.cumsum(sizes) - sizes], axis=0)
    pieces = np.append(np.flatnonzero(rings.first), len(sizes))
    return np.asarray(shapely.from_ragged_array(shapely.GeometryType.POLYGON, closed, (offsets, pieces)), np.object_)


def _layer_sums(rings: _Rings, block: Box, plan: _Plan) -> dict[str, NDArray[np.float64]]:
    at = block.shift(plan.columns[0], plan.rows[0])
    sums = {}
    for name, source in plan.layers.items():
        layer = source.read(at)
        top = np.iinfo(layer.dtype).max if layer.dtype.kind in "iu" else 1.0
        sums[name] = rings.zone_sums(layer) / top
    return sums


def _second_counts(rings: _Rings, block: Box, plan: _Plan) -> NDArray[np.int64]:
    """Pixels per piece and runner-up class."""
    if plan.runner_up is None:
        return np.zeros((len(rings.labels), 0), np.int64)
    layer = plan.runner_up.read(block.shift(plan.columns[0], plan.rows[0]))
    # One more than each label, so that IGNORE becomes 0.
    num_labels = int((layer + np.uint8(1)).max())
    counts = np.zeros((len(rings.labels), IGNORE), np.int64)
    here = _SCRATCH.room(layer.shape, np.uint8)
    for label in range(num_labels):
        counts[:, label] = np.rint(rings.zone_sums(np.equal(layer, label, out=here.view(bool)).view(np.uint8)))
    return counts


def _borders(
    rings: _Rings, block: Box, shape: tuple[int, ...]
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    here, there = rings.points, rings.step(rings.points)
    owner = np.repeat(rings.piece, rings.sizes)
    corner = np.minimum(here, there).astype(np.int64) + np.array([block.x, block.y])
    upright = here[:, 0] == there[:, 0]
    keys = (corner[:, 1] * (shape[1] + 1) + corner[:, 0]) * 2 + upright
    low = np.where(upright, here[:, 0] == 0, here[:, 1] == 0)
    high = np.where(upright, here[:, 0] == block.width, here[:, 1] == block.height)
    return (keys[low], owner[low]), (keys[high], owner[high])


@dataclass(frozen=True)
class _Pool:
    """The pieces of all blocks, one after the other."""

    labels: NDArray[np.int64]
    outlines: NDArray[np.object_]
    pixels: NDArray[np.int64]
    bounds: NDArray[np.int64]
    """Left, top, right, bottom in map pixels."""
    seeds: NDArray[np.int64]
    """Row and column of one map pixel."""
    sums: Mapping[str, NDArray[np.float64]]
    seconds: NDArray[np.int64]
    pairs: NDArray[np.int64]
    """Pieces of one label that share a cut, and the length they share: shape (N, 3)."""

    @classmethod
    def of(cls, parts: Sequence[_Pieces]) -> _Pool:
        labels = np.concatenate([part.labels for part in parts])
        return cls(
            labels,
            np.concatenate([part.outlines for part in parts]),
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.bounds for part in parts]),
            np.concatenate([part.seeds for part in parts]),
            {name: np.concatenate([part.sums[name] for part in parts]) for name in parts[0].sums},
            np.concatenate([part.seconds for part in parts]),
            _pairs(parts, labels),
        )


def _pairs(parts: Sequence[_Pieces], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.cumsum([0, *(len(part.labels) for part in parts[:-1])])
    sides = []
    for side in (0, 1):
        keys = np.concatenate([part.borders[side][0] for part in parts])
        owners = np.concatenate([part.borders[side][1] + offset for part, offset in zip(parts, offsets, strict=True)])
        sides.append((keys, owners))
    _, low, high = np.intersect1d(sides[0][0], sides[1][0], assume_unique=True, return_indices=True)
    first, second = sides[0][1][low], sides[1][1][high]
    same = labels[first] == labels[second]
    pairs, shared = np.unique(np.stack([first[same], second[same]], axis=1), axis=0, return_counts=True)
    return np.column_stack([pairs, shared]).astype(np.int64)


def _groups(pool: _Pool, plan: _Plan) -> list[list[int]]:
    """Pieces that become one polygon each."""
    wanted = ~np.isin(pool.labels, list(plan.leave_out))
    pairs = pool.pairs[wanted[pool.pairs[:, 0]]] if len(pool.pairs) else pool.pairs
    whole = _Sets(len(pool.labels))
    for first, second, _ in pairs.tolist():
        whole.unite(first, second)
    if plan.max_vertices is None:
        return whole.members(wanted)
    vertices = shapely.get_num_coordinates(pool.outlines).tolist()
    total: dict[int, int] = {}
    for index, count in enumerate(vertices):
        total[whole.root(index)] = total.get(whole.root(index), 0) + count
    parts = _Sets(len(pool.labels), vertices)
    # Pieces that share most are joined first, which keeps the parts of a region that is too large compact.
    for first, second, _ in pairs[np.argsort(-pairs[:, 2], kind="stable")].tolist():
        limit = math.inf if total[whole.root(first)] <= plan.max_vertices else plan.max_vertices
        parts.unite(first, second, limit)
    return parts.members(wanted)


class _Sets:
    """Disjoint sets of piece numbers, with a weight each."""

    def __init__(self, count: int, weights: Sequence[int] | None = None) -> None:
        self._parent = list(range(count))
        self._weight = list(weights) if weights is not None else [0] * count

    def root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def unite(self, first: int, second: int, limit: float = math.inf) -> None:
        first, second = self.root(first), self.root(second)
        if first == second or self._weight[first] + self._weight[second] > limit:
            return
        first, second = min(first, second), max(first, second)
        self._parent[second] = first
        self._weight[first] += self._weight[second]

    def members(self, wanted: NDArray[np.bool_]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for index in np.flatnonzero(wanted).tolist():
            found.setdefault(self.root(index), []).append(index)
        return list(found.values())


def _joined(pool: _Pool, plan: _Plan, mpp: float | None, threads: int) -> list[ClassPolygon]:
    groups = _groups(pool, plan)
    with ThreadPoolExecutor(max(1, threads)) as workers:
        outlines = list(workers.map(lambda group: _union(pool.outlines[group]), groups, chunksize=64))
    return [_record(pool, group, outline, mpp) for group, outline in zip(groups, outlines, strict=True)]


def _union(outlines: NDArray[np.object_]) -> Polygon:
    if len(outlines) == 1:
        return outlines[0]
    # All points lie on the grid and pieces meet on upright and level lines only: the union is exact.
    joined = shapely.union_all(outlines)
    if joined.geom_type != "Polygon":
        raise PolygonError(f"Pieces around {joined.bounds} did not join; please report this with the map")
    return joined


def _record(pool: _Pool, group: list[int], outline: Polygon, mpp: float | None) -> ClassPolygon:
    pixels = int(pool.pixels[group].sum())
    means = {name: float(sums[group].sum() / pixels) for name, sums in pool.sums.items()}
    seconds = pool.seconds[group].sum(axis=0)
    second = int(seconds.argmax()) if seconds.any() else None
    return ClassPolygon(
        label=int(pool.labels[group[0]]),
        geometry=outline,
        area_um2=None if mpp is None else outline.area * mpp * mpp,
        confidence=means.get("confidence"),
        margin=means.get("margin"),
        entropy=means.get("entropy"),
        runner_up=second,
        runner_up_share=None if second is None else float(seconds[second] / pixels),
    )


def _without_holes(polygons: list[ClassPolygon], smallest: float, mpp: float | None) -> list[ClassPolygon]:
    """Fill holes below `smallest` square level-0 pixels and drop what lies in them."""
    shapes = np.array([item.geometry for item in polygons], np.object_)
    rings, owner = shapely.get_rings(shapes, return_index=True)
    # The first ring of a polygon is its outside.
    inner = np.append(False, owner[1:] == owner[:-1])
    discs, owner = shapely.polygons(rings[inner]), owner[inner]
    small = shapely.area(discs) < smallest
    discs, owner = discs[small], owner[small]
    gone = set(shapely.STRtree(shapely.point_on_surface(shapes)).query(discs, predicate="contains")[1].tolist())
    filled = {}
    for index in sorted(set(owner.tolist()) - gone):
        shape = polygons[index].geometry
        kept = [ring for ring in shape.interiors if Polygon(ring).area >= smallest]
        outline = Polygon(shape.exterior, kept)
        area = None if mpp is None else outline.area * mpp * mpp
        filled[index] = replace(polygons[index], geometry=outline, area_um2=area)
    return [filled.get(index, item) for index, item in enumerate(polygons) if index not in gone]
