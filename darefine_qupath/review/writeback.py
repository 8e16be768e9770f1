"""Write predictions into a project: planned first, then applied as a whole.

What a pathologist drew, took over or rejected stands; a run replaces only objects of ours that nobody touched. The
same prediction gives the same identities, so doing it again changes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from darefine_qupath.classes import ClassMap, PathClass
from darefine_qupath.errors import ProjectChangedError, ReviewError
from darefine_qupath.project import Changes
from darefine_qupath.review.clipping import ClippedPolygons, clip_to_review, smallest_part
from darefine_qupath.review.history import History, finish_interrupted_runs, witness_of
from darefine_qupath.review.new_objects import ObjectMaker
from darefine_qupath.review.ownership import ImageObjects, sort_objects
from darefine_qupath.review.run import Run, RunObject
from darefine_qupath.review.run_names import new_token, next_number, now_utc, run_name, take_number
from darefine_qupath.review.run_records import save_run, with_packed
from darefine_qupath.review.run_result import RunResult
from darefine_qupath.review.tags import RUN, UNDONE
from darefine_qupath.review.write_options import WriteOptions

if TYPE_CHECKING:
    from darefine_qupath.polygons import ClassPolygon
    from darefine_qupath.project import ImageEntry, Project

__all__ = ["WritePlan", "apply_plan", "plan_write", "write_back"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WritePlan:
    """A write that is planned and not done yet.

    Attributes
    ----------
    run : Run
        As it will be recorded.
    token : str
        Random part of its id.
    changes : Changes
        What the project will be asked to do.
    classes : tuple of PathClass
        Classes that the project does not have yet.
    result : RunResult
        What it comes to.
    history : History
        The image's runs before.
    """

    run: Run
    token: str
    changes: Changes
    classes: tuple[PathClass, ...]
    result: RunResult
    history: History


def write_back(
    project: Project,
    image: ImageEntry,
    polygons: Sequence[ClassPolygon],
    *,
    model: str,
    classes: ClassMap,
    mpp: float | None = None,
    options: WriteOptions = WriteOptions(),
    parameters: Mapping[str, Any] | None = None,
    batch: str | None = None,
    dry_run: bool = False,
) -> RunResult:
    """Write the polygons of one image into its project.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        One of its images.
    polygons : sequence of ClassPolygon
        The prediction, in level-0 pixels.
    model : str
        Id of the model file.
    classes : ClassMap
        The model's classes and colours.
    mpp : float, optional
        Micrometres per level-0 pixel; the project's calibration by default.
    options : WriteOptions, optional
        How polygons become objects.
    parameters : mapping, optional
        Settings of the prediction, for the record; plain JSON values.
    batch : str, optional
        Common id of the runs of one call, so that they can be undone together.
    dry_run : bool, optional
        Only say what would be done.

    Returns
    -------
    RunResult
        Counts, as read back from the project.

    Raises
    ------
    ReviewError
        If a polygon's label is not one of the classes, or a run's file is damaged.
    ProjectError
        If the project cannot be written; it is as it was before.
    """
    plan = plan_write(
        project, image, polygons, model=model, classes=classes, mpp=mpp, options=options, parameters=parameters,
        batch=batch,
    )  # fmt: skip
    return replace(plan.result, is_dry=True) if dry_run else apply_plan(project, image, plan)


def plan_write(
    project: Project,
    image: ImageEntry,
    polygons: Sequence[ClassPolygon],
    *,
    model: str,
    classes: ClassMap,
    mpp: float | None = None,
    options: WriteOptions = WriteOptions(),
    parameters: Mapping[str, Any] | None = None,
    batch: str | None = None,
) -> WritePlan:
    """Plan a write without doing it; see `write_back`.

    Returns
    -------
    WritePlan
        For `apply_plan`.
    """
    _check_labels(polygons, classes)
    mpp = image.mpp if mpp is None else mpp
    found = sort_objects(project, image)
    clipped, warnings = clip_to_review(polygons, found, classes, options, mpp)
    former = witness_of(found.state)
    number, token = next_number(project, after=former), new_token()
    run_id = run_name(number, image, token)
    maker = ObjectMaker(run_id, image, model, classes, options)
    objects = maker.objects(clipped.polygons, found)
    untouched = {item.written.id: item.written for item in found.untouched}
    present = {item.id: replace(item, kept=item.id in untouched) for item in objects}
    gone = [item for item in untouched.values() if item.id not in present]
    gone += [item.written for item in found.rejected if item.current is not None]
    run = Run(
        id=run_id,
        batch=batch or run_id,
        image=image.id,
        image_name=image.name,
        model=model,
        date=now_utc(),
        state="pending",
        number=number,
        mpp=mpp,
        parameters=dict(parameters or {}),
        objects=tuple(replace(untouched[key], kept=True) if item.kept else item for key, item in present.items()),
        adopted=tuple(item.written for item in found.adopted_with_containers),
        rejected=tuple(item.written for item in found.rejected),
        replaced=tuple(gone),
        min_area_px2=smallest_part(mpp, options),
        known=_known(found),
        basis=found.state.version,
        former=former,
    )
    return WritePlan(
        run=run,
        token=token,
        changes=_changes(run, {UNDONE: None} if UNDONE in found.state.properties else {}),
        classes=_new_classes(project, objects, classes),
        result=_result(run, found, clipped, warnings),
        history=found.history,
    )


def apply_plan(project: Project, image: ImageEntry, plan: WritePlan) -> RunResult:
    """Do what was planned: the run's file first, then the project, then the file again.

    Cut off anywhere, the next write or undo sees from the project how it ended.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        The image.
    plan : WritePlan
        From `plan_write`, for the image's data as it is now.

    Returns
    -------
    RunResult
        What was done; another run may have taken the planned one's number meanwhile.

    Raises
    ------
    ProjectChangedError
        If the image's objects changed since they were planned with.
    ProjectError
        If the project cannot be written.
    """
    state = project.state(image)
    if state.version != plan.run.basis:
        raise ProjectChangedError(
            f"{image.name!r} changed since the prediction was laid out for it (QuPath or another program saved it); "
            f"nothing was written, run it again"
        )
    finish_interrupted_runs(project, plan.history)
    plan = _numbered(plan, take_number(project, after=plan.run.former), image)
    run = with_packed(plan.run)
    save_run(project, run)
    if plan.classes:
        project.set_classes([*project.classes, *plan.classes])
    applied = project.apply(image, plan.changes, version=plan.run.basis)
    backup = None if applied.backup is None else applied.backup.relative_to(project.folder).as_posix()
    save_run(project, replace(run, state="done", digest=applied.digest, backup=backup))
    return replace(plan.result, warnings=(*plan.result.warnings, *applied.warnings))


def _changes(run: Run, properties: Mapping[str, str | None]) -> Changes:
    return Changes(
        add=[item.record for item in run.added],
        remove=[item.id for item in run.replaced],
        properties={**properties, RUN: run.id},
    )


def _numbered(plan: WritePlan, number: int, image: ImageEntry) -> WritePlan:
    """Return the plan under the number that it got."""
    if number == plan.run.number:
        return plan
    run_id, former = run_name(number, image, plan.token), plan.run.id

    def renamed(item: RunObject) -> RunObject:
        record = item.record
        return item if item.kept else replace(item, record=replace(record, metadata={**record.metadata, RUN: run_id}))

    run = replace(
        plan.run,
        id=run_id,
        number=number,
        batch=run_id if plan.run.batch == former else plan.run.batch,
        objects=tuple(renamed(item) for item in plan.run.objects),
    )
    return replace(
        plan, run=run, changes=_changes(run, plan.changes.properties), result=replace(plan.result, run=run_id)
    )


def _known(found: ImageObjects) -> tuple[UUID, ...]:
    """Annotations that were there before the first run; what vanished with its data may have been drawn over since."""
    former = found.run or next(iter(found.history.overwritten), None)
    if former is not None:
        return former.known
    return tuple(record.id for record in found.user_objects if record.kind == "annotation")


def _check_labels(polygons: Sequence[ClassPolygon], classes: ClassMap) -> None:
    labels = sorted({item.label for item in polygons if not 0 <= item.label < classes.num_classes})
    if labels:
        raise ReviewError(f"Polygons have the labels {labels}, the model knows 0 to {classes.num_classes - 1}")


def _new_classes(project: Project, objects: Sequence[RunObject], classes: ClassMap) -> tuple[PathClass, ...]:
    known = {path_class.name for path_class in project.classes}
    colors = dict(zip(classes.names, classes.colors, strict=True))
    names = dict.fromkeys((item.record.path_class, item.training_class) for item in objects)
    return tuple(
        PathClass(name, colors[training_class]) for name, training_class in names if name and name not in known
    )


def _result(run: Run, found: ImageObjects, clipped: ClippedPolygons, warnings: tuple[str, ...]) -> RunResult:
    regions = [item for item in run.objects if item.role == "region"]
    return RunResult(
        run=run.id,
        image=run.image,
        image_name=run.image_name,
        added=len(run.added),
        kept=len(run.objects) - len(run.added),
        removed=len(run.replaced),
        adopted=len(found.adopted),
        rejected=len(found.rejected),
        clipped=clipped.num_clipped,
        hidden=clipped.num_hidden,
        suppressed=clipped.num_rejected,
        classes=dict(sorted(Counter(item.record.path_class or "" for item in regions).items())),
        warnings=warnings,
    )
