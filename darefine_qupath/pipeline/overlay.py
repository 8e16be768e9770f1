"""Draw predictions beside slide and truth."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import PredictionError
from darefine_qupath.geometry import Size, fit_within
from darefine_qupath.masks import LabelPainter
from darefine_qupath.pipeline.scoring import slide_size, truth_labels, truth_of
from darefine_qupath.pipeline.selection import choose_images
from darefine_qupath.pipeline.slide_tasks import map_folder
from darefine_qupath.prediction import ScoreMap, read_score_map
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.report.overlay import Panel, draw_panels
from darefine_qupath.review import OnError, for_images
from darefine_qupath.slides import open_slide

__all__ = ["draw_overlays"]


def draw_overlays(
    project: Project,
    out: Path,
    *,
    truth: Path | None = None,
    names: Sequence[str] = (),
    side: int = 900,
    on_error: OnError | None = None,
) -> Iterator[Path]:
    """Draw every predicted slide: as it is, its truth where there is one, its prediction, and where they differ.

    Parameters
    ----------
    out : Path
        Folder for the pictures.
    truth : Path, optional
        Folder of GeoJSON files; the project's own annotations by default.
    side : int, optional
        Longest side of each panel, in pixels.
    on_error : callable, optional
        Told of an image that cannot be drawn, after which the others are; without it that is an error.

    Yields
    ------
    Path
        Each picture, when it is there.

    Raises
    ------
    PredictionError
        If nothing was predicted yet, or there is no such folder of truths.
    """
    images, skipped = choose_images(project, names)
    if truth is not None and not truth.is_dir():
        raise PredictionError(f"No folder of GeoJSON files at {truth}")
    predicted = [image for image in images if _is_predicted(project, image)]
    gone = [image for image in skipped if _is_predicted(project, project.image(image.id))]
    if not predicted and not gone:
        raise PredictionError(f"No image of {project.path} has been predicted; run darefine predict first")
    for image in gone:
        error = PredictionError(f"{image.name}: {image.why}")
        if on_error is None:
            raise error
        on_error(image.name, PredictionError(image.why))
    drawn = for_images(predicted, lambda image: _draw_overlay(project, image, out, truth, side), on_error)
    yield from (path for _, path in drawn)


def _is_predicted(project: Project, image: ImageEntry) -> bool:
    return (map_folder(project, image) / "scoremap.json").is_file()


def _draw_overlay(project: Project, image: ImageEntry, out: Path, truth: Path | None, side: int) -> Path:
    assert image.path is not None
    score_map = read_score_map(map_folder(project, image))
    size = fit_within((score_map.box.width, score_map.box.height), (side, side))
    with open_slide(image.path, crop_bounds=image.crop_bounds) as slide:
        thumbnail = slide.read(score_map.box, size)
    predicted = _shrink(score_map.read("class"), size)
    records = truth_of(project, image, truth)
    panels = [Panel(title=image.name), Panel(title="Prediction", labels=predicted)]
    compare = None
    if any(record.path_class in score_map.classes.names for record in records):
        labels = _draw_truth(records, score_map, slide_size(image), size)
        panels.insert(1, Panel(title="Truth", labels=labels))
        compare = (labels, predicted)
    hidden = score_map.classes.unlabelled_label
    # What Windows allows in no file name; a colon would even hide the picture in a stream of another file.
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", Path(image.name).stem)
    path = out / f"{image.id}-{name}.png"
    draw_panels(
        path, thumbnail, panels, score_map.classes, hidden=None if hidden == IGNORE else hidden, compare=compare
    )
    return path


def _draw_truth(records: Sequence[Annotation], score_map: ScoreMap, image_size: Size, size: Size) -> NDArray[np.uint8]:
    known = [record for record in records if score_map.classes.knows(record.path_class)]
    labels = truth_labels(LabelPainter(known, score_map.classes), score_map, image_size, (0, score_map.size.height))
    return _shrink(labels, size)


def _shrink(labels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Labels at a smaller size, by the pixel at each centre."""
    rows = ((np.arange(size.height) + 0.5) * labels.shape[0] / size.height).astype(int)
    columns = ((np.arange(size.width) + 0.5) * labels.shape[1] / size.width).astype(int)
    shrunk: NDArray[np.uint8] = labels[rows][:, columns]
    return shrunk
