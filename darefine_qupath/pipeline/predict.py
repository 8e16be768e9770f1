"""Predict the slides of a project and write polygons back into it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint import CheckpointHeader, read_header
from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import ClassMapError, DarefineError, PredictionError, ProjectError
from darefine_qupath.geometry import Box
from darefine_qupath.limits import wording
from darefine_qupath.pipeline.identity import project_id
from darefine_qupath.pipeline.provenance import MODEL_FILE
from darefine_qupath.pipeline.selection import Skipped, choose_images, size_mismatch
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.polygons import ClassPolygon, vectorize
from darefine_qupath.prediction import PredictOptions, Progress, ScoreMap, read_score_map
from darefine_qupath.prediction.cluster import SlideTask, load_model, predict_many
from darefine_qupath.prediction.slide import fingerprint
from darefine_qupath.project import ImageEntry, Project, image_titles, open_project
from darefine_qupath.review import RunResult, WriteOptions, write_back
from darefine_qupath.sheets import write_csv
from darefine_qupath.slides import open_slide

__all__ = [
    "ImageOutcome",
    "PolygonOptions",
    "PredictRequest",
    "Prediction",
    "map_folder",
    "predict_project",
    "write_summary",
]

_log = logging.getLogger(__name__)

Report = Callable[[Progress], None]


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
class PredictRequest:
    """What to predict and how to write it back.

    Attributes
    ----------
    project, model : Path
        Project file or folder, and model file.
    settings : Path or None
        Settings file; the project's ``darefine.toml`` by default.
    engine : str
        Engine that writes.
    images : tuple of str
        Names or entry ids; all by default.
    mpp : float or None
        Micrometres per pixel of every slide.
    within : str or None
        Only inside annotations of this class.
    options : PredictOptions
        Of the network.
    polygons : PolygonOptions
        Of the polygons.
    write : WriteOptions or None
        Of the objects; None leaves the project as it is (score maps only).
    scheduler : str or None
        Address of a Dask scheduler, or ``"local"``.
    dry_run : bool
        Say what would change in the project, and change nothing; score maps that are there stay as well.
    """

    project: Path
    model: Path
    settings: Path | None = None
    engine: Literal["auto", "embedded", "paquo"] = "auto"
    images: tuple[str, ...] = ()
    mpp: float | None = None
    within: str | None = None
    options: PredictOptions = field(default_factory=PredictOptions)
    polygons: PolygonOptions = field(default_factory=PolygonOptions)
    write: WriteOptions | None = field(default_factory=WriteOptions)
    scheduler: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageOutcome:
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
            "map": None if found is None else str(found.folder),
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
    outcomes : tuple of ImageOutcome
        One per image that was tried.
    skipped : tuple of Skipped
        Images that could not be tried.
    """

    project: Path
    engine: str
    model: str
    classes: ClassMap
    outcomes: tuple[ImageOutcome, ...]
    skipped: tuple[Skipped, ...]

    @property
    def titles(self) -> dict[str, str]:
        """By entry id, the name by which people tell the image apart."""
        names = {outcome.image.id: outcome.image.name for outcome in self.outcomes}
        return image_titles({**names, **{image.id: image.name for image in self.skipped}})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "project": str(self.project),
            "engine": self.engine,
            "model": self.model,
            "classes": list(self.classes.names),
            "images": [outcome.to_json() for outcome in self.outcomes],
            "skipped": [{"id": image.id, "name": image.name, "why": image.why} for image in self.skipped],
        }


def map_folder(project: Project, image: ImageEntry) -> Path:
    """Folder of an image's score map, beside the project's own files."""
    return project.folder / "darefine" / "maps" / image.id


def predict_project(request: PredictRequest, *, progress: Report | None = None) -> Prediction:
    """Predict images of a project and write polygons back, image by image.

    An image that cannot be read does not stop the others. Each image of the project is whole at any time; a call that
    was cut off goes on where it stopped when it is made again.

    Parameters
    ----------
    request : PredictRequest
        What, and how.
    progress : callable, optional
        Told how far each slide is.

    Returns
    -------
    Prediction

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
    with open_project(request.project, engine=request.engine) as project:
        images, skipped = choose_images(project, request.images)
        if request.write is not None:
            _check_over(project, images, request.write.over)
        tasks, empty, outcomes = plan_slides(project, images, request)
        if request.dry_run:
            tasks = [keep_former_map(task, header) for task in tasks]
        skipped = (*skipped, *empty)
        names = image_titles({image.id: image.name for image in project.images})
        if not tasks:
            failed = [f"{names[outcome.image.id]}: {outcome.error}" for outcome in outcomes]
            reasons = "; ".join([f"{names[image.id]}: {image.why}" for image in skipped] + failed)
            reasons = reasons or "it has no images"
            raise PredictionError(f"No image of {project.path} can be predicted: {reasons}")
        if request.write is not None and not request.dry_run:
            project_id(project)
        by_id = {image.id: image for image in images}
        batch: str | None = None
        overall = None if progress is None else _Overall(progress, len(tasks))
        for result in predict_many(tasks, scheduler=request.scheduler, progress=overall):
            if overall is not None:
                overall.finished(result.task)
            image = by_id[result.task.key]
            if result.score_map is None:
                outcomes.append(ImageOutcome(image=image, error=result.error))
            else:
                for warning in result.score_map.warnings:
                    _log.warning("%s: %s", names[image.id], warning.message)
                outcomes.append(_finish(project, image, result.score_map, request, left_out, batch))
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


class _Overall:
    """Adds to the progress of a slide how far all slides are together."""

    def __init__(self, report: Report, num_slides: int) -> None:
        self._report, self._num_slides = report, num_slides
        self._began = time.monotonic()
        self._seen: dict[str, Progress] = {}
        self._finished = self._skipped = 0

    def __call__(self, progress: Progress) -> None:
        self._seen[progress.key] = progress
        left = self._seconds_left()
        self._report(replace(progress, slides_done=self._finished, num_slides=self._num_slides, all_seconds_left=left))

    def finished(self, task: SlideTask) -> None:
        """Count a slide that is done with; one that told nothing before was finished already, or failed."""
        self._finished += 1
        self._skipped += task.key not in self._seen

    def _seconds_left(self) -> float | None:
        seen = tuple(self._seen.values())
        fresh = sum(progress.fresh for progress in seen)
        if not fresh:
            return None
        unseen = max(0, self._num_slides - self._skipped - len(seen))
        left = sum(progress.total - progress.done for progress in seen)
        left_unseen = unseen * sum(progress.total for progress in seen) / len(seen)
        return (left + left_unseen) * (time.monotonic() - self._began) / fresh


def _check_over(project: Project, images: Sequence[ImageEntry], names: Sequence[str]) -> None:
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
        raise ClassMapError(f"{project.path} has no classes {unknown} (over); it has {sorted(known)}")


def plan_slides(
    project: Project, images: Sequence[ImageEntry], request: PredictRequest
) -> tuple[list[SlideTask], tuple[Skipped, ...], list[ImageOutcome]]:
    """Slides to predict, images that are left out, and images that fail before they begin."""
    given = given_mpp(project, request)
    tasks, skipped, failed = [], [], []
    for image in images:
        why = size_mismatch(image, given)
        if why is not None:
            failed.append(ImageOutcome(image=image, error=why))
            continue
        options = replace(request.options, crop_bounds="--no-crop" not in image.server_args)
        if request.within is not None:
            try:
                with wording(ProjectError):
                    area = _area_of(project.annotations(image), request.within)
            except DarefineError as error:
                failed.append(ImageOutcome(image=image, error=str(error)))
                continue
            if area is None:
                skipped.append(
                    Skipped(id=image.id, name=image.name, why=f"it has no annotation of class {request.within!r}")
                )
                continue
            options = replace(options, within=area)
        assert image.path is not None
        tasks.append(
            SlideTask(
                key=image.id,
                slide=image.path,
                model=request.model,
                out=map_folder(project, image),
                mpp=image.mpp if given is None else given,
                options=options,
            )
        )
    return tasks, tuple(skipped), failed


def keep_former_map(task: SlideTask, header: CheckpointHeader) -> SlideTask:
    """Give a prediction that changes nothing another folder where a map lies that is not the same, or is unfinished."""
    if not any((task.out / name).exists() for name in ("scoremap.json", "partial")):
        return task
    try:
        found = read_score_map(task.out)
        with open_slide(task.slide, crop_bounds=task.options.crop_bounds, reader=task.options.reader) as slide:
            mpp = slide.mpp if task.mpp is None else task.mpp
            is_same = found.fingerprint == fingerprint(slide, header, mpp=mpp, options=task.options)
    except DarefineError:
        is_same = False
    keep = is_same and task.options.resume
    return task if keep else replace(task, out=task.out.parents[1] / "other-maps" / task.out.name)


def given_mpp(project: Project, request: PredictRequest) -> float | None:
    return read_settings(project.folder, request.settings).mpp if request.mpp is None else request.mpp


def _area_of(annotations: Sequence[Annotation], path_class: str) -> shapely.Geometry | None:
    shapes = [record.geometry for record in annotations if record.path_class == path_class and record.area > 0]
    if not shapes:
        return None
    return shapely.union_all(shapely.make_valid(np.array(shapes)))


def _finish(
    project: Project,
    image: ImageEntry,
    score_map: ScoreMap,
    request: PredictRequest,
    left_out: frozenset[int],
    batch: str | None,
) -> ImageOutcome:
    try:
        with wording(PredictionError):
            polygons, written = _written(project, image, score_map, request, left_out, batch)
    except DarefineError as error:
        return ImageOutcome(image=image, score_map=score_map, error=str(error))
    return ImageOutcome(image=image, score_map=score_map, num_polygons=len(polygons), written=written)


def _written(
    project: Project,
    image: ImageEntry,
    score_map: ScoreMap,
    request: PredictRequest,
    left_out: frozenset[int],
    batch: str | None,
) -> tuple[tuple[ClassPolygon, ...], RunResult | None]:
    polygons = _polygons(image, score_map, request.polygons, left_out)
    written = None
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
                # Where a training on the reviewed labels finds the model that it goes on from.
                MODEL_FILE: str(request.model.resolve()),
                # What the model was trained on, so that a review can say what is unlike it.
                "stain": read_header(request.model).provenance.get("stain"),
            },
            batch=batch,
            dry_run=request.dry_run,
        )
    return polygons, written


def _polygons(
    image: ImageEntry, score_map: ScoreMap, options: PolygonOptions, left_out: frozenset[int]
) -> tuple[ClassPolygon, ...]:
    threshold = round(options.min_confidence * 255)

    def labels(window: Box) -> NDArray[np.uint8]:
        found = score_map.read("class", window)
        if threshold:
            found = np.where(score_map.read("confidence", window) >= threshold, found, np.uint8(IGNORE))
        return found

    size = None if image.width is None or image.height is None else (image.width, image.height)
    polygons = vectorize(
        labels,
        box=score_map.box,
        size=score_map.size,
        mpp=score_map.mpp,
        image_size=size,
        simplify_um=options.simplify_um,
        min_area_um2=options.min_area_um2,
        min_hole_um2=options.min_hole_um2,
        max_vertices=options.max_vertices,
        leave_out=left_out,
        confidence=lambda window: score_map.read("confidence", window),
        margin=lambda window: score_map.read("margin", window),
        runner_up=lambda window: score_map.read("runner_up", window),
    )
    _check_unchanged(score_map)
    # Alone among what gets no polygon, a region has no neighbor that it could go to.
    return tuple(item for item in polygons if item.area_um2 is None or item.area_um2 >= options.min_area_um2)


def _check_unchanged(score_map: ScoreMap) -> None:
    """Refuse polygons of a map that another process wrote anew while it was read: they may be of two models."""
    try:
        found = read_score_map(score_map.folder).fingerprint
    except PredictionError:
        found = None
    if found != score_map.fingerprint:
        raise PredictionError(
            f"{score_map.folder} was written anew by another process while it was read; predict again"
        )


def write_summary(prediction: Prediction, path: Path) -> None:
    """Write class areas and shares per slide as CSV."""
    names = prediction.classes.names
    units = [f"{name} {unit}" for unit in ("mm^2", "share") for name in names]
    rows = []
    for outcome in prediction.outcomes:
        if outcome.score_map is not None:
            areas = outcome.score_map.areas_mm2() or {}
            shares = outcome.score_map.shares()
            found = [*(areas.get(name) for name in names), *(shares[name] for name in names)]
            rows.append([outcome.image.name, outcome.image.id, *found, outcome.score_map.unpredicted_share])
    write_csv(path, ["image", "id", *units, "unpredicted share"], rows, PredictionError)
