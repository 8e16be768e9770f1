"""Pixels of a tile: the one place by which both training and prediction read slides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from darefine_qupath.tiles.plan import TilePair
from darefine_qupath.tiles.spec import PixelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from darefine_qupath.geometry import Box
    from darefine_qupath.slides import Slide

__all__ = ["PairPixels", "iter_pairs", "read_context", "read_pair", "read_slice"]


class PairPixels(NamedTuple):
    """Pixels of a tile.

    Attributes
    ----------
    slice : ndarray of uint8, shape (size_px, size_px, 3)
        RGB; white outside the slide.
    context : ndarray of uint8, shape (context_size_px, context_size_px, 3)
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
    ndarray of uint8, shape (size_px, size_px, 3)
        RGB; white outside the slide.
    """
    return slide.read(box, (spec.size_px, spec.size_px))


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
    ndarray of uint8, shape (context_size_px, context_size_px, 3)
        RGB; white outside the slide.
    """
    return slide.read(box, (spec.context_size_px, spec.context_size_px))


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
    box, context = None, None
    for pair in pairs:
        if context is None or pair.context != box:
            box, context = pair.context, read_context(slide, pair.context, spec)
        yield pair, PairPixels(read_slice(slide, pair.slice, spec), context)
