"""Collect the pieces of all blocks and group those that become one polygon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely

from darefine_qupath.polygons.disjoint_sets import DisjointSets
from darefine_qupath.polygons.settings import VectorizeSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BlockPieces", "MapPieces", "group_pieces"]


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """A row per piece, which is one connected region of one label inside one block."""

    labels: NDArray[np.int64]
    outlines: NDArray[np.object_]
    """Polygons in level-0 pixels."""
    pixels: NDArray[np.int64]
    """Number of map pixels."""
    bounds: NDArray[np.int64]
    """Left, top, right, bottom in map pixels."""
    seeds: NDArray[np.int64]
    """Row and column of one map pixel."""
    sums: Mapping[str, NDArray[np.float64]]
    """Layer to sums over the map pixels."""
    runner_up_counts: NDArray[np.int64]
    """Map pixels per runner-up class, of those that there are."""
    runner_up_labels: NDArray[np.int64]
    """Those classes."""


@dataclass(frozen=True, kw_only=True)
class BlockPieces(_Pieces):
    """Pieces of one block, and where they meet the cuts."""

    borders: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Keys of unit edges on the block's outline and the piece inside: left and top side, right and bottom side."""


@dataclass(frozen=True, kw_only=True)
class MapPieces(_Pieces):
    """Pieces of all blocks, one after the other."""

    pairs: NDArray[np.int64]
    """Pieces of one label that share a cut, and the length they share: shape (N, 3)."""

    @classmethod
    def of(cls, parts: Sequence[BlockPieces]) -> MapPieces:
        """Pieces of all blocks, and which of them share a cut."""
        labels = np.concatenate([part.labels for part in parts])
        runner_up_labels = np.unique(np.concatenate([part.runner_up_labels for part in parts]))
        return cls(
            labels=labels,
            outlines=np.concatenate([part.outlines for part in parts]),
            pixels=np.concatenate([part.pixels for part in parts]),
            bounds=np.concatenate([part.bounds for part in parts]),
            seeds=np.concatenate([part.seeds for part in parts]),
            sums={name: np.concatenate([part.sums[name] for part in parts]) for name in parts[0].sums},
            runner_up_counts=np.concatenate([_spread(part, runner_up_labels) for part in parts]),
            runner_up_labels=runner_up_labels,
            pairs=_pairs(parts, labels),
        )


def _spread(part: BlockPieces, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put the counts of a block's runner-up classes in columns for those of all blocks."""
    runner_up_counts = np.zeros((len(part.labels), len(labels)), np.int64)
    runner_up_counts[:, np.searchsorted(labels, part.runner_up_labels)] = part.runner_up_counts
    return runner_up_counts


def _pairs(parts: Sequence[BlockPieces], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.cumsum([0, *(len(part.labels) for part in parts[:-1])])
    sides = []
    for side in (0, 1):
        keys = np.concatenate([part.borders[side][0] for part in parts])
        owners = np.concatenate([part.borders[side][1] + offset for part, offset in zip(parts, offsets, strict=True)])
        sides.append((keys, owners))
    _, low, high = np.intersect1d(sides[0][0], sides[1][0], assume_unique=True, return_indices=True)
    first, second = sides[0][1][low], sides[1][1][high]
    same = labels[first] == labels[second]
    pairs, shared = np.unique(np.stack([first[same], second[same]], axis=1), axis=0, return_counts=True)
    return np.column_stack([pairs, shared]).astype(np.int64)


def group_pieces(pieces: MapPieces, settings: VectorizeSettings) -> list[list[int]]:
    """Pieces that become one polygon each."""
    wanted = ~np.isin(pieces.labels, list(settings.skip_labels))
    pairs = pieces.pairs[wanted[pieces.pairs[:, 0]]] if len(pieces.pairs) else pieces.pairs
    whole = DisjointSets(len(pieces.labels))
    for first, second, _ in pairs.tolist():
        whole.union(first, second)
    if settings.max_vertices is None:
        return whole.members(wanted)
    vertices = shapely.get_num_coordinates(pieces.outlines).tolist()
    total: dict[int, int] = {}
    for index, count in enumerate(vertices):
        total[whole.find(index)] = total.get(whole.find(index), 0) + count
    parts = DisjointSets(len(pieces.labels), vertices)
    # Pieces that share most are joined first, which keeps the parts of a region that is too large compact.
    for first, second, _ in pairs[np.argsort(-pairs[:, 2], kind="stable")].tolist():
        limit = math.inf if total[whole.find(first)] <= settings.max_vertices else settings.max_vertices
        parts.union(first, second, limit)
    return parts.members(wanted)
