"""Predictions into a project, and out of it again: planned first, then applied as a whole.

What a pathologist drew, took over or rejected stands; a run replaces only objects of ours that nobody touched. The
same prediction gives the same identities, so doing it again changes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid5

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap, PathClass, is_ignored
from darefine_qupath.errors import ProjectChangedError, ReviewError
from darefine_qupath.limits import require_finite
from darefine_qupath.project import Changes
from darefine_qupath.review.clipping import ClippedPolygons, areal, clip_predictions
from darefine_qupath.review.history import UNDONE, History, settle, witness_of
from darefine_qupath.review.ownership import (
    CLASS,
    MODEL,
    RUN,
    RUNNER_UP,
    ImageObjects,
    Reviewed,
    sort_objects,
)
from darefine_qupath.review.runs import (
    DIGEST,
    Run,
    RunObject,
    digests_of,
    new_token,
    next_number,
    now_utc,
    run_name,
    save_run,
    take_number,
    with_packed,
)

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.polygons import ClassPolygon
    from darefine_qupath.project import ImageEntry, Project

__all__ = ["RunResult", "WriteOptions", "WritePlan", "apply_plan", "plan_write", "write_back"]

_log = logging.getLogger(__name__)

_NAMESPACE = UUID("6d1f0a52-8f0e-5c58-9d3b-7c0f3f1f8a61")
_PREFIX = "DA-RefineNet: "
_AREA = "area µm^2"
_IGNORE_CLASS = "Ignore*"


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteOptions:
    """How predictions become objects.

    Attributes
    ----------
    kind : str
        ``"annotation"``, or ``"detection"``: lighter for QuPath, and not editable there.
    container : bool
        Put the objects of a run below one unclassified annotation of the whole image.
    class_suffix : str
        Added to the class, for those who want "Invasive (predicted)".
    over : tuple of str
        Classes that predictions may lie over although a pathologist drew them ("Tissue", say).
    remember_rejections : bool
        Leave out what a pathologist rejected before.
    min_area_um2, min_area_px2 : float
        What is left of a clipped polygon is left out when it is smaller: in square micrometres, and in square level-0
        pixels while the pixel size is unknown.
    """

    kind: Literal["annotation", "detection"] = "annotation"
    container: bool = False
    class_suffix: str = ""
    over: tuple[str, ...] = ()
    remember_rejections: bool = True
    min_area_um2: float = 1000.0
    min_area_px2: float = 4096.0

    def __post_init__(self) -> None:
        require_finite(self, ReviewError, "Option ")
        if any(sign in self.class_suffix for sign in ":\n\r") or self.class_suffix.endswith("*"):
            raise ReviewError(
                f"Class suffix {self.class_suffix!r}: QuPath allows no ':' and no new line, and '*' ignores"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a write or an undo did to one image, or would do.

    Attributes
    ----------
    run : str
        Run id.
    image, image_name : str
        Entry id and name.
    added, kept, removed : int
        Objects of ours; `kept` were there already, the same to the last point.
    adopted, rejected : int
        Objects of ours that belong to the pathologist, and that were rejected; none of them was changed.
    clipped, hidden, suppressed : int
        New polygons that gave way in part, wholly, and to a rejection.
    classes : mapping of str to int
        Objects of ours afterwards, by class.
    is_dry : bool
        Whether nothing was written.
    warnings : tuple of str
        What the user should know.
    """

    run: str
    image: str
    image_name: str
    added: int
    kept: int
    removed: int
    adopted: int = 0
    rejected: int = 0
    clipped: int = 0
    hidden: int = 0
    suppressed: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    is_dry: bool = False
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        names = [name for name in self.__slots__ if name not in ("classes", "warnings")]
        return {
            **{name: getattr(self, name) for name in names},
            "classes": dict(self.classes),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class WritePlan:
    """A write that has been thought through and not been done.

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
    past : History
        The image's runs before.
    """

    run: Run
    token: str
    changes: Changes
    classes: tuple[PathClass, ...]
    result: RunResult
    past: History


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
    """Think a write through without doing it; see `write_back`.

    Returns
    -------
    WritePlan
        For `apply_plan`.
    """
    _check_labels(polygons, classes)
    mpp = image.mpp if mpp is None else mpp
    found = sort_objects(project, image)
    yielded, warnings = _yielded(polygons, found, classes, options, mpp)
    former = witness_of(found.state)
    number, token = next_number(project, after=former), new_token()
    run_id = run_name(number, image, token)
    maker = _Maker(run_id, image, model, classes, options)
    objects = maker.objects(yielded.polygons, found)
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
        adopted=tuple(item.written for item in _adopted(found)),
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
        result=_result(run, found, yielded, warnings),
        past=found.past,
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
    settle(project, plan.past)
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
    former = found.run or next(iter(found.past.overwritten), None)
    if former is not None:
        return former.known
    return tuple(record.id for record in found.theirs if record.kind == "annotation")


def _adopted(found: ImageObjects) -> tuple[Reviewed, ...]:
    return (*found.adopted, *(item for item in found.containers if item.status not in ("untouched", "rejected")))


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


def _result(run: Run, found: ImageObjects, yielded: ClippedPolygons, warnings: tuple[str, ...]) -> RunResult:
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
        clipped=yielded.num_clipped,
        hidden=yielded.num_hidden,
        suppressed=yielded.num_rejected,
        classes=dict(sorted(Counter(item.record.path_class or "" for item in regions).items())),
        warnings=warnings,
    )


# -- giving way


def _yielded(
    polygons: Sequence[ClassPolygon], found: ImageObjects, classes: ClassMap, options: WriteOptions, mpp: float | None
) -> tuple[ClippedPolygons, tuple[str, ...]]:
    standing = _standing(found, options)
    rejected: dict[int, list[BaseGeometry]] = {}
    for item in found.ours if options.remember_rejections else ():
        place = areal(item.written.record.geometry)
        # What a pathologist cut off from an object of ours was rejected as well.
        if (
            item.status in ("rejected", "reshaped")
            and place is not None
            and item.written.training_class in classes.names
        ):
            rejected.setdefault(classes.names.index(item.written.training_class), []).append(place)
    smallest = smallest_part(mpp, options)
    shapes = [shape for _, shape in standing]
    yielded = clip_predictions(polygons, standing=shapes, rejected=rejected, min_area_px2=smallest, mpp=mpp)
    return yielded, _covered_by_strangers(polygons, standing, classes)


def smallest_part(mpp: float | None, options: WriteOptions = WriteOptions()) -> float:
    """Square level-0 pixels below which what is left of a clipped polygon is left out."""
    return options.min_area_px2 if mpp is None else options.min_area_um2 / mpp**2


def _standing(found: ImageObjects, options: WriteOptions) -> list[tuple[str | None, BaseGeometry]]:
    """List what nothing may overlap, with its class."""
    theirs = [record for record in found.theirs if _stands(record, options)]
    theirs += [item.current for item in found.adopted if item.current is not None]
    shapes = [(record.path_class, areal(record.geometry)) for record in theirs if record.plane[1:] == (0, 0)]
    return [(name, shape) for name, shape in shapes if shape is not None]


def _stands(record: Annotation, options: WriteOptions) -> bool:
    """Whether new predictions give way to an object that is not ours: a classified annotation, or ``Ignore*``."""
    name = record.path_class
    if record.kind != "annotation" or name is None or name in options.over:
        return False
    return name == _IGNORE_CLASS or not is_ignored(name)


def _covered_by_strangers(
    polygons: Sequence[ClassPolygon], standing: Sequence[tuple[str | None, BaseGeometry]], classes: ClassMap
) -> tuple[str, ...]:
    """Say so where annotations of a class that the model does not know hide most of a prediction."""
    shapes = np.array([item.geometry for item in polygons], np.object_)
    total = float(shapely.area(shapes).sum()) if len(shapes) else 0.0
    warnings = []
    for name in sorted({name for name, _ in standing if name is not None and not classes.knows(name)}):
        cover = shapely.union_all([shape for other, shape in standing if other == name])
        hidden = float(shapely.area(shapely.intersection(shapes, cover)).sum())
        if total and hidden > total / 2:
            warnings.append(
                f"Annotations of class {name!r} hide {hidden / total:.0%} of the prediction, which gives way to every "
                f"classified annotation; end the class name in '*' in QuPath, or let predictions lie over it"
            )
    return tuple(warnings)


# -- objects


@dataclass(frozen=True)
class _Maker:
    """Makes records of one run."""

    run_id: str
    image: ImageEntry
    model: str
    classes: ClassMap
    options: WriteOptions

    def objects(self, polygons: Sequence[ClassPolygon], found: ImageObjects) -> list[RunObject]:
        taken = {record.id for record in found.theirs} | {item.written.id for item in _adopted(found)}
        parent = self._container(polygons, found)
        made = [] if parent is None or parent.id in taken else [parent]
        outlines = shapely.to_wkb(shapely.normalize([polygon.geometry for polygon in polygons]), hex=True)
        regions: list[Annotation] = []
        for polygon, outline in zip(polygons, outlines, strict=True):
            record = self._region(polygon, outline, taken, None if parent is None else parent.id)
            taken.add(record.id)
            regions.append(record)
        names = [self.classes.names[polygon.label] for polygon in polygons]
        made += [
            RunObject(record=record, training_class=name) for record, name in zip(_sealed(regions), names, strict=True)
        ]
        return made

    def _container(self, polygons: Sequence[ClassPolygon], found: ImageObjects) -> RunObject | None:
        if not self.options.container or not polygons:
            return None
        identity = uuid5(_NAMESPACE, f"{self.image.id}/{self.model}/container")
        former = [item for item in found.containers if item.written.id == identity and item.status != "rejected"]
        if former:
            return former[0].written
        bounds = shapely.total_bounds([item.geometry for item in polygons])
        if self.image.width is not None and self.image.height is not None:
            bounds = (0, 0, self.image.width, self.image.height)
        record = Annotation(
            id=identity, geometry=shapely.box(*bounds), name=f"DA-RefineNet {self.model}", metadata=self._metadata("")
        )
        return RunObject(record=_sealed([record])[0], training_class="", role="container")

    def _region(self, polygon: ClassPolygon, outline: str, taken: set[UUID], parent: UUID | None) -> Annotation:
        name = self.classes.names[polygon.label]
        path_class = name + self.options.class_suffix
        key = f"{self.image.id}/{self.model}/{path_class}/{self.options.kind}/{parent or ''}/"
        key += outline
        identity, number = uuid5(_NAMESPACE, key), 2
        # An object that was moved away keeps its identity, so what is found again at its place needs another.
        while identity in taken:
            identity, number = uuid5(_NAMESPACE, f"{key}#{number}"), number + 1
        seconds = {} if polygon.runner_up is None else {RUNNER_UP: self.classes.names[polygon.runner_up]}
        return Annotation(
            id=identity,
            geometry=polygon.geometry,
            path_class=path_class,
            kind=self.options.kind,
            name=name if polygon.confidence is None else f"{name} {polygon.confidence:.0%}",
            parent=parent,
            measurements=_measurements(polygon),
            metadata={**self._metadata(name), **seconds},
        )

    def _metadata(self, training_class: str) -> dict[str, str]:
        return {RUN: self.run_id, MODEL: self.model, CLASS: training_class}


def _sealed(records: Sequence[Annotation]) -> list[Annotation]:
    """Give objects their digests."""
    pairs = zip(records, digests_of(records), strict=True)
    return [replace(record, metadata={**record.metadata, DIGEST: digest}) for record, digest in pairs]


def cut_to(record: Annotation, polygon: ClassPolygon, identity: UUID) -> Annotation:
    """Return an object of ours with another outline, as an object of its own."""
    area = {} if polygon.area_um2 is None else {f"{_PREFIX}{_AREA}": float(np.float32(polygon.area_um2))}
    measurements = {**record.measurements, **area}
    return _sealed([replace(record, id=identity, geometry=polygon.geometry, measurements=measurements)])[0]


def _measurements(polygon: ClassPolygon) -> dict[str, float]:
    values = {
        "confidence": polygon.confidence,
        "margin": polygon.margin,
        "runner-up share": polygon.runner_up_share,
        _AREA: polygon.area_um2,
    }
    # QuPath keeps a detection's measurements as float32; what is read back must be what was written.
    return {f"{_PREFIX}{name}": float(np.float32(value)) for name, value in values.items() if value is not None}
