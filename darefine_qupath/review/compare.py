"""Compare what was predicted with what a pathologist made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import is_ignored
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.review.clipping import areal
from darefine_qupath.review.ownership import ImageObjects, ReviewedObject, sort_objects
from darefine_qupath.review.per_image import OnError, for_images
from darefine_qupath.review.review_report import NOTHING, ImageReview, ObjectReview, OverwrittenRun, ReviewReport
from darefine_qupath.review.tags import MODEL

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.project import ImageEntry, Project

__all__ = ["compare"]


def compare(
    project: Project, images: Iterable[ImageEntry] | None = None, *, on_error: OnError | None = None
) -> ReviewReport:
    """Compare what was written with what is there now.

    Parameters
    ----------
    project : Project
        Open project.
    images : iterable of ImageEntry, optional
        Which; all by default. Images without a run are left out.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    ReviewReport
        Counts, areas and agreement.

    Raises
    ------
    ReviewError
        If a run's file is damaged.
    ProjectFormatError
        If an image's data are.
    """
    found = for_images(
        project.images if images is None else images, lambda image: sort_objects(project, image), on_error
    )
    reviews = tuple(
        _image_review(image, state)
        for image, state in found
        if state.run or state.predictions or state.history.overwritten
    )
    names = dict.fromkeys(name for review in reviews for name in review.classes[:-1])
    classes = (*sorted(names), NOTHING)
    total = ConfusionMatrix.merged([ConfusionMatrix.empty(len(classes)), *(_spread(item, classes) for item in reviews)])
    return ReviewReport(project=project.name, images=reviews, classes=classes, confusion=total)


def _image_review(image: ImageEntry, state: ImageObjects) -> ImageReview:
    last = state.run or next(iter(state.history.overwritten), None)
    known = set() if last is None else set(last.known)
    drawn = [record for record in state.user_objects if last and record.id not in known and _is_drawn(record)]
    classes, confusion = _agreement(state.predictions, drawn)
    return ImageReview(
        image=image.id,
        image_name=image.name,
        run="" if state.run is None else state.run.id,
        mpp=image.mpp if last is None or last.mpp is None else last.mpp,
        objects=(*(_object_review(item) for item in state.predictions), *(_drawn_review(record) for record in drawn)),
        classes=classes,
        confusion=confusion,
        overwritten=tuple(OverwrittenRun(run.id, len(run.added)) for run in state.history.overwritten),
    )


def _is_drawn(record: Annotation) -> bool:
    classified = record.path_class is not None and not is_ignored(record.path_class)
    return record.kind == "annotation" and classified and areal(record.geometry) is not None


def final_class(item: ReviewedObject) -> str | None:
    """Class of an object now, without the suffix that it may have been written with."""
    if item.current is None or item.status == "rejected":
        return None
    name = item.current.path_class
    suffix = (item.written.record.path_class or "").removeprefix(item.written.training_class)
    return name if name is None or not suffix else name.removesuffix(suffix)


def _object_review(item: ReviewedObject) -> ObjectReview:
    before, after = areal(item.written.record.geometry), None
    if item.current is not None and item.status != "rejected":
        after = areal(item.current.geometry)
    return ObjectReview(
        id=item.written.id,
        outcome=item.status,
        model=item.written.record.metadata.get(MODEL, ""),
        predicted=item.written.training_class,
        final=final_class(item),
        predicted_px2=0.0 if before is None else before.area,
        final_px2=0.0 if after is None else after.area,
        iou=None if before is None or after is None else _iou(before, after),
        confidence=item.written.record.measurements.get("DA-RefineNet: confidence"),
    )


def _drawn_review(record: Annotation) -> ObjectReview:
    return ObjectReview(
        id=record.id,
        outcome="drawn",
        model="",
        predicted=None,
        final=record.path_class,
        predicted_px2=0.0,
        final_px2=record.area,
        iou=None,
        confidence=None,
    )


def _iou(first: BaseGeometry, second: BaseGeometry) -> float:
    common = shapely.intersection(first, second).area
    return float(common / (first.area + second.area - common))


def _agreement(ours: Sequence[ReviewedObject], drawn: Sequence[Annotation]) -> tuple[tuple[str, ...], ConfusionMatrix]:
    """Areas by final and predicted class, over what somebody looked at."""
    reviewed = [item for item in ours if item.status != "untouched"]
    before = _unions((item.written.training_class, item.written.record.geometry) for item in reviewed)
    after = _unions(
        [
            *((final_class(item), item.current.geometry) for item in reviewed if item.current is not None),
            *((record.path_class, record.geometry) for record in drawn),
        ]
    )
    classes = (*sorted({*before, *after}), NOTHING)
    areas = np.zeros((len(classes), len(classes)))
    for row, truth in enumerate(classes[:-1]):
        for column, prediction in enumerate(classes[:-1]):
            if truth in after and prediction in before:
                areas[row, column] = shapely.intersection(after[truth], before[prediction]).area
        areas[row, -1] = after[truth].area - areas[row, :-1].sum() if truth in after else 0
    for column, prediction in enumerate(classes[:-1]):
        areas[-1, column] = before[prediction].area - areas[:-1, column].sum() if prediction in before else 0
    return classes, ConfusionMatrix(np.rint(np.maximum(areas, 0)).astype(np.int64))


def _unions(shapes: Iterable[tuple[str | None, BaseGeometry | None]]) -> dict[str, BaseGeometry]:
    found: dict[str, list[BaseGeometry]] = {}
    for name, geometry in shapes:
        area = areal(geometry)
        if name is not None and area is not None and not is_ignored(name):
            found.setdefault(name, []).append(area)
    return {name: shapely.union_all(parts) for name, parts in found.items()}


def _spread(review: ImageReview, classes: Sequence[str]) -> ConfusionMatrix:
    """Matrix of an image over the classes of all."""
    places = [classes.index(name) for name in review.classes]
    counts = np.zeros((len(classes), len(classes)), np.int64)
    counts[np.ix_(places, places)] = review.confusion.counts
    return ConfusionMatrix(counts)
