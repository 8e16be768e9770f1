"""Vectorize a label map: sieve, trace, simplify, merge."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box
from darefine_qupath.polygons.blocks import trace_blocks
from darefine_qupath.polygons.class_polygon import ClassPolygon
from darefine_qupath.polygons.map_reader import MapReader, MapSource
from darefine_qupath.polygons.merge import fill_small_holes, merge_pieces, merge_small_polygons
from darefine_qupath.polygons.settings import GRID, VectorizeSettings
from darefine_qupath.polygons.sieve import sieve_labels

__all__ = ["vectorize"]


def vectorize(
    labels: MapSource,
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
    skip_labels: Iterable[int] = (),
    max_vertices: int | None = 20_000,
    confidence: MapSource | None = None,
    margin: MapSource | None = None,
    runner_up: MapSource | None = None,
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
        Micrometers per level-0 pixel. Without it the ``_px`` settings hold and areas in um^2 are None.
    size : tuple of int, optional
        Width and height of the map, for a callable.
    image_size : tuple of int, optional
        Width and height of the image at level 0; nothing is given back outside.
    simplify_um, simplify_px : float, optional
        Detail that is left out: square root of the area of a bump, in micrometers, or in map pixels where
        `simplify_um` is None.
    min_area_um2, min_area_px : float, optional
        Smaller regions go to their largest neighbor; in um^2, or in map pixels where `min_area_um2` is None. Square
        micrometers are those of the polygon that is given back, of which only one without any neighbor may be smaller.
    min_hole_um2, min_hole_px : float, optional
        Smaller holes of a region are filled, whatever is in them. As large as the smallest region by default, and
        never smaller: a region that is left out leaves no hole.
    skip_labels : iterable of int, optional
        Labels that get no polygon (Normal, background); they shape the others' borders all the same.
    max_vertices : int, optional
        A region with more is split along straight lines; None never splits.
    confidence, margin, runner_up : as `labels`, optional
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
    source = MapReader.of(labels, size)
    scale = (box.width / source.width, box.height / source.height)
    settings = VectorizeSettings(
        box=box,
        scale=scale,
        columns=_inside(source.width, box.x, scale[0], None if image_size is None else image_size[0]),
        rows=_inside(source.height, box.y, scale[1], None if image_size is None else image_size[1]),
        image_size=image_size,
        tolerance=_length(simplify_um, simplify_px, mpp, scale),
        min_area_px=_pixels(min_area_um2, min_area_px, mpp, scale),
        smooth=smooth,
        max_vertices=max_vertices,
        skip_labels=frozenset(skip_labels) | {IGNORE},
        layers={
            name: MapReader.of(layer, (source.width, source.height))
            for name, layer in (("confidence", confidence), ("margin", margin))
            if layer is not None
        },
        runner_up=None if runner_up is None else MapReader.of(runner_up, (source.width, source.height)),
    )
    settings.check(source, block_px)
    if settings.columns[0] >= settings.columns[1] or settings.rows[0] >= settings.rows[1]:
        return ()
    hole = min_hole_um2 if mpp is not None and min_hole_um2 is not None else None
    hole_px = _pixels(hole, min_hole_px or 0.0, mpp, scale)
    # Windows does not remove a file that an error's traceback still maps; the error is what must be seen.
    with tempfile.TemporaryDirectory(prefix="darefine-", ignore_cleanup_errors=True) as scratch:
        sieved = sieve_labels(source, settings, Path(scratch))
        pieces = trace_blocks(sieved, settings, block_px, threads, progress)
        # A map in a temporary file is let go of before its folder goes.
        del sieved
    polygons = merge_pieces(pieces, settings, mpp, threads)
    if polygons and hole_px > settings.min_area_px:
        polygons = fill_small_holes(polygons, hole_px * scale[0] * scale[1], mpp)
    if polygons and mpp is not None and min_area_um2 is not None:
        polygons = merge_small_polygons(polygons, min_area_um2 / mpp**2, mpp)
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
        raise PolygonError(f"{mpp} micrometers per pixel make no sense; give the slide's mpp")
    value = um2 / (mpp * mpp * scale[0] * scale[1]) if um2 is not None and mpp is not None else px
    if not value >= 0:
        raise PolygonError(f"A smallest area of {value} map pixels makes no sense; give 0 or more")
    return value


def _inside(count: int, start: int, scale: float, limit: int | None) -> tuple[int, int]:
    """First and last column (or row) of the map that reach into the image, by more than rounding would take away."""
    if limit is None:
        return 0, count
    first = math.ceil((GRID - start) / scale) - 1
    return max(0, first), min(count, math.floor((limit - GRID - start) / scale) + 1)
