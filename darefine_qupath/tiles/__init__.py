"""Pairs of slice and context: planned, labelled, sampled, split, stored and loaded.

`spec`, `plan` and `reading` serve training and prediction alike; `sources`, `index`, `dataset`, `sampling` and `split`
make training data; `loading` alone needs torch.
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
