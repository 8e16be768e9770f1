"""Predict one slide as a task that a worker can be sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint
from darefine_qupath.errors import DarefineError, PredictionError
from darefine_qupath.limits import naming
from darefine_qupath.prediction.options import PredictionProgress, PredictOptions
from darefine_qupath.prediction.scoremap import ScoreMap
from darefine_qupath.prediction.slide import predict_slide

__all__ = ["Report", "Runner", "SlideResult", "SlideTask", "load_model", "predict_task", "run_task"]


@dataclass(frozen=True, kw_only=True)
class SlideTask:
    """One slide to predict.

    Attributes
    ----------
    key : str
        Entry id; unique among the tasks.
    slide : Path
        The image.
    model : Path
        The model file.
    out : Path
        Folder for this image's maps.
    mpp : float or None
        Micrometers per level-0 pixel; the file's by default.
    options : PredictOptions
        How.
    """

    key: str
    slide: Path
    model: Path
    out: Path
    mpp: float | None = None
    options: PredictOptions = field(default_factory=PredictOptions)


@dataclass(frozen=True, kw_only=True)
class SlideResult:
    """What became of a task.

    Attributes
    ----------
    task : SlideTask
        What was asked.
    score_map : ScoreMap or None
        None when it failed.
    error : str or None
        Why it failed; the other slides go on.
    """

    task: SlideTask
    score_map: ScoreMap | None = None
    error: str | None = None


Report = Callable[[PredictionProgress], None]


Runner = Callable[[SlideTask, "Report | None"], ScoreMap]


def predict_task(task: SlideTask, progress: Report | None = None) -> ScoreMap:
    """Predict the slide of a task; the model stays in memory for the next one."""
    return predict_slide(
        task.slide, load_model(task.model), out=task.out, mpp=task.mpp, options=task.options, progress=progress
    )


def load_model(path: Path) -> Checkpoint:
    """Read a model file, unless it is the one that was read last and has not changed since."""
    return _checkpoint(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=1)
def _checkpoint(path: Path, _changed: int) -> Checkpoint:
    return load_checkpoint(path)


def run_task(task: SlideTask, run: Runner, progress: Report | None) -> SlideResult:
    """Run a task; what goes wrong stands in its result."""

    def keyed(found: PredictionProgress) -> None:
        assert progress is not None
        progress(replace(found, key=task.key))

    try:
        with naming(task.slide, PredictionError):
            return SlideResult(task=task, score_map=run(task, None if progress is None else keyed))
    except DarefineError as error:
        return SlideResult(task=task, error=str(error))
