"""Planning: every pixel is in a slice, every slice in its context, on every slide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import TileError
from darefine_qupath.geometry import Box
from darefine_qupath.tiles import PixelSpec, TilePair, TileSpec, group_by_context, iter_pairs, plan_tiles, read_pair
from tests.tile_slides import ArraySlide, ramps

PAPER = TileSpec.paper().at(None)
properties = settings(deadline=None, derandomize=True, max_examples=100)


@st.composite
def specs(draw: st.DrawFn, placement: str | None = None) -> PixelSpec:
    slice_px = draw(st.integers(1, 30))
    return PixelSpec(
        slice_px=slice_px,
        context_px=draw(st.integers(slice_px, 90)),
        stride_px=draw(st.integers(1, slice_px)),
        size_px=8,
        context_size_px=8,
        placement=placement or draw(st.sampled_from(["parent", "centred"])),  # type: ignore[arg-type]
    )


SIZES = st.tuples(st.integers(1, 150), st.integers(1, 150))
SHIFTS = st.tuples(st.integers(0, 120), st.integers(0, 120))


def coverage(pairs: tuple[TilePair, ...], size: tuple[int, int]) -> np.ndarray:
    count = np.zeros((size[1], size[0]), int)
    for pair in pairs:
        inside = pair.slice.intersection(Box.of(size))
        assert inside is not None, "a slice beside the slide"
        count[inside.y : inside.bottom, inside.x : inside.right] += 1
    return count


@given(SIZES, specs(), SHIFTS)
@properties
def test_every_pixel_lies_in_a_slice(size: tuple[int, int], spec: PixelSpec, shift: tuple[int, int]) -> None:
    assert coverage(plan_tiles(size, spec, grid_shift=shift), size).min() >= 1


@given(SIZES, specs("parent"), SHIFTS)
@properties
def test_a_parent_holds_its_slices(size: tuple[int, int], spec: PixelSpec, shift: tuple[int, int]) -> None:
    pairs = plan_tiles(size, spec, grid_shift=shift)
    assert all(pair.context.contains(pair.slice) for pair in pairs)
    assert len({pair.slice for pair in pairs}) == len(pairs)


@given(SIZES, specs("parent"), SHIFTS)
@properties
def test_a_parent_overhangs_only_for_its_slices(size: tuple[int, int], spec: PixelSpec, shift: tuple[int, int]) -> None:
    """No context could be moved further over the slide without losing a slice."""
    for context, group in group_by_context(plan_tiles(size, spec, grid_shift=shift)):
        for axis, length in enumerate(size):
            start, end = context.bounds[axis], context.bounds[axis + 2]
            left = min(pair.slice.bounds[axis] for pair in group)
            right = max(pair.slice.bounds[axis + 2] for pair in group)
            if spec.context_px <= length:
                assert start >= 0 or start == left
                assert end <= length or end == right


@given(SIZES, specs("centred"), SHIFTS)
@properties
def test_a_centred_context_has_the_slice_s_centre(
    size: tuple[int, int], spec: PixelSpec, shift: tuple[int, int]
) -> None:
    for pair in plan_tiles(size, spec, grid_shift=shift):
        assert pair.context == pair.slice.centred(spec.context_px, spec.context_px)


@given(SIZES, st.integers(1, 20), st.integers(1, 5), st.sampled_from(["parent", "centred"]))
@properties
def test_slices_that_do_not_overlap_cover_every_pixel_once(
    size: tuple[int, int], side: int, contexts: int, placement: str
) -> None:
    spec = TileSpec(slice_px=side, stride_px=side, context_px=contexts * side, placement=placement)  # type: ignore[arg-type]
    pairs = plan_tiles(size, spec.at(None))
    assert (coverage(pairs, size) == 1).all()
    assert len(pairs) == -(-size[0] // side) * -(-size[1] // side)


@given(SIZES, specs("parent"), st.data())
@properties
def test_overlapping_parents_cover_too(size: tuple[int, int], spec: PixelSpec, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, spec.context_px))
    if max(size) > 20 * step:
        step = spec.context_px
    pairs = plan_tiles(size, spec, context_step=step)
    assert coverage(pairs, size).min() >= 1
    contexts = [context for context, _ in group_by_context(pairs)]
    assert len(set(contexts)) == len(contexts)


@pytest.mark.parametrize("step", [0, 5001])
def test_a_context_step_that_leaves_gaps_is_refused(step: int) -> None:
    with pytest.raises(TileError, match=f"context_step must lie between 1 and the context's 5000 px, got {step}"):
        plan_tiles((9000, 9000), PAPER, context_step=step)


def test_a_parent_of_the_paper_has_81_slices() -> None:
    groups = group_by_context(plan_tiles((10_000, 5_000), PAPER))
    assert [(context, len(pairs)) for context, pairs in groups] == [
        (Box(0, 0, 5000, 5000), 81),
        (Box(5000, 0, 5000, 5000), 81),
    ]
    assert groups[0][1][1].slice == Box(500, 0, 1000, 1000)


def test_the_last_context_is_moved_back_over_the_slide() -> None:
    columns = {pair.context.x: set() for pair in plan_tiles((11_747, 5_000), PAPER)}
    for pair in plan_tiles((11_747, 5_000), PAPER):
        columns[pair.context.x].add(pair.slice.x)
    assert sorted(columns) == [0, 5000, 7000]
    assert columns[7000] == {10_000, 10_500, 11_000}


def test_a_slide_smaller_than_a_context_lies_in_its_middle() -> None:
    pairs = plan_tiles((3000, 800), PAPER)
    assert {pair.context for pair in pairs} == {Box(-1000, -2100, 5000, 5000)}
    assert [pair.slice.x for pair in pairs] == [0, 500, 1000, 1500, 2000]


def test_the_plan_goes_context_by_context_row_by_row() -> None:
    spec = PixelSpec(slice_px=2, context_px=4, stride_px=2, size_px=2, context_size_px=2)
    corners = [(pair.slice.x, pair.slice.y) for pair in plan_tiles((8, 4), spec)]
    assert corners == [(0, 0), (2, 0), (0, 2), (2, 2), (4, 0), (6, 0), (4, 2), (6, 2)]


@given(SIZES, specs(), st.tuples(*[st.integers(-20, 150)] * 2), st.tuples(*[st.integers(1, 80)] * 2))
@properties
def test_within_leaves_out_what_does_not_touch(
    size: tuple[int, int], spec: PixelSpec, corner: tuple[int, int], sides: tuple[int, int]
) -> None:
    box = Box(*corner, *sides)
    every = plan_tiles(size, spec)
    assert plan_tiles(size, spec, within=box) == tuple(p for p in every if p.slice.intersection(box))
    assert plan_tiles(size, spec, keep=lambda b: b.x % 2 == 0) == tuple(p for p in every if p.slice.x % 2 == 0)


def test_each_parent_is_read_once() -> None:
    slide = ArraySlide(ramps(300, 200))
    spec = TileSpec(slice_px=40, context_px=100, stride_px=20, size_px=20).at(None)
    pairs = plan_tiles(slide.size, spec)
    read = list(iter_pairs(slide, pairs, spec))
    assert [pair for pair, _ in read] == list(pairs)
    contexts = [box for box, _ in slide.reads if box.width == 100]
    assert contexts == [context for context, _ in group_by_context(pairs)]
    other = ArraySlide(slide.pixels)
    assert all((read_pair(other, pair, spec).context == pixels.context).all() for pair, pixels in read)
    assert all((read_pair(other, pair, spec).slice == pixels.slice).all() for pair, pixels in read)
