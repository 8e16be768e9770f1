"""Plan what is predicted of a slide, and in which order.

Where slices and contexts lie is for `darefine_qupath.tiles.plan` to say; here they become rows that are computed and
finished one after the other, and places on the score map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from darefine_qupath.geometry import Box, Size
from darefine_qupath.tiles.plan import plan_prediction_tiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from darefine_qupath.prediction.options import PredictOptions
    from darefine_qupath.tiles.spec import PixelSpec

__all__ = ["ContextGroup", "MapGrid", "PlanRow", "SlidePlan", "plan_slide", "with_overlap"]

_LEAST_OVERLAP = 0.25
_BLANK_ROWS = 512
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class MapGrid:
    """Where level-0 pixels lie on the score map.

    Positions are rounded to pixels of the network's input, of which `stride` by `stride` make a map pixel.

    Attributes
    ----------
    input_downsample : float
        Level-0 pixels per input pixel.
    stride : int
        Input pixels per map pixel.
    size : Size
        Map pixels.
    """

    input_downsample: float
    stride: int
    size: Size

    @classmethod
    def of(cls, slide_size: tuple[int, int], spec: PixelSpec, stride: int) -> MapGrid:
        """Grid that covers a slide."""
        downsample = spec.slice_downsample * stride
        width, height = (max(1, math.ceil(length / downsample - _ROUNDING)) for length in slide_size)
        return cls(spec.slice_downsample, stride, Size(width, height))

    @property
    def downsample(self) -> float:
        """Level-0 pixels per map pixel."""
        return self.input_downsample * self.stride

    @property
    def box(self) -> Box:
        """Level-0 pixels under the map."""
        return self.rows_box(0, self.size.height)

    def rows_box(self, top: int, bottom: int) -> Box:
        """Level-0 pixels under some map rows, rounded outwards."""
        return Box.covering((0, top * self.downsample, self.size.width * self.downsample, bottom * self.downsample))

    def place(self, position: int) -> tuple[int, int]:
        """Map pixel of a level-0 position, and the input pixels between that pixel's edge and the position.

        The nearest input pixel or, where these are the smaller ones, the next: so the last slice of a plan reaches the
        end of the map wherever it reaches that of the slide.
        """
        place = position / self.input_downsample
        whole = math.floor(place + 0.5) if self.input_downsample > 1 else math.ceil(place - _ROUNDING)
        return divmod(whole, self.stride)


@dataclass(frozen=True, slots=True)
class ContextGroup:
    """A context and the slices that share it, in level-0 pixels."""

    context: Box
    slices: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Groups side by side, computed together.

    Attributes
    ----------
    groups : tuple of ContextGroup
        From left to right; none where a stretch of the slide holds nothing to predict.
    bottom : int
        Map row above which everything is finished once this row and those before it are predicted.
    reach : int
        Map row below which no slice of this row reaches.
    """

    groups: tuple[ContextGroup, ...]
    bottom: int
    reach: int

    @property
    def num_slices(self) -> int:
        """Slices of all groups."""
        return sum(len(group.slices) for group in self.groups)


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """Everything to predict of a slide.

    Attributes
    ----------
    spec : PixelSpec
        With the stride that is used, which may differ from training's.
    grid : MapGrid
        Of the score map.
    rows : tuple of PlanRow
        From top to bottom.
    """

    spec: PixelSpec
    grid: MapGrid
    rows: tuple[PlanRow, ...]

    @property
    def num_slices(self) -> int:
        """Slices of all rows."""
        return sum(row.num_slices for row in self.rows)


def with_overlap(spec: PixelSpec, overlap: float | None) -> PixelSpec:
    """Change the stride so that slices overlap.

    Parameters
    ----------
    spec : PixelSpec
        As trained.
    overlap : float or None
        Part of a slice that the next one sees too; None keeps training's, but at least a quarter, since slices that
        do not overlap cannot be blended.

    Returns
    -------
    PixelSpec
        The same but for its stride.
    """
    if overlap is None:
        return replace(spec, stride_px=max(1, min(spec.stride_px, round(spec.slice_px * (1 - _LEAST_OVERLAP)))))
    return replace(spec, stride_px=max(1, round(spec.slice_px * (1 - overlap))))


def plan_slide(
    size: tuple[int, int],
    spec: PixelSpec,
    options: PredictOptions,
    *,
    keep: Callable[[Sequence[Box]], NDArray[np.bool_]] | None = None,
) -> SlidePlan:
    """Plan the prediction of a slide.

    Parameters
    ----------
    size : tuple of int
        Width and height in level-0 pixels.
    spec : PixelSpec
        As trained, on this slide.
    options : PredictOptions
        Overlaps and map stride.
    keep : callable, optional
        Of slice boxes, which to predict; all by default.

    Returns
    -------
    SlidePlan
        Rows of groups, from top to bottom.
    """
    spec = with_overlap(spec, options.overlap)
    grid = MapGrid.of(size, spec, options.output_stride)
    planned = plan_prediction_tiles(size, spec, context_overlap=options.context_overlap)
    groups = [ContextGroup(context, slices) for context, slices in planned]
    if keep is not None:
        groups = _kept(groups, keep)
    if not options.share_context:
        groups = [ContextGroup(group.context, (box,)) for group in groups for box in group.slices]
    rows = [tuple(row) for _, row in groupby(groups, key=lambda group: group.context.y)]
    return SlidePlan(spec, grid, _rows(rows, grid, spec))


def _kept(groups: list[ContextGroup], keep: Callable[[Sequence[Box]], NDArray[np.bool_]]) -> list[ContextGroup]:
    wanted = iter(keep([box for group in groups for box in group.slices]).tolist())
    kept = [ContextGroup(group.context, tuple(box for box in group.slices if next(wanted))) for group in groups]
    return [group for group in kept if group.slices]


def _rows(rows: list[tuple[ContextGroup, ...]], grid: MapGrid, spec: PixelSpec) -> tuple[PlanRow, ...]:
    spans = [_span(groups, grid, spec) for groups in rows]
    planned = []
    done = 0
    for number, (groups, (top, reach)) in enumerate(zip(rows, spans, strict=True)):
        planned.extend(_blank(done, top))
        following = min((span[0] for span in spans[number + 1 :]), default=grid.size.height)
        done = max(done, top, min(following, reach))
        planned.append(PlanRow(groups, done, max(done, reach)))
    planned.extend(_blank(done, grid.size.height))
    return tuple(planned)


def _span(groups: Sequence[ContextGroup], grid: MapGrid, spec: PixelSpec) -> tuple[int, int]:
    """Map rows, half-open, that the slices of some groups reach."""
    starts = [box.y for group in groups for box in group.slices]
    top, (last, phase) = max(0, grid.place(min(starts))[0]), grid.place(max(starts))
    return top, min(grid.size.height, last - (-(phase + spec.input_px) // grid.stride))


def _blank(top: int, bottom: int) -> list[PlanRow]:
    """Rows without groups, so that a gap is never in memory as a whole."""
    cuts = [*range(top + _BLANK_ROWS, bottom, _BLANK_ROWS), bottom]
    return [PlanRow((), cut, cut) for cut in cuts] if bottom > top else []
