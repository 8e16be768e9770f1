"""Find what in a project would spoil training."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, Plane, annotators_in, class_counts
from darefine_qupath.classes import is_ignored
from darefine_qupath.errors import DarefineError, MissingMppError, ProjectError
from darefine_qupath.limits import wording
from darefine_qupath.masks import count_unlearnable, unlearnable_words
from darefine_qupath.pipeline.alignment import check_alignment
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.pipeline.selection import OVERLAP, choose_images, size_mismatch
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.slides import PyramidSlide, Slide, open_slide, resolve_mpp

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["Finding", "check_project"]

_FEW_PIXELS = 500_000
_OVERHANG = 0.01
_ON_GLASS = 0.9
_MEGABYTE = 1 << 20
_NAMED = 5
"""Annotations with one kind of problem that are named; the others are counted."""


@dataclass(frozen=True)
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


def check_project(
    project: Project,
    settings: Settings,
    *,
    mpp: float | None = None,
    listener: Listener = SILENT,
) -> tuple[Finding, ...]:
    """Look for what would spoil training.

    Parameters
    ----------
    listener : Listener, optional
        Hears how many images are checked.

    Returns
    -------
    tuple of Finding
        Errors and warnings, image by image, then those of the whole project.
    """
    findings: list[Finding] = []
    areas: dict[str, float] = {}
    for number, entry in enumerate(project.images, 1):
        try:
            with wording(ProjectError):
                for found in _check_image(project, entry, settings, mpp, areas):
                    findings.append(found)  # noqa: PERF402 - those before an error count
        except DarefineError as damage:
            findings.append(Finding("error", entry.name, str(damage)))
        listener.on_items("Checking", number, len(project.images), entry.name)
    findings += _check_duplicates(project.images)
    for name, area in sorted(areas.items()):
        if area < _FEW_PIXELS and not is_ignored(name):
            message = f"Class {name!r} has only {area:.0f} level-0 pixels in all: little to learn from"
            findings.append(Finding("warning", "", message))
    try:
        settings.class_map(project.classes, dict.fromkeys(areas, 1)).check(dict.fromkeys(areas, 1))
    except DarefineError as error:
        findings.append(Finding("error", "", str(error)))
    return tuple(findings)


def _check_duplicates(images: Sequence[ImageEntry]) -> Iterator[Finding]:
    names = Counter(image.name for image in images)
    uris = Counter((image.uri, image.server_args) for image in images)
    for name, number in names.items():
        if number > 1:
            message = f"{number} images have the name {name!r}; give them different names, or use their entry ids"
            yield Finding("warning", name, message)
    for (uri, _), number in uris.items():
        if number > 1 and uri is not None:
            names_of = ", ".join(repr(image.name) for image in images if image.uri == uri)
            message = f"{number} entries show the same file {uri}: {names_of}; annotate one of them"
            yield Finding("warning", "", message)
    for same in _find_copies(images):
        names_of = ", ".join(repr(image.name) for image in same)
        message = (
            f"{len(same)} files have the same content: {names_of}; keep one, or a split may put them on both sides"
        )
        yield Finding("error", "", message)


def _find_copies(images: Sequence[ImageEntry]) -> list[list[ImageEntry]]:
    """Images of different files that hold the same, compared by their size and three of their megabytes."""
    by_size: dict[int, dict[Path, ImageEntry]] = {}
    for image in images:
        with contextlib.suppress(OSError):
            if image.path is None or not image.path.is_file():
                continue
            by_size.setdefault(image.path.stat().st_size, {}).setdefault(image.path.resolve(), image)
    found: dict[tuple[int, str], list[ImageEntry]] = {}
    for size, same in by_size.items():
        for path, image in same.items() if len(same) > 1 else ():
            with contextlib.suppress(OSError):  # reported where the image is checked
                found.setdefault((size, _fingerprint(path, size)), []).append(image)
    return [same for same in found.values() if len(same) > 1]


def _fingerprint(path: Path, size: int) -> str:
    digest = sha256()
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _MEGABYTE)):
            file.seek(start)
            digest.update(file.read(_MEGABYTE))
    return digest.hexdigest()


def _check_image(
    project: Project, entry: ImageEntry, settings: Settings, mpp: float | None, areas: dict[str, float]
) -> Iterator[Finding]:
    annotations = project.annotations(entry)
    for name in class_counts(annotations):
        area = sum(record.area for record in annotations if record.path_class == name)
        areas[name] = areas.get(name, 0.0) + area
    _, skipped = choose_images(project, [entry.id])
    given = settings.mpp if mpp is None else mpp
    why = skipped[0].why if skipped else size_mismatch(entry, given)
    if why is not None:
        yield Finding("error", entry.name, why)
        return
    assert entry.path is not None
    with open_slide(entry.path, crop_bounds=entry.crop_bounds) as slide:
        yield from _check_slide(entry, slide, given)
        yield from _check_annotations(entry, annotations, slide)


def _check_slide(entry: ImageEntry, slide: PyramidSlide, mpp: float | None) -> Iterator[Finding]:
    yield from _check_pixel_sizes(entry, slide)
    try:
        known = resolve_mpp(mpp, entry.mpp, slide)
    except MissingMppError as missing:
        yield Finding("warning", entry.name, str(missing))
        return
    if slide.mpp is not None and abs(known / slide.mpp - 1) > 0.05:
        message = f"the project or --mpp says {known:.4f} um per pixel, the file {slide.mpp:.4f}"
        yield Finding("warning", entry.name, message)


def _check_pixel_sizes(entry: ImageEntry, slide: PyramidSlide) -> Iterator[Finding]:
    """Pixel sizes that are stated and not used."""
    by_project, by_file = entry.pixel_size, slide.stated_pixel_size
    if by_project is not None and not by_project.is_possible:
        message = f"QuPath's calibration says pixels of {by_project}, which is impossible; it is ignored"
        yield Finding("warning", entry.name, message)
    if by_file is not None and slide.pixel_size is None:
        message = f"the file says pixels of {by_file}, which no microscope has; it is ignored"
        yield Finding("warning", entry.name, message)


def _check_annotations(entry: ImageEntry, annotations: Sequence[Annotation], slide: Slide) -> Iterator[Finding]:
    line = unlearnable_words(count_unlearnable(annotations, slide.size))
    if line:
        yield Finding("warning", entry.name, line)
    names = annotators_in(annotations)
    if len(names) > 1:
        message = f"annotations of several annotators ({', '.join(sorted(names))}); {OVERLAP}"
        yield Finding("warning", entry.name, message)
    problems: dict[str, list[str]] = {}
    for record, outside in zip(annotations, _measure_overhang(annotations, slide), strict=True):
        kind, detail = _describe_problem(record, outside)
        if kind:
            label = record.name or record.path_class or "annotation"
            problems.setdefault(kind, []).append(f"{label} {record.id}: {detail}")
    for kind, messages in problems.items():
        for message in messages[:_NAMED]:
            yield Finding("warning", entry.name, message)
        if len(messages) > _NAMED:
            more = f"{len(messages) - _NAMED} more annotations: {kind}"
            yield Finding("warning", entry.name, more)
    yield from _check_pixels(entry, annotations, slide)


def _measure_overhang(annotations: Sequence[Annotation], slide: Slide) -> list[float]:
    """Share of each annotation's area beyond the image; 0 for what has no valid area."""
    whole = shapely.box(0, 0, *slide.size)
    return [
        1 - record.geometry.intersection(whole).area / record.geometry.area
        if record.geometry is not None and not _is_within(record.geometry, slide.size) and _is_sound(record.geometry)
        else 0.0
        for record in annotations
    ]


def _is_within(geometry: BaseGeometry, size: tuple[int, int]) -> bool:
    if geometry.is_empty:
        return True
    left, top, right, bottom = geometry.bounds
    return bool(left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1])


def _is_sound(geometry: BaseGeometry) -> bool:
    return bool(np.isfinite(geometry.bounds).all() and geometry.is_valid and geometry.area > 0)


def _describe_problem(record: Annotation, outside: float) -> tuple[str, str]:
    """Kind and description of what is wrong with an annotation; empty where nothing is."""
    geometry = record.geometry
    if geometry is None or geometry.is_empty:
        return "no shape", "has no shape"
    if not np.isfinite(shapely.get_coordinates(geometry)).all():
        return "coordinates that are not numbers", "has a coordinate that is not a number; draw it again"
    if not geometry.is_valid:
        return "not a valid shape", f"is not a valid shape: {shapely.is_valid_reason(geometry)}"
    if record.path_class is not None and record.area == 0:
        return "no area", "has no area and labels nothing (a line or points)"
    if record.plane[1:] != Plane()[1:]:
        return (
            "another plane",
            f"lies on the plane z = {record.plane.z}, t = {record.plane.t}; only z = 0, t = 0 is used for training",
        )
    if outside > _OVERHANG:
        return "outside the image", f"lies {100 * outside:.0f} % outside the image"
    return "", ""


def _check_pixels(entry: ImageEntry, annotations: Sequence[Annotation], slide: Slide) -> Iterator[Finding]:
    """Rasterise every annotation over its pixels at two levels; say where they differ, and what lies on glass."""
    labelled = [
        record
        for record in annotations
        if record.path_class and not is_ignored(record.path_class) and record.geometry and _is_sound(record.geometry)
    ]
    checks = list(check_alignment(slide, [record.geometry for record in labelled if record.geometry is not None]))
    misaligned = [check for check in checks if check.is_misaligned]
    if misaligned:
        first = misaligned[0]
        what = (
            f"the coarse level is shifted by {first.shift} px against level 0"
            if first.shift != (0, 0)
            else f"the levels differ by {first.difference:.0f} grey values"
        )
        message = (
            f"Under {len(misaligned)} of {len(checks)} annotations the levels of the pyramid differ, first at "
            f"({first.x}, {first.y}): {what}; the file may be damaged or badly converted"
        )
        yield Finding("error", entry.name, message)
    on_glass = [check for check in checks if check.glass > _ON_GLASS]
    if on_glass:
        named = ", ".join(
            f"{labelled[check.index].path_class} at ({check.x}, {check.y})" for check in on_glass[:_NAMED]
        )
        message = (
            f"{len(on_glass)} of {len(checks)} annotations lie on white glass ({named}); they may have been moved, or "
            f"drawn on another image"
        )
        yield Finding("warning", entry.name, message)
