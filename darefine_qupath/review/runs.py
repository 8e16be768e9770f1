"""Runs on disk: what one prediction of one image by one model wrote, so that the next knows what is ours.

Every run is one JSON file, ``<project>/darefine/runs/<run id>.json``. It holds the objects as they were written,
those of them that a pathologist took over or rejected since, and the objects of the run before that it replaced, so
each file stands for itself: to compare, to go on and to undo, nothing else is needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.errors import DarefineError, ReviewError
from darefine_qupath.project.safety import Batch, write_lock

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.project import ImageEntry, Project

__all__ = [
    "FORMAT",
    "OnError",
    "Run",
    "RunObject",
    "digest_of",
    "latest",
    "list_runs",
    "new_run_id",
    "recent_runs",
    "runs_folder",
    "save_run",
]

FORMAT = "darefine-run/1"

State = Literal["pending", "done", "undoing", "undone"]
Role = Literal["region", "container"]
OnError: TypeAlias = Callable[[str, DarefineError], None]
"""Told of an image, or a run's file, by its name, that cannot be dealt with; the others are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunObject:
    """One object as a run wrote it.

    Attributes
    ----------
    record : Annotation
        The object.
    training_class : str
        The model's class it stands for; `record.path_class` may have a suffix. Empty for a container.
    role : str
        ``"region"``, or ``"container"`` for the annotation that holds the others.
    kept : bool
        Whether the run before had written it already.
    """

    record: Annotation
    training_class: str
    role: Role = "region"
    kept: bool = False

    @property
    def id(self) -> UUID:
        """Identity in the project."""
        return self.record.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One prediction of one image by one model.

    Attributes
    ----------
    id : str
        Sorts by time.
    batch : str
        Common to the runs of one call of predict.
    image, image_name : str
        Entry id and name.
    model : str
        Id of the model file.
    date : str
        ISO 8601, UTC.
    state : str
        ``"pending"`` until the project has been written, then ``"done"``; ``"undoing"`` and ``"undone"`` likewise.
    mpp : float or None
        Micrometres per level-0 pixel.
    parameters : mapping
        What the prediction was made with; plain JSON values.
    objects : tuple of RunObject
        All of ours that nobody had touched when the run ended.
    adopted : tuple of RunObject
        Objects of former runs, as they were written, that belong to the pathologist now.
    rejected : tuple of RunObject
        Objects of former runs, as they were written, that the pathologist deleted or rejected.
    replaced : tuple of RunObject
        Objects of the run before that this one removed.
    known : tuple of UUID
        Objects that were there before the first run.
    undoing : tuple of UUID
        What an undo removes.
    digest, backup : str or None
        Fingerprint of the image's data as this run left it, and where it is kept as it was before, relative to the
        project's folder. None where the run changed nothing, or there was nothing before.
    """

    id: str
    batch: str
    image: str
    image_name: str
    model: str
    date: str
    state: State
    mpp: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    objects: tuple[RunObject, ...] = ()
    adopted: tuple[RunObject, ...] = ()
    rejected: tuple[RunObject, ...] = ()
    replaced: tuple[RunObject, ...] = ()
    known: tuple[UUID, ...] = ()
    undoing: tuple[UUID, ...] = ()
    digest: str | None = None
    backup: str | None = None

    @property
    def added(self) -> tuple[RunObject, ...]:
        """Objects that this run brought."""
        return tuple(item for item in self.objects if not item.kept)


def digest_of(record: Annotation) -> str:
    """Fingerprint of what makes an object what it is: identity, kind, class, name and outline.

    The outline counts as a set of points at QuPath's precision, so that neither the order of its rings nor where they
    start matters: engines and QuPath versions differ in both.
    """
    text = "\n".join((str(record.id), record.kind, record.path_class or "", record.name or ""))
    return hashlib.sha256(text.encode() + _outline(record.geometry)).hexdigest()[:32]


def _outline(geometry: BaseGeometry | None) -> bytes:
    if geometry is None:
        return b""
    canonical = shapely.normalize(geometry)
    points = np.rint(shapely.get_coordinates(canonical) * 100).astype("<i8")
    return str(canonical.geom_type).encode() + bytes(points)


# -- files


def runs_folder(project: Project) -> Path:
    """Where a project's runs are."""
    return project.folder / "darefine" / "runs"


def new_run_id(project: Project, image: ImageEntry) -> tuple[str, str]:
    """Id and date of a run that starts now."""
    now = datetime.now(timezone.utc)
    name = f"{now:%Y%m%dT%H%M%S}.{now.microsecond:06d}Z-{image.id}"
    number, run_id = 2, name
    while (runs_folder(project) / f"{run_id}.json").exists():
        run_id, number = f"{name}-{number}", number + 1
    return run_id, now.isoformat(timespec="seconds")


def save_run(project: Project, run: Run) -> Path:
    """Write a run, all of it or nothing.

    Raises
    ------
    ProjectWriteError
        If it cannot be written.
    """
    path = runs_folder(project) / f"{run.id}.json"
    with write_lock(project.folder), Batch(project.folder) as batch:
        batch.stage(path, (json.dumps(_run_to_json(run), ensure_ascii=False, indent=1) + "\n").encode())
        batch.commit()
    return path


def list_runs(project: Project, image: ImageEntry | None = None, *, on_error: OnError | None = None) -> tuple[Run, ...]:
    """Read the runs of a project, or of one image, oldest first.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry, optional
        One of its images; all by default.
    on_error : callable, optional
        Told of a file that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    tuple of Run
        Those that were undone among them.

    Raises
    ------
    ReviewError
        If a file is damaged or of another format; the message names it.
    """
    runs = []
    for path in _paths(project, image):
        try:
            runs.append(_read_run(path))
        except ReviewError as error:
            if on_error is None:
                raise
            on_error(path.name, error)
    return tuple(run for run in runs if image is None or run.image == image.id)


def recent_runs(project: Project, image: ImageEntry) -> tuple[Run, ...]:
    """Read the last run of an image that is done, and all since, oldest first; what came before is in it.

    Raises
    ------
    ReviewError
        If a file is damaged or of another format; the message names it.
    """
    found: list[Run] = []
    for path in reversed(_paths(project, image)):
        run = _read_run(path)
        if run.image == image.id:
            found.insert(0, run)
            if run.state == "done":
                break
    return tuple(found)


def _paths(project: Project, image: ImageEntry | None) -> list[Path]:
    paths = sorted(runs_folder(project).glob("*.json"))
    return paths if image is None else [path for path in paths if f"Z-{image.id}" in path.stem]


def _read_run(path: Path) -> Run:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data.get("format") if isinstance(data, dict) else None
        run = _run_from_json(data) if found == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, zlib.error, shapely.errors.GEOSException) as error:
        raise ReviewError(f"{path} is damaged ({error}); move it away to go on without that run's record") from error
    if run is None:
        raise ReviewError(
            f"{path} has the format {found!r}, expected {FORMAT!r}; update darefine or move the file away"
        )
    return run


def _run_to_json(run: Run) -> dict[str, Any]:
    texts = {name: getattr(run, name) for name in _TEXTS}
    lists = {name: [_object_to_json(item) for item in getattr(run, name)] for name in _OBJECT_LISTS}
    return {
        "format": FORMAT,
        **texts,
        "mpp": run.mpp,
        "parameters": dict(run.parameters),
        "known": [str(value) for value in run.known],
        "undoing": [str(value) for value in run.undoing],
        "digest": run.digest,
        "backup": run.backup,
        **lists,
    }


_TEXTS = ("id", "batch", "image", "image_name", "model", "date", "state")
_OBJECT_LISTS = ("objects", "adopted", "rejected", "replaced")


def _run_from_json(data: Mapping[str, Any]) -> Run:
    lists: dict[str, Any] = {name: tuple(_object_from_json(item) for item in data[name]) for name in _OBJECT_LISTS}
    texts: dict[str, Any] = {name: data[name] for name in _TEXTS}
    if not all(isinstance(value, str) for value in texts.values()):
        raise TypeError(f"{', '.join(_TEXTS)} are not all texts")
    return Run(
        **texts,
        **lists,
        mpp=data["mpp"],
        parameters=data["parameters"],
        known=tuple(UUID(value) for value in data["known"]),
        undoing=tuple(UUID(value) for value in data["undoing"]),
        digest=data.get("digest"),
        backup=data.get("backup"),
    )


def _object_to_json(item: RunObject) -> dict[str, Any]:
    record = item.record
    return {
        "id": str(record.id),
        "class": record.path_class,
        "training_class": item.training_class,
        "role": item.role,
        "kept": item.kept,
        "kind": record.kind,
        "name": record.name,
        "digest": digest_of(record),
        "parent": None if record.parent is None else str(record.parent),
        "measurements": dict(record.measurements),
        "metadata": dict(record.metadata),
        "roi": record.roi,
        "plane": list(record.plane),
        "class_probability": None if math.isnan(record.class_probability) else record.class_probability,
        "wkb": None if record.geometry is None else _packed(record.geometry),
    }


def _object_from_json(data: Mapping[str, Any]) -> RunObject:
    record = Annotation(
        id=UUID(data["id"]),
        path_class=data["class"],
        kind=data["kind"],
        name=data["name"],
        parent=None if data["parent"] is None else UUID(data["parent"]),
        measurements=data["measurements"],
        metadata=data["metadata"],
        roi=data["roi"],
        plane=Plane(*data["plane"]),
        class_probability=math.nan if data["class_probability"] is None else data["class_probability"],
        geometry=None if data["wkb"] is None else _unpacked(data["wkb"]),
    )
    if digest_of(record) != data["digest"]:
        raise ValueError(f"object {record.id} does not have the digest that is written for it")
    return RunObject(record=record, training_class=data["training_class"], role=data["role"], kept=data["kept"])


def _packed(geometry: BaseGeometry) -> str:
    return base64.b64encode(zlib.compress(shapely.to_wkb(geometry), 6)).decode()


def _unpacked(text: str) -> BaseGeometry:
    return shapely.from_wkb(zlib.decompress(base64.b64decode(text, validate=True)))


def latest(runs: tuple[Run, ...]) -> Run | None:
    """Last run that stands."""
    standing = [run for run in runs if run.state == "done"]
    return standing[-1] if standing else None
