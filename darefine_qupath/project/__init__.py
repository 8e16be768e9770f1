"""Open, create and restore QuPath projects: one interface, two engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from darefine_qupath.classes import PathClass
from darefine_qupath.errors import EngineError, ProjectError
from darefine_qupath.project.backups import Backup, choose_backup
from darefine_qupath.project.embedded import EmbeddedProject
from darefine_qupath.project.interface import Applied, Changes, Engine, ImageEntry, ImageState, Project, image_titles
from darefine_qupath.project.project_reader import PROJECT_FILE

__all__ = [
    "Applied",
    "Backup",
    "Changes",
    "Engine",
    "ImageEntry",
    "ImageState",
    "Project",
    "create_project",
    "creation_mark",
    "image_titles",
    "list_backups",
    "open_project",
    "restore",
]

_log = logging.getLogger(__name__)


def open_project(path: Path | str, engine: str = "auto") -> Project:
    """Open a QuPath project.

    Parameters
    ----------
    path : Path or str
        The ``project.qpproj`` or its folder.
    engine : str, optional
        ``"embedded"`` needs no QuPath, ``"paquo"`` uses the one that is installed, ``"auto"`` takes paquo where it
        finds QuPath.

    Returns
    -------
    Project
        To be closed, or used in a ``with`` block.

    Raises
    ------
    ProjectNotFoundError
        If there is no such project.
    ProjectFormatError
        If it is not a project, or damaged.
    EngineError
        If paquo is asked for and does not work here.
    """
    mark = creation_mark(Path(path))
    if mark.exists():
        raise ProjectError(f"{path}: its making was stopped half way (it left {mark.name}); run darefine create again")
    return _engine(engine)(Path(path))


def creation_mark(path: Path) -> Path:
    """File that stands beside a project's while it is being made of slides, and holds what was there before."""
    file = path if path.suffix == ".qpproj" else path / PROJECT_FILE
    return file.with_name(f".{file.name}.creating")


def create_project(
    path: Path | str,
    *,
    classes: Sequence[PathClass] = (),
    engine: str = "auto",
) -> Project:
    """Make a QuPath project without images.

    Parameters
    ----------
    path : Path or str
        Its folder; made where it is not there.
    classes : sequence of PathClass, optional
        The class list.
    engine : str, optional
        As for `open_project`.

    Returns
    -------
    Project
        The new project.

    Raises
    ------
    ProjectWriteError
        If there is a project already, or it cannot be written.
    EngineError
        If paquo is asked for and does not work here.
    """
    return _engine(engine).create(Path(path), classes)


def list_backups(path: Path | str, image: str) -> tuple[Backup, ...]:
    """Former states of an image's objects.

    Parameters
    ----------
    path : Path or str
        The project.
    image : str
        Entry id or name.

    Returns
    -------
    tuple of Backup
        Newest first.
    """
    project = EmbeddedProject(Path(path))
    return project.backups(project.image(image))


def restore(path: Path | str, image: str, which: str | int = 1) -> Applied:
    """Bring back a former state of an image's objects; the present one becomes a backup itself.

    Parameters
    ----------
    path : Path or str
        The project.
    image : str
        Entry id or name.
    which : str or int, optional
        1 is the newest backup, 2 the one before; or the beginning of a backup's file name (its time in UTC).

    Returns
    -------
    Applied
        What changed.

    Raises
    ------
    ProjectError
        If there is no such backup, or it is damaged.
    ProjectLockedError, ProjectWriteError
        As for `Project.apply`.
    """
    project = EmbeddedProject(Path(path))
    entry = project.image(image)
    return project.restore(entry, choose_backup(project.backups(entry), which, entry.name))


def _engine(engine: str) -> type[EmbeddedProject]:
    """Class of the engine that is asked for, or else works here; the log says which."""
    if engine not in ("auto", "embedded", "paquo"):
        raise EngineError(f"There is no engine {engine!r}; choose auto, embedded or paquo")
    if engine == "embedded":
        return EmbeddedProject
    # Java starts in no process that was forked after this.
    from darefine_qupath.project import jvm  # noqa: PLC0415

    try:
        found = jvm.find_qupath()
    except ImportError as error:
        if engine == "paquo":
            raise EngineError(f"paquo cannot be loaded ({error}); `pip install paquo`, then {jvm.GET_QUPATH}") from None
        _log.info("Engine: embedded (paquo cannot be loaded: %s)", error)
        return EmbeddedProject
    if found is None:
        if engine == "paquo":
            raise EngineError(f"paquo finds no QuPath; {jvm.GET_QUPATH}")
        _log.info("Engine: embedded (paquo finds no QuPath)")
        return EmbeddedProject
    _log.info("Engine: paquo, with QuPath at %s", found)
    from darefine_qupath.project.paquo_engine import PaquoProject  # noqa: PLC0415

    return PaquoProject
