"""Merge pieces across the cuts between blocks into polygons, fill small holes, merge small polygons."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import shapely
from shapely.geometry import Polygon

from darefine_qupath.errors import PolygonError
from darefine_qupath.polygons.class_polygon import ClassPolygon
from darefine_qupath.polygons.disjoint_sets import DisjointSets
from darefine_qupath.polygons.pieces import MapPieces, group_pieces
from darefine_qupath.polygons.settings import VectorizeSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["fill_small_holes", "merge_pieces", "merge_small_polygons"]

_ROUNDING = 1e-9


def merge_pieces(pieces: MapPieces, settings: VectorizeSettings, mpp: float | None, threads: int) -> list[ClassPolygon]:
    """Join the pieces across the cuts into polygons."""
    groups = group_pieces(pieces, settings)
    with ThreadPoolExecutor(max(1, threads)) as workers:
        # Most regions are one piece, for which a thread is not worth its while.
        unions = [workers.submit(_union, pieces.outlines[group]) if len(group) > 1 else None for group in groups]
        outlines = [
            pieces.outlines[group[0]] if union is None else union.result()
            for group, union in zip(groups, unions, strict=True)
        ]
    return [_record(pieces, group, outline, mpp) for group, outline in zip(groups, outlines, strict=True)]


def _union(outlines: NDArray[np.object_]) -> Polygon:
    # All points lie on the grid and pieces meet on upright and level lines only: the union is exact.
    joined = shapely.union_all(outlines)
    if joined.geom_type != "Polygon":
        raise PolygonError(f"Pieces around {joined.bounds} did not join; please report this with the map")
    return joined


def _record(pieces: MapPieces, group: list[int], outline: Polygon, mpp: float | None) -> ClassPolygon:
    pixels = int(pieces.pixels[group].sum())
    means = {name: float(sums[group].sum() / pixels) for name, sums in pieces.sums.items()}
    runner_up_counts = pieces.runner_up_counts[group].sum(axis=0)
    column = int(runner_up_counts.argmax()) if runner_up_counts.any() else None
    return ClassPolygon(
        label=int(pieces.labels[group[0]]),
        geometry=outline,
        area_um2=None if mpp is None else outline.area * mpp * mpp,
        confidence=means.get("confidence"),
        margin=means.get("margin"),
        runner_up=None if column is None else int(pieces.runner_up_labels[column]),
        runner_up_share=None if column is None else float(runner_up_counts[column] / pixels),
    )


def fill_small_holes(polygons: list[ClassPolygon], smallest: float, mpp: float | None) -> list[ClassPolygon]:
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


def merge_small_polygons(polygons: list[ClassPolygon], smallest: float, mpp: float | None) -> list[ClassPolygon]:
    """Give polygons below `smallest` square level-0 pixels to the neighbor with which they share most of their border.

    A region of enough pixels becomes one where simplifying takes from it more than it gives, or where the image ends
    within its pixels. One without a neighbor (all there is, or beside what gets no polygon) stays as it is.
    """
    shapes = np.array([item.geometry for item in polygons], np.object_)
    areas = shapely.area(shapes)
    enough = smallest * (1 - _ROUNDING)
    small = np.flatnonzero(areas < enough)
    if not len(small):
        return polygons
    neighbors = _neighbors(shapes, small)
    sets = DisjointSets(len(polygons))
    members = {index: [index] for index in range(len(polygons))}
    total = areas.tolist()
    for index in small[np.argsort(areas[small], kind="stable")].tolist():
        root = sets.find(index)
        beside = [(length, other) for each in members[root] for other, length in neighbors.get(each, ())]
        beside = [(length, other) for length, other in beside if sets.find(other) != root]
        if total[root] >= enough or not beside:
            continue
        other = sets.find(max(beside)[1])
        sets.union(root, other)
        kept, gone = sets.find(root), root + other - sets.find(root)
        members[kept] = members[kept] + members.pop(gone)
        total[kept] += total[gone]
    return [_merged(polygons, sorted(group, key=lambda index: -areas[index]), mpp) for group in members.values()]


def _neighbors(shapes: NDArray[np.object_], small: NDArray[np.int64]) -> dict[int, list[tuple[int, float]]]:
    """By index of a small shape, the shapes that have edges of its border, and the length of these edges."""
    rings, owners = shapely.get_rings(shapes, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    is_edge = ring[1:] == ring[:-1]
    ends = np.concatenate([points[:-1], points[1:]], axis=1)[is_edge]
    owner = owners[ring[:-1][is_edge]]
    # An edge goes one way in one polygon and the other way in its neighbor.
    turned = (ends[:, 0] > ends[:, 2]) | ((ends[:, 0] == ends[:, 2]) & (ends[:, 1] > ends[:, 3]))
    ends[turned] = ends[turned][:, [2, 3, 0, 1]]
    order = np.lexsort(ends.T)
    ends, owner = ends[order], owner[order]
    same = np.flatnonzero((ends[1:] == ends[:-1]).all(axis=1))
    lengths = np.hypot(*(ends[same, 2:] - ends[same, :2]).T)
    shared: dict[int, dict[int, float]] = {int(index): {} for index in small}
    for first, second, length in zip(owner[same].tolist(), owner[same + 1].tolist(), lengths.tolist(), strict=True):
        for one, other in ((first, second), (second, first)):
            if one in shared and one != other:
                shared[one][other] = shared[one].get(other, 0.0) + length
    return {index: list(found.items()) for index, found in shared.items()}


def _merged(polygons: list[ClassPolygon], group: list[int], mpp: float | None) -> ClassPolygon:
    """Largest polygon of a group with the ground of the others; what is said of it is of its own pixels."""
    largest = polygons[group[0]]
    if len(group) == 1:
        return largest
    outline = shapely.union_all([polygons[index].geometry for index in group])
    if outline.geom_type != "Polygon":
        return largest
    return replace(largest, geometry=outline, area_um2=None if mpp is None else outline.area * mpp * mpp)
