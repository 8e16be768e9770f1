"""Real annotations of a real project: tiles hold what the source masks hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.geometry import Box, Size
from darefine_qupath.masks import LabelPainter
from darefine_qupath.project import open_project
from darefine_qupath.slides import open_slide
from darefine_qupath.tiles.plan import plan_training_tiles
from darefine_qupath.tiles.scan import TileFilter, index_tiles
from darefine_qupath.tiles.slide_reader import paint_mask
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.spatial_split import spatial_split
from darefine_qupath.tiles.spec import PixelSpec, TileSpec
from darefine_qupath.tiles.split import split_images

CLASSES = ClassMap(names=("Normal", "Benign", "In situ", "Invasive"), unlabelled="Normal")
GRID = 50


def _sources(shared: Path) -> tuple[TileSource, ...]:
    with open_project(shared / "bach" / "project", engine="embedded") as project:
        return tuple(
            TileSource(
                id=image.id,
                name=image.name,
                path=shared / "bach" / "slides" / image.path.name,
                mpp=image.mpp,
                annotations=project.annotations(image),
                metadata=image.metadata,
            )
            for image in project.images
            if image.path is not None
        )


@pytest.fixture
def sources(shared: Path) -> tuple[TileSource, ...]:
    found = _sources(shared)
    assert len(found) == 4
    return found


SIZES = [(500, 500), (500, 1000), (400, 1000), (256, 777)]


@pytest.fixture(scope="module")
def known(shared: Path) -> dict[str, NDArray[np.uint8]]:
    """Source masks by slide: their labels, and 255 where they or the project's ``Ignore*`` outlines say nothing.

    255 of the masks and ``Ignore*`` of the project are not the same pixels: whoever drew the outlines went along a
    grid of 50 px, which the edge of the mosaic does not follow. On A03_roi1 that alone is 0.9 % of Invasive.
    """
    masks = {}
    with pytest.MonkeyPatch.context() as patch:
        # Pillow's own limit stops at 179 million pixels; the largest mask has 195.
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        for source in _sources(shared):
            with Image.open(shared / "bach" / f"{source.path.stem}.labels.png") as image:
                mask = np.array(image)
            mask[_ignored(source, mask.shape)] = IGNORE
            masks[source.id] = mask
    return masks


def _ignored(source: TileSource, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels under the project's ``Ignore*`` outlines, by the squares of their grid and without our rasteriser."""
    outlines = [note.geometry for note in source.annotations if note.path_class == "Ignore*"]
    assert not (shapely.get_coordinates(outlines) % GRID).any()
    rows, columns = (np.arange(-(-length // GRID)) * GRID + GRID / 2 for length in shape)
    x, y = np.meshgrid(columns, rows)
    squares = np.zeros(x.shape, bool)
    for outline in outlines:
        squares |= shapely.contains_xy(outline, x, y)
    return squares.repeat(GRID, axis=0).repeat(GRID, axis=1)[: shape[0], : shape[1]]


def test_ignored_pixels_are_those_under_the_outlines(sources: tuple[TileSource, ...]) -> None:
    # Every tenth pixel: the grid of the outlines is a multiple.
    for source in sources:
        with open_slide(source.path) as slide:
            width, height = (side // GRID * GRID for side in slide.size)
        mask = LabelPainter(source.annotations, CLASSES).paint(Box(0, 0, width, height), (width // 10, height // 10))
        assert ((mask == IGNORE) == _ignored(source, (height, width))[::10, ::10]).all()


def _masks(
    source: TileSource, known: NDArray[np.uint8], spec: PixelSpec
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Mask of every tile without overlap, and the source mask at the centres of its pixels; `IGNORE` beyond it."""
    size = Size(known.shape[1], known.shape[0])
    padded = np.pad(known, ((0, spec.slice_px), (0, spec.slice_px)), constant_values=IGNORE)
    centers = np.ceil((np.arange(spec.input_px) + 0.5) * spec.slice_downsample - 1).astype(int)
    painter = LabelPainter(source.annotations, CLASSES)
    for pair in plan_training_tiles(size, spec):
        mask = paint_mask(painter, pair.slice, spec, size)
        yield mask, padded[np.ix_(pair.slice.y + centers, pair.slice.x + centers)]


@pytest.mark.parametrize(("input_px", "slice_px"), SIZES)
def test_tiles_without_overlap_hold_the_pixels_of_the_label_masks(
    sources: tuple[TileSource, ...], known: dict[str, NDArray[np.uint8]], input_px: int, slice_px: int
) -> None:
    spec = TileSpec(input_px=input_px, slice_px=slice_px, context_px=5 * slice_px, stride_px=slice_px).at(None)
    for source in sources:
        found, sampled = np.zeros(256, np.int64), np.zeros(256, np.int64)
        agreeing = 0
        for mask, truth in _masks(source, known[source.id], spec):
            both = (mask != IGNORE) & (truth != IGNORE)
            found += np.bincount(mask[both], minlength=256)
            sampled += np.bincount(truth[both], minlength=256)
            agreeing += int((mask == truth)[both].sum())
        # What the annotations and the source masks both know is the same to 1 in 2,000 pixels: edges of outlines.
        assert agreeing > 0.9995 * found.sum()
        expected = sampled[:4]
        if slice_px % 500 == 0:
            # These slices end where the slides do, so a mask pixel stands for the same number of pixels everywhere.
            expected = np.bincount(known[source.id].ravel(), minlength=256)[:4] / spec.slice_downsample**2
        assert found[:4] == pytest.approx(expected, rel=1e-3)


def test_without_ignored_areas_the_counts_are_those_of_the_files(
    sources: tuple[TileSource, ...], known: dict[str, NDArray[np.uint8]]
) -> None:
    spec = TileSpec(input_px=500, slice_px=1000, context_px=5000, stride_px=1000)
    index = index_tiles(sources, spec, CLASSES, tile_filter=TileFilter(min_labelled=0, min_tissue=0))
    checked = 0
    for number, source in enumerate(sources):
        if any(note.path_class == "Ignore*" for note in source.annotations):
            continue
        truth = np.bincount(known[source.id].ravel(), minlength=256)
        assert truth[IGNORE] == 0
        found = index.counts[index.image == number, :-1].sum(axis=0) * 4
        assert found == pytest.approx(truth[:4], rel=1e-3)
        checked += 1
    assert checked == 2


def test_the_project_splits_by_slide_with_every_class_in_training(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, replace(TileSpec.paper(), input_px=100), CLASSES)
    part = split_images(index).part(index, "train")
    assert (part.tiles.class_tiles > 0).all()
    first = index.subset(index.image == 1)
    assert len(spatial_split(first).part(first, "validation")) > 0
