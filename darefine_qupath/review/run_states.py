"""Tell which runs stand, as the data of their images tells."""

from __future__ import annotations

from collections.abc import Sequence

from darefine_qupath.errors import ReviewError
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review.history import History, history_of, runs_below, witness_of
from darefine_qupath.review.ownership import sort_objects
from darefine_qupath.review.per_image import OnError, for_images
from darefine_qupath.review.run import Run
from darefine_qupath.review.run_names import number_of, run_files
from darefine_qupath.review.run_records import list_runs
from darefine_qupath.review.tags import MODEL, RUN

__all__ = ["StandingRuns", "run_states"]


def run_states(project: Project, *, on_error: OnError | None = None) -> tuple[tuple[Run, str], ...]:
    """List the runs of a project and what became of them, as the data of their images tells.

    Parameters
    ----------
    project : Project
        Open project.
    on_error : callable, optional
        Told of an image or a run's file that is damaged; without it that is an error.

    Returns
    -------
    tuple of Run and str
        Oldest first; ``"done"``, ``"undone"``, ``"overwritten"``, or ``"unrecorded"`` where only the image tells of
        the run. Of an image that is not there, or damaged, what the run's file says.

    Raises
    ------
    ReviewError, ProjectFormatError
        If a file is damaged.
    """
    runs = list_runs(project, on_error=on_error)
    stand = StandingRuns(project, runs, on_error)
    found = [(run, stand.state(run)) for run in runs] + [(run, "unrecorded") for run in stand.unrecorded()]
    return tuple(sorted(found, key=lambda pair: pair[0].order))


class StandingRuns:
    """Tells which runs stand; an image is read when it is first asked for."""

    def __init__(self, project: Project, runs: Sequence[Run], on_error: OnError | None) -> None:
        self._project = project
        self._images = {image.id: image for image in project.images}
        self._on_error = on_error
        self._recorded = {file.id for file in run_files(project)}
        self._runs: dict[str, list[Run]] = {}
        for run in runs:
            self._runs.setdefault(run.image, []).append(run)
        self._pasts: dict[str, tuple[History | None, str | None]] = {}

    def _past(self, image_id: str) -> tuple[History | None, str | None]:
        """History and witness; None where the image is not there, or damaged."""
        if image_id not in self._pasts:
            images = [self._images[image_id]] if image_id in self._images else []
            read = for_images(images, self._read, self._on_error)
            self._pasts[image_id] = next((past for _, past in read), (None, None))
        return self._pasts[image_id]

    def _read(self, image: ImageEntry) -> tuple[History | None, str | None]:
        state = self._project.state(image)
        try:
            return history_of(self._project, image, state), witness_of(state)
        except ReviewError:
            # Its damaged file was named when all were read.
            return None, witness_of(state)

    def current(self, image_id: str) -> Run | None:
        """Run that the image's data was written by, or saved from."""
        past, _ = self._past(image_id)
        return None if past is None else past.current

    def witness(self, image_id: str) -> str | None:
        """Id of the run that the image's data bears the witness of, whether or not its file is there."""
        return self._past(image_id)[1]

    def unrecorded(self) -> tuple[Run, ...]:
        """Return what the objects of images tell of the runs that wrote them last, where a run's file is missing."""
        witnesses = [(image, self.witness(image.id)) for image in self._images.values()]
        missing = [(image, witness) for image, witness in witnesses if witness and witness not in self._recorded]
        return tuple(recovered_run(self._project, *found) for found in missing)

    def state(self, run: Run) -> str:
        """Tell what became of a run: ``"done"`` where it stands, be it below others."""
        past, witness = self._past(run.image)
        if past is None:
            return run.state
        if run.id in runs_below(past, self._runs.get(run.image, ()), witness):
            return "done"
        return "overwritten" if run.state == "done" else "undone"


def recovered_run(project: Project, image: ImageEntry, run_id: str) -> Run:
    """Make up the record of a run from the objects that say they are of it."""
    found = sort_objects(project, image)
    items = [item.written for item in (*found.containers, *found.predictions)]
    objects = [item for item in items if item.record.geometry is not None and item.record.metadata.get(RUN) == run_id]
    return Run(
        id=run_id,
        batch=run_id,
        image=image.id,
        image_name=image.name,
        model=next((item.record.metadata.get(MODEL, "") for item in objects), ""),
        date="",
        state="done",
        number=number_of(run_id) or 0,
        mpp=image.mpp,
        objects=tuple(objects),
    )
