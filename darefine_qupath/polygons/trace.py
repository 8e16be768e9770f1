"""Trace borders on the lattice of pixel corners, and sum layers over what they enclose."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from rasterio import features

from darefine_qupath.polygons.concurrency import SCRATCH, WARNINGS_LOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Rings", "trace"]


@dataclass(frozen=True)
class Rings:
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
        totals = SCRATCH.room((layer.shape[0], layer.shape[1] + 1), dtype)
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


def trace(window: NDArray[np.uint8]) -> Rings:
    """Trace the regions of a window."""
    corners: list[tuple[float, float]] = []
    sizes: list[int] = []
    counts: list[int] = []
    labels: list[int] = []
    with WARNINGS_LOCK:
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
    return Rings(
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
