"""Identify the project and the slides that a model learned from, wherever they lie by now."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from darefine_qupath.checkpoint.header import CheckpointHeader
from darefine_qupath.errors import LimitError, ProjectError, SlideError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import NOTES, naming, parse_json, read_file
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.slides import file_digest

__all__ = ["IDENTITY", "identity_of", "project_id", "trained_on"]

IDENTITY = "identity"
"""Key in a model's provenance: the project's id, and by entry id the digests of the slides."""

_log = logging.getLogger(__name__)


def project_id(project: Project) -> str | None:
    """Id of a project, which moves and is copied with it; given to it when it has none yet.

    Returns
    -------
    str or None
        A random UUID; None where nothing can be written beside the project's files.

    Raises
    ------
    ProjectError
        If the file that holds it is damaged.
    """
    path = project.folder / "darefine" / "project.json"
    found = _stored_id(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path, ProjectError, like=project.path) as temporary:
            temporary.write_text(json.dumps({"id": str(uuid4())}) + "\n", encoding="utf-8")
    except (OSError, ProjectError) as error:
        _log.info("The project is given no id: %s", error)
        return None
    return _stored_id(path)


def _stored_id(path: Path) -> str | None:
    try:
        content = read_file(path, NOTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, LimitError) as error:
        raise ProjectError(f"{path} cannot be read: {error}") from error
    damaged = (
        f'{path} is damaged: it should hold the project\'s id as {{"id": UUID}}; restore it from a copy, or delete it '
        f"and the project gets a new one"
    )
    with naming(damaged, ProjectError):
        return str(UUID(parse_json(content, NOTES)["id"]))


def identity_of(project: Project, images: Collection[str]) -> dict[str, Any]:
    """Plain JSON values that stand for a project and some of its images in a model file.

    Parameters
    ----------
    images : collection of str
        Entry ids.

    Returns
    -------
    dict
        ``"project"`` (id or None) and ``"files"`` (digest by entry id).
    """
    files = {image.id: digest for image in project.images if image.id in images and (digest := _digest(image))}
    return {"project": project_id(project), "files": files}


def trained_on(header: CheckpointHeader, project: Project, images: Iterable[ImageEntry]) -> frozenset[str]:
    """Find the images that gave a model training tiles.

    Parameters
    ----------
    project : Project
        Any project; the one of training, moved or copied, or another with some of its slides.
    images : iterable of ImageEntry
        Images of it.

    Returns
    -------
    frozenset of str
        Entry ids: of the same slide file, or of the same entry (id and name) of the project of training.
    """
    trained = _training_ids(header.provenance)
    identity = header.provenance.get(IDENTITY)
    names = _mapping(header.provenance.get("images"))
    if not isinstance(identity, Mapping) or not identity:
        return _by_path(header, project, images, trained, names)
    files = {digest for image, digest in _mapping(identity.get("files")).items() if image in trained}
    stored = identity.get("project")
    is_same = stored is not None and stored == _stored_id(project.folder / "darefine" / "project.json")
    return frozenset(
        image.id
        for image in images
        if (is_same and image.id in trained and names.get(image.id) == image.name)
        or (files and _digest(image) in files)
    )


def _by_path(
    header: CheckpointHeader,
    project: Project,
    images: Iterable[ImageEntry],
    trained: Collection[str],
    names: Mapping[str, Any],
) -> frozenset[str]:
    """Find them by what older model files say: where the project was, and the names of its images."""
    source = header.provenance.get("project")
    if source is None:
        return frozenset()
    is_there = Path(str(source)).resolve() in (project.folder.resolve(), project.path.resolve())
    found = frozenset(
        image.id for image in images if image.id in trained and (is_there or names.get(image.id) == image.name)
    )
    how = "by its path" if is_there else "by the ids and names of the images"
    _log.warning(
        "The model %s only says where its project was (%s), as models did before projects had an id; whether it was "
        "trained on an image here is decided %s",
        header.model_id, source, how,
    )  # fmt: skip
    return found


def _training_ids(provenance: Mapping[str, Any]) -> frozenset[str]:
    split = _mapping(provenance.get("split"))
    if split.get("spatial"):
        return frozenset(_mapping(provenance.get("images")))
    return frozenset(image for image, role in _mapping(split.get("images")).items() if role == "train")


def _mapping(value: object) -> Mapping[str, Any]:
    """Take what should be an object in a model file, which anyone may have written."""
    return value if isinstance(value, Mapping) else {}


def _digest(image: ImageEntry) -> str | None:
    try:
        return None if image.path is None else file_digest(image.path)
    except SlideError:
        return None
