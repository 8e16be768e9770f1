"""Store runs on disk, so that the next one knows what is ours.

Every run is one JSON file, ``<project>/darefine/runs/<run id>.json``. It holds the objects as they were written,
those of them that a pathologist took over or rejected since, and the objects of the run before that it replaced, so
each file stands for itself: to compare, to go on and to undo, nothing else is needed.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, Kind, Plane, RoiKind
from darefine_qupath.errors import DarefineError, ReviewError
from darefine_qupath.limits import DATA, parse_json, read_file, wording
from darefine_qupath.project.staging import StagedFiles, write_lock
from darefine_qupath.review.per_image import OnError
from darefine_qupath.review.run import PackedObjects, Role, Run, RunObject, State, digest_of, digests_of
from darefine_qupath.review.run_names import LOCK_PATIENCE_S, RunFile, number_of, path_of_run, run_files
from darefine_qupath.review.tags import DIGEST

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.project import ImageEntry, Project

__all__ = ["FORMAT", "list_runs", "read_run", "save_run", "with_packed"]


FORMAT = "darefine-run/2"
FIRST_FORMAT = "darefine-run/1"
"""Without numbers; every object with its own geometry and digest."""

_log = logging.getLogger(__name__)


# -- files


def save_run(project: Project, run: Run) -> Path:
    """Write a run, all of it or nothing.

    Raises
    ------
    ProjectLockedError
        If another process holds the project for long.
    ProjectWriteError
        If it cannot be written.
    """
    path = path_of_run(project, run)
    head = json.dumps({"format": FORMAT, **_head_to_json(run)}, ensure_ascii=False, indent=1)
    # Both are JSON objects; they become one.
    text = f"{head[:-2]},\n {with_packed(run).packed.text[1:]}\n"  # type: ignore[union-attr]
    # Under the lock: whoever holds it next removes what a killed writer staged.
    with write_lock(project.folder, patience_s=LOCK_PATIENCE_S), StagedFiles(project.folder) as batch:
        # Half a character becomes an escape of JSON.
        batch.stage(path, text.encode("utf-8", "backslashreplace"))
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
    for file in run_files(project, image):
        try:
            runs.append(read_run(file.path))
        except ReviewError as error:
            if on_error is None:
                raise
            on_error(file.path.name, error)
    return tuple(run for run in runs if image is None or run.image == image.id)


def read_run(path: Path) -> Run:
    """Read a run's file.

    Raises
    ------
    ReviewError
        If it is damaged or of another format; the message names it.
    """
    try:
        with wording(ReviewError):
            data = parse_json(read_file(path, DATA), DATA, non_finite=True, half_characters=True)
            found = data.get("format") if isinstance(data, dict) else None
            run = _run_from_json(data) if found in (FORMAT, FIRST_FORMAT) else None
    except DarefineError as error:
        raise ReviewError(f"{path} is damaged ({error}); move it away to go on without that run's record") from error
    if run is None:
        raise ReviewError(
            f"{path} has the format {found!r}, expected {FORMAT!r}; update darefine or move the file away"
        )
    return run


def readable_runs(files: Iterable[RunFile]) -> list[Run]:
    """Read runs, and leave out those whose file is damaged, with a warning."""
    found = []
    for file in files:
        try:
            found.append(read_run(file.path))
        except ReviewError as error:
            _log.warning("%s", error)
    return found


def _run_from_json(data: Mapping[str, Any]) -> Run:
    # Undone runs did not always say what they left in the image.
    data = {"survivors": [], **data}
    lists: Mapping[str, Any] = _objects_from_json(data) if data["format"] == FORMAT else _first_objects_from_json(data)
    return Run(**_head_from_json(data), **lists)


_TEXTS = ("id", "batch", "image", "image_name", "model", "date", "state")
_OBJECT_LISTS = ("objects", "adopted", "rejected", "replaced", "survivors")


def _head_to_json(run: Run) -> dict[str, Any]:
    return {
        **{name: getattr(run, name) for name in _TEXTS},
        "number": run.number,
        "former": run.former,
        "basis": run.basis,
        "digest": run.digest,
        "backup": run.backup,
        "mpp": run.mpp,
        "min_area_px2": run.min_area_px2,
        "parameters": dict(run.parameters),
        "known": base64.b64encode(b"".join(value.bytes for value in run.known)).decode(),
        "undoing": [str(value) for value in run.undoing],
    }


def _head_from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: _checked(data, name, str) for name in _TEXTS}
    if texts["state"] not in get_args(State):
        raise ValueError(f"{texts['state']!r} is no state of a run")
    mpp, min_area = _number(data, "mpp"), _number({"min_area_px2": None, **data}, "min_area_px2")
    if mpp is not None and not 0 < mpp < math.inf:
        raise ValueError(f"{mpp} is no pixel size")
    if min_area is not None and not 0 <= min_area < math.inf:
        raise ValueError(f"{min_area} is no area")
    # Numbers came with the second format.
    more = {} if data["format"] == FIRST_FORMAT else _counted(data)
    return {
        **texts,
        **more,
        "mpp": mpp,
        "min_area_px2": min_area,
        "parameters": _checked(data, "parameters", dict),
        "known": _known(data["known"]),
        "undoing": tuple(UUID(value) for value in _checked(data, "undoing", list)),
        "digest": _checked({"digest": None, **data}, "digest", str, None),
        "backup": _checked({"backup": None, **data}, "backup", str, None),
    }


def _counted(data: Mapping[str, Any]) -> dict[str, Any]:
    number = _checked(data, "number", int)
    if number != (number_of(data["id"]) or 0):
        raise ValueError(f"run {data['id']} has the number {number}")
    return {
        "number": number, "former": _checked(data, "former", str, None), "basis": _checked(data, "basis", str),
    }  # fmt: skip


def _known(value: object) -> tuple[UUID, ...]:
    if isinstance(value, list):
        return tuple(UUID(text) for text in value)
    content = base64.b64decode(value, validate=True)  # type: ignore[arg-type]
    return tuple(UUID(bytes=content[start : start + 16]) for start in range(0, len(content), 16))


def _checked(data: Mapping[str, Any], name: str, *kinds: type | None) -> Any:  # noqa: ANN401 - one of `kinds`
    value = data[name]
    # JSON has no integers that are truth values.
    if not any(value is None if kind is None else type(value) is kind for kind in kinds):
        raise TypeError(f"{name} is {json.dumps(value)[:40]}")
    return value


def _number(data: Mapping[str, Any], name: str) -> float | None:
    value = _checked(data, name, int, float, None)
    return None if value is None else float(value)


# -- objects in a file


def with_packed(run: Run) -> Run:
    """Return the run with its objects packed for its file, which is most of the work of writing it."""
    lists = tuple(getattr(run, name) for name in _OBJECT_LISTS)
    if run.packed is not None and all(one is two for one, two in zip(run.packed.lists, lists, strict=True)):
        return run
    items = list(chain.from_iterable(lists))
    outlines: list[bytes | None] = []
    if items:
        outlines = shapely.to_wkb(np.array([item.record.geometry for item in items], object)).tolist()
    packed = zlib.compress(b"".join(outline for outline in outlines if outline is not None), 1)
    content = {
        **{name: [_object_to_json(item) for item in found] for name, found in zip(_OBJECT_LISTS, lists, strict=True)},
        # -1 is that of an object without one.
        "sizes": [-1 if outline is None else len(outline) for outline in outlines],
        "outlines": base64.b64encode(packed).decode(),
    }
    return replace(run, packed=PackedObjects(json.dumps(content, ensure_ascii=False), lists))


def _objects_from_json(data: Mapping[str, Any]) -> dict[str, tuple[RunObject, ...]]:
    outlines = _unpacked(data["outlines"], data["sizes"])
    shapes = iter(shapely.from_wkb(np.array(outlines, object)).tolist() if outlines else [])
    found = {
        name: tuple(_object_from_json(item, next(shapes)) for item in _checked(data, name, list))
        for name in _OBJECT_LISTS
    }
    if next(shapes, found) is not found:
        raise ValueError("there are more outlines than objects")
    _check_digests(chain.from_iterable(found.values()), chain.from_iterable(data[name] for name in _OBJECT_LISTS))
    return found


def _check_digests(items: Iterable[RunObject], written: Iterable[Mapping[str, Any]]) -> None:
    records = [item.record for item in items]
    for record, digest, stored in zip(records, digests_of(records), written, strict=True):
        if digest != stored["digest"]:
            raise ValueError(f"object {record.id} does not have the digest that is written for it")


def _unpacked(packed: str, sizes: Sequence[int]) -> list[bytes | None]:
    lengths = [max(0, size) for size in sizes]
    content = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), sum(lengths) + 1)
    if len(content) != sum(lengths):
        raise ValueError(f"the outlines have {len(content)} bytes instead of {sum(lengths)}")
    places = pairwise(accumulate(lengths, initial=0))
    return [None if size < 0 else content[start:end] for size, (start, end) in zip(sizes, places, strict=True)]


def _first_objects_from_json(data: Mapping[str, Any]) -> dict[str, tuple[RunObject, ...]]:
    found = {name: tuple(map(_first_object_from_json, _checked(data, name, list))) for name in _OBJECT_LISTS}
    _check_digests(chain.from_iterable(found.values()), chain.from_iterable(data[name] for name in _OBJECT_LISTS))
    return found


def _first_object_from_json(item: Mapping[str, Any]) -> RunObject:
    packed = item["wkb"]
    geometry = None if packed is None else shapely.from_wkb(zlib.decompress(base64.b64decode(packed, validate=True)))
    return _object_from_json(item, geometry)


# What most objects of a run have is left out.
_USUAL: dict[str, Any] = {
    "role": "region", "kept": False, "kind": "annotation", "parent": None, "plane": list(Plane()), "roi": None,
    "class_probability": None,
}  # fmt: skip


def _object_to_json(item: RunObject) -> dict[str, Any]:
    record = item.record
    values = {
        "id": str(record.id),
        "class": record.path_class,
        "training_class": item.training_class,
        "name": record.name,
        "digest": _known_digest(record),
        "measurements": dict(record.measurements),
        "metadata": dict(record.metadata),
        "role": item.role,
        "kept": item.kept,
        "kind": record.kind,
        "parent": None if record.parent is None else str(record.parent),
        "plane": list(record.plane),
        "roi": record.roi,
        "class_probability": None if math.isnan(record.class_probability) else record.class_probability,
    }
    return {key: value for key, value in values.items() if key not in _USUAL or value != _USUAL[key]}


def _known_digest(record: Annotation) -> str:
    """Digest of an object, which was taken when it was made; one that was edited has no outline on record."""
    return (record.geometry is not None and record.metadata.get(DIGEST)) or digest_of(record)


def _object_from_json(item: Mapping[str, Any], geometry: BaseGeometry | None) -> RunObject:
    item = {**_USUAL, **item}
    _check_choice(item, "role", Role)
    _check_choice(item, "kind", Kind)
    if item["roi"] is not None:
        _check_choice(item, "roi", RoiKind)
    probability = _number(item, "class_probability")
    parent = _checked(item, "parent", str, None)
    record = Annotation(
        id=UUID(_checked(item, "id", str)),
        path_class=_checked(item, "class", str, None),
        kind=item["kind"],
        name=_checked(item, "name", str, None),
        parent=None if parent is None else UUID(parent),
        measurements=_numbers(_checked(item, "measurements", dict)),
        metadata=_texts(_checked(item, "metadata", dict)),
        roi=item["roi"],
        plane=_plane(item["plane"]),
        class_probability=math.nan if probability is None else probability,
        geometry=geometry,
    )
    return RunObject(
        record=record,
        training_class=_checked(item, "training_class", str),
        role=item["role"],
        kept=_checked(item, "kept", bool),
    )


def _check_choice(item: Mapping[str, Any], name: str, choices: object) -> None:
    if item[name] not in get_args(choices):
        raise ValueError(f"{name} is {json.dumps(item[name])[:40]}")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(_checked(values, name, int, float)) for name in values}


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: _checked(values, name, str) for name in values}


def _plane(values: Sequence[Any]) -> Plane:
    c, z, t = (_checked({"plane": value}, "plane", int) for value in values)
    return Plane(c, z, t)
