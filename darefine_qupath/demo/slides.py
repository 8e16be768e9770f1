"""Draw a slide, write it as a pyramid, and annotate it as a pathologist would."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid5

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.shutil import copy as copy_raster

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color, PathClass
from darefine_qupath.demo.layout import TUMOR_CLASSES, Layout, plan_layout
from darefine_qupath.demo.painting import paint

__all__ = ["CLASSES", "MPP", "DemoSlide", "draw_slide", "write_slide"]

CLASSES = (
    PathClass("Normal", Color(50, 160, 60)),
    PathClass("Benign", Color(80, 120, 220)),
    PathClass("In situ", Color(240, 170, 40)),
    PathClass("Invasive", Color(200, 30, 40)),
)
"""The four classes of BACH, in label order."""

MPP = 0.5
"""Micrometres per pixel of a generated slide."""

_NAMESPACE = UUID("5f0f4b1e-6a0f-5d0e-9e44-3c6a5b8c2a11")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSlide:
    """A generated slide.

    Attributes
    ----------
    path : Path
        Pyramidal TIFF.
    annotations : tuple of Annotation
        The truth, as a pathologist would draw it; what they do not cover is Normal.
    """

    path: Path
    annotations: tuple[Annotation, ...]


def draw_slide(path: Path, *, seed: int, size: tuple[int, int] = (6144, 6144), quality: int = 85) -> DemoSlide:
    """Draw a slide and its annotations.

    Parameters
    ----------
    path : Path
        Where the pyramidal TIFF goes; an existing file is replaced.
    seed : int
        The same seed and size give the same pixels.
    size : tuple of int
        Width and height in pixels.
    quality : int
        JPEG quality.

    Returns
    -------
    DemoSlide
        Path and truth.
    """
    rng = np.random.default_rng(seed)
    layout = plan_layout(size, rng)
    write_slide(path, paint(layout, rng), mpp=MPP, quality=quality)
    return DemoSlide(path=path, annotations=_annotate(layout, seed, rng))


def write_slide(path: Path, pixels: NDArray[np.uint8], *, mpp: float, quality: int = 85) -> None:
    """Write pixels as a tiled, pyramidal JPEG TIFF that OpenSlide and QuPath open.

    Parameters
    ----------
    path : Path
        Target.
    pixels : ndarray of uint8, shape (height, width, 3)
        RGB.
    mpp : float
        Micrometres per pixel, written as resolution tags.
    quality : int
        JPEG quality.
    """
    height, width = pixels.shape[:2]
    levels = [factor for factor in (2, 4, 8, 16, 32) if min(width, height) // factor >= 128]
    profile = {"driver": "GTiff", "width": width, "height": height, "count": 3, "dtype": "uint8"}
    # A slide has no place on the globe, and rasterio says so every time.
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(**profile) as raw:
            raw.write(np.moveaxis(pixels, 2, 0))
            per_cm = 10_000 / mpp
            raw.update_tags(
                TIFFTAG_XRESOLUTION=f"{per_cm:.6f}", TIFFTAG_YRESOLUTION=f"{per_cm:.6f}", TIFFTAG_RESOLUTIONUNIT="3"
            )
            raw.build_overviews(levels, Resampling.average)
        options = {"compress": "JPEG", "photometric": "YCBCR", "jpeg_quality": quality, "tiled": True}
        with memory.open() as raw:
            copy_raster(raw, path, driver="GTiff", copy_src_overviews=True, blockxsize=256, blockysize=256, **options)


def _annotate(layout: Layout, seed: int, rng: np.random.Generator) -> tuple[Annotation, ...]:
    records = []
    for number, name in enumerate(TUMOR_CLASSES):
        shapes = [_by_hand(nest.shape, rng) for nest in layout.nests if nest.path_class == name]
        if number == 0 and len(shapes) > 2:
            shapes = [shapely.MultiPolygon(shapes[:2]), *shapes[2:]]
        records += [(name, shape) for shape in shapes]
    normal = layout.territories["Normal"].buffer(-60)
    if not normal.is_empty:
        records.append(("Normal", _by_hand(normal, rng)))
    return tuple(
        Annotation(id=uuid5(_NAMESPACE, f"{seed}/{layout.size}/{index}"), geometry=shape, path_class=name)
        for index, (name, shape) in enumerate(records)
    )


def _by_hand(shape: shapely.Polygon, rng: np.random.Generator) -> shapely.Polygon:
    """Outline as drawn with a mouse: a pixel or so off, corners where it bends."""

    def shake(ring: shapely.LinearRing) -> NDArray[np.float64]:
        corners = np.asarray(ring.coords)[:-1]
        return np.round(corners + rng.normal(0, 1.2, corners.shape), 2)

    simple = shape.simplify(1.5)
    drawn = shapely.Polygon(shake(simple.exterior), [shake(ring) for ring in simple.interiors])
    return drawn if drawn.is_valid else shape
