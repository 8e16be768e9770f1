"""Pixels of a tile: the one place by which both training and prediction read slides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Box
from darefine_qupath.slides import PyramidSlide
from darefine_qupath.tiles.plan import TilePair, group_by_context
from darefine_qupath.tiles.spec import PixelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darefine_qupath.slides import Slide

__all__ = ["PairPixels", "held", "iter_pairs", "mended_context", "read_context", "read_pair", "read_slice"]

_PIECES = 8
"""Pieces along each side into which a context is cut that cannot be read as a whole."""


class PairPixels(NamedTuple):
    """Pixels of a tile.

    Attributes
    ----------
    slice : ndarray of uint8, shape (input_px, input_px, 3)
        RGB; white outside the slide.
    context : ndarray of uint8, shape (context_input_px, context_input_px, 3)
        RGB; white outside the slide.
    """

    slice: NDArray[np.uint8]
    context: NDArray[np.uint8]


def read_slice(slide: Slide, box: Box, spec: PixelSpec) -> NDArray[np.uint8]:
    """Read a slice.

    Parameters
    ----------
    slide : Slide
        An open slide.
    box : Box
        Slice of a `TilePair`, in level-0 pixels.
    spec : PixelSpec
        What the tiles were planned with.

    Returns
    -------
    ndarray of uint8, shape (input_px, input_px, 3)
        RGB; white outside the slide.
    """
    return slide.read(box, (spec.input_px, spec.input_px))


def read_context(slide: Slide, box: Box, spec: PixelSpec) -> NDArray[np.uint8]:
    """Read a context.

    Parameters
    ----------
    slide : Slide
        An open slide.
    box : Box
        Context of a `TilePair`, in level-0 pixels.
    spec : PixelSpec
        What the tiles were planned with.

    Returns
    -------
    ndarray of uint8, shape (context_input_px, context_input_px, 3)
        RGB; white outside the slide.
    """
    return slide.read(box, (spec.context_input_px, spec.context_input_px))


def mended_context(slide: Slide, box: Box, spec: PixelSpec) -> tuple[NDArray[np.uint8], tuple[Box, ...]]:
    """Read a context of which a part may be damaged: one bad spot must not cost all the slices inside.

    Parameters
    ----------
    slide : Slide
        An open slide.
    box : Box
        Context of a `TilePair`, in level-0 pixels.
    spec : PixelSpec
        What the tiles were planned with.

    Returns
    -------
    ndarray of uint8, shape (context_input_px, context_input_px, 3)
        As `read_context` gives it; where the slide is damaged put together from pieces, white those that fail.
    tuple of Box
        The white pieces, in level-0 pixels; none where the slide is whole.
    """
    try:
        return read_context(slide, box, spec), ()
    except SlideError:
        return _context_in_pieces(slide, box, spec)


def _context_in_pieces(slide: Slide, box: Box, spec: PixelSpec) -> tuple[NDArray[np.uint8], tuple[Box, ...]]:
    side = spec.context_input_px
    canvas = np.full((side, side, 3), 255, np.uint8)
    holes = []
    cuts = [round(side * index / _PIECES) for index in range(_PIECES + 1)]
    edges = [round(box.width * cut / side) for cut in cuts]
    spans = [
        (slice(cuts[index], cuts[index + 1]), edges[index], edges[index + 1] - edges[index])
        for index in range(_PIECES)
        if cuts[index + 1] > cuts[index] and edges[index + 1] > edges[index]
    ]
    for rows, top, height in spans:
        for columns, left, width in spans:
            piece = Box(box.x + left, box.y + top, width, height)
            try:
                canvas[rows, columns] = slide.read(piece, (columns.stop - columns.start, rows.stop - rows.start))
            except SlideError:
                holes.append(piece)
    return canvas, tuple(holes)


def read_pair(slide: Slide, pair: TilePair, spec: PixelSpec) -> PairPixels:
    """Read slice and context of a tile; see `read_slice` and `read_context`."""
    return PairPixels(read_slice(slide, pair.slice, spec), read_context(slide, pair.context, spec))


def iter_pairs(slide: Slide, pairs: Iterable[TilePair], spec: PixelSpec) -> Iterator[tuple[TilePair, PairPixels]]:
    """Read tiles one after the other; neighbours that share a context share one array of it.

    Parameters
    ----------
    slide : Slide
        An open slide.
    pairs : iterable of TilePair
        In the order `plan_tiles` gives, so that each context is read once.
    spec : PixelSpec
        What the tiles were planned with.

    Yields
    ------
    TilePair
        The tile.
    PairPixels
        Its pixels.
    """
    for box, group in group_by_context(pairs):
        near = held(slide, [pair.slice for pair in group], spec)
        context = read_context(slide, box, spec)
        for pair in group:
            yield pair, PairPixels(read_slice(near, pair.slice, spec), context)


def held(slide: Slide, slices: Sequence[Box], spec: PixelSpec) -> Slide:
    """Slide to read neighbouring slices from: their common area is decoded once, where that is less than one by one.

    Parameters
    ----------
    slide : Slide
        An open slide.
    slices : sequence of Box
        In level-0 pixels.
    spec : PixelSpec
        What they were planned with.

    Returns
    -------
    Slide
        Gives the same bytes as `slide`, which it may be.
    """
    if len(slices) < 2 or not isinstance(slide, PyramidSlide):
        return slide
    left, top = min(box.x for box in slices), min(box.y for box in slices)
    around = Box(left, top, max(box.right for box in slices) - left, max(box.bottom for box in slices) - top)
    if around.area > sum(box.area for box in slices):
        return slide
    return slide.hold(around, spec.slice_downsample) or slide
