"""Which objects of an image are ours, and what the pathologist made of each.

An object that we wrote belongs to the pathologist as soon as it is locked, moved, reshaped, given another class, name,
colour, description or metadata, marked as accepted, or holds detections. Measurements do not count: QuPath's own
commands add them to every object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.errors import DarefineError, ReviewError
from darefine_qupath.limits import wording
from darefine_qupath.review.runs import OnError, Run, RunObject, digest_of, latest, recent_runs, save_run

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.annotations import Annotation
    from darefine_qupath.project import ImageEntry, Project

__all__ = [
    "CLASS",
    "DIGEST",
    "MARK",
    "MODEL",
    "PLACE",
    "RUN",
    "Reviewed",
    "Status",
    "Survey",
    "for_images",
    "survey",
]

_Found = TypeVar("_Found")

RUN, MODEL, CLASS, DIGEST = "darefine.run", "darefine.model", "darefine.class", "darefine.digest"
"""Metadata that every object of ours carries."""

MARK = "darefine.review"
"""Metadata (or measurement, 1 or -1) by which a script accepts or rejects an object."""

PLACE = "darefine.place"
"""Metadata of an annotation that says where to look next."""

RUNNER_UP = "darefine.runner_up"
_OWN = frozenset({RUN, MODEL, CLASS, DIGEST, MARK, RUNNER_UP})

Status = Literal["untouched", "accepted", "reshaped", "reclassified", "edited", "rejected"]


@dataclass(frozen=True, slots=True)
class Reviewed:
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
class Survey:
    """The objects of one image, sorted by whom they belong to.

    Attributes
    ----------
    run : Run or None
        The last run that stands; None where nothing was predicted.
    ours : tuple of Reviewed
        Everything we ever wrote that we did not take back, containers left out.
    containers : tuple of Reviewed
        The annotations that hold ours.
    theirs : tuple of Annotation
        All other objects; what was ours and belongs to the pathologist now is not among them.
    places : tuple of Annotation
        Annotations that say where to look next.
    """

    run: Run | None
    ours: tuple[Reviewed, ...]
    containers: tuple[Reviewed, ...]
    theirs: tuple[Annotation, ...]
    places: tuple[Annotation, ...]

    @property
    def untouched(self) -> tuple[Reviewed, ...]:
        """Objects of ours, containers among them, that we may replace."""
        return tuple(item for item in (*self.containers, *self.ours) if item.status == "untouched")

    @property
    def adopted(self) -> tuple[Reviewed, ...]:
        """Objects of ours that belong to the pathologist now."""
        return tuple(item for item in self.ours if item.status not in ("untouched", "rejected"))

    @property
    def rejected(self) -> tuple[Reviewed, ...]:
        """Objects of ours that the pathologist deleted or marked as wrong."""
        return tuple(item for item in self.ours if item.status == "rejected")


def for_images(
    images: Iterable[ImageEntry], action: Callable[[ImageEntry], _Found], on_error: OnError | None
) -> Iterator[tuple[ImageEntry, _Found]]:
    """Do something with every image.

    Parameters
    ----------
    images : iterable of ImageEntry
        The images.
    action : callable
        What to do.
    on_error : callable or None
        Told of an image whose data are damaged, say; without it the error ends the walk.

    Yields
    ------
    tuple
        Image, and what the action gave.
    """
    for image in images:
        try:
            with wording(ReviewError):
                found = action(image)
        except DarefineError as error:
            if on_error is None:
                raise
            on_error(image.name, error)
        else:
            yield image, found


def survey(project: Project, image: ImageEntry, *, objects: Sequence[Annotation] | None = None) -> Survey:
    """Sort the objects of an image by whom they belong to.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        One of its images.
    objects : sequence of Annotation, optional
        Its objects, where they have been read already.

    Returns
    -------
    Survey
        With the state of every object of ours.

    Raises
    ------
    ReviewError
        If a run's file is damaged.
    """
    objects = project.objects(image) if objects is None else objects
    runs = tuple(settled(run, objects) for run in recent_runs(project, image))
    run = latest(runs)
    now = {record.id: record for record in objects}
    used = {record.parent for record in objects if record.kind != "annotation" and not _is_ours(record)}
    written = [] if run is None else [*run.objects, *run.adopted]
    known = {item.id for item in written}
    written += [_unrecorded(record) for record in objects if _is_ours(record) and record.id not in known]
    found = [Reviewed(item, now.get(item.id), _status(item, now.get(item.id), used)) for item in written]
    known = {item.written.id for item in found}
    found += [Reviewed(item, None, "rejected") for item in _rejections(runs) if item.id not in known]
    # A container that was given a class is an annotation like any other.
    found = [item for item in found if item.written.role == "region" or not _is_classified(item.current)]
    ids = {item.written.id for item in found}
    # One that was given a class is an annotation like any other.
    places = tuple(record for record in objects if PLACE in record.metadata and record.path_class is None)
    ids.update(record.id for record in places)
    return Survey(
        run=run,
        ours=tuple(item for item in found if item.written.role == "region"),
        containers=tuple(item for item in found if item.written.role == "container"),
        theirs=tuple(record for record in objects if record.id not in ids),
        places=places,
    )


def settle(project: Project, image: ImageEntry, objects: Sequence[Annotation]) -> None:
    """Write down how runs ended that were cut off between the project and their file."""
    for run in recent_runs(project, image):
        now = settled(run, objects)
        if now is not run:
            save_run(project, now)


def settled(run: Run, objects: Iterable[Annotation]) -> Run:
    """Return the run as the project says it ended.

    A run's file is written before the project and again after it; a project is written as a whole or not at all.
    """
    if run.state not in ("pending", "undoing"):
        return run
    present = {record.id for record in objects}
    if run.state == "pending":
        removed = {item.id for item in run.replaced}
        applied = any(item.id in present for item in run.added) if run.added else not removed & present
        return replace(run, state="done" if applied else "undone")
    restored = {item.id for item in run.replaced}
    undone = not present & set(run.undoing) if run.undoing else restored <= present
    return replace(run, state="undone" if undone else "done", undoing=())


def _is_ours(record: Annotation) -> bool:
    return RUN in record.metadata and record.metadata.get(DIGEST) is not None


def _is_classified(record: Annotation | None) -> bool:
    return record is not None and record.path_class is not None


def _unrecorded(record: Annotation) -> RunObject:
    """Take from its metadata what is known of an object of ours whose run has no file."""
    training_class = record.metadata.get(CLASS, "")
    same = digest_of(record) == record.metadata[DIGEST]
    return RunObject(
        # With another digest it was edited, and is taken for the pathologist's as it is.
        record=replace(record, locked=False) if same else replace(record, geometry=None),
        training_class=training_class,
        role="region" if training_class else "container",
    )


def _rejections(runs: Sequence[Run]) -> list[RunObject]:
    """Rejected objects that the last standing run knows of, and those of runs that were undone since."""
    run = latest(tuple(runs))
    found = {} if run is None else {item.id: item for item in run.rejected}
    for other in runs:
        if other.state == "undone":
            found.update({item.id: item for item in other.rejected})
    return list(found.values())


def _status(item: RunObject, current: Annotation | None, used: set[UUID | None]) -> Status:
    if current is None:
        return "rejected"
    written = item.record
    if current.path_class != written.path_class:
        return "reclassified"
    if written.geometry is None or not same_outline(written.geometry, current.geometry):
        return "reshaped"
    if _mark(current) < 0:
        return "rejected"
    if current.locked or _mark(current) > 0:
        return "accepted"
    edited = (
        digest_of(current) != digest_of(written)
        or current.colour is not None
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


def same_outline(first: BaseGeometry, second: BaseGeometry | None) -> bool:
    """Whether two geometries are the same at QuPath's precision."""
    if second is None:
        return False
    return bool(shapely.equals_exact(first, second, tolerance=0.006, normalize=True))
