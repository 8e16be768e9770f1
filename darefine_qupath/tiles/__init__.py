"""Plan, label, sample, split, store and read pairs of slice and context.

`spec`, `plan` and `reading` serve training and prediction alike; the other modules make training data.
"""

from __future__ import annotations

from darefine_qupath.tiles.plan import TilePair, group_by_context, plan_even, plan_tiles
from darefine_qupath.tiles.reading import PairPixels, iter_pairs, read_context, read_pair, read_slice
from darefine_qupath.tiles.spec import PixelSpec, TileSpec

__all__ = [
    "PairPixels",
    "PixelSpec",
    "TilePair",
    "TileSpec",
    "group_by_context",
    "iter_pairs",
    "plan_even",
    "plan_tiles",
    "read_context",
    "read_pair",
    "read_slice",
]
