"""Read windows of a map, be it an array, a raster file or a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from darefine_qupath.errors import PolygonError
from darefine_qupath.geometry import Box

__all__ = ["MapReader", "MapSource", "RasterDataset"]


class RasterDataset(Protocol):
    """What is used of an open rasterio dataset; the first band is read."""

    @property
    def width(self) -> int:
        """Columns."""

    @property
    def height(self) -> int:
        """Rows."""

    def read(self, indexes: int, *, window: Window) -> NDArray[Any]:
        """Pixels of one band inside a window."""


MapSource: TypeAlias = "NDArray[Any] | RasterDataset | Callable[[Box], NDArray[Any]]"


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
                raise PolygonError(f"A map must have rows and columns; this one has the shape {layer.shape}")
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
