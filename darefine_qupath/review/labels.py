"""Choose the annotations that train: what a person drew or took over, never a prediction that nobody looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import is_ignored
from darefine_qupath.review.clipping import areal
from darefine_qupath.review.compare import final_class
from darefine_qupath.review.ownership import ImageObjects, sort_objects

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.project import ImageEntry, Project

__all__ = ["ReviewedLabels", "manual_annotations", "reviewed_annotations"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewedLabels:
    """Training annotations of one image, and where they come from.

    Attributes
    ----------
    annotations : tuple of Annotation
        Drawn, accepted and corrected ones in their final class, and ``Ignore*`` where a prediction was rejected.
    drawn : tuple of UUID
        Annotations that a person drew.
    reviewed : tuple of UUID
        Objects of ours that were accepted or corrected.
    rejected : tuple of UUID
        Objects of ours that were rejected.
    """

    annotations: tuple[Annotation, ...]
    drawn: tuple[UUID, ...]
    reviewed: tuple[UUID, ...]
    rejected: tuple[UUID, ...]


def manual_annotations(project: Project, image: ImageEntry, *, taken_over: bool = True) -> tuple[Annotation, ...]:
    """Annotations of an image without our own predictions.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        One of its images.
    taken_over : bool, optional
        Keep predictions that a pathologist accepted or edited: they are the pathologist's. Without them only what a
        person drew is left.

    Returns
    -------
    tuple of Annotation
        Each in its final class.
    """
    found = sort_objects(project, image)
    return _annotations(found, taken_over=taken_over)


def reviewed_annotations(project: Project, image: ImageEntry) -> ReviewedLabels:
    """Annotations of an image with what the review says about its predictions.

    A rejected area is ignored in training unless somebody has drawn there since: that it is not what was predicted
    does not say what it is.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        One of its images.

    Returns
    -------
    ReviewedLabels
        Annotations and their origin.
    """
    found = sort_objects(project, image)
    annotations = _annotations(found, taken_over=True)
    labelled = [
        areal(record.geometry)
        for record in annotations
        if record.path_class is not None and not is_ignored(record.path_class)
    ]
    places = [(item.written.record, areal(item.written.record.geometry)) for item in found.rejected]
    refused = [(record, place) for record, place in places if place is not None]
    shapes = [shape for shape in labelled if shape is not None]
    ignored = [
        Annotation(id=record.id, geometry=left, path_class="Ignore*", plane=record.plane)
        for (record, _), left in zip(refused, _without([place for _, place in refused], shapes), strict=True)
        if left is not None
    ]
    reviewed = {item.written.id for item in found.adopted}
    return ReviewedLabels(
        annotations=(*annotations, *ignored),
        drawn=tuple(record.id for record in annotations if record.id not in reviewed),
        reviewed=tuple(record.id for record in annotations if record.id in reviewed),
        rejected=tuple(item.written.id for item in found.rejected),
    )


def _without(places: Sequence[BaseGeometry], shapes: Sequence[BaseGeometry]) -> list[BaseGeometry | None]:
    """Cut shapes out of places; each place meets only the shapes that touch it."""
    left: list[BaseGeometry | None] = []
    tree = shapely.STRtree(shapes)
    for place in places:
        near = tree.geometries[tree.query(place, predicate="intersects")]
        left.append(areal(shapely.difference(place, shapely.union_all(near))) if len(near) else place)
    return left


def _annotations(found: ImageObjects, *, taken_over: bool) -> tuple[Annotation, ...]:
    theirs = [record for record in found.user_objects if record.kind == "annotation"]
    if not taken_over:
        return tuple(theirs)
    # A detection that was accepted labels as an annotation does.
    taken = [
        replace(item.current, path_class=final_class(item), kind="annotation")
        for item in found.adopted
        if item.current is not None
    ]
    return (*theirs, *taken)
