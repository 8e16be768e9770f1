"""Check that annotations lie where the pixels are: rasterise each over its pixels at two levels of the slide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import shapely
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import Affine

from darefine_qupath.geometry import Box, Size, level_scale, scaled_size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.slides import Slide

__all__ = ["AlignmentCheck", "check_alignment"]

_BLOCK_PX = 1024
_COARSE = 3.0
"""Downsample from which a level is worth comparing with level 0."""

_WHITE = 225
_GRAY = 12
_SEEN_PX = 9
"""Pixels of the coarse level an annotation needs for its mean to say anything."""

_FARTHEST = 3
"""Coarse pixels up to which a shift between levels is looked for."""

_CLEAR_GAIN = 0.1
"""By how much a shifted level must correlate better: neighbours of a true place correlate nearly as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentCheck:
    """What lies below an annotation, as far as it reaches into the block around a point of its inside.

    Attributes
    ----------
    index : int
        Position of the annotation in the sequence given.
    x, y : int
        A point inside it, level-0 pixels.
    glass : float
        Share of its pixels that are white.
    difference : float
        Grey values between its mean at level 0 and at the coarse level; 0 where there is one level only, or it is too
        small to be seen there.
    shift : tuple of int
        By how many level-0 pixels the coarse level is shifted against level 0 in this block, in x and y.
    """

    index: int
    x: int
    y: int
    glass: float
    difference: float
    shift: tuple[int, int]

    @property
    def is_misaligned(self) -> bool:
        """Whether the levels show different things here."""
        return self.shift != (0, 0) or self.difference > _GRAY


def check_alignment(slide: Slide, shapes: Sequence[BaseGeometry]) -> Iterator[AlignmentCheck]:
    """Rasterise shapes over their pixels at level 0 and at a coarse level.

    The slide is read in blocks of 1024 level-0 pixels, each once for all the shapes in it, so that twenty thousand
    cells cost little more than the area they lie in.

    Parameters
    ----------
    shapes : sequence of shapely geometry
        Valid, with an area, in level-0 pixels.

    Yields
    ------
    Place
        One per shape, block by block.

    Raises
    ------
    SlideError
        If the slide is damaged there.
    """
    if not shapes:
        return
    points = shapely.get_coordinates(shapely.point_on_surface(list(shapes))).astype(int)
    inside = ((points >= 0) & (points < slide.size)).all(axis=1)
    order = np.lexsort((points[:, 0] // _BLOCK_PX, points[:, 1] // _BLOCK_PX))
    chosen = [int(index) for index in order if inside[index]]
    factor = _coarse_factor(slide)
    blocks: dict[tuple[int, int], list[int]] = {}
    for index in chosen:
        x, y = points[index].tolist()
        blocks.setdefault((x // _BLOCK_PX, y // _BLOCK_PX), []).append(index)
    for (column, row), indices in blocks.items():
        block = Box(column * _BLOCK_PX, row * _BLOCK_PX, _BLOCK_PX, _BLOCK_PX).intersection(Box.of(slide.size))
        assert block is not None
        yield from _check_block(slide, block, factor, [(index, shapes[index], points[index]) for index in indices])


def _coarse_factor(slide: Slide) -> float:
    """Downsample of the first level that is clearly coarser than level 0; 4 where there is none."""
    factors = [1 / level_scale(slide.size, level)[0] for level in slide.levels]
    return next((factor for factor in factors if factor >= _COARSE), 4.0)


def _check_block(
    slide: Slide, block: Box, factor: float, items: Sequence[tuple[int, BaseGeometry, NDArray[np.int64]]]
) -> Iterator[AlignmentCheck]:
    size = scaled_size(block.size, factor)
    image = Image.fromarray(slide.read(block, block.size))
    fine = np.asarray(image.resize(size, Image.Resampling.BOX), np.float32)
    coarse = slide.read(block, size).astype(np.float32)
    white = fine.min(axis=2) > _WHITE
    fine, coarse = fine.mean(axis=2), coarse.mean(axis=2)
    x, y = _find_shift(fine, coarse)
    for index, shape, point in items:
        rows, columns, mask = _rasterize(shape, block, size)
        count = int(mask.sum())
        below, above = fine[rows, columns][mask], coarse[rows, columns][mask]
        yield AlignmentCheck(
            index=index,
            x=int(point[0]),
            y=int(point[1]),
            glass=float(white[rows, columns][mask].mean()) if count else 0.0,
            difference=abs(float(below.mean() - above.mean())) if count >= _SEEN_PX else 0.0,
            shift=(round(x * factor), round(y * factor)),
        )


def _rasterize(shape: BaseGeometry, block: Box, size: Size) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Rows and columns of the block around a shape, and which pixels there it touches: a small cell has some too."""
    step_x, step_y = block.width / size.width, block.height / size.height
    left, top, right, bottom = shape.bounds
    rows = slice(max(0, int((top - block.y) / step_y)), min(size.height, int((bottom - block.y) / step_y) + 1))
    columns = slice(max(0, int((left - block.x) / step_x)), min(size.width, int((right - block.x) / step_x) + 1))
    corner = (block.x + columns.start * step_x, block.y + rows.start * step_y)
    transform = Affine(step_x, 0, corner[0], 0, step_y, corner[1])
    out = (rows.stop - rows.start, columns.stop - columns.start)
    return rows, columns, np.asarray(rasterize([shape], out_shape=out, transform=transform, all_touched=True) > 0)


def _find_shift(fine: NDArray[np.float32], coarse: NDArray[np.float32]) -> tuple[int, int]:
    """Coarse pixels in x and y by which `coarse` must be moved back to lie on `fine`; 0 unless that is clear."""
    side = _FARTHEST
    if min(fine.shape) < 8 * side:
        return 0, 0
    inner = fine[side:-side, side:-side]
    height, width = inner.shape
    in_place = _correlation(inner, coarse[side:-side, side:-side])
    if in_place + _CLEAR_GAIN >= 1:
        return 0, 0
    found = {
        (x, y): _correlation(inner, coarse[side + y : side + y + height, side + x : side + x + width])
        for x, y in product(range(-side, side + 1), repeat=2)
    }
    best = max(found, key=lambda move: found[move])
    return best if found[best] > in_place + _CLEAR_GAIN else (0, 0)


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Correlation of grey values; 0 where one of them has none to speak of."""
    first, second = first - first.mean(), second - second.mean()
    spread = float(np.sqrt((first**2).mean() * (second**2).mean()))
    return float((first * second).mean()) / spread if spread > 1 else 0.0
