"""Mark places to look at next in a project, and clear the marks again."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple
from uuid import UUID, uuid5

import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.project import Changes, ImageEntry, Project
from darefine_qupath.review.ownership import sort_objects
from darefine_qupath.review.per_image import OnError, for_images
from darefine_qupath.review.review_queue import ReviewPlace
from darefine_qupath.review.tags import PLACE

__all__ = ["clear_places", "mark_places"]


_NAMESPACE = UUID("c2b0f2f4-55d7-5a0e-9a07-2a7cf0d6a3b1")
_PREFIX = "Review"


def mark_places(project: Project, places: Sequence[ReviewPlace], *, on_error: OnError | None = None) -> int:
    """Put places into the project as small unclassified annotations, named in order: ``Review 01``, ``Review 02`` ...

    Those of an earlier call go, but for those that were locked or given a class: a place that has such a one gets no
    other. A place keeps its annotation whatever its rank. They train nothing, nothing gives way to them, and
    `clear_places` removes them.

    Parameters
    ----------
    project : Project
        Open project.
    places : sequence of ReviewPlace
        Best first.
    on_error : callable, optional
        Told of an image that cannot be written; without it that is an error.

    Returns
    -------
    int
        Places that have one now by this call.
    """
    standing = list(for_images(project.images, lambda image: _standing_marks(project, image), on_error))
    of_image = {image.id: marks for image, marks in standing}
    names = _names(len(places), {name for _, marks in standing for name in marks.names})
    wanted: dict[str, list[Annotation]] = {}
    for place, name in zip(places, names, strict=True):
        record = Annotation(
            id=uuid5(_NAMESPACE, f"{place.image}/{place.box}"),
            geometry=shapely.box(*place.box.bounds),
            name=name,
            metadata={PLACE: f"{place.score:.4f}", "ANNOTATION_DESCRIPTION": _description(place)},
        )
        wanted.setdefault(place.image, []).append(record)

    def mark(image: ImageEntry) -> int:
        marks = of_image[image.id]
        new = [record for record in wanted.get(image.id, ()) if record.id not in marks.taken]
        ids = {record.id for record in new}
        changes = Changes(
            add=[record for record in new if record.id not in marks.removable],
            replace=[record for record in new if record.id in marks.removable],
            remove=[identity for identity in marks.removable if identity not in ids],
        )
        if not changes.is_empty:
            project.apply(image, changes, version=marks.version)
        return len(new)

    images = [image for image, _ in standing]
    return sum(count for _, count in for_images(images, mark, on_error))


class _Marks(NamedTuple):
    """Marks of an image that may go, identities that are somebody's, and the names of marks among them."""

    removable: tuple[UUID, ...]
    taken: frozenset[UUID]
    names: tuple[str, ...]
    version: str


def _standing_marks(project: Project, image: ImageEntry) -> _Marks:
    found = sort_objects(project, image)
    ours = tuple(record.id for record in found.places if not record.locked)
    theirs = [record for record in found.state.objects if record.id not in set(ours)]
    names = tuple(record.name for record in theirs if record.name and PLACE in record.metadata)
    return _Marks(ours, frozenset(record.id for record in theirs), names, found.state.version)


def _names(count: int, taken: Collection[str]) -> list[str]:
    """Names in order; where a mark that somebody kept has one, another after the last."""
    digits = max(2, len(str(count)))
    spare = (name for number in itertools.count(count + 1) if (name := f"{_PREFIX} {number:0{digits}d}") not in taken)
    names = (f"{_PREFIX} {number:0{digits}d}" for number in range(1, count + 1))
    return [next(spare) if name in taken else name for name in names]


def _description(place: ReviewPlace) -> str:
    return (
        f"{place.path_class}: uncertainty {place.uncertainty:.2f}, size {place.size:.2f}, border {place.border:.2f}, "
        f"unlike {place.unlike:.2f}"
    )


def clear_places(
    project: Project, images: Iterable[ImageEntry] | None = None, *, on_error: OnError | None = None
) -> int:
    """Remove the annotations of `mark_places`; one that was given a class or was locked is somebody's and stays.

    Parameters
    ----------
    project : Project
        Open project.
    images : iterable of ImageEntry, optional
        Which; all by default.
    on_error : callable, optional
        Told of an image that cannot be read or written; without it that is an error.

    Returns
    -------
    int
        Annotations removed.
    """

    def clear(image: ImageEntry) -> int:
        marks = _standing_marks(project, image)
        if not marks.removable:
            return 0
        return project.apply(image, Changes(remove=marks.removable), version=marks.version).removed

    chosen = project.images if images is None else images
    return sum(count for _, count in for_images(chosen, clear, on_error))
