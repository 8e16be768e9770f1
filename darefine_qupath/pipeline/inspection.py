"""What is in a project, and what in it would spoil training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, class_counts
from darefine_qupath.classes import is_ignored
from darefine_qupath.errors import DarefineError, MissingMppError, SlideError
from darefine_qupath.geometry import Box, scaled_size
from darefine_qupath.pipeline.selection import choose_images, misfit
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.slides import Slide, open_slide, resolve_mpp

__all__ = ["ClassSummary", "Finding", "ImageSummary", "ProjectSummary", "check_project", "summarise"]

_FEW_PIXELS = 500_000
_OVERHANG = 0.01


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

    @property
    def totals(self) -> dict[str, int]:
        """Annotations per class over all images."""
        counts: Counter[str] = Counter()
        for image in self.images:
            counts.update({item.name: item.num_annotations for item in image.classes})
        return dict(sorted(counts.items()))


def summarise(project: Project) -> ProjectSummary:
    """Describe a project without opening its slides.

    Parameters
    ----------
    project : Project
        The project.

    Returns
    -------
    ProjectSummary
        An image whose data is damaged is in it, with the reason.
    """
    problems = {skipped.name: skipped.why for skipped in choose_images(project)[1]}
    images = tuple(_summarise_image(project, entry, problems.get(entry.name)) for entry in project.images)
    return ProjectSummary(
        path=project.path,
        version=project.version,
        engine=project.engine,
        class_names=tuple(path_class.name for path_class in project.classes),
        images=images,
    )


def _summarise_image(project: Project, entry: ImageEntry, problem: str | None) -> ImageSummary:
    try:
        objects = project.objects(entry)
    except DarefineError as error:
        return ImageSummary(entry=entry, num_objects=0, classes=(), problem=str(error))
    annotations = [record for record in objects if record.kind == "annotation"]
    names = sorted({record.path_class or "" for record in annotations})
    classes = []
    for name in names:
        same = [record for record in annotations if (record.path_class or "") == name]
        area = sum(record.area for record in same)
        classes.append(ClassSummary(name=name or "(unclassified)", num_annotations=len(same), area_px=area))
    return ImageSummary(entry=entry, num_objects=len(objects), classes=tuple(classes), problem=problem)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that `check_project` noticed.

    Attributes
    ----------
    level : str
        ``"error"`` spoils training or prediction; ``"warning"`` may.
    image : str
        Name of the image; empty when it is about the project.
    message : str
        What is wrong, with the value, and what to do.
    """

    level: Literal["error", "warning"]
    image: str
    message: str


def check_project(project: Project, settings: Settings, *, mpp: float | None = None) -> tuple[Finding, ...]:
    """Look for what would spoil training.

    Parameters
    ----------
    project : Project
        The project.
    settings : Settings
        Its settings.
    mpp : float, optional
        Given by the user.

    Returns
    -------
    tuple of Finding
        Errors and warnings, image by image, then those of the whole project.
    """
    findings: list[Finding] = []
    areas: dict[str, float] = {}
    for entry in project.images:
        findings += _check_image(project, entry, settings, mpp, areas)
    findings += _check_duplicates(project.images)
    for name, area in sorted(areas.items()):
        if area < _FEW_PIXELS and not is_ignored(name):
            findings.append(
                Finding(
                    level="warning",
                    image="",
                    message=f"Class {name!r} has {area:.0f} level-0 pixels in all, little to learn from",
                )
            )
    try:
        settings.class_map(project.classes, dict.fromkeys(areas, 1)).check(dict.fromkeys(areas, 1))
    except DarefineError as error:
        findings.append(Finding(level="error", image="", message=str(error)))
    return tuple(findings)


def _check_duplicates(images: Sequence[ImageEntry]) -> Iterator[Finding]:
    names = Counter(image.name for image in images)
    uris = Counter((image.uri, image.server_args) for image in images)
    for name, number in names.items():
        if number > 1:
            message = f"{number} images have the name {name!r}; name them apart, or address them by entry id"
            yield Finding(level="warning", image=name, message=message)
    for (uri, _), number in uris.items():
        if number > 1 and uri is not None:
            names_of = ", ".join(repr(image.name) for image in images if image.uri == uri)
            message = f"{number} entries show the same file {uri}: {names_of}; a split could put them on both sides"
            yield Finding(level="warning", image="", message=message)


def _check_image(
    project: Project, entry: ImageEntry, settings: Settings, mpp: float | None, areas: dict[str, float]
) -> Iterator[Finding]:
    def error(message: str) -> Finding:
        return Finding(level="error", image=entry.name, message=message)

    try:
        annotations = project.annotations(entry)
    except DarefineError as damage:
        yield error(str(damage))
        return
    for name in class_counts(annotations):
        area = sum(record.area for record in annotations if record.path_class == name)
        areas[name] = areas.get(name, 0.0) + area
    _, skipped = choose_images(project, [entry.id])
    why = skipped[0].why if skipped else misfit(entry)
    if why is not None:
        yield error(why)
        return
    assert entry.path is not None
    try:
        with open_slide(entry.path, crop_bounds="--no-crop" not in entry.server_args) as slide:
            yield from _check_slide(entry, slide, settings.mpp if mpp is None else mpp)
            yield from _check_annotations(entry, annotations, slide)
    except SlideError as damage:
        yield error(str(damage))


def _check_slide(entry: ImageEntry, slide: Slide, mpp: float | None) -> Iterator[Finding]:
    try:
        known = resolve_mpp(mpp, entry.mpp, slide)
    except MissingMppError as missing:
        yield Finding(level="warning", image=entry.name, message=str(missing))
        return
    if slide.mpp is not None and abs(known / slide.mpp - 1) > 0.05:
        yield Finding(
            level="warning",
            image=entry.name,
            message=f"{known:.4f} um per pixel by the project or --mpp, {slide.mpp:.4f} by the file",
        )


def _check_annotations(entry: ImageEntry, annotations: Sequence[Annotation], slide: Slide) -> Iterator[Finding]:
    whole = shapely.box(0, 0, *slide.size)
    unclassified = sum(record.path_class is None for record in annotations)
    if unclassified:
        message = f"{unclassified} annotations have no class and are not learnt from"
        yield Finding(level="warning", image=entry.name, message=message)
    for record in annotations:
        problem = _problem(record, whole)
        if problem is not None:
            label = record.name or record.path_class or "annotation"
            yield Finding(level="warning", image=entry.name, message=f"{label} {record.id}: {problem}")
    yield from _check_pixels(entry, annotations, slide)


def _problem(record: Annotation, whole: shapely.Polygon) -> str | None:
    geometry = record.geometry
    if geometry is None or geometry.is_empty:
        return "has no shape"
    if record.path_class is not None and record.area == 0:
        return "has no area and labels nothing (a line or points)"
    if not geometry.is_valid:
        return f"is not a valid shape: {shapely.is_valid_reason(geometry)}"
    if geometry.area > 0:
        outside = 1 - geometry.intersection(whole).area / geometry.area
        if outside > _OVERHANG:
            return f"lies {100 * outside:.0f} % outside the image"
    return None


def _check_pixels(entry: ImageEntry, annotations: Sequence[Annotation], slide: Slide) -> Iterator[Finding]:
    """Annotations over glass: read under each class at two levels and look for white."""
    shapes = [r.geometry for r in annotations if r.path_class and not is_ignored(r.path_class) and r.area > 0]
    for shape in shapes:
        if shape is None or not shape.is_valid:
            continue
        point = shapely.point_on_surface(shape)
        fine = _darkness(slide, Box(int(point.x) - 64, int(point.y) - 64, 128, 128), 1)
        coarse = _darkness(slide, Box(int(point.x) - 64, int(point.y) - 64, 128, 128), 4)
        if abs(fine - coarse) > 12:
            yield Finding(
                level="error",
                image=entry.name,
                message=f"At ({point.x:.0f}, {point.y:.0f}) the levels of the pyramid differ by "
                f"{abs(fine - coarse):.0f} grey values: the file may be damaged or misaligned",
            )


def _darkness(slide: Slide, box: Box, downsample: float) -> float:
    return float(np.mean(slide.read(box, scaled_size(box.size, downsample))))
