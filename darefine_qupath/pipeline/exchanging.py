"""Annotation files of other programs into a project and out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from uuid import NAMESPACE_URL, uuid5

from darefine_qupath.annotations import Annotation, LabelPainter, class_counts
from darefine_qupath.classes import PathClass, default_colour, is_ignored
from darefine_qupath.errors import ExchangeError, ProjectError
from darefine_qupath.exchange import Imported, read_annotations, write_geojson, write_label_tiff
from darefine_qupath.pipeline.selection import choose_images
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import Changes, ImageEntry, Project, create_project
from darefine_qupath.review import OnError, for_images
from darefine_qupath.slides import open_slide

__all__ = ["Import", "create_from_slides", "export_geojson", "export_labels", "import_file", "match_files"]

_log = logging.getLogger(__name__)

_OUTLINE_SUFFIXES = (".xml", ".geojson", ".json")
_ANNOTATION_SUFFIXES = (*_OUTLINE_SUFFIXES, ".png", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Import:
    """An annotation file that went into a project.

    Attributes
    ----------
    file : Imported
        What was read.
    image : ImageEntry
        Where it went.
    added : int
        New objects.
    already : int
        Objects that an earlier import of the same file had brought.
    """

    file: Imported
    image: ImageEntry
    added: int
    already: int


def match_files(project: Project, files: Sequence[Path], image: str | None) -> list[tuple[Path, ImageEntry]]:
    """Find the image of each annotation file: the one that is named, or the one with the file's name.

    Raises
    ------
    ExchangeError
        If a file belongs to no image or to several.
    """
    if image is not None:
        return [(file, project.image(image)) for file in files]
    by_stem: dict[str, list[ImageEntry]] = {}
    for entry in project.images:
        for name in {_stem(entry.name), *([_stem(entry.path.name)] if entry.path else [])}:
            by_stem.setdefault(name.lower(), []).append(entry)
    matched = []
    for file in files:
        found = by_stem.get(_stem(file.name).lower(), [])
        if not found:
            names = ", ".join(repr(entry.name) for entry in project.images) or "none"
            raise ExchangeError(f"{file}: no image of the project has this file's name; give --image, one of {names}")
        if len(found) > 1:
            ids = ", ".join(f"{entry.id} ({entry.path or entry.name})" for entry in found)
            raise ExchangeError(
                f"{file}: {len(found)} images of the project have this file's name; give --image an id, one of {ids}"
            )
        matched.append((file, found[0]))
    return matched


def _stem(name: str) -> str:
    """File name without its last suffix, ``.ome`` and a trailing ``.labels`` included."""
    stem = name.rsplit(".", 1)[0] if "." in name else name
    for extra in (".ome", ".labels", "_labels", "-labels"):
        stem = stem.removesuffix(extra)
    return stem


def import_file(
    project: Project,
    file: Path,
    image: ImageEntry,
    *,
    labels: Mapping[int, str] | None = None,
    dry_run: bool = False,
) -> Import:
    """Add the annotations of a file to an image.

    The same file imported twice changes nothing: an object without an id of its own gets one from the file's name and
    its place in it.

    Parameters
    ----------
    project : Project
        The project.
    file : Path
        Aperio or ASAP XML, GeoJSON, or a label mask.
    image : ImageEntry
        Where it goes.
    labels : mapping of int to str, optional
        Classes of the labels of a mask.
    dry_run : bool
        Only read.

    Returns
    -------
    Import

    Raises
    ------
    ExchangeError
        If the file cannot be read, or nothing in it can be used.
    """
    classes = [path_class.name for path_class in project.classes]
    size = None if image.width is None or image.height is None else (image.width, image.height)
    found = read_annotations(file, mpp=image.mpp, classes=classes, labels=labels, image_size=size)
    _refuse_useless(found)
    present = {record.id for record in project.objects(image)}
    records = found.annotations if found.format == "GeoJSON" else _with_fixed_ids(found, image)
    fresh = [record for record in records if record.id not in present]
    if fresh and not dry_run:
        missing = sorted(set(class_counts(fresh)) - set(classes))
        if missing:
            new = [PathClass(name, found.colours.get(name, default_colour(name))) for name in missing]
            project.set_classes([*project.classes, *new])
        project.apply(image, Changes(add=fresh))
    return Import(file=found, image=image, added=len(fresh), already=len(records) - len(fresh))


def _refuse_useless(found: Imported) -> None:
    if found.refused and not found.annotations:
        more = f" and {len(found.refused) - 1} more" if len(found.refused) > 1 else ""
        raise ExchangeError(f"{found.path} holds no annotation that can be used: {found.refused[0]}{more}")


def _with_fixed_ids(found: Imported, image: ImageEntry) -> list[Annotation]:
    return [
        replace(record, id=uuid5(NAMESPACE_URL, f"darefine:{image.id}/{found.path.name}/{number}"))
        for number, record in enumerate(found.annotations)
    ]


def create_from_slides(
    path: Path,
    slides: Sequence[Path],
    *,
    annotations: Path | None = None,
    mpp: float | None = None,
    engine: Literal["auto", "embedded", "paquo"] = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Project, tuple[Import, ...]]:
    """Make a project of slides and, where there are any, their annotation files.

    Parameters
    ----------
    path : Path
        Folder of the new project.
    slides : sequence of Path
        Image files, or folders of them.
    annotations : Path, optional
        Folder of annotation files named like the slides.
    mpp : float, optional
        Micrometres per pixel of every slide.
    engine : str
        Engine that writes.
    progress : callable, optional
        Told images done, images in all, and a name.

    Returns
    -------
    Project
        Open; the caller closes it.
    tuple of Import
        What came from annotation files.

    Raises
    ------
    ProjectError
        If there is a project already, or no slide.
    SlideError
        If a slide cannot be opened; no project is made.
    ExchangeError
        If there is no such folder of annotations, or a file in it cannot be read or belongs to several slides; no
        project is made, unless it is a label mask.
    """
    files = _slide_files(slides)
    found_for = _annotation_files(annotations, files)
    for file in files:
        # Before there is a project: half of one would be in the way of the next try.
        with open_slide(file) as slide:
            for found in found_for.get(file, []):
                # The labels of a mask are those of the project.
                if found.suffix.lower() in _OUTLINE_SUFFIXES:
                    _refuse_useless(read_annotations(found, mpp=mpp or slide.mpp, image_size=slide.size))
    project = create_project(path, engine=engine)
    imports = []
    for number, file in enumerate(files):
        image = project.add_image(file, mpp=mpp)
        imports += [import_file(project, found, image) for found in found_for.get(file, [])]
        if progress is not None:
            progress(number + 1, len(files), file.name)
    return project, tuple(imports)


def _slide_files(slides: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for item in slides:
        if item.is_dir():
            files += sorted(p for p in item.iterdir() if p.is_file() and p.suffix.lower() in _SLIDE_SUFFIXES)
        else:
            files.append(item)
    files = list({file.resolve(): file for file in files}.values())
    if not files:
        raise ProjectError(f"No slides in {', '.join(str(item) for item in slides)}; name image files, or a folder")
    return files


_SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi",
    ".png", ".jpg", ".jpeg", ".jp2",
)  # fmt: skip


def _annotation_files(folder: Path | None, slides: Sequence[Path]) -> dict[Path, list[Path]]:
    """Annotation files of each slide: those of its name, except the slides themselves."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ExchangeError(f"No folder of annotation files at {folder}")
    by_stem: dict[str, list[Path]] = {}
    for slide in slides:
        by_stem.setdefault(_stem(slide.name).lower(), []).append(slide)
    taken = {slide.resolve() for slide in slides}
    found: dict[Path, list[Path]] = {}
    left_over = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in _ANNOTATION_SUFFIXES or file.resolve() in taken:
            continue
        owners = by_stem.get(_stem(file.name).lower(), [])
        if len(owners) > 1:
            raise ExchangeError(
                f"{file}: {len(owners)} slides have this file's name ({', '.join(map(str, owners))}); leave "
                f"--annotations out and give each file its image with darefine import --image"
            )
        if owners:
            found.setdefault(owners[0], []).append(file)
        elif file.suffix.lower() in _OUTLINE_SUFFIXES:
            left_over.append(file.name)
    if left_over:
        _log.warning("%d annotation files have the name of no slide: %s", len(left_over), ", ".join(left_over))
    return found


def export_geojson(
    project: Project, out: Path, names: Sequence[str] = (), *, on_error: OnError | None = None
) -> dict[str, int]:
    """Write one FeatureCollection per image, ``<entry id>.geojson``.

    Parameters
    ----------
    project : Project
        The project.
    out : Path
        Folder for the files.
    names : sequence of str, optional
        Only these images.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    dict of str to int
        Features by entry id.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = [project.image(name) for name in names] if names else project.images
    classes = project.classes

    def write(image: ImageEntry) -> int:
        return write_geojson(project.annotations(image), out / f"{image.id}.geojson", classes=classes)

    return {image.id: count for image, count in for_images(images, write, on_error)}


def export_labels(
    project: Project,
    settings: Settings,
    out: Path,
    *,
    downsample: int,
    names: Sequence[str] = (),
    on_error: OnError | None = None,
) -> dict[str, tuple[int, int]]:
    """Write one label image per annotated image, ``<entry id>.tif``.

    Parameters
    ----------
    project : Project
        The project.
    settings : Settings
        Its settings.
    out : Path
        Folder for the files.
    downsample : int
        Of the label images.
    names : sequence of str, optional
        Only these images.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    dict of str to tuple of int
        Width and height by entry id.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, skipped = choose_images(project, names)
    for left_out in skipped:
        _log.warning("%s is left out: %s", left_out.name, left_out.why)
    drawn = list(for_images(images, project.annotations, on_error))
    counts = class_counts(record for _, records in drawn for record in records)
    class_map = settings.class_map(project.classes, {k: v for k, v in counts.items() if not is_ignored(k)})
    records_of = {image.id: records for image, records in drawn if class_counts(records)}

    def write(image: ImageEntry) -> tuple[int, int] | None:
        if image.width is None or image.height is None:
            return None
        painter = LabelPainter(records_of[image.id], class_map)
        size = write_label_tiff(painter, (image.width, image.height), out / f"{image.id}.tif", downsample=downsample)
        return size.width, size.height

    written = for_images([image for image, _ in drawn if image.id in records_of], write, on_error)
    return {image.id: size for image, size in written if size is not None}
