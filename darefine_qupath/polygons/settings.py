"""Convert the settings of a vectorization to the units of the map, and lay the grid that vertices lie on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box
from darefine_qupath.polygons.map_reader import MapReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FEWEST_VERTICES", "GRID", "VectorizeSettings", "snap"]

GRID = 0.25
"""Spacing in level-0 pixels that every vertex lies on: exact in QuPath's 0.01 px and in its float32."""


FEWEST_VERTICES = 400
"""A region is split into pieces of no fewer vertices than this."""


_FLOAT32_EXACT = 1 << 22


"""A map as an array, an open rasterio dataset, or a function from a `Box` in map pixels to an array."""


def snap(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round level-0 coordinates to `GRID`."""
    return np.round(values / GRID) * GRID


@dataclass(frozen=True, kw_only=True)
class VectorizeSettings:
    """Everything the blocks need to know; lengths in level-0 pixels, areas in map pixels."""

    box: Box
    scale: tuple[float, float]
    columns: tuple[int, int]
    rows: tuple[int, int]
    image_size: tuple[int, int] | None
    tolerance: float
    min_area_px: float
    smooth: bool
    max_vertices: int | None
    skip_labels: frozenset[int]
    layers: Mapping[str, MapReader]
    runner_up: MapReader | None

    def check(self, source: MapReader, block_px: int) -> None:
        """Refuse what cannot be done."""
        if min(self.scale) < 2 * GRID:
            raise PolygonError(
                f"The map of {source.width} x {source.height} covers only {self.box.width} x {self.box.height} level-0 "
                f"pixels; it must not be finer than {2 * GRID} level-0 pixels per map pixel"
            )
        if max(abs(value) for value in self.box.bounds) >= _FLOAT32_EXACT:
            raise PolygonError(f"{self.box} reaches beyond {_FLOAT32_EXACT} pixels, where QuPath loses precision")
        if self.max_vertices is not None and self.max_vertices < FEWEST_VERTICES:
            raise PolygonError(
                f"At most {self.max_vertices} vertices per polygon are too few; allow {FEWEST_VERTICES} or more"
            )
        if block_px < 16:
            raise PolygonError(f"Blocks of {block_px} map pixels are too small; use 16 or more")

    @property
    def limit(self) -> float:
        """How far in map pixels a border point may move, its rounding to the grid included."""
        return min(0.45, 0.5 - 0.6 * GRID / min(self.scale))

    def place(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Level-0 place, on the grid and inside the image, of points in map pixels."""
        placed = snap(points * self.scale + (self.box.x, self.box.y))
        if self.image_size is not None:
            np.clip(placed, 0, self.image_size, out=placed)
        return placed
