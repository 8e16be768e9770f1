"""Runs taken back: what they wrote goes, what they replaced returns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

from darefine_qupath.errors import DarefineError, ReviewError
from darefine_qupath.polygons import ClassPolygon
from darefine_qupath.project import Changes
from darefine_qupath.review.giveway import areal, give_way
from darefine_qupath.review.ours import RUN, Survey, for_images, settle, settled, survey
from darefine_qupath.review.runs import OnError, Run, RunObject, latest, list_runs, runs_folder, save_run
from darefine_qupath.review.writeback import RunResult, cut_to, smallest_part

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.annotations import Annotation
    from darefine_qupath.project import ImageEntry, Project

__all__ = ["undo"]


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
        If there is no such run, it was undone already, or a later one stands on it.
    ProjectError
        If the project cannot be written.
    """
    damaged: dict[str, DarefineError] = {}
    runs = list_runs(project, on_error=None if on_error is None else damaged.__setitem__)
    standing = _standing_runs(project, runs, on_error)
    wanted = _last_batch(project, standing, damaged) if run_id is None else _named(project, runs, standing, run_id)
    for run in wanted:
        last = latest(tuple(other for other in standing if other.image == run.image))
        if last is not None and last.id != run.id:
            raise ReviewError(f"Run {last.id} of {run.image_name!r} came after {run.id}; undo that one first")
    if on_error is not None:
        for name, error in damaged.items():
            on_error(name, error)
    of_image = {run.image: run for run in wanted}
    images = [project.image(run.image) for run in wanted]
    done = for_images(images, lambda image: _undo_one(project, of_image[image.id], dry_run=dry_run), on_error)
    return tuple(result for _, result in done)


def _standing_runs(project: Project, runs: Iterable[Run], on_error: OnError | None) -> tuple[Run, ...]:
    """Find the runs that are done; how one ended that was cut off the project tells."""
    images = {image.id: image for image in project.images}
    found = [run for run in runs if run.image in images and run.state == "done"]
    for run in runs:
        if run.image in images and run.state in ("pending", "undoing"):
            objects = for_images([images[run.image]], project.objects, on_error)
            found += [now for _, records in objects if (now := settled(run, records)).state == "done"]
    return tuple(sorted(found, key=lambda run: run.id))


def _last_batch(project: Project, standing: Sequence[Run], damaged: Mapping[str, DarefineError]) -> tuple[Run, ...]:
    if not standing:
        raise next(iter(damaged.values()), ReviewError(f"There is no run to undo in {project.path}"))
    last = max(standing, key=lambda run: run.id)
    for name, error in damaged.items():
        if name > f"{last.id}.json":
            raise ReviewError(f"The last run cannot be undone: {error}; or name the run to undo") from error
    return tuple(run for run in standing if run.batch == last.batch)


def _named(project: Project, runs: Sequence[Run], standing: Sequence[Run], run_id: str) -> tuple[Run, ...]:
    """Find the run of an id, or the runs of a batch of that id."""
    known = [run for run in runs if run_id in (run.id, run.batch)]
    if not known:
        raise ReviewError(f"No run {run_id!r} in {runs_folder(project)}; `darefine runs` lists them")
    # The first run of a batch lends its id to it: then all of them are meant.
    meant = {run.id for run in known if run.id == run_id and run.batch != run_id} or {run.id for run in known}
    wanted = tuple(run for run in standing if run.id in meant)
    if not wanted:
        raise ReviewError(f"Run {run_id!r} was undone already")
    return wanted


def _undo_one(project: Project, run: Run, *, dry_run: bool) -> RunResult:
    image = project.image(run.image)
    objects = project.objects(image)
    found = survey(project, image, objects=objects)
    added = {item.id for item in run.added}
    # A part of an object that made way for another is known by its metadata only.
    removed = [
        item.written.id
        for item in found.untouched
        if item.written.id in added or item.written.record.metadata.get(RUN) == run.id
    ]
    present = {record.id for record in objects}
    missing = [item for item in run.replaced if item.id not in present]
    whole, parts = _making_way(missing, run, found)
    restored = [*(item.record for item in whole), *parts]
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
    settle(project, image, objects)
    rejected = tuple(item.written for item in found.rejected)
    # What does not return whole is no object of the former run any more; otherwise it would count as deleted.
    _forget(project, image, run, {item.id for item in missing} - {item.id for item in whole})
    run = replace(run, replaced=tuple(item for item in run.replaced if item.id in present or item in whole))
    save_run(project, replace(run, state="undoing", undoing=tuple(removed), rejected=rejected))
    applied = None
    if run.digest is not None and run.backup is not None:
        # Nothing was written since: the former file comes back, the order of its objects included.
        applied = project.take_back(image, digest=run.digest, backup=project.folder / run.backup)
    if applied is None:
        applied = project.apply(image, Changes(add=restored, remove=removed))
    save_run(project, replace(run, state="undone", undoing=(), rejected=rejected))
    return replace(result, warnings=applied.warnings)


def _making_way(missing: Sequence[RunObject], run: Run, found: Survey) -> tuple[list[RunObject], list[Annotation]]:
    """Objects that can return as they were, and what is left of those where the pathologist made up their mind since.

    Only objects of the run itself count: to all others the former run gave way already, or they were put over it.
    """
    added = {item.id for item in run.added}
    standing = [areal(item.current.geometry) for item in found.adopted if item.current and item.written.id in added]
    refused: dict[str, list[BaseGeometry]] = {}
    for item in found.rejected:
        place = areal(item.written.record.geometry)
        if item.written.id in added and place is not None:
            refused.setdefault(item.written.training_class, []).append(place)
    regions = {number: item for number, item in enumerate(missing) if item.role == "region"}
    yielded = give_way(
        # The label says which object a part is of.
        [ClassPolygon(label=number, geometry=item.record.geometry) for number, item in regions.items()],
        standing=[shape for shape in standing if shape is not None],
        rejected={number: refused.get(item.training_class, []) for number, item in regions.items()},
        min_area_px2=smallest_part(run.mpp),
        mpp=run.mpp,
    )
    returned = {number for number, item in enumerate(missing) if item.role != "region"}
    parts: list[Annotation] = []
    for polygon in yielded.polygons:
        record = missing[polygon.label].record
        if polygon.geometry is record.geometry:
            returned.add(polygon.label)
        else:
            parts.append(cut_to(record, polygon, uuid5(record.id, f"{run.id}/{len(parts)}")))
    return [missing[number] for number in sorted(returned)], parts


def _forget(project: Project, image: ImageEntry, run: Run, gone: Collection[UUID]) -> None:
    """Strike objects from the runs that stand once a run is taken back."""
    for former in list_runs(project, image) if gone else ():
        kept = tuple(item for item in former.objects if item.id not in gone)
        if former.state == "done" and former.id < run.id and len(kept) < len(former.objects):
            save_run(project, replace(former, objects=kept))
