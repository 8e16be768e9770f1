"""Boxes, and the arithmetic between level 0 and the other levels."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import GeometryError
from darefine_qupath.geometry import (
    Box,
    FloatBox,
    Size,
    best_level,
    fit_within,
    level_box,
    level_scale,
    level_window,
    scaled_size,
)

COORD = st.integers(-100_000, 200_000)
SIDE = st.integers(1, 50_000)
BOXES = st.builds(Box, COORD, COORD, SIDE, SIDE)
SIZES = st.builds(Size, SIDE, SIDE)
properties = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(("width", "height"), [(0, 1), (1, 0), (-5, 5)])
def test_a_box_needs_a_positive_size(width: int, height: int) -> None:
    with pytest.raises(GeometryError, match=f"positive size, got {width} x {height}"):
        Box(0, 0, width, height)


def test_the_edges_of_a_box_are_half_open() -> None:
    box = Box(-2, 3, 10, 20)
    assert (box.right, box.bottom, box.area, box.size) == (8, 23, 200, (10, 20))
    assert box.bounds == (-2, 3, 8, 23)
    assert Box.of((10, 20)) == Box(0, 0, 10, 20)


@given(st.tuples(*[st.floats(-1e5, 1e5)] * 2), st.floats(0, 1e4), st.floats(0, 1e4))
@properties
def test_covering_rounds_outwards_and_no_further(corner: tuple[float, float], width: float, height: float) -> None:
    left, top = corner
    box = Box.covering((left, top, left + width, top + height))
    assert box.x <= left
    assert box.y <= top
    assert box.right >= left + width
    assert box.bottom >= top + height
    assert box.width < width + 2
    assert box.height < height + 2


@given(BOXES, st.integers(-1000, 1000), st.integers(-1000, 1000), st.integers(0, 1000))
@properties
def test_shift_and_grow_undo_themselves(box: Box, dx: int, dy: int, margin: int) -> None:
    assert box.shift(dx, dy).shift(-dx, -dy) == box
    assert box.grow(margin).grow(-margin) == box
    assert box.grow(margin).contains(box)


@given(BOXES, BOXES)
@properties
def test_intersection_is_what_both_contain(one: Box, other: Box) -> None:
    common = one.intersection(other)
    assert common == other.intersection(one)
    if common is None:
        assert one.right <= other.x or other.right <= one.x or one.bottom <= other.y or other.bottom <= one.y
    else:
        assert one.contains(common)
        assert other.contains(common)


@given(BOXES)
@properties
def test_boxes_side_by_side_have_nothing_in_common(box: Box) -> None:
    assert box.intersection(box.shift(box.width, 0)) is None
    assert box.intersection(box.shift(0, -box.height)) is None
    assert box.contains(box)
    assert not box.contains(box.grow(1))


@pytest.mark.parametrize(
    ("base", "level", "scale"),
    [
        ((5000, 5000), (5000, 5000), (1, 1)),
        ((11747, 16557), (5873, 8278), (1 / 2, 1 / 2)),
        ((11747, 16557), (2936, 4139), (1 / 4, 1 / 4)),
        ((46000, 32914), (11500, 8228), (1 / 4, 1 / 4)),
        ((46000, 32914), (1437, 1028), (1 / 32, 1 / 32)),
        ((1000, 1000), (400, 400), (0.4, 0.4)),
        ((1000, 2000), (500, 500), (0.5, 0.25)),
    ],
    ids=["same", "cut", "quarter", "4.00012", "32.01", "2.5", "anisotropic"],
)
def test_a_level_that_was_cut_short_has_a_whole_downsample(
    base: tuple[int, int], level: tuple[int, int], scale: tuple[float, float]
) -> None:
    assert level_scale(base, level) == scale


@given(BOXES, SIZES, st.integers(1, 64))
@properties
def test_a_level_box_lies_where_the_downsample_puts_it(box: Box, base: Size, factor: int) -> None:
    assume(min(base) >= factor)
    level = (base.width // factor, base.height // factor)
    scale_x, scale_y = level_scale(base, level)
    place = level_box(box, base, level)
    assert place.x / scale_x == pytest.approx(box.x)
    assert (place.y + place.height) / scale_y == pytest.approx(box.bottom)


PLACES = st.builds(FloatBox, *[st.floats(-1e4, 1e4)] * 2, *[st.floats(0.01, 1e4)] * 2)


@given(PLACES, st.floats(0, 20))
@properties
def test_a_level_window_rounds_outwards_once(place: FloatBox, margin: float) -> None:
    window = level_window(place, (margin, margin))
    slack = 1e-5
    assert window.box.x <= place.x - margin + slack
    assert window.box.right >= place.x + place.width + margin - slack
    assert window.box.width < place.width + 2 * margin + 2 + slack
    assert window.box.x + window.inner.x == pytest.approx(place.x, abs=slack)
    assert window.box.y + window.inner.y == pytest.approx(place.y, abs=slack)
    assert window.inner.height == pytest.approx(place.height, abs=2 * slack)


@given(BOXES, st.floats(-1e-7, 1e-7))
@properties
def test_whole_pixels_stay_whole_whatever_floating_point_adds(box: Box, error: float) -> None:
    window = level_window(FloatBox(box.x + error, box.y - error, box.width + error, box.height))
    assert window.box == box
    assert window.is_whole


def test_the_margin_of_a_window_does_not_leave_its_frame() -> None:
    frame = Box(0, 0, 100, 100)
    window = level_window(FloatBox(0.5, 90, 10, 10), (3, 3), frame)
    assert window.box == Box(0, 87, 14, 13)
    assert window.inner == FloatBox(0.5, 3, 10, 10)
    assert not window.is_whole


LEVELS = ((46000, 32914), (11500, 8228), (2875, 2057), (1437, 1028))


@pytest.mark.parametrize(
    ("downsample", "level"),
    [(0.5, 0), (1, 0), (3.9, 0), (4, 1), (10, 1), (15.5, 1), (15.9, 2), (16, 2), (32, 3), (1000, 3)],
)
def test_the_best_level_is_the_coarsest_that_is_fine_enough(downsample: float, level: int) -> None:
    assert best_level(downsample, LEVELS[0], LEVELS) == level


@given(SIZES, st.floats(0.01, 1000))
@properties
def test_scaled_sizes_are_the_nearest_and_never_nothing(size: Size, downsample: float) -> None:
    scaled = scaled_size(size, downsample)
    assert scaled.width == max(1, round(size.width / downsample))
    assert min(scaled) >= 1


@pytest.mark.parametrize("downsample", [0, -1, math.nan])
def test_a_downsample_must_be_positive(downsample: float) -> None:
    with pytest.raises(GeometryError, match="must be positive, got"):
        scaled_size((10, 10), downsample)


@given(SIZES, SIZES)
@properties
def test_fitting_keeps_within_the_limit_and_fills_one_side(size: Size, limit: Size) -> None:
    fitted = fit_within(size, limit)
    assert fitted.width <= max(1, limit.width)
    assert fitted.height <= max(1, limit.height)
    assert fitted == size or fitted.width == limit.width or fitted.height == limit.height
