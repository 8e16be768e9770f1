"""Planning: every pixel is in a slice, every slice in its context, on every slide."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.geometry import Box
from darefine_qupath.tiles.plan import TilePair, plan_prediction_tiles, plan_training_tiles
from darefine_qupath.tiles.spec import PixelSpec, TileSpec
from tests.tile_slides import centered

PAPER = TileSpec.paper().at(None)
properties = settings(deadline=None, derandomize=True, max_examples=100)


@st.composite
def specs(draw: st.DrawFn, placement: str | None = None) -> PixelSpec:
    slice_px = draw(st.integers(1, 30))
    return PixelSpec(
        slice_px=slice_px,
        context_px=draw(st.integers(slice_px, 90)),
        stride_px=draw(st.integers(1, slice_px)),
        input_px=8,
        context_input_px=8,
        placement=placement or draw(st.sampled_from(["parent", "centred"])),  # type: ignore[arg-type]
    )


SIZES = st.tuples(st.integers(1, 150), st.integers(1, 150))


def coverage(pairs: tuple[TilePair, ...], size: tuple[int, int]) -> np.ndarray:
    count = np.zeros((size[1], size[0]), int)
    for pair in pairs:
        inside = pair.slice.intersection(Box.of(size))
        assert inside is not None, "a slice beside the slide"
        count[inside.y : inside.bottom, inside.x : inside.right] += 1
    return count


def by_context(pairs: tuple[TilePair, ...]) -> list[tuple[Box, list[TilePair]]]:
    return [(context, list(group)) for context, group in groupby(pairs, key=lambda pair: pair.context)]


@given(SIZES, specs())
@properties
def test_every_pixel_lies_in_a_slice(size: tuple[int, int], spec: PixelSpec) -> None:
    assert coverage(plan_training_tiles(size, spec), size).min() >= 1


@given(SIZES, specs("parent"))
@properties
def test_a_parent_holds_its_slices(size: tuple[int, int], spec: PixelSpec) -> None:
    pairs = plan_training_tiles(size, spec)
    assert all(pair.context.contains(pair.slice) for pair in pairs)
    assert len({pair.slice for pair in pairs}) == len(pairs)


@given(SIZES, specs("parent"))
@properties
def test_a_parent_overhangs_only_for_its_slices(size: tuple[int, int], spec: PixelSpec) -> None:
    """No context could be moved further over the slide without losing a slice."""
    for context, group in by_context(plan_training_tiles(size, spec)):
        for axis, length in enumerate(size):
            start, end = context.bounds[axis], context.bounds[axis + 2]
            left = min(pair.slice.bounds[axis] for pair in group)
            right = max(pair.slice.bounds[axis + 2] for pair in group)
            if spec.context_px <= length:
                assert start >= 0 or start == left
                assert end <= length or end == right


@given(SIZES, specs("centred"))
@properties
def test_a_centred_context_has_the_slice_s_centre(size: tuple[int, int], spec: PixelSpec) -> None:
    for pair in plan_training_tiles(size, spec):
        assert pair.context == centered(pair.slice, (spec.context_px, spec.context_px))


@given(SIZES, st.integers(1, 20), st.integers(1, 5), st.sampled_from(["parent", "centred"]))
@properties
def test_slices_that_do_not_overlap_cover_every_pixel_once(
    size: tuple[int, int], side: int, contexts: int, placement: str
) -> None:
    spec = TileSpec(slice_px=side, stride_px=side, context_px=contexts * side, placement=placement)  # type: ignore[arg-type]
    pairs = plan_training_tiles(size, spec.at(None))
    assert (coverage(pairs, size) == 1).all()
    assert len(pairs) == -(-size[0] // side) * -(-size[1] // side)


def test_a_parent_of_the_paper_has_81_slices() -> None:
    groups = by_context(plan_training_tiles((10_000, 5_000), PAPER))
    assert [(context, len(pairs)) for context, pairs in groups] == [
        (Box(0, 0, 5000, 5000), 81),
        (Box(5000, 0, 5000, 5000), 81),
    ]
    assert groups[0][1][1].slice == Box(500, 0, 1000, 1000)


def test_the_last_context_is_moved_back_over_the_slide() -> None:
    columns = {pair.context.x: set() for pair in plan_training_tiles((11_747, 5_000), PAPER)}
    for pair in plan_training_tiles((11_747, 5_000), PAPER):
        columns[pair.context.x].add(pair.slice.x)
    assert sorted(columns) == [0, 5000, 7000]
    assert columns[7000] == {10_000, 10_500, 11_000}


def test_a_slide_smaller_than_a_context_lies_in_its_middle() -> None:
    pairs = plan_training_tiles((3000, 800), PAPER)
    assert {pair.context for pair in pairs} == {Box(-1000, -2100, 5000, 5000)}
    assert [pair.slice.x for pair in pairs] == [0, 500, 1000, 1500, 2000]


def test_the_plan_goes_context_by_context_row_by_row() -> None:
    spec = PixelSpec(slice_px=2, context_px=4, stride_px=2, input_px=2, context_input_px=2)
    corners = [(pair.slice.x, pair.slice.y) for pair in plan_training_tiles((8, 4), spec)]
    assert corners == [(0, 0), (2, 0), (0, 2), (2, 2), (4, 0), (6, 0), (4, 2), (6, 2)]


@given(SIZES, specs())
@properties
def test_keep_leaves_slices_out(size: tuple[int, int], spec: PixelSpec) -> None:
    every = plan_training_tiles(size, spec)
    assert plan_training_tiles(size, spec, keep=lambda b: b.x % 2 == 0) == tuple(p for p in every if p.slice.x % 2 == 0)


@st.composite
def any_ratios(draw: st.DrawFn) -> PixelSpec:
    """Slice, context and stride in any real ratio, on a slide of any pixel size."""
    slice_um = draw(st.floats(1, 500))
    context_um = slice_um * draw(st.one_of(st.just(1.0), st.floats(1, 1.3), st.floats(1, 9)))
    stride_um = slice_um * (1 - draw(st.one_of(st.just(0.0), st.floats(0, 0.9))))
    spec = TileSpec(
        input_px=draw(st.integers(1, 600)), slice_um=slice_um, context_um=context_um, stride_um=stride_um,
        placement=draw(st.sampled_from(["parent", "centred"])),
    )  # fmt: skip
    return spec.at(draw(st.floats(0.1, 4)))


LENGTHS = st.one_of(st.integers(1, 60), st.integers(1, 100_000))
many = settings(deadline=None, derandomize=True, max_examples=250)


@given(LENGTHS, any_ratios(), st.floats(0, 0.9))
@many
def test_one_even_grid_covers_whatever_the_ratios(length: int, spec: PixelSpec, context_overlap: float) -> None:
    length = min(length, 1000 * spec.stride_px)
    planned = list(plan_prediction_tiles((length, 1), spec, context_overlap=context_overlap))
    starts = [box.x for _, boxes in planned for box in boxes]
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] + spec.slice_px >= length
    assert (steps >= 1).all()
    assert (steps <= spec.slice_px).all()
    assert np.ptp(steps) <= 2 * max(1, np.ceil(spec.slice_downsample)) if len(steps) else True
    assert len(starts) <= max(0, -(-(length - spec.slice_px) // spec.stride_px)) + 1


@given(LENGTHS, any_ratios(), st.floats(0, 0.9))
@many
def test_one_slice_has_the_one_context_in_whose_middle_it_lies_most(
    length: int, spec: PixelSpec, context_overlap: float
) -> None:
    length = min(length, 300 * spec.stride_px)
    planned = list(plan_prediction_tiles((length, 1), spec, context_overlap=context_overlap))
    contexts = np.array([context.x for context, _ in planned])
    assert (np.diff(contexts) > 0).all()
    room = spec.context_px - spec.slice_px
    for context, boxes in planned:
        for box in boxes:
            assert context.contains(box) or (spec.placement == "centred" and context == centered(box, context.size))
            off = abs(box.x - context.x - room / 2)
            assert off <= np.abs(box.x - contexts - room / 2).min() + 1


@given(LENGTHS, any_ratios(), st.floats(0, 0.9))
@many
def test_contexts_are_shared_as_far_as_they_reach(length: int, spec: PixelSpec, context_overlap: float) -> None:
    length = min(length, 1000 * spec.stride_px)
    planned = list(plan_prediction_tiles((length, 1), spec, context_overlap=context_overlap))
    num_slices = sum(len(boxes) for _, boxes in planned)
    if spec.placement == "centred":
        assert len(planned) == num_slices
        return
    # Of those that fit, the part that is not left to neighbors; one fewer where an input pixel is in the way.
    jitter = int(np.ceil(max(1, spec.slice_downsample)))
    fit = max(1, (spec.context_px - spec.slice_px - jitter) // spec.stride_px + 1)
    shared = max(1, min(fit, round(fit * (1 - context_overlap))))
    assert len(planned) <= -(-num_slices // shared) + 1


@pytest.mark.parametrize(
    ("tiles", "num"), [((1000, 1200, 500), 39 * 31), ((256, 320, 192), 104 * 83), ((256, 384, 256), 79 * 63)]
)
def test_a_context_hardly_larger_than_its_slices_skips_none(tiles: tuple[int, int, int], num: int) -> None:
    spec = PixelSpec(slice_px=tiles[0], context_px=tiles[1], stride_px=tiles[2], input_px=256, context_input_px=256)
    assert sum(len(boxes) for _, boxes in plan_prediction_tiles((20_000, 16_000), spec)) == num


@pytest.mark.parametrize(("context_overlap", "contexts"), [(0.0, 20), (0.45, 42), (0.9, 713)])
def test_contexts_of_the_paper_are_shared(context_overlap: float, contexts: int) -> None:
    planned = list(plan_prediction_tiles((20_000, 16_000), PAPER, context_overlap=context_overlap))
    assert len(planned) == contexts
    assert sum(len(boxes) for _, boxes in planned) == 39 * 31
