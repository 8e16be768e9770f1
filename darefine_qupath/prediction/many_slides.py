"""Predict many slides, one after the other or on a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from darefine_qupath.errors import PredictionError
from darefine_qupath.prediction.cluster import predict_on_dask
from darefine_qupath.prediction.tasks import Report, Runner, SlideResult, SlideTask, predict_task, run_task

__all__ = ["predict_many"]


def predict_many(
    tasks: Sequence[SlideTask],
    *,
    scheduler: str | None = None,
    local_workers: int | None = None,
    progress: Report | None = None,
    run: Runner = predict_task,
) -> Iterator[SlideResult]:
    """Predict slides, and give each result as soon as it is there.

    Parameters
    ----------
    tasks : sequence of SlideTask
        With different keys and folders.
    scheduler : str, optional
        Address of a Dask scheduler, or ``"local"`` for one worker process per GPU of this machine (one in all
        without). By default slides are predicted in this process, one after the other.
    local_workers : int, optional
        Worker processes of ``"local"``.
    progress : callable, optional
        Called with a `PredictionProgress` of some slide, now and then, perhaps from another thread.
    run : callable, optional
        What a worker does with a task.

    Yields
    ------
    SlideResult
        One per task, in the order they end. A slide that fails does not stop the others.

    Raises
    ------
    PredictionError
        If tasks share a key or a folder, or Dask or its scheduler is not there.
    """
    for what, values in (("key", [task.key for task in tasks]), ("folder", [task.out for task in tasks])):
        if len(set(values)) < len(values):
            raise PredictionError(f"Two slides have the same {what}; each needs one of its own")
    if scheduler is None:
        return (run_task(task, run, progress) for task in tasks)
    return predict_on_dask(tasks, scheduler, local_workers, progress, run)
