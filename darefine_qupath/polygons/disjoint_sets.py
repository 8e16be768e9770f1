"""Unite numbers into disjoint sets, up to a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["DisjointSets"]


class DisjointSets:
    """Disjoint sets of piece numbers, with a weight each."""

    def __init__(self, count: int, weights: Sequence[int] | None = None) -> None:
        self._parent = list(range(count))
        self._weight = list(weights) if weights is not None else [0] * count

    def find(self, index: int) -> int:
        """Return the number that stands for the set."""
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def union(self, first: int, second: int, limit: float = math.inf) -> None:
        """Make two sets one, unless that would weigh more than `limit`."""
        first, second = self.find(first), self.find(second)
        if first == second or self._weight[first] + self._weight[second] > limit:
            return
        first, second = min(first, second), max(first, second)
        self._parent[second] = first
        self._weight[first] += self._weight[second]

    def members(self, wanted: NDArray[np.bool_]) -> list[list[int]]:
        """List the sets of what is wanted."""
        found: dict[int, list[int]] = {}
        for index in np.flatnonzero(wanted).tolist():
            found.setdefault(self.find(index), []).append(index)
        return list(found.values())
