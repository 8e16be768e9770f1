"""Hold a class polygon with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

from shapely.geometry import Polygon

__all__ = ["ClassPolygon"]


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
        Area in square micrometers; None while the pixel size is unknown.
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
