"""Undo runs: what they wrote goes, what they replaced returns."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

from darefine_qupath.errors import DarefineError, ProjectFormatError, ReviewError
from darefine_qupath.limits import DATA, read_file
from darefine_qupath.polygons import ClassPolygon
from darefine_qupath.project import Changes, image_titles
from darefine_qupath.review.clipping import areal, clip_predictions, smallest_part
from darefine_qupath.review.history import finish_interrupted_runs, witness_of
from darefine_qupath.review.new_objects import cut_to
from darefine_qupath.review.ownership import ImageObjects, sort_objects
from darefine_qupath.review.per_image import OnError, for_images
from darefine_qupath.review.run import Run, RunObject
from darefine_qupath.review.run_names import RunFile, call_number, is_named, run_files, runs_folder
from darefine_qupath.review.run_records import list_runs, save_run, with_packed
from darefine_qupath.review.run_result import RunResult
from darefine_qupath.review.run_states import StandingRuns
from darefine_qupath.review.tags import RUN, UNDONE
from darefine_qupath.review.write_options import WriteOptions

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.project import Applied, ImageEntry, Project

__all__ = ["undo"]

_log = logging.getLogger(__name__)

_OVERWRITTEN = (
    "is not in the image any more: its data was restored, saved in QuPath from a state before that run, or copied here"
)


def undo(
    project: Project, run_id: str | None = None, *, dry_run: bool = False, on_error: OnError | None = None
) -> tuple[RunResult, ...]:
    """Take a run back: remove what it added and nobody touched, bring back what it replaced.

    Where nothing was written to an image since, its data is afterwards what it was before, byte for byte. Classes that
    came into the project's list stay there. What returns gives way, as a prediction does, to objects of the run that
    the pathologist took over or rejected.

    Parameters
    ----------
    project : Project
        Open project.
    run_id : str, optional
        A run, or a batch of runs; the last batch by default.
    dry_run : bool, optional
        Only say what would be done.
    on_error : callable, optional
        Told of an image or a run's file that is damaged, after which the others are undone; without it that is an
        error.

    Returns
    -------
    tuple of RunResult
        One per image.

    Raises
    ------
    ReviewError
        If there is no such run, it was undone or overwritten already, or a later one builds on it.
    ProjectError
        If the project cannot be written.
    """
    damaged: dict[str, ReviewError] = {}
    runs = list_runs(project, on_error=None if on_error is None else damaged.__setitem__)  # type: ignore[arg-type]
    stand = StandingRuns(project, runs, on_error)
    unrecorded = stand.unrecorded()
    if run_id is not None:
        wanted = _named(project, stand, (*runs, *unrecorded), run_id)
    else:
        titles = image_titles({image.id: image.name for image in project.images})
        lost = {titles[run.image]: _record_missing(project, run) for run in unrecorded}
        wanted = _last_call(project, stand, runs, {**damaged, **lost})
        first = min(call_number(run) or 0 for run in wanted)
        last = max(run.number for run in wanted)
        for missing in unrecorded:
            error = lost[titles[missing.image]]
            if missing.number > last:
                raise ReviewError(f"The last run cannot be undone: {error}") from error
            if missing.number >= first:
                damaged[titles[missing.image]] = error
        if on_error is None and damaged:
            raise next(iter(damaged.values()))
    for run in wanted:
        current = stand.current(run.image)
        if current is not None and current.id != run.id:
            raise ReviewError(f"Run {current.id} of {run.image_name!r} came after {run.id}; undo that one first")
    if on_error is not None:
        for name, error in damaged.items():
            on_error(name, error)
    of_image = {run.image: run for run in wanted}
    images = [project.image(run.image) for run in wanted]
    done = for_images(images, lambda image: _undo_one(project, of_image[image.id], dry_run=dry_run), on_error)
    return tuple(result for _, result in done)


def _record_missing(project: Project, run: Run) -> ReviewError:
    return ReviewError(
        f"{run.image_name!r} was written last by run {run.id}, whose record is not in {runs_folder(project)}; put it "
        f"back, or undo {run.id} by its id: that removes its objects that nobody touched, but brings none back"
    )


def _last_call(
    project: Project, stand: StandingRuns, runs: Sequence[Run], damaged: Mapping[str, ReviewError]
) -> tuple[Run, ...]:
    """Find the runs of the last call of predict of which something stands."""
    files = {file.id: file for file in run_files(project) if file.path.name in damaged}
    for run in sorted(runs, key=lambda run: run.order, reverse=True):
        current = stand.current(run.image)
        if current is None or current.id != run.id:
            if stand.state(run) == "overwritten":
                _log.warning("%s: run %s is left out, it %s", run.image_name, run.id, _OVERWRITTEN)
            continue
        for file in files.values():
            later = file.order > run.order and not _is_of_call(file, run)
            if later and (file.image is None or stand.witness(file.image) == file.id):
                error = damaged[file.path.name]
                raise ReviewError(f"The last run cannot be undone: {error}; or name the run to undo") from error
        call = [other for other in runs if other.batch == run.batch]
        for other in call:
            if other.order < run.order and stand.state(other) == "overwritten":
                _log.warning("%s: run %s is left out, it %s", other.image_name, other.id, _OVERWRITTEN)
        return tuple(other for other in call if stand.state(other) == "done" and stand.current(other.image))
    raise next(reversed([*damaged.values()]), ReviewError(f"There is no run to undo in {project.path}"))


def _is_of_call(file: RunFile, run: Run) -> bool:
    """Whether a damaged file is of the same call of predict as a run."""
    if file.call is not None:
        return file.call == call_number(run)
    # The name of a file of before there were numbers does not tell; what is left of it may.
    with contextlib.suppress(DarefineError):
        return f'"batch": "{run.batch}"'.encode() in read_file(file.path, DATA)
    return False


def _named(project: Project, stand: StandingRuns, runs: Sequence[Run], run_id: str) -> tuple[Run, ...]:
    """Find the run of an id, or the runs of a batch of that id."""
    known = [run for run in runs if is_named(run.id, run_id) or is_named(run.batch, run_id)]
    if not known:
        raise ReviewError(f"No run {run_id!r} in {runs_folder(project)}; `darefine runs` lists them")
    # The first run of a batch lends its id to it: then all of them are meant.
    meant = {run.id for run in known if is_named(run.id, run_id) and not is_named(run.batch, run_id)}
    meant = meant or {run.id for run in known}
    wanted = tuple(run for run in known if run.id in meant and stand.state(run) == "done")
    if not wanted:
        lost = any(stand.state(run) == "overwritten" for run in known)
        raise ReviewError(f"Run {run_id!r} {_OVERWRITTEN}" if lost else f"Run {run_id!r} was undone already")
    return wanted


def _undo_one(project: Project, run: Run, *, dry_run: bool) -> RunResult:
    image = project.image(run.image)
    found = sort_objects(project, image)
    if run.id != (witness_of(found.state) if found.run is None else found.run.id):
        raise ReviewError(
            f"{image.name!r} was not written by run {run.id} last, but by one whose record is not in "
            f"{runs_folder(project)}; put it back, or use `darefine restore`"
        )
    added = {item.id for item in run.added}
    # A part of an object that made way for another is known by its metadata only.
    removed = [
        item.written.id
        for item in found.untouched
        if item.written.id in added or item.written.record.metadata.get(RUN) == run.id
    ]
    present = {record.id for record in found.state.objects}
    missing = [item for item in run.replaced if item.id not in present]
    whole, parts = _cut_to_review(missing, run, found)
    restored = [item.record for item in (*whole, *parts)]
    result = RunResult(
        run=run.id,
        image=run.image,
        image_name=run.image_name,
        added=len(restored),
        kept=len(found.untouched) - len(removed),
        removed=len(removed),
        adopted=len(found.adopted),
        rejected=len(found.rejected),
        is_dry=dry_run,
    )
    if dry_run:
        return result
    finish_interrupted_runs(project, found.history)
    # What does not return whole is no object of the former run any more; otherwise it would count as deleted.
    _forget(project, image, run, {item.id for item in missing} - {item.id for item in whole})
    run = replace(
        run,
        state="undoing",
        undoing=tuple(removed),
        rejected=tuple(item.written for item in found.rejected),
        survivors=(*(item.written for item in found.adopted), *parts),
        replaced=tuple(item for item in run.replaced if item.id in present or item in whole),
    )
    run = with_packed(run)
    save_run(project, run)
    applied = _taken_back(project, image, run)
    if applied is None:
        properties: dict[str, str | None] = {} if witness_of(found.state) is None else {RUN: run.former}
        if run.survivors or UNDONE in found.state.properties:
            properties[UNDONE] = run.id if run.survivors else None
        changes = Changes(add=restored, remove=removed, properties=properties)
        applied = project.apply(image, changes, version=found.state.version)
    save_run(project, replace(run, state="undone", undoing=()))
    return replace(result, warnings=applied.warnings)


def _taken_back(project: Project, image: ImageEntry, run: Run) -> Applied | None:
    """Bring the former file back, the order of its objects included, where nothing was written since."""
    if run.digest is None or run.backup is None:
        return None
    backup = project.folder / run.backup
    try:
        if run.basis and backup.is_file() and sha256(backup.read_bytes()).hexdigest() != run.basis:
            raise ProjectFormatError("this is not what was kept before the run", path=backup)
        return project.take_back(image, digest=run.digest, backup=backup)
    except (ProjectFormatError, OSError) as error:
        _log.warning("%s; what run %s replaced comes back from the run's own record", error, run.id)
        return None


def _cut_to_review(
    missing: Sequence[RunObject], run: Run, found: ImageObjects
) -> tuple[list[RunObject], list[RunObject]]:
    """Find the objects that can return as they were, and cut the others to what the pathologist decided since.

    Only objects of the run itself count: to all others the former run gave way already, or they were put over it.
    """
    added = {item.id for item in run.added}
    standing = [areal(item.current.geometry) for item in found.adopted if item.current and item.written.id in added]
    refused: dict[str, list[BaseGeometry]] = {}
    for rejected in found.rejected:
        place = areal(rejected.written.record.geometry)
        if rejected.written.id in added and place is not None:
            refused.setdefault(rejected.written.training_class, []).append(place)
    regions = {number: item for number, item in enumerate(missing) if item.role == "region"}
    clipped = clip_predictions(
        # The label says which object a part is of.
        [ClassPolygon(label=number, geometry=item.record.geometry) for number, item in regions.items()],
        standing=[shape for shape in standing if shape is not None],
        rejected={number: refused.get(item.training_class, []) for number, item in regions.items()},
        min_area_px2=smallest_part(run.mpp, WriteOptions()) if run.min_area_px2 is None else run.min_area_px2,
        mpp=run.mpp,
    )
    returned = {number for number, item in enumerate(missing) if item.role != "region"}
    parts: list[RunObject] = []
    for polygon in clipped.polygons:
        item = missing[polygon.label]
        if polygon.geometry is item.record.geometry:
            returned.add(polygon.label)
        else:
            record = cut_to(item.record, polygon, uuid5(item.id, f"{run.id}/{len(parts)}"))
            parts.append(replace(item, record=record))
    return [missing[number] for number in sorted(returned)], parts


def _forget(project: Project, image: ImageEntry, run: Run, gone: Collection[UUID]) -> None:
    """Strike objects from the runs that stand once a run is taken back."""
    for former in list_runs(project, image, on_error=_pass_over) if gone else ():
        kept = tuple(item for item in former.objects if item.id not in gone)
        if former.state == "done" and former.order < run.order and len(kept) < len(former.objects):
            save_run(project, replace(former, objects=kept))


def _pass_over(_: str, error: DarefineError) -> None:
    _log.warning("%s", error)
