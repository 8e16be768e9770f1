"""Trace and simplify the map block by block, until no region is below the smallest area."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import shapely

from darefine_qupath.classes import IGNORE
from darefine_qupath.geometry import Box
from darefine_qupath.polygons.concurrency import SCRATCH
from darefine_qupath.polygons.disjoint_sets import DisjointSets
from darefine_qupath.polygons.pieces import BlockPieces, MapPieces
from darefine_qupath.polygons.settings import VectorizeSettings
from darefine_qupath.polygons.sieve import merge_into_neighbor
from darefine_qupath.polygons.simplify import simplify_outlines
from darefine_qupath.polygons.trace import Rings, trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["trace_blocks"]


def trace_blocks(
    sieved: NDArray[np.uint8],
    settings: VectorizeSettings,
    block_px: int,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> MapPieces:
    """Work through all blocks; gives their pieces, none of which is part of a region below the smallest area."""
    blocks = list(_blocks(sieved.shape[1], sieved.shape[0], block_px))
    found: dict[Box, list[BlockPieces]] = {}
    todo = blocks
    with ThreadPoolExecutor(max(1, threads)) as workers:
        while todo:
            parts = workers.map(lambda block: list(_block(sieved, block, settings)), todo)
            for block, part in zip(todo, parts, strict=True):
                found[block] = part
                if progress is not None:
                    progress(len(found), len(blocks))
            pieces = MapPieces.of([part for block in blocks for part in found[block]])
            changed = [merge_into_neighbor(sieved, *place) for place in _small_regions(pieces, settings)]
            todo = [block for block in blocks if any(at is not None and block.intersection(at) for at in changed)]
    return pieces


def _small_regions(pieces: MapPieces, settings: VectorizeSettings) -> list[tuple[tuple[int, int], Box]]:
    """Find the regions below the smallest area: a pixel (row, column) and the bounds in map pixels of each."""
    regions = DisjointSets(len(pieces.labels), pieces.pixels.tolist())
    for first, second, _ in pieces.pairs.tolist():
        regions.union(first, second)
    found = []
    for members in regions.members(np.ones(len(pieces.labels), bool)):
        if pieces.pixels[members].sum() < settings.min_area_px:
            left, top = pieces.bounds[members, :2].min(axis=0).tolist()
            right, bottom = pieces.bounds[members, 2:].max(axis=0).tolist()
            row, column = pieces.seeds[members[0]].tolist()
            found.append(((row, column), Box(left, top, right - left, bottom - top)))
    return found


def _blocks(width: int, height: int, side: int) -> Iterator[Box]:
    """Blocks of nearly the same size, none larger than `side`."""
    down, across = math.ceil(height / side), math.ceil(width / side)
    rows = [height * index // down for index in range(down + 1)]
    columns = [width * index // across for index in range(across + 1)]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            yield Box(left, top, right - left, bottom - top)


def _block(sieved: NDArray[np.uint8], block: Box, settings: VectorizeSettings) -> Iterator[BlockPieces]:
    """Pieces of a block, or of its quarters where one has more vertices than a polygon may have."""
    window = np.ascontiguousarray(sieved[block.y : block.bottom, block.x : block.right])
    rings = trace(window)
    pixels = rings.pixels
    touching = (rings.bounds == (0, 0, block.width, block.height)).any(axis=1)
    if (~touching & (pixels < settings.min_area_px)).any():
        # A region that is left over: it will be given away, and the block is done again.
        outlines = np.full(len(pixels), None, np.object_)
    else:
        outlines = simplify_outlines(rings, window, block, settings)
    heavy = shapely.get_num_coordinates(outlines) > (settings.max_vertices or math.inf)
    heavy &= ~np.isin(rings.labels, list(settings.skip_labels))
    if heavy.any() and min(block.size) >= 16:
        for quarter in _blocks(block.width, block.height, math.ceil(max(block.size) / 2)):
            yield from _block(sieved, quarter.shift(block.x, block.y), settings)
        return
    runner_up_counts, runner_up_labels = _count_runner_ups(rings, block, settings)
    yield BlockPieces(
        labels=rings.labels,
        outlines=outlines,
        pixels=pixels,
        bounds=rings.bounds + np.array([block.x, block.y, block.x, block.y]),
        seeds=rings.seeds + np.array([block.y, block.x]),
        sums=_layer_sums(rings, block, settings),
        runner_up_counts=runner_up_counts,
        runner_up_labels=runner_up_labels,
        borders=_borders(rings, block, sieved.shape),
    )


def _layer_sums(rings: Rings, block: Box, settings: VectorizeSettings) -> dict[str, NDArray[np.float64]]:
    at = block.shift(settings.columns[0], settings.rows[0])
    sums = {}
    for name, source in settings.layers.items():
        layer = source.read(at)
        top = np.iinfo(layer.dtype).max if layer.dtype.kind in "iu" else 1.0
        sums[name] = rings.zone_sums(layer) / top
    return sums


def _count_runner_ups(
    rings: Rings, block: Box, settings: VectorizeSettings
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels per piece and runner-up class, and which classes these are; only those that the block has."""
    if settings.runner_up is None:
        return np.zeros((len(rings.labels), 0), np.int64), np.zeros(0, np.int64)
    layer = settings.runner_up.read(block.shift(settings.columns[0], settings.rows[0]))
    labels = np.flatnonzero(np.bincount(layer.ravel(), minlength=IGNORE + 1)[:IGNORE])
    counts = np.zeros((len(rings.labels), len(labels)), np.int64)
    here = SCRATCH.room(layer.shape, np.uint8)
    for column, label in enumerate(labels.tolist()):
        counts[:, column] = np.rint(rings.zone_sums(np.equal(layer, label, out=here.view(bool)).view(np.uint8)))
    return counts, labels


def _borders(
    rings: Rings, block: Box, shape: tuple[int, ...]
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    here, there = rings.points, rings.step(rings.points)
    owner = np.repeat(rings.piece, rings.sizes)
    corner = np.minimum(here, there).astype(np.int64) + np.array([block.x, block.y])
    upright = here[:, 0] == there[:, 0]
    keys = (corner[:, 1] * (shape[1] + 1) + corner[:, 0]) * 2 + upright
    low = np.where(upright, here[:, 0] == 0, here[:, 1] == 0)
    high = np.where(upright, here[:, 0] == block.width, here[:, 1] == block.height)
    return (keys[low], owner[low]), (keys[high], owner[high])
