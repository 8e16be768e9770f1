"""Blend overlapping slices smoothly in a rolling band of map rows.

Scores are weighted by a window that falls towards the slice's edge and summed on the score map's grid; the sum of the
windows normalizes them. Only the rows that unfinished slices can still reach are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.classes import IGNORE

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MapRows", "RollingBand", "WindowedScores"]


@dataclass(frozen=True, slots=True)
class WindowedScores:
    """Scores of one slice on the map's grid.

    Attributes
    ----------
    row, column : int
        Map pixel of the upper left corner; may be negative, and the scores may overhang the map.
    scores : ndarray of float32, shape (K, height, width)
        Softmax scores.
    weight : ndarray of float32, shape (height, width)
        The window, averaged over each map pixel.
    """

    row: int
    column: int
    scores: NDArray[np.float32]
    weight: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MapRows:
    """Finished rows of a score map, all uint8 of shape (rows, width).

    Attributes
    ----------
    label : ndarray
        Class, 255 where nothing was predicted.
    confidence : ndarray
        Score of that class, 0 to 255 for 0 to 1; 0 where nothing was predicted.
    margin : ndarray
        Score of that class minus the runner-up's, likewise.
    runner_up : ndarray
        Second class; 255 where nothing was predicted or there is only one class.
    """

    label: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    margin: NDArray[np.uint8]
    runner_up: NDArray[np.uint8]

    @classmethod
    def blank(cls, rows: int, width: int) -> MapRows:
        """Rows where nothing was predicted."""
        shape = (rows, width)
        return cls(
            np.full(shape, IGNORE, np.uint8), np.zeros(shape, np.uint8), np.zeros(shape, np.uint8),
            np.full(shape, IGNORE, np.uint8),
        )  # fmt: skip

    def hide(self, mask: NDArray[np.bool_]) -> None:
        """Mark the pixels of `mask` as not predicted, in place."""
        self.label[mask] = IGNORE
        self.confidence[mask] = 0
        self.margin[mask] = 0
        self.runner_up[mask] = IGNORE


class RollingBand:
    """Sums of windowed scores for the map rows that are not finished yet.

    Parameters
    ----------
    num_classes : int
        K.
    width : int
        Map columns.
    top : int
        First map row that is not finished.
    """

    def __init__(self, num_classes: int, width: int, *, top: int = 0) -> None:
        self.top = top
        self.width = width
        # The last plane is the weight: one array moves, grows and is stored as a whole.
        self._sums = np.zeros((num_classes + 1, 0, width), np.float32)

    @property
    def unfinished(self) -> NDArray[np.float32]:
        """Sums and weight of the unfinished rows, shape (K + 1, rows, width): all that a resumed run needs."""
        return self._sums

    @unfinished.setter
    def unfinished(self, sums: NDArray[np.float32]) -> None:
        self._sums = np.array(sums, np.float32)

    def reserve(self, bottom: int) -> None:
        """Make room for the rows above `bottom` (exclusive)."""
        missing = bottom - self.top - self._sums.shape[1]
        if missing > 0:
            more = np.zeros((self._sums.shape[0], missing, self.width), np.float32)
            self._sums = np.concatenate([self._sums, more], axis=1)

    def add(self, score: WindowedScores) -> None:
        """Add the scores of a slice; what lies outside the map, or above the unfinished rows, falls away."""
        height, width = score.weight.shape
        first_row, first_column = max(self.top, score.row), max(0, score.column)
        last_row = min(self.top + self._sums.shape[1], score.row + height)
        last_column = min(self.width, score.column + width)
        if last_row <= first_row or last_column <= first_column:
            return
        rows = slice(first_row - score.row, last_row - score.row)
        columns = slice(first_column - score.column, last_column - score.column)
        target = self._sums[:, first_row - self.top : last_row - self.top, first_column:last_column]
        weight = score.weight[rows, columns]
        target[:-1] += score.scores[:, rows, columns] * weight
        target[-1] += weight

    def finish(self, bottom: int) -> MapRows:
        """Take out the rows above `bottom` (exclusive) as layers; later slices may not reach them."""
        self.reserve(bottom)
        num = bottom - self.top
        done, rest = self._sums[:, :num], self._sums[:, num:]
        layers = _layers(done)
        self._sums = rest.copy()
        self.top = bottom
        return layers


def _layers(sums: NDArray[np.float32]) -> MapRows:
    """Layers of summed scores; row by block of rows, so that the temporaries stay small."""
    num_classes, rows, width = sums.shape[0] - 1, sums.shape[1], sums.shape[2]
    layers = MapRows.blank(rows, width)
    for start in range(0, rows, 64):
        block = sums[:, start : start + 64]
        # No class where a sum is not a number: the largest of several NaN would be the first class.
        rows_seen, columns_seen = np.nonzero((block[-1] > 0) & np.isfinite(block).all(axis=0))
        if not len(rows_seen):
            continue
        scores = block[:-1, rows_seen, columns_seen] / block[-1, rows_seen, columns_seen]
        place = (rows_seen + start, columns_seen)
        label, pixel = scores.argmax(axis=0), np.arange(scores.shape[1])
        best = scores[label, pixel]
        layers.label[place] = label
        layers.confidence[place] = _uint8(best)
        if num_classes == 1:
            layers.margin[place] = _uint8(best)
            continue
        scores[label, pixel] = -1
        second = scores.argmax(axis=0)
        layers.runner_up[place] = second
        layers.margin[place] = _uint8(best - scores[second, pixel])
    return layers


def _uint8(fraction: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(np.clip(fraction, 0, 1) * 255).astype(np.uint8)
