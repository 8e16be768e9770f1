"""Make a QuPath project of slides and their annotation files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Literal

from darefine_qupath.errors import ExchangeError, ProjectError
from darefine_qupath.exchange import Imported
from darefine_qupath.exchange.names import SLIDE_SUFFIXES, NameIndex, is_annotation_file
from darefine_qupath.pipeline.annotation_import import (
    DEFAULT_IMPORT,
    Import,
    ImportOptions,
    _log,
    add_to_project,
    read_for_image,
)
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.project import Project, create_project
from darefine_qupath.project.embedded import PROJECT_FILE
from darefine_qupath.slides import open_slide

__all__ = ["create_from_slides"]


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
    options : ImportOptions, optional
        How they are read.
    mpp : float, optional
        Micrometres per pixel of every slide.
    engine : str
        Engine that writes.
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
    files = _slide_files(slides)
    found_for = _annotation_files(annotations, files)
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
