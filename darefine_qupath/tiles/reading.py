"""Read slices and contexts from a slide, for training and prediction alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Box
from darefine_qupath.slides import PyramidSlide
from darefine_qupath.tiles.spec import PixelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darefine_qupath.slides import Slide

__all__ = ["hold_slices", "read_context", "read_slice"]

_PIECES = 8
"""Pieces along each side into which a context is cut that cannot be read as a whole."""


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


def read_context(slide: Slide, box: Box, spec: PixelSpec) -> tuple[NDArray[np.uint8], tuple[Box, ...]]:
    """Read a context; where a part of it is damaged, in pieces: one bad spot must not cost all the slices inside.

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
        RGB; white outside the slide and where a piece cannot be read.
    tuple of Box
        The white pieces, in level-0 pixels; none where the slide is whole.
    """
    try:
        return slide.read(box, (spec.context_input_px, spec.context_input_px)), ()
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


def hold_slices(slide: Slide, slices: Sequence[Box], spec: PixelSpec) -> Slide:
    """Decode the common area of neighboring slices once, where that is less work than one by one.

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
        To read them from; gives the same bytes as `slide`, which it may be.
    """
    if len(slices) < 2 or not isinstance(slide, PyramidSlide):
        return slide
    left, top = min(box.x for box in slices), min(box.y for box in slices)
    around = Box(left, top, max(box.right for box in slices) - left, max(box.bottom for box in slices) - top)
    if around.area > sum(box.area for box in slices):
        return slide
    return slide.hold(around, spec.slice_downsample) or slide
