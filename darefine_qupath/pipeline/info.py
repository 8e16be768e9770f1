"""Summarize a project: its images, classes and annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import DarefineError, ProjectError
from darefine_qupath.limits import wording
from darefine_qupath.pipeline.selection import choose_images
from darefine_qupath.project import ImageEntry, Project

__all__ = ["ClassSummary", "ImageSummary", "ProjectSummary", "summarize"]


@dataclass(frozen=True, kw_only=True)
class ClassSummary:
    """Annotations of one class.

    Attributes
    ----------
    name : str
        Full class name; ``"(unclassified)"`` for none.
    num_annotations : int
        How many.
    area_px : float
        Their area in level-0 pixels.
    """

    name: str
    num_annotations: int
    area_px: float


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    """One image of a project.

    Attributes
    ----------
    entry : ImageEntry
        The project's record.
    num_objects : int
        Objects of any kind; 0 where `problem` stands.
    classes : tuple of ClassSummary
        What is annotated, by name.
    problem : str or None
        Why the image cannot be used; None when it can.
    """

    entry: ImageEntry
    num_objects: int
    classes: tuple[ClassSummary, ...]
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class ProjectSummary:
    """A project at a glance.

    Attributes
    ----------
    path : Path
        The project file.
    version : str
        QuPath version that wrote it.
    engine : str
        Engine that read it.
    class_names : tuple of str
        Its class list.
    images : tuple of ImageSummary
        Every image.
    """

    path: Path
    version: str
    engine: str
    class_names: tuple[str, ...]
    images: tuple[ImageSummary, ...]


def summarize(project: Project) -> ProjectSummary:
    """Describe a project without opening its slides.

    Returns
    -------
    ProjectSummary
        An image whose data is damaged is in it, with the reason.
    """
    readable, skipped = choose_images(project)
    known = {entry.id for entry in readable}
    others = [entry.id for entry in project.images if entry.id not in known]
    problems = {entry_id: image.why for entry_id, image in zip(others, skipped, strict=True)}
    images = tuple(_summarize_image(project, entry, problems.get(entry.id)) for entry in project.images)
    return ProjectSummary(
        path=project.path,
        version=project.version,
        engine=project.engine,
        class_names=tuple(path_class.name for path_class in project.classes),
        images=images,
    )


def _summarize_image(project: Project, entry: ImageEntry, problem: str | None) -> ImageSummary:
    try:
        with wording(ProjectError):
            return _count_annotations(entry, project.objects(entry), problem)
    except DarefineError as error:
        return ImageSummary(entry=entry, num_objects=0, classes=(), problem=str(error))


def _count_annotations(entry: ImageEntry, objects: Sequence[Annotation], problem: str | None) -> ImageSummary:
    annotations = [record for record in objects if record.kind == "annotation"]
    names = sorted({record.path_class or "" for record in annotations})
    classes = []
    for name in names:
        same = [record for record in annotations if (record.path_class or "") == name]
        area = sum(record.area for record in same)
        classes.append(ClassSummary(name=name or "(unclassified)", num_annotations=len(same), area_px=area))
    return ImageSummary(entry=entry, num_objects=len(objects), classes=tuple(classes), problem=problem)
