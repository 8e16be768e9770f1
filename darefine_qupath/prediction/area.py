"""Find where a slide is predicted at all: on tissue, and inside an area the user gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import shapely
from rasterio.features import geometry_mask
from rasterio.transform import Affine

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.geometry import Box
    from darefine_qupath.prediction.plan import MapGrid
    from darefine_qupath.slides import TissueMask

__all__ = ["PredictionArea"]

_ANY = 1e-12
"""A fraction above this is not the rounding of zero."""


@dataclass(frozen=True, kw_only=True)
class PredictionArea:
    """Tissue within an area.

    Attributes
    ----------
    tissue : TissueMask or None
        None stands for the whole slide.
    within : shapely geometry or None
        In level-0 pixels; None stands for the whole slide.
    """

    tissue: TissueMask | None = None
    within: BaseGeometry | None = None

    def __post_init__(self) -> None:
        if self.within is not None:
            shapely.prepare(self.within)

    def touches(self, boxes: Sequence[Box]) -> NDArray[np.bool_]:
        """Whether anything in each level-0 box is to be predicted."""
        inside = np.ones(len(boxes), bool)
        if self.tissue is not None:
            inside &= self.tissue.fractions(np.array([(box.x, box.y, *box.size) for box in boxes])) > _ANY
        if self.within is not None:
            bounds = np.array([box.bounds for box in boxes], float)
            inside &= shapely.intersects(self.within, shapely.box(*bounds.T))
        return inside

    def outside(self, grid: MapGrid, top: int, bottom: int) -> NDArray[np.bool_] | None:
        """Map pixels, of the rows from `top` to `bottom`, that are not to be predicted.

        Parameters
        ----------
        grid : MapGrid
            Of the score map.
        top, bottom : int
            Map rows, half-open.

        Returns
        -------
        ndarray of bool, shape (bottom - top, map width), or None
            None when everything is to be predicted.
        """
        shape = (bottom - top, grid.size.width)
        outside = None if self.tissue is None else ~_sampled(self.tissue, grid, top, bottom)
        if self.within is not None:
            scale = grid.downsample
            # A pixel of the map belongs to the area when its center does.
            beyond = geometry_mask([self.within], shape, Affine(scale, 0, 0, 0, scale, top * scale))
            outside = beyond if outside is None else outside | beyond
        return outside


def _sampled(tissue: TissueMask, grid: MapGrid, top: int, bottom: int) -> NDArray[np.bool_]:
    """Tissue at the centers of map pixels."""
    height, width = tissue.mask.shape
    columns = (np.arange(grid.size.width) + 0.5) * grid.downsample * width / tissue.size[0]
    rows = (np.arange(top, bottom) + 0.5) * grid.downsample * height / tissue.size[1]
    near_rows, near_columns = np.minimum(rows.astype(int), height - 1), np.minimum(columns.astype(int), width - 1)
    sampled: NDArray[np.bool_] = tissue.mask[np.ix_(near_rows, near_columns)]
    return sampled
