"""Add the annotations of files of other programs to the images of a project."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from darefine_qupath.annotations import Annotation, class_counts
from darefine_qupath.errors import DarefineError, ExchangeError
from darefine_qupath.exchange import Imported, Note, read_annotations
from darefine_qupath.exchange.documents import member_names
from darefine_qupath.exchange.file_names import NameIndex
from darefine_qupath.exchange.matching import Origin
from darefine_qupath.exchange.reconcile import Reconciled, reconcile
from darefine_qupath.limits import naming
from darefine_qupath.masks import count_unlearnable, unlearnable_words
from darefine_qupath.project import Changes, ImageEntry, ImageState, Project
from darefine_qupath.project.qpdata.stored import stored_records
from darefine_qupath.slides import read_glass_frame

__all__ = ["Import", "ImportOptions", "check_members", "import_files", "match_files"]

_Image = TypeVar("_Image")

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


DEFAULT_IMPORT = ImportOptions()


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
    index = NameIndex((entry, {entry.name, *([entry.path.name] if entry.path else [])}) for entry in project.images)
    if image is not None:
        chosen = project.image(image)
        for file in files:
            check_members(file, chosen, index, image)
        return [(file, chosen) for file in files]
    matched = [(file, index.owners(file.name)) for file in files]
    unclaimed = [str(file) for file, found in matched if not found]
    if unclaimed:
        names = ", ".join(repr(entry.name) for entry in project.images) or "none"
        raise ExchangeError(
            f"{', '.join(unclaimed)}: no image of the project has this file's name; give --image with one of {names}"
        )
    for file, found in matched:
        if len(found) > 1:
            ids = ", ".join(f"{entry.id} ({entry.path or entry.name})" for entry in found)
            raise ExchangeError(
                f"{file}: {len(found)} images of the project have this file's name; give --image with an id: {ids}"
            )
        check_members(file, found[0], index, found[0].name)
    return [(file, found[0]) for file, found in matched]


def check_members(file: Path, image: _Image, index: NameIndex[_Image], name: str) -> None:
    """Refuse a zip that goes into an image and holds a file named like another one.

    Raises
    ------
    ExchangeError
        With the name of that file.
    """
    for member in member_names(file):
        owners = index.owners(member)
        if owners and image not in owners:
            raise ExchangeError(
                f"{file} holds {member}, which has the name of another image, and goes into {name}; unpack it and "
                f"import its files"
            )


def import_files(
    project: Project,
    files: Sequence[tuple[Path, ImageEntry]],
    options: ImportOptions = DEFAULT_IMPORT,
    *,
    dry_run: bool = False,
) -> tuple[Import, ...]:
    """Add the annotations of files to images.

    Every file is read before anything is written. What is there with the same content stays; what changed is updated
    where only one object can be meant that nobody edited in the project; all else is added.

    Parameters
    ----------
    files : sequence of (Path, ImageEntry)
        Aperio or ASAP XML, GeoJSON or label masks, and where each goes.
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
    if options.replaces:
        _check_names_differ(files)
    classes = [path_class.name for path_class in project.classes]
    read = []
    for file, image in files:
        name = image.name if image.path is None else image.path.name
        read.append(
            (read_for_image(file, options, classes, name=name, path=image.path, mpp=image.mpp, size=image.size), image)
        )
    return add_to_project(project, read, options, dry_run=dry_run)


def _check_names_differ(files: Sequence[tuple[Path, ImageEntry]]) -> None:
    """Refuse two files of one name for one image: the second would take out what the first brings."""
    seen: dict[tuple[str, str], Path] = {}
    for file, image in files:
        other = seen.setdefault((image.id, file.name), file)
        if other.resolve() != file.resolve():
            raise ExchangeError(
                f"{other} and {file} have the same name and go into the same image; with --replace the second would "
                f"take out what the first brings. Rename one, or import each with its --annotator NAME"
            )


def read_for_image(
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
    found = _refuse_unstorable(found)
    if found.refused and not found.annotations:
        more = f" and {len(found.refused) - 1} more" if len(found.refused) > 1 else ""
        raise ExchangeError(f"{found.path} holds no annotation that can be used: {found.refused[0]}{more}")
    classes += [name for name in class_counts(found.annotations) if name not in classes]
    lines = (unlearnable_words(count_unlearnable(found.annotations, size)), _other_kinds(found.annotations))
    return replace(found, warnings=(*found.warnings, *filter(None, lines)))


def _other_kinds(records: Sequence[Annotation]) -> str:
    kinds = Counter(record.kind for record in records if record.kind != "annotation")
    counted = ", ".join(f"{count} of kind {kind}" for kind, count in kinds.items())
    return f"{kinds.total()} objects are no annotations and do not train: {counted}" if kinds else ""


def _refuse_unstorable(found: Imported) -> Imported:
    """Annotations as QuPath will store them; those that it cannot hold are refused, one by one."""
    kept: dict[int, Annotation] = {}
    refused = []
    for number, stored in _store_each(found.annotations, 0):
        if isinstance(stored, str):
            refused.append(Note(item=found.items[number], reason=stored))
        else:
            kept[number] = stored
    ids = {record.id for record in kept.values()}
    above = {record.id: record.parent for record in found.annotations}
    names = {found.annotations[number].path_class: record.path_class for number, record in kept.items()}
    return replace(
        found,
        annotations=tuple(
            replace(record, parent=_nearest_kept_parent(record.parent, above, ids)) for record in kept.values()
        ),
        items=tuple(found.items[number] for number in kept),
        own_ids=found.own_ids & ids,
        refused=(*found.refused, *refused),
        colors={name: color for key, color in found.colors.items() if (name := names.get(key)) is not None},
    )


def _nearest_kept_parent(parent: UUID | None, above: Mapping[UUID, UUID | None], ids: Collection[UUID]) -> UUID | None:
    """Nearest object above that is imported."""
    while parent is not None and parent not in ids:
        parent = above.get(parent)
    return parent


def _store_each(records: Sequence[Annotation], first: int) -> Iterator[tuple[int, Annotation | str]]:
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
        yield from _store_each(records[:half], first)
        yield from _store_each(records[half:], first + half)
    else:
        yield from enumerate(stored, first)


def _check_texts(record: Annotation) -> None:
    """Refuse half characters, which no file can keep."""
    for text in (record.path_class, record.name, *record.metadata, *record.metadata.values(), *record.measurements):
        if text is not None:
            text.encode()


def add_to_project(
    project: Project, read: Sequence[tuple[Imported, ImageEntry]], options: ImportOptions, *, dry_run: bool
) -> tuple[Import, ...]:
    states: dict[str, ImageState] = {}
    plans = []
    for found, image in read:
        state = states[image.id] if image.id in states else project.state(image)
        origin = Origin(path=found.path, image=image.id, annotator=options.annotator)
        plan = _leave_cores_out(reconcile(found, state.objects, origin, replaces=options.replaces))
        plans.append((found, image, plan, None if image.id in states else state.version))
        # The next file meets what this one leaves.
        gone = {*plan.remove, *(record.id for record in plan.update)}
        kept = (record for record in state.objects if record.id not in gone)
        states[image.id] = replace(state, objects=(*kept, *plan.update, *plan.add))
    imports: list[Import] = []
    for found, image, plan, version in plans:
        changes = Changes(add=plan.add, replace=plan.update, remove=plan.remove, class_colors=found.colors)
        warnings: tuple[str, ...] = ()
        if not (dry_run or changes.is_empty):
            with _naming_what_was_written(imports):
                warnings = project.apply(image, changes, version=version).warnings
        imports.append(
            Import(
                file=found,
                image=image,
                added=len(plan.add),
                updated=len(plan.update),
                removed=len(plan.remove),
                already=plan.already,
                notes=plan.notes,
                remarks=(*plan.remarks, *warnings),
            )
        )
    return tuple(imports)


@contextmanager
def _naming_what_was_written(imports: Sequence[Import]) -> Iterator[None]:
    """Add to an error the files that were imported before it."""
    try:
        yield
    except DarefineError as error:
        names = ", ".join(str(item.file.path) for item in imports)
        if not names:
            raise
        raise type(error)(f"{error}; imported before that: {names}") from error


def _leave_cores_out(plan: Reconciled) -> Reconciled:
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
