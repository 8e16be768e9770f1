"""Predict the slides of a project and write polygons back into it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darefine_qupath.checkpoint.model_file import read_header
from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import ClassMapError, DarefineError, PredictionError, ProjectError
from darefine_qupath.geometry import Box
from darefine_qupath.limits import wording
from darefine_qupath.pipeline.identity import project_id
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.pipeline.provenance import MODEL_FILE
from darefine_qupath.pipeline.selection import Skipped, choose_images
from darefine_qupath.pipeline.slide_tasks import SlideRequest, plan_slides, predict_elsewhere, predict_slides
from darefine_qupath.polygons import ClassPolygon, vectorize
from darefine_qupath.prediction import ScoreMap, read_score_map
from darefine_qupath.prediction.tasks import load_model
from darefine_qupath.project import ImageEntry, Project, image_titles, open_project
from darefine_qupath.review import RunResult, WriteOptions, write_back
from darefine_qupath.sheets import write_csv

__all__ = [
    "ImagePrediction",
    "PolygonOptions",
    "PredictRequest",
    "Prediction",
    "predict_project",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PolygonOptions:
    """How a score map becomes polygons.

    Attributes
    ----------
    simplify_um : float or None
        Detail left out of borders; None = 1.5 map pixels.
    min_area_um2 : float
        Smaller regions go to their surroundings.
    min_hole_um2 : float or None
        Smaller holes are filled; None = as `min_area_um2`.
    max_vertices : int or None
        Larger regions are split along straight lines; None never splits.
    background : bool
        Also draw the class of unlabelled pixels (Normal, say).
    classes : tuple of str
        Only these classes; all by default.
    min_confidence : float
        Leave out where the network is less sure, 0 to 1.
    """

    simplify_um: float | None = None
    min_area_um2: float = 1000.0
    min_hole_um2: float | None = None
    max_vertices: int | None = 20_000
    background: bool = False
    classes: tuple[str, ...] = ()
    min_confidence: float = 0.0

    def left_out(self, class_map: ClassMap) -> frozenset[int]:
        """Labels that give no polygons.

        Raises
        ------
        ClassMapError
            If a class of `classes` is not the model's.
        """
        unknown = [name for name in self.classes if name not in class_map.names]
        if unknown:
            raise ClassMapError(f"The model does not know the classes {unknown}; it knows {list(class_map.names)}")
        labels = {label for label, name in enumerate(class_map.names) if self.classes and name not in self.classes}
        if not self.background and not self.classes and class_map.unlabelled_label != IGNORE:
            labels.add(class_map.unlabelled_label)
        return frozenset(labels)


@dataclass(frozen=True, kw_only=True)
class PredictRequest(SlideRequest):
    """What to predict and how to write it back.

    Attributes
    ----------
    engine : str
        Engine that writes.
    polygons : PolygonOptions
        Of the polygons.
    write : WriteOptions or None
        Of the objects; None leaves the project as it is (score maps only).
    dry_run : bool
        Say what would change in the project, and write nothing into its folder: score maps are not kept.
    """

    engine: Literal["auto", "embedded", "paquo"] = "auto"
    polygons: PolygonOptions = field(default_factory=PolygonOptions)
    write: WriteOptions | None = field(default_factory=WriteOptions)
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """What became of one image.

    Attributes
    ----------
    image : ImageEntry
        The image.
    score_map : ScoreMap or None
        None when it failed.
    num_polygons : int
        Polygons of the prediction.
    written : RunResult or None
        What was written into the project.
    error : str or None
        Why it failed; the other images went on.
    """

    image: ImageEntry
    score_map: ScoreMap | None = None
    num_polygons: int = 0
    written: RunResult | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        found = self.score_map
        return {
            "id": self.image.id,
            "name": self.image.name,
            "error": self.error,
            "polygons": self.num_polygons,
            "written": None if self.written is None else self.written.to_json(),
            "area_mm2": None if found is None else found.areas_mm2(),
            "share": None if found is None else found.shares(),
            "unpredicted_share": None if found is None else found.unpredicted_share,
            "map": None if found is None or not found.folder.is_dir() else str(found.folder),
            "warnings": [] if found is None else [warning.to_json() for warning in found.warnings],
        }


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What became of a prediction.

    Attributes
    ----------
    project : Path
        The project file.
    engine : str
        Engine that read and wrote it.
    model : str
        Id of the model.
    classes : ClassMap
        Its classes.
    outcomes : tuple of ImagePrediction
        One per image that was tried.
    skipped : tuple of Skipped
        Images that could not be tried.
    """

    project: Path
    engine: str
    model: str
    classes: ClassMap
    outcomes: tuple[ImagePrediction, ...]
    skipped: tuple[Skipped, ...]

    @property
    def titles(self) -> dict[str, str]:
        """By entry id, the name by which people tell the image apart."""
        names = {outcome.image.id: outcome.image.name for outcome in self.outcomes}
        return image_titles({**names, **{image.id: image.name for image in self.skipped}})

    def write_csv(self, path: Path) -> None:
        """Write class areas and shares per slide as CSV."""
        names = self.classes.names
        units = [f"{name} {unit}" for unit in ("mm^2", "share") for name in names]
        rows = []
        for outcome in self.outcomes:
            if outcome.score_map is not None:
                areas = outcome.score_map.areas_mm2() or {}
                shares = outcome.score_map.shares()
                found = [*(areas.get(name) for name in names), *(shares[name] for name in names)]
                rows.append([outcome.image.name, outcome.image.id, *found, outcome.score_map.unpredicted_share])
        write_csv(path, ["image", "id", *units, "unpredicted share"], rows, PredictionError)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "project": str(self.project),
            "engine": self.engine,
            "model": self.model,
            "classes": list(self.classes.names),
            "images": [outcome.to_json() for outcome in self.outcomes],
            "skipped": [image.to_json() for image in self.skipped],
        }


def predict_project(request: PredictRequest, *, listener: Listener = SILENT) -> Prediction:
    """Predict images of a project and write polygons back, image by image.

    An image that cannot be read does not stop the others. Each image of the project is whole at any time; a call that
    was cut off goes on where it stopped when it is made again.

    Parameters
    ----------
    listener : Listener, optional
        Hears how far each slide is.

    Raises
    ------
    CheckpointError
        If the model file is none, or damaged.
    PredictionError
        If no image of the project can be predicted, or the device cannot be used.
    """
    # Weights and all: what is wrong with them is wrong for every slide.
    header = load_model(request.model).header
    if request.scheduler is None:
        choose_device(request.options.device)
    left_out = request.polygons.left_out(header.classes)
    with contextlib.ExitStack() as resources:
        project = resources.enter_context(open_project(request.project, engine=request.engine))
        images, skipped = choose_images(project, request.images)
        if request.write is not None:
            _check_overlapped_classes(project, images, request.write.over)
        plan = plan_slides(project, images, request)
        tasks = plan.tasks
        if request.dry_run:
            scratch = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="darefine-")))
            tasks = tuple(predict_elsewhere(task, header, scratch) for task in tasks)
        skipped = (*skipped, *plan.skipped)
        names = image_titles({image.id: image.name for image in project.images})
        if not tasks:
            reasons = "; ".join(f"{names[image.id]}: {image.why}" for image in (*skipped, *plan.failed))
            raise PredictionError(f"No image of {project.path} can be predicted: {reasons or 'it has no images'}")
        if request.write is not None and not request.dry_run:
            project_id(project)
        by_id = {image.id: image for image in images}
        outcomes = [ImagePrediction(image=by_id[image.id], error=image.why) for image in plan.failed]
        batch: str | None = None
        for result in predict_slides(tasks, request, listener):
            image = by_id[result.task.key]
            if result.score_map is None:
                outcomes.append(ImagePrediction(image=image, error=result.error))
            else:
                for warning in result.score_map.warnings:
                    _log.warning("%s: %s", names[image.id], warning.message)
                outcomes.append(_vectorize_and_write(project, image, result.score_map, request, left_out, batch))
                # The first run lends its id to the others of this call, so that they are undone together.
                batch = batch or (outcomes[-1].written.run if outcomes[-1].written else None)
        return Prediction(
            project=project.path,
            engine=project.engine,
            model=header.model_id,
            classes=header.classes,
            outcomes=tuple(outcomes),
            skipped=skipped,
        )


def _check_overlapped_classes(project: Project, images: Sequence[ImageEntry], names: Sequence[str]) -> None:
    """Refuse classes that neither the project nor an annotation in it has: most likely they are misspelt."""
    known = {path_class.name for path_class in project.classes}
    for image in images:
        if known.issuperset(names):
            return
        # An annotation may have a class that is not in the project's list.
        # An image that cannot be read is reported when its turn comes.
        with contextlib.suppress(DarefineError), wording(ProjectError):
            known.update(record.path_class for record in project.annotations(image) if record.path_class)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ClassMapError(f"{project.path} has no classes {unknown} (--allow-overlap); it has {sorted(known)}")


def _vectorize_and_write(
    project: Project,
    image: ImageEntry,
    score_map: ScoreMap,
    request: PredictRequest,
    left_out: frozenset[int],
    batch: str | None,
) -> ImagePrediction:
    written = None
    try:
        with wording(PredictionError):
            polygons = _vectorize_map(image, score_map, request.polygons, left_out)
            if request.write is not None:
                written = write_back(
                    project,
                    image,
                    polygons,
                    model=score_map.model_id,
                    classes=score_map.classes,
                    mpp=score_map.mpp,
                    options=request.write,
                    parameters={
                        "prediction": dict(score_map.settings),
                        "fingerprint": score_map.fingerprint,
                        # Training on the reviewed labels finds here the model to start from.
                        MODEL_FILE: str(request.model.resolve()),
                        # What the model was trained on, so that a review can say what is unlike it.
                        "stain": read_header(request.model).provenance.get("stain"),
                    },
                    batch=batch,
                    dry_run=request.dry_run,
                )
    except DarefineError as error:
        return ImagePrediction(image=image, score_map=score_map, error=str(error))
    return ImagePrediction(image=image, score_map=score_map, num_polygons=len(polygons), written=written)


def _vectorize_map(
    image: ImageEntry, score_map: ScoreMap, options: PolygonOptions, left_out: frozenset[int]
) -> tuple[ClassPolygon, ...]:
    threshold = round(options.min_confidence * 255)

    def labels(window: Box) -> NDArray[np.uint8]:
        found = score_map.read("class", window)
        if threshold:
            found = np.where(score_map.read("confidence", window) >= threshold, found, np.uint8(IGNORE))
        return found

    polygons = vectorize(
        labels,
        box=score_map.box,
        size=score_map.size,
        mpp=score_map.mpp,
        image_size=image.size,
        simplify_um=options.simplify_um,
        min_area_um2=options.min_area_um2,
        min_hole_um2=options.min_hole_um2,
        max_vertices=options.max_vertices,
        skip_labels=left_out,
        confidence=lambda window: score_map.read("confidence", window),
        margin=lambda window: score_map.read("margin", window),
        runner_up=lambda window: score_map.read("runner_up", window),
    )
    _check_unchanged(score_map)
    # Alone among what gets no polygon, a region has no neighbor that it could go to.
    return tuple(item for item in polygons if item.area_um2 is None or item.area_um2 >= options.min_area_um2)


def _check_unchanged(score_map: ScoreMap) -> None:
    """Refuse polygons of a map that another process rewrote while it was read: they may be of two models."""
    try:
        found = read_score_map(score_map.folder).fingerprint
    except PredictionError:
        found = None
    if found != score_map.fingerprint:
        raise PredictionError(
            f"{score_map.folder} was rewritten by another process while it was being read; predict again"
        )
