"""Where the tiles of a slide lie: pure arithmetic, the same for training and for prediction.

``parent``: contexts stand on a grid from the slide's top left corner, slices are cut inside them, evenly and at most
a stride apart, so that every pixel of the slide lies in a slice. At the right and lower border a slice may overhang
the slide; slices that would only repeat what their neighbour covers are left out. A context at the border is moved
back over the slide as far as its slices allow, so that it shows tissue rather than white; a slide smaller than a
context lies in its middle.

``centred``: slices stand on one grid over the slide, each with a context around its own centre, which may overhang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from darefine_qupath.errors import TileError
from darefine_qupath.geometry import Box
from darefine_qupath.tiles.spec import PixelSpec

__all__ = ["TilePair", "group_by_context", "plan_tiles"]


@dataclass(frozen=True, slots=True, order=True)
class TilePair:
    """One tile: a slice and its context, in level-0 pixels; both may overhang the slide."""

    slice: Box
    context: Box


class _Cell(NamedTuple):
    """One context along one axis, with the slices cut inside it."""

    context: int
    slices: tuple[int, ...]


def plan_tiles(
    size: tuple[int, int],
    spec: PixelSpec,
    *,
    within: Box | None = None,
    keep: Callable[[Box], bool] | None = None,
    grid_shift: tuple[int, int] = (0, 0),
    context_step: int | None = None,
) -> tuple[TilePair, ...]:
    """Plan the tiles of a slide.

    Parameters
    ----------
    size : tuple of int
        Width and height of the slide in level-0 pixels.
    spec : PixelSpec
        From `TileSpec.at`.
    within : Box, optional
        Leave out slices that do not touch this box.
    keep : callable, optional
        Leave out slices for which ``keep(slice box)`` is false (glass, say).
    grid_shift : tuple of int
        Start the grid this many level-0 pixels to the left of and above the slide: a second pass over the slide
        with the context borders elsewhere.
    context_step : int, optional
        Level-0 pixels from one parent context to the next; by default they stand side by side. A smaller step lets
        them overlap, so that the slices of one run on into the next; ``centred`` placement takes no notice.

    Returns
    -------
    tuple of TilePair
        Tiles that share a context stand together; contexts, and slices in them, row by row. Without `within` and
        `keep` every pixel of the slide lies in at least one slice.

    Raises
    ------
    TileError
        If `context_step` would leave gaps or not advance.
    """
    axis = _parent_axis if spec.placement == "parent" else _centred_axis
    step = spec.context_px if context_step is None else context_step
    if not 1 <= step <= spec.context_px:
        raise TileError(f"context_step must lie between 1 and the context's {spec.context_px} px, got {context_step}")
    columns = axis(size[0], spec, grid_shift[0], step)
    rows = axis(size[1], spec, grid_shift[1], step)
    if within is not None:
        columns = _touching(columns, spec.slice_px, within.x, within.right)
        rows = _touching(rows, spec.slice_px, within.y, within.bottom)
    pairs = (pair for row in rows for column in columns for pair in _pairs(column, row, spec))
    return tuple(pair for pair in pairs if keep is None or keep(pair.slice))


def group_by_context(pairs: Iterable[TilePair]) -> tuple[tuple[Box, tuple[TilePair, ...]], ...]:
    """Put neighbours that share a context together.

    Parameters
    ----------
    pairs : iterable of TilePair
        In the order `plan_tiles` gives.

    Returns
    -------
    tuple of (Box, tuple of TilePair)
        Every context with its tiles.
    """
    return tuple((context, tuple(group)) for context, group in groupby(pairs, key=lambda pair: pair.context))


def _pairs(column: _Cell, row: _Cell, spec: PixelSpec) -> Iterator[TilePair]:
    context = Box(column.context, row.context, spec.context_px, spec.context_px)
    for y in row.slices:
        for x in column.slices:
            yield TilePair(Box(x, y, spec.slice_px, spec.slice_px), context)


def _parent_axis(length: int, spec: PixelSpec, shift: int, context_step: int) -> list[_Cell]:
    room = spec.context_px - spec.slice_px
    steps = -(-room // spec.stride_px)
    offsets = [room * step // steps for step in range(steps + 1)] if steps else [0]
    cells = []
    for origin in range(-(shift % context_step), length, context_step):
        slices = _needed([origin + offset for offset in offsets], spec.slice_px, length)
        cells.append(_Cell(_context_start(origin, slices, spec, length), slices))
        if origin + spec.context_px >= length:
            break
    return cells


def _centred_axis(length: int, spec: PixelSpec, shift: int, _context_step: int) -> list[_Cell]:
    starts = range(-(shift % spec.stride_px), length, spec.stride_px)
    # Box.centred, for one axis.
    margin = (spec.slice_px - spec.context_px) // 2
    return [_Cell(start + margin, (start,)) for start in _needed(starts, spec.slice_px, length)]


def _needed(starts: Sequence[int], side: int, length: int) -> tuple[int, ...]:
    """Without the slices at either end that cover nothing of the slide which their neighbour does not."""
    first = max((index for index, start in enumerate(starts) if start <= 0), default=0)
    last = next((index for index, start in enumerate(starts) if start + side >= length), len(starts) - 1)
    return tuple(starts[first : max(first, last) + 1])


def _context_start(origin: int, slices: Sequence[int], spec: PixelSpec, length: int) -> int:
    room = length - spec.context_px
    wanted = min(max(origin, 0), room) if room >= 0 else room // 2
    return min(max(wanted, slices[-1] + spec.slice_px - spec.context_px), slices[0])


def _touching(cells: Iterable[_Cell], side: int, start: int, end: int) -> list[_Cell]:
    kept = (_Cell(cell.context, tuple(s for s in cell.slices if s < end and start < s + side)) for cell in cells)
    return [cell for cell in kept if cell.slices]
