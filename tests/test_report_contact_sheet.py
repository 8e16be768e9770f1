"""Contact sheets: that they show what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap, Color
from darefine_qupath.errors import TileError
from darefine_qupath.report.contact_sheet import check_sheet, choose_examples, contact_sheet
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.scan import index_tiles
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.spec import TileSpec
from tests.tile_slides import ArraySlide

CLASSES = ClassMap(names=("Normal", "Rare"), colors=(Color(10, 200, 30), Color(200, 10, 220)), unlabelled="Normal")


def opener(_: TileSource) -> ArraySlide:
    return ArraySlide(np.full((200, 300, 3), (240, 180, 210), np.uint8))


@pytest.fixture
def source() -> TileSource:
    rare = Annotation(geometry=shapely.box(210, 110, 240, 140), path_class="Rare")
    return TileSource(id="1", name="slide one", path=Path("x"), annotations=(rare,))


def tiles_of(source: TileSource, spec: TileSpec) -> TileIndex:
    return index_tiles([source], spec, CLASSES, opener=opener)


SPEC = TileSpec(input_px=40, slice_px=50, context_px=150, stride_px=50)


def test_examples_show_every_class_and_repeat_nothing(source: TileSource) -> None:
    tiles = index_tiles([source], SPEC, ClassMap(names=("Rare", "Normal"), unlabelled="Normal"), opener=opener)
    tiles = index_of_everything(tiles)
    chosen = choose_examples(tiles, 6)
    assert len(set(chosen.tolist())) == 6
    assert tiles.counts[chosen[0], 0] > 0
    assert (choose_examples(tiles, 6) == chosen).all()
    assert len(choose_examples(tiles, 1000)) == len(tiles)


def index_of_everything(tiles: TileIndex) -> TileIndex:
    """Twelve tiles, the last of them alone with Rare."""
    rows = [(0, 50 * (n % 6), 50 * (n // 6), 0, 0, 100 * (n == 11), 1500, 0) for n in range(12)]
    return TileIndex.of_rows(tiles.spec, tiles.classes, tiles.images, rows)


@pytest.mark.parametrize(
    "spec", [SPEC, TileSpec(input_px=40, slice_um=25, context_um=75, stride_um=25)], ids=["px", "um"]
)
def test_a_sheet_holds_slices_masks_contexts_and_the_table(source: TileSource, tmp_path: Path, spec: TileSpec) -> None:
    tiles = tiles_of(source, spec)
    path = contact_sheet(tiles, SlideTileReader([source], CLASSES, opener=opener), tmp_path / "sheet.png", number=4)
    with Image.open(path) as image:
        colors = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert colors[(240, 180, 210)] > 4 * 220 * 220
    assert colors[(200, 10, 220)] > 1000
    assert (0, 200, 255) in colors
    assert colors[(10, 200, 30)] > 100


def test_no_tiles_give_no_sheet(source: TileSource, tmp_path: Path) -> None:
    tiles = tiles_of(source, SPEC).subset(np.zeros(0, int))
    with pytest.raises(TileError, match="There are no tiles to show"):
        contact_sheet(tiles, SlideTileReader([source], CLASSES), tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sheet.pdf", r"one of \.png, \.jpg, \.jpeg, not '\.pdf'; rename"),
        ("none/a.png", "There is no folder .*none for"),
    ],
)
def test_a_sheet_that_cannot_be_drawn_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TileError, match=message):
        check_sheet(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg"])
def test_the_suffix_is_the_format(source: TileSource, tmp_path: Path, suffix: str) -> None:
    tiles = tiles_of(source, SPEC)
    path = contact_sheet(
        tiles, SlideTileReader([source], CLASSES, opener=opener), tmp_path / f"sheet{suffix}", number=1
    )
    with Image.open(path) as image:
        assert image.format == ("PNG" if suffix == ".png" else "JPEG")


def test_a_slice_shows_the_outlines_of_its_mask(source: TileSource, tmp_path: Path) -> None:
    tiles = tiles_of(source, SPEC)
    with_rare = tiles.subset(tiles.counts[:, 1] > 0)
    path = contact_sheet(with_rare, SlideTileReader([source], CLASSES, opener=opener), tmp_path / "a.png", number=1)
    with Image.open(path) as image:
        slice_shown = np.asarray(image.convert("RGB"))[42:262, 24:244]
    pink, rare = (slice_shown == (240, 180, 210)).all(axis=2), (slice_shown == (200, 10, 220)).all(axis=2)
    # The square fills 132 of 220 px of its slice, from 44 on: a line round it, and the tissue inside it still shows.
    assert rare[46:174, 44].all()
    assert pink[60:160, 60:160].all()
