"""Plan and predict the slides of a project: what `predict` and `evaluate` share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.header import CheckpointHeader
from darefine_qupath.errors import DarefineError, ProjectError
from darefine_qupath.limits import wording
from darefine_qupath.pipeline.listener import Listener
from darefine_qupath.pipeline.request import ProjectRequest
from darefine_qupath.pipeline.selection import Skipped, size_mismatch
from darefine_qupath.prediction import PredictionProgress, PredictOptions, read_score_map
from darefine_qupath.prediction.fingerprint import compute_fingerprint
from darefine_qupath.prediction.many_slides import predict_many
from darefine_qupath.prediction.tasks import SlideResult, SlideTask
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.slides import open_slide

__all__ = [
    "SlidePlan",
    "SlideRequest",
    "map_folder",
    "plan_slides",
    "predict_elsewhere",
    "predict_slides",
    "spare_former_map",
]


@dataclass(frozen=True, kw_only=True)
class SlideRequest(ProjectRequest):
    """Which slides to predict, and by which model.

    Attributes
    ----------
    model : Path
        Model file.
    within : str or None
        Only inside annotations of this class.
    options : PredictOptions
        Of the network.
    scheduler : str or None
        Address of a Dask scheduler, or ``"local"``.
    """

    model: Path
    within: str | None = None
    options: PredictOptions = field(default_factory=PredictOptions)
    scheduler: str | None = None


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """What is predicted of some images.

    Attributes
    ----------
    tasks : tuple of SlideTask
        Slides to predict.
    skipped : tuple of Skipped
        Images in which there is nothing to predict.
    failed : tuple of Skipped
        Images that cannot be predicted although they should be.
    """

    tasks: tuple[SlideTask, ...]
    skipped: tuple[Skipped, ...]
    failed: tuple[Skipped, ...]


def map_folder(project: Project, image: ImageEntry) -> Path:
    """Folder of an image's score map, beside the project's own files."""
    return project.folder / "darefine" / "maps" / image.id


def plan_slides(project: Project, images: Sequence[ImageEntry], request: SlideRequest) -> SlidePlan:
    """Plan the slides of images that can be read."""
    given = request.given_mpp
    tasks, skipped, failed = [], [], []
    for image in images:
        area = request.options.within
        why = size_mismatch(image, given)
        if why is None and request.within is not None:
            try:
                with wording(ProjectError):
                    area = _find_area(project.annotations(image), request.within)
            except DarefineError as error:
                why = str(error)
            else:
                if area is None:
                    skipped.append(Skipped.of(image, f"it has no annotation of class {request.within!r}"))
                    continue
        if why is not None:
            failed.append(Skipped.of(image, why))
            continue
        assert image.path is not None
        tasks.append(
            SlideTask(
                key=image.id,
                slide=image.path,
                model=request.model,
                out=map_folder(project, image),
                mpp=image.mpp if given is None else given,
                options=replace(request.options, crop_bounds=image.crop_bounds, within=area),
            )
        )
    return SlidePlan(tasks=tuple(tasks), skipped=tuple(skipped), failed=tuple(failed))


def spare_former_map(task: SlideTask, header: CheckpointHeader) -> SlideTask:
    """Give an evaluation another folder where a map lies that is not the same, or is unfinished."""
    is_free = not any((task.out / name).exists() for name in ("scoremap.json", "partial"))
    if is_free or _is_finished(task, header):
        return task
    return replace(task, out=task.out.parents[1] / "other-maps" / task.out.name)


def predict_elsewhere(task: SlideTask, header: CheckpointHeader, folder: Path) -> SlideTask:
    """Give a dry run a folder outside the project, unless the map that it needs is finished and only read."""
    return task if _is_finished(task, header) else replace(task, out=folder / task.key)


def _is_finished(task: SlideTask, header: CheckpointHeader) -> bool:
    if not task.options.resume:
        return False
    try:
        found = read_score_map(task.out)
        with open_slide(task.slide, crop_bounds=task.options.crop_bounds, reader=task.options.reader) as slide:
            mpp = slide.mpp if task.mpp is None else task.mpp
            return found.fingerprint == compute_fingerprint(slide, header, mpp=mpp, options=task.options)
    except DarefineError:
        return False


def _find_area(annotations: Sequence[Annotation], path_class: str) -> shapely.Geometry | None:
    shapes = [record.geometry for record in annotations if record.path_class == path_class and record.area > 0]
    if not shapes:
        return None
    return shapely.union_all(shapely.make_valid(np.array(shapes)))


def predict_slides(tasks: Sequence[SlideTask], request: SlideRequest, listener: Listener) -> Iterator[SlideResult]:
    """Predict slides one after the other, or by a scheduler; the listener hears how far all of them are together."""
    overall = _OverallProgress(listener, len(tasks))
    for result in predict_many(tasks, scheduler=request.scheduler, progress=overall):
        overall.finish(result.task)
        yield result


class _OverallProgress:
    """Adds to the progress of a slide how far all slides are together."""

    def __init__(self, listener: Listener, num_slides: int) -> None:
        self._listener, self._num_slides = listener, num_slides
        self._began = time.monotonic()
        self._seen: dict[str, PredictionProgress] = {}
        self._finished = self._skipped = 0

    def __call__(self, progress: PredictionProgress) -> None:
        self._seen[progress.key] = progress
        left = self._seconds_left()
        self._listener.on_slide(
            replace(progress, slides_done=self._finished, num_slides=self._num_slides, all_seconds_left=left)
        )

    def finish(self, task: SlideTask) -> None:
        """Count a slide that is done with; one that was never heard of was finished already, or failed."""
        self._finished += 1
        self._skipped += task.key not in self._seen

    def _seconds_left(self) -> float | None:
        seen = tuple(self._seen.values())
        fresh = sum(progress.fresh for progress in seen)
        if not fresh:
            return None
        unseen = max(0, self._num_slides - self._skipped - len(seen))
        left = sum(progress.total - progress.done for progress in seen)
        left_unseen = unseen * sum(progress.total for progress in seen) / len(seen)
        return (left + left_unseen) * (time.monotonic() - self._began) / fresh
