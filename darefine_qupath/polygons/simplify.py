"""Round, thin and simplify borders, the same way for both neighbors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely

from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box
from darefine_qupath.polygons.concurrency import WARNINGS_LOCK
from darefine_qupath.polygons.settings import VectorizeSettings
from darefine_qupath.polygons.trace import Rings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["simplify_outlines"]

_PASSES = 4


_THIN_FROM_PX = 16


def simplify_outlines(
    rings: Rings, window: NDArray[np.uint8], block: Box, settings: VectorizeSettings
) -> NDArray[np.object_]:
    """Simplified outline per piece in level-0 pixels."""
    fixed = _fixed(rings.points, window)
    origin = (block.x + settings.columns[0], block.y + settings.rows[0])
    # Rounding and thinning keep the topology but for contrived maps, so what comes out is checked; on the bare lattice
    # nothing can go wrong.
    for smooth in (True, False) if settings.smooth else (False,):
        moved = _smoothed(rings, fixed, settings.limit) if smooth else rings.points.astype(np.float64)
        keep = _thinned(rings, fixed) if smooth and settings.min_area_px >= _THIN_FROM_PX else np.ones(len(moved), bool)
        outlines = _simplified(_polygons(rings, settings.place(moved + origin), keep), settings.tolerance)
        if outlines is not None:
            return outlines
    raise PolygonError(f"No valid outlines for the map pixels of {block}; please report this with the map")


def _simplified(outlines: NDArray[np.object_], tolerance: float) -> NDArray[np.object_] | None:
    try:
        if tolerance > 0:
            outlines = shapely.coverage_simplify(outlines, tolerance, simplify_boundary=False)
    except shapely.errors.GEOSException:
        return None
    with WARNINGS_LOCK:
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


def _smoothed(rings: Rings, fixed: NDArray[np.bool_], limit: float) -> NDArray[np.float64]:
    """Points pulled towards their neighbors on the border, each by less than `limit` from its lattice place."""
    home = rings.points.astype(np.float64)
    pull = np.where(fixed, 0.0, 0.25)[:, None]
    moved = home.copy()
    for _ in range(_PASSES):
        # Before plus after is the same sum whichever way the ring runs: both neighbors get the same bits.
        moved += (rings.step_back(moved) + rings.step(moved) - 2 * moved) * pull
        np.clip(moved, home - limit, home + limit, out=moved)
    return moved


def _thinned(rings: Rings, fixed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every second point, by a rule that both neighbors of a border follow: the parity of its lattice place."""
    return np.asarray(fixed | (rings.points.sum(axis=1) % 2 == 0), np.bool_)


def _polygons(rings: Rings, placed: NDArray[np.float64], keep: NDArray[np.bool_]) -> NDArray[np.object_]:
    sizes = np.add.reduceat(keep.astype(np.int64), rings.starts)
    kept = placed[keep]
    offsets = np.append(0, np.cumsum(sizes + 1))
    closed = np.insert(kept, np.cumsum(sizes), kept[np.cumsum(sizes) - sizes], axis=0)
    pieces = np.append(np.flatnonzero(rings.first), len(sizes))
    return np.asarray(shapely.from_ragged_array(shapely.GeometryType.POLYGON, closed, (offsets, pieces)), np.object_)
