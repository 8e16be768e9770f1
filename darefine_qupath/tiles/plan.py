"""Plan where the tiles of a slide lie, for training and for prediction: pure arithmetic.

Both know two placements. ``parent``: many slices share a context, which is moved back over the slide at its borders as
far as its slices allow, so that it shows tissue rather than white; a slide smaller than a context lies in its middle.
``centred``: each slice has a context around its own center, which may overhang.

`plan_training_tiles` follows the paper: parent contexts stand side by side from the slide's top left corner and slices
are cut inside them, evenly and at most a stride apart. At the right and lower border a slice may overhang the slide;
slices that would only repeat what their neighbor covers are left out.

`plan_prediction_tiles` lays one even grid of slices over the whole slide, whatever the sizes of slice, context and
stride; parent contexts overlap, and each slice has the one in whose middle it lies most. No slice is laid twice, and
there is no border of contexts at which the grid would break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from darefine_qupath.geometry import Box
from darefine_qupath.tiles.spec import PixelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TilePair", "plan_prediction_tiles", "plan_training_tiles"]


@dataclass(frozen=True, slots=True, order=True)
class TilePair:
    """One tile: a slice and its context, in level-0 pixels; both may overhang the slide."""

    slice: Box
    context: Box


class _Cell(NamedTuple):
    """One context along one axis, with the slices cut inside it."""

    context: int
    slices: tuple[int, ...]


def plan_training_tiles(
    size: tuple[int, int], spec: PixelSpec, *, keep: Callable[[Box], bool] | None = None
) -> tuple[TilePair, ...]:
    """Plan the tiles of a slide for training.

    Parameters
    ----------
    size : tuple of int
        Width and height of the slide in level-0 pixels.
    spec : PixelSpec
        From `TileSpec.at`.
    keep : callable, optional
        Leave out slices for which ``keep(slice box)`` is false (glass, say).

    Returns
    -------
    tuple of TilePair
        Tiles that share a context stand together; contexts, and slices in them, row by row. Without `keep`
        every pixel of the slide lies in at least one slice.
    """
    axis = _parent_axis if spec.placement == "parent" else _centered_axis
    columns, rows = (axis(length, spec) for length in size)
    pairs = (pair for row in rows for column in columns for pair in _pairs(column, row, spec))
    return tuple(pair for pair in pairs if keep is None or keep(pair.slice))


def plan_prediction_tiles(
    size: tuple[int, int], spec: PixelSpec, *, context_overlap: float = 0.0
) -> Iterator[tuple[Box, tuple[Box, ...]]]:
    """Plan the tiles of a slide for prediction.

    Parameters
    ----------
    size : tuple of int
        Width and height of the slide in level-0 pixels.
    spec : PixelSpec
        From `TileSpec.at`.
    context_overlap : float
        Part of the slices that fit into a parent context and are left to its neighbors, 0 to below 1.

    Yields
    ------
    context : Box
        In level-0 pixels, row by row.
    slices : tuple of Box
        Those of which it is the context; it holds them whole. Along each axis they are at most
        ``max(0, ceil((length - slice_px) / stride_px)) + 1`` in all, and together they cover every pixel of the slide
        and, laid on whole pixels of the network's input, of its score map.
    """
    columns, rows = (_even_axis(length, spec, context_overlap) for length in size)
    side = spec.slice_px
    for row in rows:
        for column in columns:
            context = Box(column.context, row.context, spec.context_px, spec.context_px)
            yield context, tuple(Box(x, y, side, side) for y in row.slices for x in column.slices)


def _pairs(column: _Cell, row: _Cell, spec: PixelSpec) -> Iterator[TilePair]:
    context = Box(column.context, row.context, spec.context_px, spec.context_px)
    for y in row.slices:
        for x in column.slices:
            yield TilePair(Box(x, y, spec.slice_px, spec.slice_px), context)


def _parent_axis(length: int, spec: PixelSpec) -> list[_Cell]:
    room = spec.context_px - spec.slice_px
    steps = -(-room // spec.stride_px)
    offsets = [room * step // steps for step in range(steps + 1)] if steps else [0]
    cells = []
    for origin in range(0, length, spec.context_px):
        slices = _until_covered([origin + offset for offset in offsets], spec.slice_px, length)
        cells.append(_Cell(_context_start(origin, slices, spec, length), slices))
    return cells


def _centered_axis(length: int, spec: PixelSpec) -> list[_Cell]:
    return _centered(_until_covered(range(0, length, spec.stride_px), spec.slice_px, length), spec)


def _centered(starts: Iterable[int], spec: PixelSpec) -> list[_Cell]:
    margin = (spec.slice_px - spec.context_px) // 2
    return [_Cell(start + margin, (start,)) for start in starts]


def _even_axis(length: int, spec: PixelSpec, context_overlap: float) -> list[_Cell]:
    starts = _even_starts(length, spec)
    if spec.placement == "centred":
        return _centered(starts.tolist(), spec)
    contexts = _context_starts(starts, length, spec, context_overlap)
    # Half way between the middles of two contexts, as starts of slices.
    between = (contexts[1:] + contexts[:-1] + spec.context_px - spec.slice_px) / 2
    parts = np.split(starts, np.searchsorted(starts, between, side="right"))
    cells = zip(contexts.tolist(), parts, strict=True)
    return [_Cell(context, tuple(part.tolist())) for context, part in cells if len(part)]


def _even_starts(length: int, spec: PixelSpec) -> NDArray[np.int64]:
    """Find starts of slices a stride apart, from 0 to the first that reaches the end.

    Where an input pixel is larger than a level-0 pixel, each is moved on to the next whole input pixel: what then
    covers the slide without a gap covers the score map too, and lies on both at the same place.
    """
    side, size, stride = spec.slice_px, spec.input_px, spec.stride_px
    number = np.arange(max(0, -(-(length - side) // stride)) + 1)
    if side <= size:
        return number * stride
    inputs = -(-number * stride * size // side)
    last = np.searchsorted(inputs * side, (length - side) * size)
    return np.unique((2 * inputs[: last + 1] * side + size) // (2 * size))


def _context_starts(
    starts: NDArray[np.int64], length: int, spec: PixelSpec, context_overlap: float
) -> NDArray[np.int64]:
    """Find starts of parent contexts along one axis; every slice lies in one of them whole."""
    room = spec.context_px - spec.slice_px
    step = max(1, round((room // spec.stride_px + 1) * (1 - context_overlap)))
    # By number of the first slice in a context, that of the last.
    ends = np.searchsorted(starts, starts + room, side="right") - 1
    found, first, last = [], 0, -1
    while last < len(starts) - 1:
        last = int(ends[first])
        slices = (int(starts[first]), int(starts[last]))
        slack = room - (slices[1] - slices[0])
        found.append(_context_start(slices[0] - slack // 2, slices, spec, length))
        first = min(first + step, last + 1)
    return np.unique(found)


def _until_covered(starts: Sequence[int], side: int, length: int) -> tuple[int, ...]:
    """Keep the slices up to the first that reaches the end of the slide."""
    last = next((index for index, start in enumerate(starts) if start + side >= length), len(starts) - 1)
    return tuple(starts[: last + 1])


def _context_start(origin: int, slices: Sequence[int], spec: PixelSpec, length: int) -> int:
    room = length - spec.context_px
    wanted = min(max(origin, 0), room) if room >= 0 else room // 2
    return min(max(wanted, slices[-1] + spec.slice_px - spec.context_px), slices[0])
