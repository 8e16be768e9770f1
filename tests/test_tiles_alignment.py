"""Slices, contexts and masks show the same place to the pixel, on images whose pixels say where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.geometry import Box, Size
from darefine_qupath.masks import LabelPainter
from darefine_qupath.slides import open_slide
from darefine_qupath.slides.openslide_reader import OpenSlideReader
from darefine_qupath.tiles.plan import TilePair
from darefine_qupath.tiles.slide_reader import paint_mask
from darefine_qupath.tiles.spec import PixelSpec
from tests.tile_slides import area_means, centered, ramps, read_pair, write_pyramid

# The pyramids below are cut short: 803 x 607, 401 x 303, 200 x 151 are downsamples of 2.003 and 4.015 and more.
SIZE = Size(803, 607)
RAMPS = ramps(*SIZE)
EVEN = Size(800, 608)
Stripes = tuple[Path, np.ndarray, tuple[Annotation, ...]]
SLICE_PX = {1: 50, 2: 100, 2.5: 125, 4: 200}
BOUNDS = Box(37, 59, 611, 433)
properties = settings(deadline=None, derandomize=True, max_examples=25, phases=[Phase.generate])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("ramps") / "ramps.tif", RAMPS, (2, 4))


def spec_for(side: int, input_px: int = 50) -> PixelSpec:
    return PixelSpec(slice_px=side, context_px=5 * side, stride_px=side, input_px=input_px, context_input_px=input_px)


def assert_shows(found: np.ndarray, pixels: np.ndarray, box: Box, origin: tuple[int, int] = (0, 0)) -> None:
    """Fail where pixels show another place, by a third of a pixel: a level-0 pixel to the side is a grey level."""
    expected = area_means(pixels, box, (found.shape[1], found.shape[0]))
    if box.size == (found.shape[1], found.shape[0]):
        assert np.abs(found - expected).max() < 1e-6
        return
    downsample = box.width / found.shape[1]
    x = box.x + (np.arange(found.shape[1]) + 0.5) * downsample
    y = box.y + (np.arange(found.shape[0]) + 0.5) * downsample
    # A filter reaches over the bends of the ramps and over the slide's edge; between them it has nothing to blur.
    reach = 3 * downsample
    inside = ((y > reach) & (y < pixels.shape[0] - reach))[:, None] & ((x > reach) & (x < pixels.shape[1] - reach))
    x, y = x + origin[0], y[:, None] + origin[1]
    for channel, at in enumerate([x, y, x + 100]):
        straight = inside & (np.abs((at + 100) % 200 - 100) > reach)
        uphill = np.where(at % 400 < 200, -1, 1)
        shift = ((found - expected)[..., channel] * uphill)[straight]
        if shift.size > 20:
            # Levels give whole pixels, and OpenSlide takes whole level-0 pixels: part of a pixel stays open.
            assert abs(shift.mean()) < 0.3 * downsample + 0.3
            assert np.abs(shift).max() < 0.3 * downsample + 4


@pytest.mark.parametrize("reader", ["openslide", "auto"])
@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4])
@given(data=st.data())
@properties
def test_slice_and_context_show_their_place(path: Path, reader: str, downsample: float, data: st.DataObject) -> None:
    side = SLICE_PX[downsample]
    box = Box(data.draw(st.integers(1 - side, SIZE[0] - 1)), data.draw(st.integers(1 - side, SIZE[1] - 1)), side, side)
    pair = TilePair(box, centered(box, (5 * side, 5 * side)))
    with open_slide(path, reader=reader) as slide:
        found = read_pair(slide, pair, spec_for(side))
    assert_shows(found.slice, RAMPS, pair.slice)
    assert_shows(found.context, RAMPS, pair.context)


@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4])
@given(x=st.integers(-60, 560), y=st.integers(-60, 400))
@properties
def test_with_bounds_every_place_counts_from_their_corner(path: Path, downsample: float, x: int, y: int) -> None:
    side = SLICE_PX[downsample]
    pair = TilePair(Box(x, y, side, side), centered(Box(x, y, side, side), (2 * side, 2 * side)))
    cropped = RAMPS[BOUNDS.y : BOUNDS.bottom, BOUNDS.x : BOUNDS.right]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("darefine_qupath.slides.openslide_reader._bounds", lambda *_: BOUNDS)
        with open_slide(path, reader="openslide") as slide:
            assert slide.size == BOUNDS.size
            found = read_pair(slide, pair, spec_for(side))
    assert_shows(found.slice, cropped, pair.slice, (BOUNDS.x, BOUNDS.y))
    assert_shows(found.context, cropped, pair.context, (BOUNDS.x, BOUNDS.y))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Stripes:
    """Black bars, upright on the left and level on the right, each annotated to the pixel; a pyramid and a hole."""
    pixels = np.full((EVEN.height, EVEN.width, 3), 255, np.uint8)
    bars = [shapely.box(x, 0, x + 41, EVEN.height) for x in (13, 96, 181, 300)]
    bars += [shapely.box(400, y, EVEN.width, y + 67) for y in (0, 150, 333, EVEN.height - 67)]
    bars = [bars[0], bars[1] - shapely.box(96, 200, 137, 300), *bars[2:]]
    for bar in bars:
        left, top, right, bottom = (int(value) for value in bar.bounds)
        pixels[top:bottom, left:right] = 0
    pixels[200:300, 96:137] = 255
    path = write_pyramid(tmp_path_factory.mktemp("stripes") / "stripes.tif", pixels, (2, 4))
    return path, pixels, tuple(Annotation(geometry=bar, path_class="Bar") for bar in bars)


@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4])
@given(data=st.data())
@properties
def test_a_mask_is_dark_where_its_slice_is(stripes: Stripes, downsample: float, data: st.DataObject) -> None:
    path, pixels, bars = stripes
    side = SLICE_PX[downsample]
    box = Box(data.draw(st.integers(1 - side, EVEN[0] - 1)), data.draw(st.integers(1 - side, EVEN[1] - 1)), side, side)
    spec = spec_for(side)
    with open_slide(path) as slide:
        found = read_pair(slide, TilePair(box, box), spec).slice
        painter = LabelPainter(bars, ClassMap(names=("Bar", "Rest"), unlabelled="Rest"))
        mask = paint_mask(painter, box, spec, slide.size)
    x = box.x + (np.arange(50) + 0.5) * downsample
    y = box.y + (np.arange(50) + 0.5) * downsample
    outside = ((y < 0) | (y >= EVEN.height))[:, None] | ((x < 0) | (x >= EVEN.width))
    assert ((mask == IGNORE) == outside).all()
    # Where the level-0 pixels leave no doubt, that is all but the pixels that an edge or a corner cuts.
    dark = area_means(pixels, box, (50, 50))[..., 0]
    clear = ((dark < 60) | (dark > 195)) & ~outside
    assert ((mask == 0) == (dark < 60))[clear].all()
    assert ((found[..., 0] < 128) == (dark < 60))[clear].all()
    well_outside = ((y < -downsample) | (y > EVEN.height + downsample))[:, None] | (
        (x < -downsample) | (x > EVEN.width + downsample)
    )
    assert (found[well_outside] == 255).all()


def test_a_downsample_of_4_00012_does_not_drift(tmp_path: Path) -> None:
    """A slide 10003 wide with a level of 2500: its far end would be off by 3 px if the ratio of sizes were believed."""
    pixels = np.tile(ramps(10_003, 8), (40, 1, 1))
    path = write_pyramid(tmp_path / "long.tif", pixels, (4,))
    box = Box(9600, 0, 320, 320)
    with open_slide(path, reader="openslide") as slide:
        assert slide.levels[1] == (2500, 80)
        found = read_pair(slide, TilePair(box, box), spec_for(320, 80)).slice
    expected = area_means(pixels[:, 9000:], box.shift(-9000, 0), (80, 80))
    uphill = np.where((9600 + np.arange(80) * 4) % 400 < 200, -1, 1)
    shift = ((found - expected)[:, :, 0] * uphill)[:, 3:47]
    assert abs(shift.mean()) < 0.6


def test_the_source_s_bounds_are_what_the_patch_replaces(path: Path) -> None:
    assert OpenSlideReader(path).bounds is None
