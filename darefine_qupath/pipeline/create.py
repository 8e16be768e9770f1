"""Make a QuPath project of slides and their annotation files."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Literal

from darefine_qupath.errors import ExchangeError, ProjectError
from darefine_qupath.exchange import Imported
from darefine_qupath.exchange.file_names import SLIDE_SUFFIXES, NameIndex, is_annotation_file, is_mask_name
from darefine_qupath.filesystem import open_lock, try_lock
from darefine_qupath.pipeline.annotation_import import (
    DEFAULT_IMPORT,
    Import,
    ImportOptions,
    _log,
    add_to_project,
    check_members,
    read_for_image,
)
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.project import Project, create_project, creation_mark
from darefine_qupath.project.project_reader import PROJECT_FILE
from darefine_qupath.slides import open_slide

__all__ = ["create_from_slides"]

_MAX_MARK = 1 << 20


def create_from_slides(
    path: Path,
    slides: Sequence[Path],
    *,
    annotations: Path | None = None,
    options: ImportOptions = DEFAULT_IMPORT,
    mpp: float | None = None,
    engine: Literal["auto", "embedded", "paquo"] = "auto",
    listener: Listener = SILENT,
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
    listener : Listener, optional
        Hears how many slides are added.

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
    files, masks = _slide_files(slides)
    found_for = _annotation_files(annotations, files)
    _say_left_out(masks, found_for)
    classes: list[str] = []
    read: dict[Path, list[Imported]] = {}
    for file in files:
        with open_slide(file) as slide:
            read[file] = [
                read_for_image(
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
    with _removed_on_failure(path):
        project = create_project(path, engine=engine)
        imports: list[Import] = []
        for number, file in enumerate(files, 1):
            image = project.add_image(file, mpp=mpp)
            imports += add_to_project(project, [(found, image) for found in read[file]], options, dry_run=False)
            listener.on_items("Adding images", number, len(files), file.name)
    return project, tuple(imports)


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """Remove what was made of a project when something stops it, now or before the next try."""
    file = path if path.suffix == ".qpproj" else path / PROJECT_FILE
    folder, mark = file.parent, creation_mark(file)
    if file.exists() and not mark.exists():
        # It is somebody's project, and refused.
        yield
        return
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(mark)
    try:
        if not try_lock(descriptor):
            raise ProjectError(f"{folder}: another darefine is making this project")
        kept = _kept(descriptor, file)
        try:
            yield
        except BaseException:
            _remove_made(file, kept)
            raise
        finally:
            mark.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        for above in missing:
            with suppress(OSError):
                above.rmdir()


def _kept(descriptor: int, file: Path) -> Collection[str]:
    """Note what is in the folder before anything is made; where an earlier try was killed, remove what that made."""
    text = os.read(descriptor, _MAX_MARK)
    if not text:
        names = [item.relative_to(file.parent).as_posix() for item in _made(file)]
        os.write(descriptor, json.dumps(names).encode())
        return names
    try:
        kept = [str(name) for name in json.loads(text)]
    except (ValueError, TypeError):
        mark = creation_mark(file)
        raise ProjectError(f"{mark} is damaged; remove it and what there is of the unfinished project") from None
    _remove_made(file, kept)
    return kept


def _made(file: Path) -> Iterator[Path]:
    """Everything in a folder that may be part of a project."""
    folder = file.parent
    for pattern in ("data/*", f"{file.name}*", "*.darefine-tmp"):
        yield from folder.glob(pattern)
    yield from (item for name in ("data", "darefine", "classifiers") if (item := folder / name).exists())


def _remove_made(file: Path, kept: Collection[str]) -> None:
    for item in list(_made(file)):
        if item.relative_to(file.parent).as_posix() in kept:
            continue
        if item.is_dir() and not item.is_symlink():
            rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


def _slide_files(slides: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Slides, and what lies beside them in a folder named like an annotation of one of them."""
    files: list[Path] = []
    masks: list[Path] = []
    for item in slides:
        if item.is_dir():
            inside = sorted(p for p in item.iterdir() if p.is_file() and p.suffix.lower() in SLIDE_SUFFIXES)
            index = NameIndex((file, (file.name,)) for file in inside if not is_mask_name(file.name))
            masks += [file for file in inside if is_mask_name(file.name) and index.owners(file.name)]
            files += [file for file in inside if file not in masks]
        else:
            files.append(item)
    files = list({file.resolve(): file for file in files}.values())
    if not files:
        raise ProjectError(f"No slides in {', '.join(str(item) for item in slides)}; name image files, or a folder")
    return files, [file for file in masks if file not in files]


def _say_left_out(masks: Sequence[Path], found_for: Mapping[Path, Sequence[Path]]) -> None:
    read = {file.resolve() for found in found_for.values() for file in found}
    left_out = [file.name for file in masks if file.resolve() not in read]
    if left_out:
        _log.warning(
            "%d files are named like masks of other slides and were not added as images: %s; --annotations DIR imports "
            "them, an image that is meant can be named as a file",
            len(left_out),
            ", ".join(left_out),
        )


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
            check_members(file, owners[0], index, owners[0].name)
            found.setdefault(owners[0], []).append(file)
        else:
            left_over.append(file.name)
    if left_over:
        _log.warning("%d annotation files match no slide by their name: %s", len(left_over), ", ".join(left_over))
    return found
