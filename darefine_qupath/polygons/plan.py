"""What is asked for, and what every block needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from rasterio.windows import Window
from shapely.geometry import Polygon

from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FEWEST_VERTICES", "GRID", "ClassPolygon", "Dataset", "MapReader", "MapSource", "Plan", "snap"]

GRID = 0.25
"""Spacing in level-0 pixels that every vertex lies on: exact in QuPath's 0.01 px and in its float32."""


FEWEST_VERTICES = 400
"""A region is split into pieces of no fewer vertices than this."""


_FLOAT32_EXACT = 1 << 22


class Dataset(Protocol):
    """What is used of an open rasterio dataset; the first band is read."""

    @property
    def width(self) -> int:
        """Columns."""

    @property
    def height(self) -> int:
        """Rows."""

    def read(self, indexes: int, *, window: Window) -> NDArray[Any]:
        """Pixels of one band inside a window."""


MapSource: TypeAlias = "NDArray[Any] | Dataset | Callable[[Box], NDArray[Any]]"
"""A map as an array, an open rasterio dataset, or a function from a `Box` in map pixels to an array."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassPolygon:
    """One connected region of one class, or a piece of a region that was split.

    Attributes
    ----------
    label : int
        Class label.
    geometry : Polygon
        In level-0 pixels, on quarters of a pixel; valid, holes kept.
    area_um2 : float or None
        Area in square micrometres; None while the pixel size is unknown.
    confidence, margin : float or None
        Means over the region's pixels of the map, 0 to 1 where the layer is; None where no layer was given.
    runner_up : int or None
        The class that comes second on most pixels.
    runner_up_share : float or None
        Share of the pixels on which it does.
    """

    label: int
    geometry: Polygon
    area_um2: float | None = None
    confidence: float | None = None
    margin: float | None = None
    runner_up: int | None = None
    runner_up_share: float | None = None


def snap(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round level-0 coordinates to `GRID`."""
    return np.round(values / GRID) * GRID


@dataclass(frozen=True)
class MapReader:
    """A layer of the map, read by window."""

    width: int
    height: int
    read: Callable[[Box], NDArray[Any]]

    @classmethod
    def of(cls, layer: MapSource, size: tuple[int, int] | None) -> MapReader:
        """Layer of any kind; `size` is what it must measure."""
        if isinstance(layer, np.ndarray):
            if layer.ndim != 2 or 0 in layer.shape:
                raise PolygonError(f"A map has rows and columns, this one has the shape {layer.shape}")
            array = layer
            found = cls(layer.shape[1], layer.shape[0], lambda at: array[at.y : at.bottom, at.x : at.right])
        elif callable(layer):
            if size is None:
                raise PolygonError("A map that is given as a function needs its size (width, height)")
            found = cls(*size, layer)
        else:
            dataset = layer
            found = cls(
                layer.width,
                layer.height,
                lambda at: dataset.read(1, window=Window(at.x, at.y, at.width, at.height)),
            )
        if size is not None and (found.width, found.height) != tuple(size):
            raise PolygonError(f"A layer is {found.width} x {found.height}, the map is {size[0]} x {size[1]}")
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
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
