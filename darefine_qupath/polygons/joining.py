"""Pieces joined across the cuts, and what is said of each polygon."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import shapely
from shapely.geometry import Polygon

from darefine_qupath.errors import PolygonError
from darefine_qupath.polygons.plan import ClassPolygon, Plan
from darefine_qupath.polygons.pool import Pool, grouped

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["join", "without_holes"]


def join(pool: Pool, plan: Plan, mpp: float | None, threads: int) -> list[ClassPolygon]:
    """Join the pieces across the cuts into polygons."""
    groups = grouped(pool, plan)
    with ThreadPoolExecutor(max(1, threads)) as workers:
        # Most regions are one piece, for which a thread is not worth its while.
        unions = [workers.submit(_union, pool.outlines[group]) if len(group) > 1 else None for group in groups]
        outlines = [
            pool.outlines[group[0]] if union is None else union.result()
            for group, union in zip(groups, unions, strict=True)
        ]
    return [_record(pool, group, outline, mpp) for group, outline in zip(groups, outlines, strict=True)]


def _union(outlines: NDArray[np.object_]) -> Polygon:
    # All points lie on the grid and pieces meet on upright and level lines only: the union is exact.
    joined = shapely.union_all(outlines)
    if joined.geom_type != "Polygon":
        raise PolygonError(f"Pieces around {joined.bounds} did not join; please report this with the map")
    return joined


def _record(pool: Pool, group: list[int], outline: Polygon, mpp: float | None) -> ClassPolygon:
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


def without_holes(polygons: list[ClassPolygon], smallest: float, mpp: float | None) -> list[ClassPolygon]:
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
