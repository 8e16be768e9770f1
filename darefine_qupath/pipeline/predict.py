"""From a model and a project to score maps, polygons and objects in QuPath."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation, LabelPainter, by_annotators
from darefine_qupath.checkpoint import CheckpointHeader, read_header
from darefine_qupath.classes import IGNORE, UNLABELLED_IGNORE, ClassMap
from darefine_qupath.errors import ClassMapError, DarefineError, PredictionError, ProjectError
from darefine_qupath.geometry import Box, Size, fit_within
from darefine_qupath.limits import wording
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.pipeline.identity import project_id, trained_on
from darefine_qupath.pipeline.provenance import MODEL_FILE
from darefine_qupath.pipeline.scoring import (
    SlideScore,
    Unpredicted,
    score_context,
    score_slide,
    truth_labels,
    truth_of,
)
from darefine_qupath.pipeline.selection import Skipped, check_annotators, choose_images, size_mismatch
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.polygons import ClassPolygon, vectorize
from darefine_qupath.prediction import PredictOptions, Progress, ScoreMap, read_score_map
from darefine_qupath.prediction.cluster import SlideResult, SlideTask, load_model, predict_many
from darefine_qupath.prediction.engine import choose_device
from darefine_qupath.prediction.region import Region
from darefine_qupath.prediction.slide import fingerprint
from darefine_qupath.project import ImageEntry, Project, image_titles, open_project
from darefine_qupath.report import Panel, draw_panels
from darefine_qupath.review import OnError, RunResult, WriteOptions, for_images, write_back
from darefine_qupath.sheets import write_csv
from darefine_qupath.slides import open_slide, tissue_mask
from darefine_qupath.training import ContextMode

__all__ = [
    "Evaluation",
    "ImageOutcome",
    "PolygonOptions",
    "PredictRequest",
    "Prediction",
    "draw_overlays",
    "evaluate_project",
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
        tasks, empty, outcomes = _tasks(project, images, request)
        if request.dry_run:
            tasks = [_aside(task, header) for task in tasks]
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


def _tasks(
    project: Project, images: Sequence[ImageEntry], request: PredictRequest
) -> tuple[list[SlideTask], tuple[Skipped, ...], list[ImageOutcome]]:
    """Slides to predict, images that are left out, and images that fail before they begin."""
    given = _given_mpp(project, request)
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


def _aside(task: SlideTask, header: CheckpointHeader) -> SlideTask:
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


def _given_mpp(project: Project, request: PredictRequest) -> float | None:
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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model does.

    Attributes
    ----------
    model : str
        Its id.
    classes : ClassMap
        Its classes.
    slides : tuple of SlideScore
        One per slide.
    context : mapping of str to ConfusionMatrix
        Tile by tile, by context mode; empty unless asked for.
    seen : tuple of str
        Slides among them that the model was trained on: their scores flatter.
    failed : tuple of Skipped
        Images that could not be compared; no score counts them.
    """

    model: str
    classes: ClassMap
    slides: tuple[SlideScore, ...]
    context: Mapping[str, ConfusionMatrix]
    seen: tuple[str, ...]
    failed: tuple[Skipped, ...] = ()

    @property
    def total(self) -> ConfusionMatrix:
        """All slides together."""
        return ConfusionMatrix.merged(slide.matrix for slide in self.slides)

    @property
    def unpredicted_share(self) -> float:
        """Part of the labelled pixels of all slides that have no prediction, 0 to 1."""
        num_labelled = sum(slide.num_labelled for slide in self.slides)
        return sum(slide.num_unpredicted for slide in self.slides) / max(1, num_labelled)

    @property
    def titles(self) -> dict[str, str]:
        """By entry id, the name by which people tell the slide apart."""
        names = {slide.id: slide.image for slide in self.slides}
        return image_titles({**names, **{image.id: image.name for image in self.failed}})

    def write_csv(self, path: Path) -> None:
        """Write the scores slide by slide as CSV."""
        ious = [f"IoU {name}" for name in self.classes.names]
        rows = []
        for slide in self.slides:
            found = slide.matrix
            scores = (*found.iou, found.mean_iou, found.accuracy, found.mean_dice, found.bach_score)
            cells = [None if np.isnan(score) else float(score) for score in scores]
            rows.append([slide.image, slide.id, *cells, slide.unpredicted_share])
        columns = ["image", "id", *ious, "mIoU", "accuracy", "Dice", "BACH score", "unpredicted share"]
        write_csv(path, columns, rows, PredictionError)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        names = self.classes.names
        return {
            "model": self.model,
            "total": self.total.to_json(names),
            "unpredicted_share": self.unpredicted_share,
            "slides": [
                {
                    "id": slide.id,
                    "name": slide.image,
                    "unpredicted": slide.num_unpredicted,
                    "unpredicted_share": slide.unpredicted_share,
                    **slide.matrix.to_json(names),
                }
                for slide in self.slides
            ],
            "context": {mode: matrix.to_json(names) for mode, matrix in self.context.items()},
            "seen": list(self.seen),
            "failed": [{"id": image.id, "name": image.name, "why": image.why} for image in self.failed],
        }


def evaluate_project(
    request: PredictRequest,
    *,
    truth: Path | None = None,
    annotators: Sequence[str] = (),
    context: Sequence[ContextMode] = (),
    unpredicted: Unpredicted = "count",
    progress: Report | None = None,
) -> Evaluation:
    """Compare predictions with annotations; the project stays as it is.

    Without named images these are the images that have a truth and that the model was not trained on; if there is
    none, all that have a truth, and `Evaluation.seen` says so.

    Parameters
    ----------
    request : PredictRequest
        What to predict, and how; what concerns polygons and objects is not used.
    truth : Path, optional
        Folder of GeoJSON files; the project's own annotations by default.
    annotators : sequence of str, optional
        Compare only with annotations of these; see `by_annotators`.
    context : sequence of str, optional
        Also score tile by tile with these context modes.
    unpredicted : {"count", "ignore"}
        Whether labelled pixels without a prediction count as errors; see `score_slide`.
    progress : callable, optional
        Told how far each slide is.

    Returns
    -------
    Evaluation

    Raises
    ------
    PredictionError
        If there is nothing to compare with, or no slide can be predicted.
    """
    header = load_model(request.model).header
    with open_project(request.project, engine="embedded") as project:
        images, missing = choose_images(project, request.images)
        failed = list(missing if request.images else ())
        titles = image_titles({image.id: image.name for image in images})
        by_title = {titles[image.id]: image for image in images}

        def note_failure(title: str, error: DarefineError) -> None:
            failed.append(Skipped(id=by_title[title].id, name=by_title[title].name, why=str(error)))

        truths = list(for_images(images, lambda image: truth_of(project, image, truth), note_failure))
        check_annotators((record for _, records in truths for record in records), annotators)
        truths = [(image, by_annotators(records, annotators)) for image, records in truths]
        truths = [(image, records) for image, records in truths if any(record.path_class for record in records)]
        if not truths:
            if failed:
                raise PredictionError("; ".join(f"{titles.get(image.id, image.name)}: {image.why}" for image in failed))
            where = project.path if truth is None else truth
            raise PredictionError(
                f"No image has annotations in {where} to compare with; annotate some, or give --truth"
            )
        trained = trained_on(header, project, [image for image, _ in truths])
        unseen = [item for item in truths if item[0].id not in trained]
        chosen = unseen if unseen and not request.images else truths
        tasks, _, unfit = _tasks(project, [image for image, _ in chosen], request)
        failed += [Skipped(id=o.image.id, name=o.image.name, why=str(o.error)) for o in unfit]
        tasks = [_aside(task, header) for task in tasks]
        records_of = {image.id: (image, records) for image, records in chosen}
        slides: list[SlideScore] = []
        scored: set[str] = set()
        for result in predict_many(tasks, scheduler=request.scheduler, progress=progress):
            image, records = records_of[result.task.key]
            try:
                with wording(PredictionError):
                    slides.append(_scored(image, result, records, header.classes, unpredicted))
                    scored.add(image.id)
            except DarefineError as error:
                note_failure(titles[image.id], error)
        if not slides:
            raise PredictionError(
                "; ".join(f"{titles.get(image.id, image.name)}: {image.why}" for image in failed)
                or "Nothing was predicted"
            )
        scores = {}
        if context:
            modes: tuple[ContextMode, ...] = tuple(dict.fromkeys(("normal", *context)))
            scores = score_context(
                load_model(request.model),
                [item for item in chosen if item[0].id in scored],
                modes,
                mpp=_given_mpp(project, request),
                device=str(choose_device(request.options.device)),
            )
    return Evaluation(
        model=header.model_id,
        classes=header.classes,
        slides=tuple(slides),
        context=scores,
        seen=tuple(titles[image.id] for image, _ in chosen if image.id in trained),
        failed=tuple(failed),
    )


def _scored(
    image: ImageEntry,
    result: SlideResult,
    records: Sequence[Annotation],
    classes: ClassMap,
    unpredicted: Unpredicted,
) -> SlideScore:
    if result.score_map is None:
        raise PredictionError(str(result.error))
    region = _region(result.task, classes)
    return score_slide(image, result.score_map, records, _slide_size(image), region=region, unpredicted=unpredicted)


def _region(task: SlideTask, classes: ClassMap) -> Region:
    """Find what of a slide was to be predicted."""
    defaults = {classes.unlabelled, classes.region_unlabelled} - {UNLABELLED_IGNORE}
    if not (task.options.tissue and defaults):
        return Region(within=task.options.within)
    with open_slide(task.slide, crop_bounds=task.options.crop_bounds, reader=task.options.reader) as slide:
        mask = tissue_mask(slide, mpp=slide.mpp if task.mpp is None else task.mpp)
    return Region(tissue=mask, within=task.options.within)


def _slide_size(image: ImageEntry) -> Size:
    if image.width is not None and image.height is not None:
        return Size(image.width, image.height)
    assert image.path is not None
    with open_slide(image.path, crop_bounds="--no-crop" not in image.server_args) as slide:
        return slide.size


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
    project : Project
        The project.
    out : Path
        Folder for the pictures.
    truth : Path, optional
        Folder of GeoJSON files; the project's own annotations by default.
    names : sequence of str, optional
        Only these images.
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
    with open_slide(image.path, crop_bounds="--no-crop" not in image.server_args) as slide:
        thumbnail = slide.read(score_map.box, size)
    predicted = _shrunk(score_map.read("class"), size)
    records = truth_of(project, image, truth)
    panels = [Panel(title=image.name), Panel(title="Prediction", labels=predicted)]
    compare = None
    if any(record.path_class in score_map.classes.names for record in records):
        labels = _truth_map(records, score_map, _slide_size(image), size)
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


def _truth_map(records: Sequence[Annotation], score_map: ScoreMap, image_size: Size, size: Size) -> NDArray[np.uint8]:
    known = [record for record in records if score_map.classes.knows(record.path_class)]
    labels = truth_labels(LabelPainter(known, score_map.classes), score_map, image_size, (0, score_map.size.height))
    return _shrunk(labels, size)


def _shrunk(labels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Labels at a smaller size, by the pixel at each centre."""
    rows = ((np.arange(size.height) + 0.5) * labels.shape[0] / size.height).astype(int)
    columns = ((np.arange(size.width) + 0.5) * labels.shape[1] / size.width).astype(int)
    shrunk: NDArray[np.uint8] = labels[rows][:, columns]
    return shrunk
