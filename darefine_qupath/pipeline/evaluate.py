"""Compare what a model predicts for a project with annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darefine_qupath.annotations import Annotation, by_annotators
from darefine_qupath.classes import UNLABELLED_IGNORE, ClassMap
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import DarefineError, PredictionError, ProjectError
from darefine_qupath.limits import wording
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.pipeline.identity import trained_on
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.pipeline.scoring import SlideScore, Unpredicted, score_context, score_slide, slide_size, truth_of
from darefine_qupath.pipeline.selection import Skipped, check_annotators, choose_images, warn_of_several_annotators
from darefine_qupath.pipeline.slide_tasks import SlideRequest, plan_slides, predict_slides, spare_former_map
from darefine_qupath.prediction.area import PredictionArea
from darefine_qupath.prediction.tasks import SlideResult, SlideTask, load_model
from darefine_qupath.project import ImageEntry, Project, image_titles, open_project
from darefine_qupath.sheets import write_csv
from darefine_qupath.slides import open_slide, tissue_mask
from darefine_qupath.training import ContextMode

__all__ = ["EvaluateRequest", "Evaluation", "evaluate_project"]


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(SlideRequest):
    """What to predict, and what to compare it with.

    Attributes
    ----------
    truth : Path or None
        Folder of GeoJSON files; the project's own annotations by default.
    annotators : tuple of str
        Compare only with annotations of these; see `by_annotators`.
    context : tuple of str
        Also score tile by tile with these context modes.
    unpredicted : {"count", "ignore"}
        Whether labelled pixels without a prediction count as errors; see `score_slide`.
    """

    truth: Path | None = None
    annotators: tuple[str, ...] = ()
    context: tuple[ContextMode, ...] = ()
    unpredicted: Unpredicted = "count"


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
        Slides among them that the model was trained on: their scores are too good.
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
            "failed": [image.to_json() for image in self.failed],
        }


def evaluate_project(request: EvaluateRequest, *, listener: Listener = SILENT) -> Evaluation:
    """Compare predictions with annotations; the project stays as it is.

    Without named images these are the images that have a truth and that the model was not trained on; if there is
    none, all that have a truth, and `Evaluation.seen` says so.

    Parameters
    ----------
    listener : Listener, optional
        Hears how far each slide is.

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
        truths = _read_truths(project, images, request, failed)
        if not truths:
            where = project.path if request.truth is None else request.truth
            raise PredictionError(
                _join_reasons(failed, titles)
                or f"No image has annotations in {where} to compare with; annotate some, or give --truth"
            )
        trained = trained_on(header, project, [image for image, _ in truths])
        unseen = [item for item in truths if item[0].id not in trained]
        chosen = unseen if unseen and not request.images else truths
        plan = plan_slides(project, [image for image, _ in chosen], request)
        failed += plan.failed
        records_of = {image.id: (image, records) for image, records in chosen}
        slides: list[SlideScore] = []
        for result in predict_slides([spare_former_map(task, header) for task in plan.tasks], request, listener):
            image, records = records_of[result.task.key]
            try:
                with wording(PredictionError):
                    slides.append(_score(image, result, records, header.classes, request.unpredicted))
            except DarefineError as error:
                failed.append(Skipped.of(image, error))
        if not slides:
            raise PredictionError(_join_reasons(failed, titles) or "Nothing was predicted")
        scored = {slide.id for slide in slides}
        context = _score_contexts([item for item in chosen if item[0].id in scored], request)
    return Evaluation(
        model=header.model_id,
        classes=header.classes,
        slides=tuple(slides),
        context=context,
        seen=tuple(titles[image.id] for image, _ in chosen if image.id in trained),
        failed=tuple(failed),
    )


def _read_truths(
    project: Project, images: Sequence[ImageEntry], request: EvaluateRequest, failed: list[Skipped]
) -> list[tuple[ImageEntry, tuple[Annotation, ...]]]:
    """Images with the annotations to compare with; those whose annotations cannot be read join the failed ones."""
    read = []
    for image in images:
        try:
            with wording(ProjectError):
                read.append((image, truth_of(project, image, request.truth)))
        except DarefineError as error:
            failed.append(Skipped.of(image, error))
    check_annotators((record for _, records in read for record in records), request.annotators)
    chosen = [(image, by_annotators(records, request.annotators)) for image, records in read]
    annotated = [(image, records) for image, records in chosen if any(record.path_class for record in records)]
    warn_of_several_annotators(records for _, records in annotated)
    return annotated


def _join_reasons(failed: Sequence[Skipped], titles: Mapping[str, str]) -> str:
    return "; ".join(f"{titles.get(image.id, image.name)}: {image.why}" for image in failed)


def _score_contexts(
    truths: Sequence[tuple[ImageEntry, Sequence[Annotation]]], request: EvaluateRequest
) -> dict[str, ConfusionMatrix]:
    if not request.context:
        return {}
    modes: tuple[ContextMode, ...] = tuple(dict.fromkeys(("normal", *request.context)))
    device = str(choose_device(request.options.device))
    return score_context(load_model(request.model), truths, modes, mpp=request.given_mpp, device=device)


def _score(
    image: ImageEntry,
    result: SlideResult,
    records: Sequence[Annotation],
    classes: ClassMap,
    unpredicted: Unpredicted,
) -> SlideScore:
    if result.score_map is None:
        raise PredictionError(str(result.error))
    region = _predicted_region(result.task, classes)
    return score_slide(image, result.score_map, records, slide_size(image), region=region, unpredicted=unpredicted)


def _predicted_region(task: SlideTask, classes: ClassMap) -> PredictionArea:
    """Find what of a slide was to be predicted."""
    defaults = {classes.unlabelled, classes.region_unlabelled} - {UNLABELLED_IGNORE}
    if not (task.options.tissue and defaults):
        return PredictionArea(within=task.options.within)
    with open_slide(task.slide, crop_bounds=task.options.crop_bounds, reader=task.options.reader) as slide:
        mask = tissue_mask(slide, mpp=slide.mpp if task.mpp is None else task.mpp)
    return PredictionArea(tissue=mask, within=task.options.within)
