"""Real annotations of a real project: tiles hold what the source masks hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.project import open_project
from darefine_qupath.tiles import TileSpec
from darefine_qupath.tiles.screening import Screening, index_tiles
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.split import spatial_split, split_images

CLASSES = ClassMap(names=("Normal", "Benign", "In situ", "Invasive"), unlabelled="Normal")


@pytest.fixture(autouse=True)
def large_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Pillow open the mask of the largest region, 195 million pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)


@pytest.fixture
def sources(shared: Path) -> tuple[TileSource, ...]:
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


def test_tiles_without_overlap_hold_the_pixels_of_the_label_masks(
    shared: Path, sources: tuple[TileSource, ...]
) -> None:
    # Slices that divide the slides' sides: where the last ones overhang, the column of mask pixels that the border
    # cuts counts whole or not at all, and a region that ends at the border is up to 0.3 % off.
    spec = TileSpec(size_px=500, slice_px=1000, context_px=5000, stride_px=1000)
    index = index_tiles(sources, spec, CLASSES, screening=Screening(min_labelled=0, min_tissue=0))
    assert len(sources) == 4
    for number, source in enumerate(sources):
        scale = index.pixel_specs[number].slice_downsample ** 2
        found = index.counts[index.image == number, :-1].sum(axis=0) * scale
        truth = label_pixels(shared / "bach" / f"{source.path.stem}.labels.png", source)
        assert found == pytest.approx(truth, rel=1e-3)


GRID = 50


def label_pixels(path: Path, source: TileSource) -> list[int]:
    """Pixels per class of a source mask, with the project's own idea of what is ignored.

    The project's ``Ignore*`` outlines go along a grid of 50 px, which the masks' 255 do not; on the largest region
    that moves 0.9 % of Invasive in or out. So 255 gives way to the outlines, grid square by grid square.
    """
    outlines = [note.geometry for note in source.annotations if note.path_class == "Ignore*"]
    assert not (shapely.get_coordinates(outlines) % GRID).any()
    with Image.open(path) as image:
        width, height = image.size
        x = np.arange(width // GRID + 1) * GRID + GRID / 2
        counts = np.zeros(4, np.int64)
        for top in range(0, height, GRID):
            labels = np.asarray(image.crop((0, top, width, min(height, top + GRID))))
            squares = np.zeros(len(x), bool)
            for outline in outlines:
                squares |= shapely.contains_xy(outline, x, np.full(len(x), top + GRID / 2))
            known = labels[:, ~np.repeat(squares, GRID)[:width]]
            known = np.where(known == IGNORE, 0, known)
            counts += np.bincount(known.ravel(), minlength=4)
    return [int(count) for count in counts]


def test_the_project_splits_by_slide_with_every_class_in_training(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, replace(TileSpec.paper(), size_px=100), CLASSES)
    part = split_images(index).part(index, "train")
    assert (part.tiles.class_tiles > 0).all()
    first = index.subset(index.image == 1)
    assert len(spatial_split(first).part(first, "validation")) > 0
