"""Annotation files of other programs into a project and out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Literal
from uuid import UUID

from darefine_qupath.annotations import (
    Annotation,
    LabelPainter,
    by_annotators,
    class_counts,
    count_unlearnable,
    unlearnable_words,
)
from darefine_qupath.classes import is_ignored
from darefine_qupath.errors import DarefineError, ExchangeError, ProjectError
from darefine_qupath.exchange import Imported, Note, read_annotations, write_geojson, write_label_tiff
from darefine_qupath.exchange.identity import Origin, Reconciled, reconcile
from darefine_qupath.exchange.names import SLIDE_SUFFIXES, NameIndex, is_annotation_file
from darefine_qupath.limits import naming
from darefine_qupath.pipeline.selection import check_annotators, choose_images, every_annotation, say_what_cannot_train
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import Changes, ImageEntry, ImageState, Project, create_project
from darefine_qupath.project.embedded import PROJECT_FILE
from darefine_qupath.project.qpdata import stored_records
from darefine_qupath.review import OnError, for_images
from darefine_qupath.slides import open_slide, read_glass_frame

__all__ = [
    "Import",
    "ImportOptions",
    "create_from_slides",
    "export_geojson",
    "export_labels",
    "import_files",
    "match_files",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How annotation files are read and taken in.

    Attributes
    ----------
    labels : mapping of int to str or None
        Classes of the labels of a mask.
    class_from : tuple of str
        Fields that hold the class of an object; those of the format by default.
    stretch : bool
        Scale a mask of another aspect ratio to its image.
    annotator : str or None
        Whose annotations they are; kept in their metadata.
    replaces : bool
        Take out what an earlier import of a file of the same name (and annotator) brought and the file does not hold.
    """

    labels: Mapping[int, str] | None = None
    class_from: tuple[str, ...] = ()
    stretch: bool = False
    annotator: str | None = None
    replaces: bool = False


_DEFAULTS = ImportOptions()


@dataclass(frozen=True, kw_only=True)
class Import:
    """An annotation file that went into a project.

    Attributes
    ----------
    file : Imported
        What was read.
    image : ImageEntry
        Where it went.
    added, updated, removed : int
        Objects.
    already : int
        Objects that were there.
    notes : tuple of Note
        What became of objects for which that is no matter of course.
    remarks : tuple of str
        What the user should know about the file as a whole.
    """

    file: Imported
    image: ImageEntry
    added: int
    updated: int
    removed: int
    already: int
    notes: tuple[Note, ...] = ()
    remarks: tuple[str, ...] = ()


def match_files(project: Project, files: Sequence[Path], image: str | None) -> list[tuple[Path, ImageEntry]]:
    """Find the image of each annotation file: the one that is named, or the one with the file's name.

    Raises
    ------
    ExchangeError
        If a file belongs to no image or to several.
    """
    if image is not None:
        return [(file, project.image(image)) for file in files]
    index = NameIndex((entry, {entry.name, *([entry.path.name] if entry.path else [])}) for entry in project.images)
    matched = [(file, index.owners(file.name)) for file in files]
    unclaimed = [str(file) for file, found in matched if not found]
    if unclaimed:
        names = ", ".join(repr(entry.name) for entry in project.images) or "none"
        raise ExchangeError(
            f"{', '.join(unclaimed)}: no image of the project has this file's name; give --image, one of {names}"
        )
    for file, found in matched:
        if len(found) > 1:
            ids = ", ".join(f"{entry.id} ({entry.path or entry.name})" for entry in found)
            raise ExchangeError(
                f"{file}: {len(found)} images of the project have this file's name; give --image an id, one of {ids}"
            )
    return [(file, found[0]) for file, found in matched]


def import_files(
    project: Project,
    files: Sequence[tuple[Path, ImageEntry]],
    options: ImportOptions = _DEFAULTS,
    *,
    dry_run: bool = False,
) -> tuple[Import, ...]:
    """Add the annotations of files to images.

    Every file is read before anything is written. What is there with the same content stays; what changed is updated
    where only one object can be meant that nobody edited in the project; all else is added.

    Parameters
    ----------
    project : Project
        The project.
    files : sequence of (Path, ImageEntry)
        Aperio or ASAP XML, GeoJSON or label masks, and where each goes.
    options : ImportOptions, optional
        How.
    dry_run : bool
        Only read, and say what would be done.

    Returns
    -------
    tuple of Import
        One per file.

    Raises
    ------
    ExchangeError
        If a file cannot be read, or nothing in it can be used; nothing is written.
    """
    classes = [path_class.name for path_class in project.classes]
    read = []
    for file, image in files:
        size = None if image.width is None or image.height is None else (image.width, image.height)
        name = image.name if image.path is None else image.path.name
        read.append((_read(file, options, classes, name=name, path=image.path, mpp=image.mpp, size=size), image))
    return _take_in(project, read, options, dry_run=dry_run)


def _read(
    file: Path,
    options: ImportOptions,
    classes: list[str],
    *,
    name: str,
    path: Path | None,
    mpp: float | None,
    size: tuple[int, int] | None,
) -> Imported:
    """Read a file; its classes join those by which the next file is spelled."""
    found = read_annotations(
        file,
        mpp=mpp,
        classes=classes,
        labels=options.labels,
        image_size=size,
        image_name=name,
        class_from=options.class_from,
        stretch=options.stretch,
        glass=None if path is None else partial(read_glass_frame, path),
    )
    found = _storable(found)
    if found.refused and not found.annotations:
        more = f" and {len(found.refused) - 1} more" if len(found.refused) > 1 else ""
        raise ExchangeError(f"{found.path} holds no annotation that can be used: {found.refused[0]}{more}")
    classes += [name for name in class_counts(found.annotations) if name not in classes]
    line = unlearnable_words(count_unlearnable(found.annotations, size))
    return replace(found, warnings=(*found.warnings, line)) if line else found


def _storable(found: Imported) -> Imported:
    """Annotations as QuPath will store them; those that it cannot hold are refused, one by one."""
    kept: dict[int, Annotation] = {}
    refused = []
    for number, stored in _stored(found.annotations, 0):
        if isinstance(stored, str):
            refused.append(Note(item=found.items[number], reason=stored))
        else:
            kept[number] = stored
    ids = {record.id for record in kept.values()}
    above = {record.id: record.parent for record in found.annotations}
    names = {found.annotations[number].path_class: record.path_class for number, record in kept.items()}
    return replace(
        found,
        annotations=tuple(replace(record, parent=_standing(record.parent, above, ids)) for record in kept.values()),
        items=tuple(found.items[number] for number in kept),
        own_ids=found.own_ids & ids,
        refused=(*found.refused, *refused),
        colors={name: color for key, color in found.colors.items() if (name := names.get(key)) is not None},
    )


def _standing(parent: UUID | None, above: Mapping[UUID, UUID | None], ids: Collection[UUID]) -> UUID | None:
    """Nearest object above that is imported."""
    while parent is not None and parent not in ids:
        parent = above.get(parent)
    return parent


def _stored(records: Sequence[Annotation], first: int) -> Iterator[tuple[int, Annotation | str]]:
    """Each record as it will be stored, or why it cannot be; all at once where nothing is wrong."""
    try:
        with naming("object", ExchangeError):
            for record in records:
                _check_texts(record)
            stored = stored_records([(record, None) for record in records])
    except DarefineError as error:
        if len(records) == 1:
            yield first, str(error).removeprefix("object: ")
            return
        half = len(records) // 2
        yield from _stored(records[:half], first)
        yield from _stored(records[half:], first + half)
    else:
        yield from enumerate(stored, first)


def _check_texts(record: Annotation) -> None:
    """Refuse half characters, which no file can keep."""
    for text in (record.path_class, record.name, *record.metadata, *record.metadata.values(), *record.measurements):
        if text is not None:
            text.encode()


def _take_in(
    project: Project, read: Sequence[tuple[Imported, ImageEntry]], options: ImportOptions, *, dry_run: bool
) -> tuple[Import, ...]:
    imports = []
    states: dict[str, ImageState] = {}
    for found, image in read:
        state = states[image.id] if image.id in states else project.state(image)
        origin = Origin(path=found.path, image=image.id, annotator=options.annotator)
        plan = _without_cores(reconcile(found, state.objects, origin, replaces=options.replaces))
        changes = Changes(add=plan.add, replace=plan.update, remove=plan.remove, class_colors=found.colors)
        if dry_run:
            # The next file meets what this one would leave.
            gone = {*plan.remove, *(record.id for record in plan.update)}
            kept = (record for record in state.objects if record.id not in gone)
            states[image.id] = replace(state, objects=(*kept, *plan.update, *plan.add))
        elif not changes.is_empty:
            warnings = project.apply(image, changes, version=state.version).warnings
            plan = replace(plan, remarks=(*plan.remarks, *warnings))
        imports.append(
            Import(
                file=found,
                image=image,
                added=len(plan.add),
                updated=len(plan.update),
                removed=len(plan.remove),
                already=plan.already,
                notes=plan.notes,
                remarks=plan.remarks,
            )
        )
    return tuple(imports)


def _without_cores(plan: Reconciled) -> Reconciled:
    """Leave out new cores of a TMA grid, which only QuPath makes."""
    cores = {record.id for record in plan.add if record.kind == "tma core"}
    if not cores:
        return plan
    kept = tuple(
        replace(record, parent=None) if record.parent in cores else record
        for record in plan.add
        if record.id not in cores
    )
    line = f"{len(cores)} cores of a TMA grid are not imported; make the grid in QuPath"
    return replace(plan, add=kept, remarks=(*plan.remarks, line))


def create_from_slides(
    path: Path,
    slides: Sequence[Path],
    *,
    annotations: Path | None = None,
    options: ImportOptions = _DEFAULTS,
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
    options : ImportOptions, optional
        How they are read.
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
        If a slide cannot be opened.
    ExchangeError
        If there is no such folder of annotations, or a file in it cannot be read or belongs to several slides.
        Whatever is raised, nothing is left of the new project.
    """
    files = _slide_files(slides)
    found_for = _annotation_files(annotations, files)
    classes: list[str] = []
    read: dict[Path, list[Imported]] = {}
    for file in files:
        with open_slide(file) as slide:
            read[file] = [
                _read(
                    found,
                    options,
                    classes,
                    name=file.name,
                    path=file,
                    mpp=mpp or slide.mpp,
                    size=(slide.size.width, slide.size.height),
                )
                for found in found_for.get(file, [])
            ]
    with _nothing_left(path):
        project = create_project(path, engine=engine)
        imports: list[Import] = []
        for number, file in enumerate(files):
            image = project.add_image(file, mpp=mpp)
            imports += _take_in(project, [(found, image) for found in read[file]], options, dry_run=False)
            if progress is not None:
                progress(number + 1, len(files), file.name)
    return project, tuple(imports)


@contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """Remove what was made of a project when something stops it, so that it can be tried again."""
    folder, file = (path.parent, path) if path.suffix == ".qpproj" else (path, path / PROJECT_FILE)
    if file.exists():
        # It is somebody's project, and refused.
        yield
        return
    was_there = set(folder.iterdir()) if folder.is_dir() else set()
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        yield
    except BaseException:
        for item in set(folder.iterdir()) - was_there if folder.is_dir() else ():
            if item.is_dir() and not item.is_symlink():
                rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)
        for above in made:
            with suppress(OSError):
                above.rmdir()
        raise


def _slide_files(slides: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for item in slides:
        if item.is_dir():
            files += sorted(p for p in item.iterdir() if p.is_file() and p.suffix.lower() in SLIDE_SUFFIXES)
        else:
            files.append(item)
    files = list({file.resolve(): file for file in files}.values())
    if not files:
        raise ProjectError(f"No slides in {', '.join(str(item) for item in slides)}; name image files, or a folder")
    return files


def _annotation_files(folder: Path | None, slides: Sequence[Path]) -> dict[Path, list[Path]]:
    """Annotation files of each slide: those of its name, except the slides themselves."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ExchangeError(f"No folder of annotation files at {folder}")
    index = NameIndex((slide, (slide.name,)) for slide in slides)
    taken = {slide.resolve() for slide in slides}
    found: dict[Path, list[Path]] = {}
    left_over = []
    for file in sorted(folder.iterdir()):
        if not is_annotation_file(file.name) or file.resolve() in taken or not file.is_file():
            continue
        owners = index.owners(file.name)
        if len(owners) > 1:
            raise ExchangeError(
                f"{file}: {len(owners)} slides have this file's name ({', '.join(map(str, owners))}); leave "
                f"--annotations out and give each file its image with darefine import --image"
            )
        if owners:
            found.setdefault(owners[0], []).append(file)
        else:
            left_over.append(file.name)
    if left_over:
        _log.warning("%d annotation files have the name of no slide: %s", len(left_over), ", ".join(left_over))
    return found


def export_geojson(
    project: Project,
    out: Path,
    names: Sequence[str] = (),
    *,
    annotators: Sequence[str] = (),
    on_error: OnError | None = None,
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
    annotators : sequence of str, optional
        Only annotations of these; see `by_annotators`.
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
    check_annotators(every_annotation(project, images), annotators)

    def write(image: ImageEntry) -> int:
        records = by_annotators(project.annotations(image), annotators)
        return write_geojson(records, out / f"{image.id}.geojson", classes=classes)

    return {image.id: count for image, count in for_images(images, write, on_error)}


def export_labels(
    project: Project,
    settings: Settings,
    out: Path,
    *,
    downsample: int,
    names: Sequence[str] = (),
    annotators: Sequence[str] = (),
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
    annotators : sequence of str, optional
        Only annotations of these; see `by_annotators`.
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
    check_annotators(every_annotation(project, images), annotators)
    drawn = [
        (image, by_annotators(records, annotators))
        for image, records in for_images(images, project.annotations, on_error)
    ]
    counts = class_counts(record for _, records in drawn for record in records)
    class_map = settings.class_map(project.classes, {k: v for k, v in counts.items() if not is_ignored(k)})
    say_what_cannot_train(drawn)
    records_of = {image.id: records for image, records in drawn if class_counts(records)}

    def write(image: ImageEntry) -> tuple[int, int] | None:
        if image.width is None or image.height is None:
            return None
        painter = LabelPainter(records_of[image.id], class_map)
        size = write_label_tiff(painter, (image.width, image.height), out / f"{image.id}.tif", downsample=downsample)
        return size.width, size.height

    written = for_images([image for image, _ in drawn if image.id in records_of], write, on_error)
    return {image.id: size for image, size in written if size is not None}
