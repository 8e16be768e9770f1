"""How well predictions agree with annotations, slide by slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation, LabelPainter
from darefine_qupath.checkpoint import Checkpoint
from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import TileError
from darefine_qupath.exchange import read_annotations
from darefine_qupath.geometry import Box, Size
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.pipeline.selection import source_of
from darefine_qupath.prediction import ScoreMap
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review import manual_annotations
from darefine_qupath.tiles.loading import TileDataset
from darefine_qupath.tiles.screening import index_tiles
from darefine_qupath.tiles.sources import SlideReader
from darefine_qupath.training import ContextMode, evaluate

__all__ = ["SlideScore", "score_context", "score_slide", "truth_labels", "truth_of"]

_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class SlideScore:
    """Agreement on one slide.

    Attributes
    ----------
    image : str
        Name.
    matrix : ConfusionMatrix
        Map pixels by true and predicted class.
    num_unpredicted : int
        Labelled map pixels that were not predicted (glass, unreadable), in none of the figures.
    """

    image: str
    matrix: ConfusionMatrix
    num_unpredicted: int


def truth_of(project: Project, image: ImageEntry, folder: Path | None) -> tuple[Annotation, ...]:
    """Annotations to compare with.

    Parameters
    ----------
    project : Project
        The project.
    image : ImageEntry
        One of its images.
    folder : Path or None
        Folder with ``<entry id>.geojson`` or ``<image name>.geojson``; None = what a person drew in the project;
        accepted predictions do not count, they would flatter.

    Returns
    -------
    tuple of Annotation
        Empty where there is no truth.
    """
    if folder is None:
        return manual_annotations(project, image, taken_over=False)
    for name in (image.id, image.name, Path(image.name).stem):
        file = folder / f"{name}.geojson"
        if file.is_file():
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
    image: ImageEntry, score_map: ScoreMap, annotations: Sequence[Annotation], image_size: Size
) -> SlideScore:
    """Compare a score map with annotations.

    Parameters
    ----------
    image : ImageEntry
        What was predicted.
    score_map : ScoreMap
        The prediction.
    annotations : sequence of Annotation
        The truth.
    image_size : Size
        Of the slide, in level-0 pixels.

    Returns
    -------
    SlideScore
    """
    painter = LabelPainter(annotations, score_map.classes)
    matrix = ConfusionMatrix.empty(score_map.classes.num_classes)
    unpredicted = 0
    for top, layers in score_map.bands(_ROWS, ("class",)):
        predicted = layers["class"]
        truth = truth_labels(painter, score_map, image_size, (top, top + len(predicted)))
        missing = (predicted == IGNORE) & (truth != IGNORE)
        unpredicted += int(missing.sum())
        matrix = matrix.updated(np.where(missing, np.uint8(IGNORE), truth), predicted)
    return SlideScore(image=image.name, matrix=matrix, num_unpredicted=unpredicted)


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
    checkpoint : Checkpoint
        The model.
    truths : sequence of (ImageEntry, sequence of Annotation)
        Images with their annotations.
    modes : sequence of str
        ``"normal"``, ``"blank"``, ``"shuffled"``.
    mpp : float, optional
        Micrometres per pixel of every slide.
    device : str
        Where to compute.

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
    data = TileDataset(tiles, SlideReader(sources, checkpoint.classes))
    network = checkpoint.build()
    return {
        mode: evaluate(network, data, normalisation=checkpoint.normalisation, device=device, context=mode)
        for mode in modes
    }
