"""Read where a scan lies on its glass slide, as Hamamatsu's scanners note it."""

from __future__ import annotations

import math
from pathlib import Path

import openslide

from darefine_qupath.geometry import GlassFrame, PixelSize, Size

__all__ = ["read_glass_frame"]

_OFFSETS = ("hamamatsu.XOffsetFromSlideCentre", "hamamatsu.YOffsetFromSlideCentre")
_MPP = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)


def read_glass_frame(path: Path | str) -> GlassFrame | None:
    """Read where an image lies on its glass.

    Parameters
    ----------
    path : Path or str
        The slide.

    Returns
    -------
    GlassFrame or None
        None for a file that does not say, or is not there: only Hamamatsu's do.
    """
    try:
        with openslide.OpenSlide(path) as slide:
            values = [float(slide.properties.get(name, "nan")) for name in (*_OFFSETS, *_MPP)]
            size = Size(*slide.dimensions)
    except (openslide.OpenSlideError, OSError, ValueError):
        return None
    x, y, *mpp = values
    pixel = PixelSize(*mpp)
    return GlassFrame((x, y), size, pixel) if math.isfinite(x + y) and pixel.is_possible else None
