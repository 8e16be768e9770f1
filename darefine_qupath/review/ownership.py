"""Tell whose each object of an image is, and what the pathologist made of ours.

An object that we wrote belongs to the pathologist as soon as it is locked, moved, reshaped, given another class, name,
color, description or metadata, marked as accepted, or holds detections. Measurements do not count: QuPath's own
commands add them to every object.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.review.history import History, history_of
from darefine_qupath.review.origins import Origins, is_ours
from darefine_qupath.review.run import Run, RunObject
from darefine_qupath.review.run_names import run_files
from darefine_qupath.review.run_records import readable_runs
from darefine_qupath.review.tags import CLASS, DIGEST, MARK, MODEL, PLACE, RUN, RUNNER_UP

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.annotations import Annotation
    from darefine_qupath.project import ImageEntry, ImageState, Project

__all__ = ["ImageObjects", "ReviewedObject", "Status", "sort_objects"]

_log = logging.getLogger(__name__)


TOLERANCE = 0.006
"""Level-0 pixels by which a vertex may differ in an outline that nobody changed: QuPath keeps 0.01 px."""


_OWN = frozenset({RUN, MODEL, CLASS, DIGEST, MARK, RUNNER_UP})

Status = Literal["untouched", "accepted", "reshaped", "reclassified", "edited", "rejected"]


@dataclass(frozen=True, slots=True)
class ReviewedObject:
    """An object of ours and what became of it.

    Attributes
    ----------
    written : RunObject
        As it was written.
    current : Annotation or None
        As it is now; None where it is gone.
    status : str
        What the pathologist did.
    """

    written: RunObject
    current: Annotation | None
    status: Status


@dataclass(frozen=True, kw_only=True)
class ImageObjects:
    """The objects of one image, sorted by whom they belong to.

    Attributes
    ----------
    run : Run or None
        The run that the image's data was written by, or saved from; None where there is none.
    history : History
        That run, and those after it which do not stand.
    state : ImageState
        What is stored for the image.
    predictions : tuple of Reviewed
        Everything we ever wrote that we did not take back, containers left out.
    containers : tuple of Reviewed
        The annotations that hold ours.
    user_objects : tuple of Annotation
        All other objects; what was ours and belongs to the pathologist now is not among them.
    places : tuple of Annotation
        Annotations that say where to look next.
    """

    run: Run | None
    history: History
    state: ImageState
    predictions: tuple[ReviewedObject, ...]
    containers: tuple[ReviewedObject, ...]
    user_objects: tuple[Annotation, ...]
    places: tuple[Annotation, ...]

    @property
    def untouched(self) -> tuple[ReviewedObject, ...]:
        """Objects of ours, containers among them, that we may replace."""
        return tuple(item for item in (*self.containers, *self.predictions) if item.status == "untouched")

    @property
    def adopted(self) -> tuple[ReviewedObject, ...]:
        """Objects of ours that belong to the pathologist now."""
        return tuple(item for item in self.predictions if item.status not in ("untouched", "rejected"))

    @property
    def adopted_with_containers(self) -> tuple[ReviewedObject, ...]:
        """As `adopted`, and the containers among them."""
        return (*self.adopted, *(item for item in self.containers if item.status not in ("untouched", "rejected")))

    @property
    def rejected(self) -> tuple[ReviewedObject, ...]:
        """Objects of ours that the pathologist deleted or marked as wrong."""
        return tuple(item for item in self.predictions if item.status == "rejected")


def sort_objects(project: Project, image: ImageEntry, *, state: ImageState | None = None) -> ImageObjects:
    """Sort the objects of an image by whom they belong to.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        One of its images.
    state : ImageState, optional
        What is stored for it, where that has been read already.

    Returns
    -------
    ImageObjects
        With the state of every object of ours.

    Raises
    ------
    ReviewError
        If a run's file is damaged.
    """
    state = project.state(image) if state is None else state
    past, run = _without_false_rejections(project, image, history_of(project, image, state))
    objects = state.objects
    now = {record.id: record for record in objects}
    used = {record.parent for record in objects if record.kind != "annotation" and not is_ours(record)}
    survivors = {item.id: item for item in past.survivors}
    written = survivors if run is None else survivors | {item.id: item for item in (*run.objects, *run.adopted)}
    strangers = [record for record in objects if is_ours(record) and record.id not in written]
    # Whoever saved the image's data saw these: what is missing of them was deleted.
    seen = written if past.is_seen else survivors
    written = written | Origins(project, past, now).of(strangers)
    pairs = [(item, now.get(item.id)) for item in written.values() if item.id in now or item.id in seen]
    found = [
        ReviewedObject(item, current, status)
        for (item, current), status in zip(pairs, _statuses(pairs, used), strict=True)
    ]
    known = {item.written.id for item in found}
    found += [ReviewedObject(item, None, "rejected") for item in _rejections(run, past) if item.id not in known]
    # A container that was given a class is an annotation like any other.
    found = [item for item in found if item.written.role == "region" or not _is_classified(item.current)]
    ids = {item.written.id for item in found}
    # One that was given a class is an annotation like any other.
    places = tuple(record for record in objects if PLACE in record.metadata and record.path_class is None)
    ids.update(record.id for record in places)
    return ImageObjects(
        run=run,
        history=past,
        state=state,
        predictions=tuple(item for item in found if item.written.role == "region"),
        containers=tuple(item for item in found if item.written.role == "container"),
        user_objects=tuple(record for record in objects if record.id not in ids),
        places=places,
    )


def _is_classified(record: Annotation | None) -> bool:
    return record is not None and record.path_class is not None


def _without_false_rejections(project: Project, image: ImageEntry, past: History) -> tuple[History, Run | None]:
    """Take back what a run of before there were witnesses calls rejected though all of a run was gone at once."""
    run = past.current
    if run is None or run.number or not run.rejected:
        return past, run
    rejected = {item.id for item in run.rejected}
    names = {item.record.metadata.get(RUN) for item in run.rejected}
    files = [file for file in run_files(project, image) if file.id in names]
    gone = [former for former in readable_runs(files) if {item.id for item in former.added} <= rejected]
    lost = {item.id for former in gone for item in former.added}
    run = replace(run, rejected=tuple(item for item in run.rejected if item.id not in lost))
    return replace(past, overwritten=(*gone, *past.overwritten)), run


def _rejections(run: Run | None, past: History) -> list[RunObject]:
    """Rejected objects that the current run knows of, and those of runs that were undone since."""
    found = {} if run is None else {item.id: item for item in run.rejected}
    for other in past.undone:
        found.update({item.id: item for item in other.rejected})
    return list(found.values())


def _statuses(pairs: Sequence[tuple[RunObject, Annotation | None]], used: set[UUID | None]) -> list[Status]:
    same = _same_outlines(
        [item.record.geometry for item, _ in pairs], [current and current.geometry for _, current in pairs]
    )
    return [_status(item, current, used, is_same=is_same) for (item, current), is_same in zip(pairs, same, strict=True)]


def _status(item: RunObject, current: Annotation | None, used: set[UUID | None], *, is_same: bool) -> Status:
    if current is None:
        return "rejected"
    written = item.record
    if current.path_class != written.path_class:
        return "reclassified"
    if not is_same:
        return "reshaped"
    if _mark(current) < 0:
        return "rejected"
    if current.locked or _mark(current) > 0:
        return "accepted"
    edited = (
        (current.kind, current.name or "") != (written.kind, written.name or "")
        or current.color is not None
        or _other(current.metadata) != _other(written.metadata)
        or (current.id in used and item.role == "region")
    )
    return "edited" if edited else "untouched"


def _mark(record: Annotation) -> float:
    word = record.metadata.get(MARK)
    if word is not None:
        return {"accepted": 1.0, "rejected": -1.0}.get(word, 0.0)
    value = record.measurements.get(MARK, 0.0)
    return 0.0 if np.isnan(value) else value


def _other(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in _OWN}


def _same_outlines(first: Sequence[BaseGeometry | None], second: Sequence[BaseGeometry | None]) -> list[bool]:
    """Whether pairs of geometries are the same at QuPath's precision; what has none is never the same."""
    if not first:
        return []
    one, two = np.array(first, np.object_), np.array(second, np.object_)
    same = shapely.equals_exact(one, two, tolerance=0)
    # Engines and QuPath versions differ in where a ring starts and in the order of rings.
    other = np.flatnonzero(~same)
    same[other] = shapely.equals_exact(one[other], two[other], tolerance=TOLERANCE, normalize=True)
    found: list[bool] = same.tolist()
    return found
