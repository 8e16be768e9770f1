"""Runs on disk: what one prediction of one image by one model wrote, so that the next knows what is ours.

Every run is one JSON file, ``<project>/darefine/runs/<run id>.json``. It holds the objects as they were written,
those of them that a pathologist took over or rejected since, and the objects of the run before that it replaced, so
each file stands for itself: to compare, to go on and to undo, nothing else is needed.

Runs are ordered by a number that the project counts, since clocks go back, and differ between machines. Runs of before
there were numbers come first, by date.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation, Kind, Plane, RoiKind
from darefine_qupath.errors import DarefineError, ReviewError
from darefine_qupath.limits import DATA, parse_json, read_file, wording
from darefine_qupath.project.staging import Batch, write_lock

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.project import ImageEntry, Project

__all__ = [
    "DIGEST",
    "FORMAT",
    "OnError",
    "Run",
    "RunFile",
    "RunObject",
    "call_number",
    "digest_of",
    "digests_of",
    "is_named",
    "list_runs",
    "new_token",
    "next_number",
    "now_utc",
    "number_of",
    "read_run",
    "run_files",
    "run_name",
    "runs_folder",
    "save_run",
    "take_number",
    "with_packed",
]

DIGEST = "darefine.digest"
"""Metadata of every object of ours: its digest as it was written."""

FORMAT = "darefine-run/2"
_FIRST_FORMAT = "darefine-run/1"
"""Without numbers; every object with its own geometry and digest."""

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
        Number, image, and a random part that no other project's run has, nor a copy's of this project; without it in
        older runs, and a date instead of the number in the oldest.
    number : int
        Orders the runs of a project; 0 in runs of before there were numbers.
    batch : str
        Common to the runs of one call of predict.
    image, image_name : str
        Entry id and name.
    model : str
        Id of the model file.
    date : str
        ISO 8601, UTC, by this machine's clock.
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
    survivors : tuple of RunObject
        Of an undone run: objects of ours that stayed in the image, because they belong to the pathologist.
    min_area_px2 : float or None
        What was left of a clipped polygon was left out when it was smaller; None in older runs.
    known : tuple of UUID
        Annotations that were there before the first run.
    undoing : tuple of UUID
        What an undo removes.
    digest, backup : str or None
        Fingerprint of the image's data as this run left it, and where it is kept as it was before, relative to the
        project's folder. None where the run changed no object, or there was nothing before.
    basis : str
        Version of the image's data that the run was planned for; empty in runs of before there were numbers.
    former : str or None
        Run that the image's data bore the witness of before; None where it bore none.
    packed : PackedObjects or None
        See `with_packed`.
    """

    id: str
    batch: str
    image: str
    image_name: str
    model: str
    date: str
    state: State
    number: int = 0
    mpp: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    objects: tuple[RunObject, ...] = ()
    adopted: tuple[RunObject, ...] = ()
    rejected: tuple[RunObject, ...] = ()
    replaced: tuple[RunObject, ...] = ()
    survivors: tuple[RunObject, ...] = ()
    min_area_px2: float | None = None
    known: tuple[UUID, ...] = ()
    undoing: tuple[UUID, ...] = ()
    digest: str | None = None
    backup: str | None = None
    basis: str = ""
    former: str | None = None
    packed: PackedObjects | None = field(default=None, repr=False, compare=False)

    @property
    def order(self) -> tuple[int, str]:
        """Where the run stands among all of the project."""
        return self.number, self.id

    @property
    def added(self) -> tuple[RunObject, ...]:
        """Objects that this run brought."""
        return tuple(item for item in self.objects if not item.kept)


def digest_of(record: Annotation) -> str:
    """Fingerprint of what makes an object what it is: identity, kind, class, name and outline.

    The outline counts as a set of points at QuPath's precision, so that neither the order of its rings nor where they
    start matters: engines and QuPath versions differ in both.
    """
    return digests_of([record])[0]


def digests_of(records: Sequence[Annotation]) -> list[str]:
    """As `digest_of`, of many objects at once."""
    outlines = _outlines([record.geometry for record in records])
    texts = ("\n".join((str(item.id), item.kind, item.path_class or "", item.name or "")) for item in records)
    pairs = zip(texts, outlines, strict=True)
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass") + outline).hexdigest()[:32] for text, outline in pairs]


def _outlines(geometries: Sequence[BaseGeometry | None]) -> Iterator[bytes]:
    if not geometries:
        return
    canonical = shapely.normalize(np.array(geometries, object))
    points, owners = shapely.get_coordinates(canonical, return_index=True)
    numbers = np.rint(points * 100).astype("<i8")
    ends = np.searchsorted(owners, np.arange(len(geometries)), side="right").tolist()
    for shape, (start, end) in zip(canonical, pairwise([0, *ends]), strict=True):
        yield b"" if shape is None else str(shape.geom_type).encode() + numbers[start:end].tobytes()


# -- files


class RunFile(NamedTuple):
    """A run's file by its name alone.

    Attributes
    ----------
    order : tuple of int and str
        Number and id; where the run stands among all of the project.
    path : Path
        The file.
    image : str or None
        Entry id; None where only the content tells (runs of before there were numbers).
    call : int or None
        Number of the first run of the same call of predict; None where only the content tells.
    """

    order: tuple[int, str]
    path: Path
    image: str | None
    call: int | None

    @property
    def id(self) -> str:
        """Run id."""
        return self.order[1]


_COUNTER = "last-run"
_NAME = re.compile(r"([0-9]{1,18})-([^_]+?)(-[0-9a-f]{8})?(?:_([0-9]{1,18}))?", re.ASCII)
_PATIENCE_S = 60.0
"""How long a run waits for its number or its record: another process may be writing a large image."""


def runs_folder(project: Project) -> Path:
    """Where a project's runs are."""
    return project.folder / "darefine" / "runs"


def new_token() -> str:
    """Return the random part of a new run's id: numbers begin anew in a copy of a project, or without its records."""
    return secrets.token_hex(4)


def run_name(number: int, image: ImageEntry, token: str) -> str:
    """Id of a run."""
    return f"{number:06d}-{image.id}-{token}"


def is_named(run_id: str, name: str) -> bool:
    """Whether a name means a run: its id, which people may type without the random part."""
    found = _NAME.fullmatch(run_id)
    return name == run_id or (found is not None and name == f"{found[1]}-{found[2]}")


def number_of(run_id: str | None) -> int | None:
    """Read the number in a run's id; None where it has none."""
    found = None if run_id is None else _NAME.fullmatch(run_id)
    return None if found is None else int(found[1])


def call_number(run: Run) -> int | None:
    """Return the number of the first run of the same call of predict; the names of their files tell it too."""
    return number_of(run.batch) or run.number or None


def _path_of(project: Project, run: Run) -> Path:
    """File of a run; its name tells the call too, so that a damaged file still says what it belongs to."""
    call = call_number(run) if run.number else None
    suffix = "" if call in (None, run.number) else f"_{call:06d}"
    return runs_folder(project) / f"{run.id}{suffix}.json"


def run_files(project: Project, image: ImageEntry | None = None) -> tuple[RunFile, ...]:
    """List the files of runs, oldest first.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry, optional
        Only those that may be of this image; all by default.
    """
    names = _names(project)
    if image is not None:
        names = [name for name in names if f"-{image.id}" in name]
    found = [_run_file(runs_folder(project) / name) for name in names]
    return tuple(sorted(file for file in found if image is None or file.image in (image.id, None)))


def _names(project: Project) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        # A path for each name would cost more than all the rest.
        return [name for name in os.listdir(runs_folder(project)) if name.endswith(".json")]  # noqa: PTH208
    return []


def _run_file(path: Path) -> RunFile:
    parts = _NAME.fullmatch(path.stem)
    if parts is None:
        return RunFile((0, path.stem), path, None, None)
    number, image, token, call = parts.groups()
    return RunFile((int(number), f"{number}-{image}{token or ''}"), path, image, int(call or number))


def next_number(project: Project, *, after: str | None = None) -> int:
    """Return the number that the next run would get; it is taken only by `take_number`.

    Parameters
    ----------
    project : Project
        Open project.
    after : str, optional
        Id of the run that the image's data was written by: records may be gone, or be those of another copy.
    """
    numbers = [number_of(name.removesuffix(".json")) or 0 for name in _names(project)]
    counter = runs_folder(project).parent / _COUNTER
    with contextlib.suppress(OSError, ValueError):
        # A run's file that was moved away does not give its number free.
        numbers.append(int(counter.read_bytes()[:18]))
    return max([number_of(after) or 0, *numbers]) + 1


def take_number(project: Project, *, after: str | None = None) -> int:
    """Take the number of a new run, as `next_number` gives it; no other process gets the same.

    Raises
    ------
    ProjectLockedError
        If another process holds the project for long.
    ProjectWriteError
        If the project cannot be written to.
    """
    with write_lock(project.folder, patience_s=_PATIENCE_S):
        number = next_number(project, after=after)
        with Batch(project.folder) as batch:
            batch.stage(runs_folder(project).parent / _COUNTER, f"{number}\n".encode())
            batch.commit()
    return number


def now_utc() -> str:
    """Date of a run that starts now."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save_run(project: Project, run: Run) -> Path:
    """Write a run, all of it or nothing.

    Raises
    ------
    ProjectLockedError
        If another process holds the project for long.
    ProjectWriteError
        If it cannot be written.
    """
    path = _path_of(project, run)
    head = json.dumps({"format": FORMAT, **_head_to_json(run)}, ensure_ascii=False, indent=1)
    # Both are JSON objects; they become one.
    text = f"{head[:-2]},\n {with_packed(run).packed.text[1:]}\n"  # type: ignore[union-attr]
    # Under the lock: whoever holds it next removes what a killed writer staged.
    with write_lock(project.folder, patience_s=_PATIENCE_S), Batch(project.folder) as batch:
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
            run = _run_from_json(data) if found in (FORMAT, _FIRST_FORMAT) else None
    except DarefineError as error:
        raise ReviewError(f"{path} is damaged ({error}); move it away to go on without that run's record") from error
    if run is None:
        raise ReviewError(
            f"{path} has the format {found!r}, expected {FORMAT!r}; update darefine or move the file away"
        )
    return run


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
    more = {} if data["format"] == _FIRST_FORMAT else _counted(data)
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


class PackedObjects(NamedTuple):
    """Objects of a run as they stand in its file, and what they were made of."""

    text: str
    lists: tuple[tuple[RunObject, ...], ...]


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
