"""Find pairs of shapes with much the same outline, however many lie in a heap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

__all__ = ["overlapping"]

_SAME_OUTLINE = 0.5
"""Share of what two outlines cover together that both cover, from which one can be a new form of the other."""

_PAIRS_EACH = 50
"""Shapes near another that it is compared with; where there are more, it counts as crowded."""

_AT_ONCE = 256


def overlapping(
    ours: Sequence[BaseGeometry | None], theirs: Sequence[BaseGeometry | None]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Find the pairs of shapes of which each covers most of the other; of lines and points, those that are equal.

    Returns
    -------
    list of tuple of int
        Index in `ours` and in `theirs`.
    list of int
        Indices of `ours` in heaps of shapes, which are not compared one by one.
    """
    pairs: list[tuple[int, int]] = []
    crowded: list[int] = []
    shapes, tree = np.array(ours, object), shapely.STRtree(np.array(theirs, object))
    looked_at, most = 0, _PAIRS_EACH * (len(ours) + len(theirs))
    for first in range(0, len(ours), _AT_ONCE):
        if looked_at > most:
            crowded += range(first, len(ours))
            break
        some = shapes[first : first + _AT_ONCE]
        one, two = tree.query(some)
        looked_at += len(one)
        near = _may_be_alike(some[one], tree.geometries[two])
        one, two = one[near], two[near]
        is_crowded = np.bincount(one, minlength=len(some)) > _PAIRS_EACH
        crowded += (np.flatnonzero(is_crowded) + first).tolist()
        few = ~is_crowded[one]
        pairs += [
            (first + place, index)
            for place, index in zip(one[few].tolist(), two[few].tolist(), strict=True)
            if _are_alike(some[place], tree.geometries[index])
        ]
    return pairs, crowded


def _may_be_alike(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether areas and bounds allow it, which costs little to know; of the rest, whether both are valid."""
    sizes = np.stack([shapely.area(ours), shapely.area(theirs)])
    a, b = shapely.bounds(ours), shapely.bounds(theirs)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    least, most = _SAME_OUTLINE * sizes.max(axis=0), sides.clip(min=0).prod(axis=1)
    fits = (sizes.min(axis=0) >= least) & (most >= least)
    fits[fits] = shapely.is_valid(ours[fits]) & shapely.is_valid(theirs[fits])
    return np.asarray(fits)


def _are_alike(one: BaseGeometry, two: BaseGeometry) -> bool:
    whole = shapely.union(one, two).area
    if whole == 0:
        return bool(shapely.equals(one, two))
    return bool(shapely.intersection(one, two).area >= _SAME_OUTLINE * whole)
