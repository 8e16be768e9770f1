"""Score predictions against annotations, slide by slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import Checkpoint
from darefine_qupath.classes import IGNORE, UNLABELLED_IGNORE
from darefine_qupath.errors import PredictionError, TileError
from darefine_qupath.exchange import read_annotations
from darefine_qupath.geometry import Box, Size
from darefine_qupath.masks import LabelPainter
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.pipeline.selection import source_of
from darefine_qupath.prediction import ScoreMap
from darefine_qupath.prediction.area import PredictionArea
from darefine_qupath.prediction.plan import MapGrid
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review import manual_annotations
from darefine_qupath.slides import open_slide
from darefine_qupath.tiles.scan import index_tiles
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.training import ContextMode, evaluate
from darefine_qupath.training.tile_dataset import TileDataset

__all__ = ["SlideScore", "Unpredicted", "score_context", "score_slide", "truth_labels", "truth_of"]

_ROWS = 512

Unpredicted = Literal["count", "ignore"]
"""Whether a labelled pixel without a prediction is an error, or is left out."""


@dataclass(frozen=True, kw_only=True)
class SlideScore:
    """Agreement on one slide.

    Attributes
    ----------
    id, image : str
        Entry id and name.
    matrix : ConfusionMatrix
        Map pixels by true and predicted class; `ConfusionMatrix.missed` are those of `num_unpredicted`, unless they
        were not to count.
    num_unpredicted, num_labelled : int
        Map pixels that have a true class and were to be predicted, and those of them that were not (taken for glass,
        unreadable).
    """

    id: str
    image: str
    matrix: ConfusionMatrix
    num_unpredicted: int
    num_labelled: int

    @property
    def unpredicted_share(self) -> float:
        """Part of the labelled pixels that have no prediction, 0 to 1."""
        return self.num_unpredicted / max(1, self.num_labelled)


def truth_of(project: Project, image: ImageEntry, folder: Path | None) -> tuple[Annotation, ...]:
    """Annotations to compare with.

    Parameters
    ----------
    folder : Path or None
        Folder with ``<entry id>.geojson`` or ``<image name>.geojson``; None = what a person drew in the project;
        accepted predictions do not count, since they would raise the score.

    Returns
    -------
    tuple of Annotation
        Empty where there is no truth.

    Raises
    ------
    PredictionError
        If a file is named as several images are.
    """
    if folder is None:
        return manual_annotations(project, image, taken_over=False)
    for name in (image.id, image.name, Path(image.name).stem):
        file = folder / f"{name}.geojson"
        if file.is_file():
            same = [other.id for other in project.images if name in (other.name, Path(other.name).stem)]
            if name != image.id and len(same) > 1:
                raise PredictionError(
                    f"{file} could belong to any of the images {', '.join(same)}, which have the same name; rename "
                    f"it to <entry id>.geojson"
                )
            return read_annotations(file).annotations
    return ()


def truth_labels(
    painter: LabelPainter, score_map: ScoreMap, image_size: Size, rows: tuple[int, int]
) -> NDArray[np.uint8]:
    """Paint the true labels of some rows of a score map, shape (rows, width)."""
    top, bottom = rows
    step = score_map.downsample
    first = round(score_map.box.y + top * step)
    last = round(score_map.box.y + bottom * step)
    box = Box(score_map.box.x, first, score_map.box.width, last - first)
    return painter.paint(box, (score_map.size.width, bottom - top), image_size=image_size)


def score_slide(
    image: ImageEntry,
    score_map: ScoreMap,
    annotations: Sequence[Annotation],
    image_size: Size,
    *,
    region: PredictionArea | None = None,
    unpredicted: Unpredicted = "count",
) -> SlideScore:
    """Compare a score map with annotations.

    A pixel with a true class and no prediction is an error. Two kinds of pixels are left out: those outside the area
    that was asked for, and glass that no annotation covers, which has its class (Normal, say) only for want of another.

    Parameters
    ----------
    region : Region, optional
        What was asked for; the whole slide by default.
    unpredicted : {"count", "ignore"}
        Whether pixels without a prediction count as errors.
    """
    region = region or PredictionArea()
    classes = score_map.classes
    drawn_only = replace(classes, unlabelled=UNLABELLED_IGNORE, region_unlabelled=UNLABELLED_IGNORE)
    painter, drawn = LabelPainter(annotations, classes), LabelPainter(annotations, drawn_only)
    grid = MapGrid(score_map.downsample, 1, score_map.size)
    matrix = ConfusionMatrix.empty(classes.num_classes)
    missed = np.zeros(classes.num_classes, np.int64)
    for top, layers in score_map.bands(_ROWS, ("class",)):
        predicted = layers["class"]
        rows = (top, top + len(predicted))
        truth = truth_labels(painter, score_map, image_size, rows)
        beyond = replace(region, tissue=None).outside(grid, *rows)
        if beyond is not None:
            truth[beyond] = IGNORE
        glass = region.outside(grid, *rows) if drawn_only != classes else None
        if glass is not None:
            undrawn = truth_labels(drawn, score_map, image_size, rows) == IGNORE
            truth[glass & undrawn & (predicted == IGNORE)] = IGNORE
        missing = (predicted == IGNORE) & (truth != IGNORE)
        missed += np.bincount(truth[missing], minlength=classes.num_classes)
        matrix = matrix.updated(np.where(missing, np.uint8(IGNORE), truth), predicted)
    num_missed = int(missed.sum())
    return SlideScore(
        id=image.id,
        image=image.name,
        matrix=matrix if unpredicted == "ignore" else ConfusionMatrix(matrix.counts, missed),
        num_unpredicted=num_missed,
        num_labelled=matrix.num_pixels + num_missed,
    )


def score_context(
    checkpoint: Checkpoint,
    truths: Sequence[tuple[ImageEntry, Sequence[Annotation]]],
    modes: Sequence[ContextMode],
    *,
    mpp: float | None = None,
    device: str = "cpu",
) -> dict[str, ConfusionMatrix]:
    """Score a model tile by tile, with its contexts as they are, blank, or those of other tiles.

    Parameters
    ----------
    modes : sequence of str
        ``"normal"``, ``"blank"``, ``"shuffled"``.

    Returns
    -------
    dict of str to ConfusionMatrix
        By mode.

    Raises
    ------
    TileError
        If no image has an annotation.
    """
    sources = [source_of(image, records, mpp) for image, records in truths if records]
    if not sources:
        raise TileError("None of the images has annotations to compare with")
    tiles = index_tiles(sources, checkpoint.tiles, checkpoint.classes)
    data = TileDataset(tiles, SlideTileReader(sources, checkpoint.classes))
    network = checkpoint.build()
    return {
        mode: evaluate(network, data, normalization=checkpoint.normalization, device=device, context=mode)
        for mode in modes
    }


def slide_size(image: ImageEntry) -> Size:
    """Size of an image by its project, else by its file."""
    if image.size is not None:
        return image.size
    assert image.path is not None
    with open_slide(image.path, crop_bounds=image.crop_bounds) as slide:
        return slide.size
