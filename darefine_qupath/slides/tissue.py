"""Tell tissue from glass on a thumbnail, so that glass is neither tiled nor predicted.

Rather too much tissue than too little: faint stroma and fat count, and holes as small as a duct are filled. What is
left out is what certainly is none: glass, flat fill of a mosaic, black padding, blue, green and black pen, grey dust on
glass. Red pen has the colour of blood and stays in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter
from rasterio.features import sieve

from darefine_qupath.errors import GeometryError
from darefine_qupath.geometry import Box, Size, fit_within, scaled_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darefine_qupath.slides.slide import Slide

__all__ = ["TissueMask", "tissue_mask"]

_THUMBNAIL_UM = 10.0
_THUMBNAIL_DOWNSAMPLE = 20.0
_LONGEST_SIDE = 2000
_SPECK_PX = 16
_HOLE_PX = 400
_BLACK = 30
_DENSITY_RANGE = (0.02, 0.035)
_STAIN = 0.015

_DUST_DENSITY = 0.08
_DUST_COLOR = 0.15
"""Share of its density by which a grey speck may differ between channels; in H&E 0.3 and more."""


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Where a slide holds tissue.

    Attributes
    ----------
    mask : ndarray of bool, shape (height, width)
        True on tissue.
    size : Size
        Width and height of the slide in level-0 pixels, which the mask covers.
    """

    mask: NDArray[np.bool_]
    size: Size
    _sums: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or 0 in self.mask.shape or min(self.size) < 1:
            raise GeometryError(f"No tissue mask: {self.mask.shape} for a slide of {self.size[0]} x {self.size[1]}")
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1))
        sums[1:, 1:] = self.mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
        object.__setattr__(self, "_sums", sums)

    def fraction(self, box: Box) -> float:
        """Share of a box that is tissue, 0 to 1; what overhangs the slide is none.

        Parameters
        ----------
        box : Box
            In level-0 pixels.

        Returns
        -------
        float
            Exact for the mask's pixels, also where the box cuts them.
        """
        return float(self.fractions(np.array([[box.x, box.y, box.width, box.height]]))[0])

    def fractions(self, boxes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Share of each box that is tissue.

        Parameters
        ----------
        boxes : ndarray, shape (N, 4)
            ``x, y, width, height`` in level-0 pixels.

        Returns
        -------
        ndarray of float64, shape (N,)
            As `fraction` gives it.
        """
        boxes = np.asarray(boxes, np.float64)
        height, width = self.mask.shape
        columns = np.clip(np.stack([boxes[:, 0], boxes[:, 0] + boxes[:, 2]]) * (width / self.size[0]), 0, width)
        rows = np.clip(np.stack([boxes[:, 1], boxes[:, 1] + boxes[:, 3]]) * (height / self.size[1]), 0, height)
        corners = [[self._sum(rows[i], columns[j]) for j in (0, 1)] for i in (0, 1)]
        covered = corners[1][1] - corners[0][1] - corners[1][0] + corners[0][0]
        area = boxes[:, 2] * boxes[:, 3] * (width / self.size[0]) * (height / self.size[1])
        return np.clip(np.asarray(covered / area, np.float64), 0.0, 1.0)

    def _sum(self, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mask pixels above and to the left of fractional places."""
        top = np.minimum(rows.astype(np.int64), self.mask.shape[0] - 1)
        left = np.minimum(columns.astype(np.int64), self.mask.shape[1] - 1)
        down, across = rows - top, columns - left
        upper = self._sums[top, left] * (1 - across) + self._sums[top, left + 1] * across
        lower = self._sums[top + 1, left] * (1 - across) + self._sums[top + 1, left + 1] * across
        return np.asarray(upper * (1 - down) + lower * down)


def tissue_mask(
    slide: Slide, *, mpp: float | None = None, um_per_px: float = _THUMBNAIL_UM, min_tissue_um2: float | None = None
) -> TissueMask:
    """Tell tissue from glass.

    Parameters
    ----------
    slide : Slide
        The slide.
    mpp : float, optional
        Micrometres per level-0 pixel; default the file's, and a downsample of 20 where the file has none.
    um_per_px : float, optional
        Scale of the mask; coarser where the slide would exceed 2000 pixels.
    min_tissue_um2 : float, optional
        Specks below this area are dropped; default 16 pixels of the mask (1,600 um^2).

    Returns
    -------
    TissueMask
        Over the whole slide.
    """
    mpp = mpp or slide.mpp
    wanted = um_per_px / mpp if mpp else _THUMBNAIL_DOWNSAMPLE
    size = fit_within(scaled_size(slide.size, max(1.0, wanted)), (_LONGEST_SIDE, _LONGEST_SIDE))
    thumbnail = slide.read(Box.of(slide.size), size)
    pixel_um2 = slide.size.width / size.width * slide.size.height / size.height * (mpp or 0) ** 2
    speck = _SPECK_PX if min_tissue_um2 is None or not pixel_um2 else max(1, round(min_tissue_um2 / pixel_um2))
    return TissueMask(_tissue(thumbnail, speck), slide.size)


def _tissue(rgb: NDArray[np.uint8], speck: int) -> NDArray[np.bool_]:
    excluded = _flat(rgb) | _black(rgb) | _ink(rgb)
    density = _density(rgb, excluded)
    gray = density.mean(axis=2)
    stain = density.max(axis=2) - density.min(axis=2)
    mask = ((gray > _threshold(gray[~excluded])) | (stain > _STAIN)) & ~excluded
    mask = _closed(mask & ~_dust(gray, stain, excluded))
    mask &= sieve(mask.astype(np.uint8), min(speck, mask.size)).astype(bool)
    mask |= sieve(mask.astype(np.uint8), min(_HOLE_PX, mask.size)).astype(bool)
    return np.asarray(mask & ~excluded)


def _density(rgb: NDArray[np.uint8], excluded: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Optical density of each channel against the glass, smoothed over 3 x 3 pixels."""
    smooth = np.asarray(Image.fromarray(rgb).filter(ImageFilter.BoxBlur(1)), np.float32)
    low, high = smooth.min(axis=2), smooth.max(axis=2)
    glass = smooth[(low > 200) & (high - low < 15) & (_contrast(rgb) <= 6) & ~excluded]
    # Too little glass to measure: a region cut out of tissue. Its colour is then near white.
    white = np.median(glass, axis=0) if len(glass) > 0.005 * low.size else np.full(3, 235, np.float32)
    return np.maximum(0, np.log10((white + 1) / (smooth + 1))).astype(np.float32)


def _contrast(rgb: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Largest difference between neighbours within 3 x 3 pixels, over all channels."""
    image = Image.fromarray(rgb)
    low = np.asarray(image.filter(ImageFilter.MinFilter(3)), np.int16)
    high = np.asarray(image.filter(ImageFilter.MaxFilter(3)), np.int16)
    return np.asarray((high - low).max(axis=2), np.int16)


def _threshold(density: NDArray[np.float32]) -> float:
    """Otsu's threshold, halved in favour of faint tissue and held in the range that glass does not reach."""
    if density.size == 0:
        return _DENSITY_RANGE[1]
    counts, edges = np.histogram(density, bins=256, range=(0.0, 1.0))
    centers = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    weighted = np.cumsum(counts * centers)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    otsu = float(centers[int(np.nan_to_num(between).argmax())])
    return min(max(otsu / 2, _DENSITY_RANGE[0]), _DENSITY_RANGE[1])


def _flat(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Grey pixels whose surroundings are equal to the last bit: no camera took them."""
    gray = (rgb.max(axis=2).astype(np.int16) - rgb.min(axis=2)) <= 3
    return _opened(np.asarray((_contrast(rgb) <= 1) & gray))


def _black(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray(rgb.max(axis=2) < _BLACK)


def _ink(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Blue, green and black pen.

    Haematoxylin and eosin both absorb green most, so a stained pixel has its minimum there; blue and green pen take
    out red instead. Black pen is dark without colour, which dense nuclei are not.
    """
    red, green, blue = (rgb[..., band].astype(np.int16) for band in range(3))
    high, low = rgb.max(axis=2).astype(np.int16), rgb.min(axis=2).astype(np.int16)
    is_blue = (green - red >= -5) & (blue - red >= 60)
    is_green = (green - red >= 25) & (green - blue >= -10)
    is_black = (high < 90) & (high - low < 20)
    return _opened(is_blue | is_green | is_black)


def _dust(gray: NDArray[np.float32], stain: NDArray[np.float32], excluded: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find what is dark without colour, unless most of the slide is; within tissue it is filled in again."""
    seen = (gray > _DUST_DENSITY) & ~excluded
    dust = seen & (stain < _DUST_COLOR * gray)
    return np.asarray(_grown(_opened(dust), 2) if dust.sum() < seen.sum() / 2 else np.zeros_like(dust))


def _opened(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without anything thinner than 3 pixels."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3))) > 0


def _grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def _closed(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With gaps of up to 8 pixels closed, about a fat cell."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.MinFilter(9))) > 0
