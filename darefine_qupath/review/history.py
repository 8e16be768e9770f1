"""Find the run that an image's data was saved from: what vanished with its data was not rejected.

Every write puts its run's id among the image's properties, which QuPath keeps when it opens and saves an image. Data
that bears the witness of a run was saved by someone who saw its objects: what is missing was rejected. Data that does
not was saved, or restored, from a state before the run: the run was overwritten.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

from darefine_qupath.errors import ReviewError
from darefine_qupath.review.run import Run, RunObject
from darefine_qupath.review.run_names import number_of, run_files
from darefine_qupath.review.run_records import read_run, save_run
from darefine_qupath.review.tags import RUN, UNDONE

if TYPE_CHECKING:
    from darefine_qupath.project import ImageEntry, ImageState, Project

__all__ = ["History", "finish_interrupted_runs", "history_of", "runs_below", "witness_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class History:
    """The runs of an image, as its data tells.

    Attributes
    ----------
    current : Run or None
        The run that the data was written by, or saved from; None where there is none, or its file is gone.
    is_seen : bool
        Whether who saved the data saw the run's objects, so that what is missing was rejected.
    survivors : tuple of RunObject
        Objects of ours that the last undo left in the image; whoever saved its data since saw them.
    undone : tuple of Run
        Runs after it that were taken back, or never came into the project; oldest first.
    overwritten : tuple of Run
        Runs after it that vanished with the data they stood in; oldest first.
    """

    current: Run | None = None
    is_seen: bool = False
    survivors: tuple[RunObject, ...] = ()
    undone: tuple[Run, ...] = ()
    overwritten: tuple[Run, ...] = ()


def witness_of(state: ImageState) -> str | None:
    """Id of the run that an image's data bears the witness of."""
    witness = state.properties.get(RUN)
    return witness if number_of(witness) is not None else None


def history_of(project: Project, image: ImageEntry, state: ImageState) -> History:
    """Tell the runs of an image apart.

    Parameters
    ----------
    project : Project
        Open project.
    image : ImageEntry
        One of its images.
    state : ImageState
        What is stored for it.

    Returns
    -------
    History
        What came before the current run is in that run.

    Raises
    ------
    ReviewError
        If the file of the run that may be the current one is damaged.
    """
    witness = witness_of(state)
    undone = number_of(state.properties.get(UNDONE))
    present = {record.id for record in state.objects}
    since: list[Run] = []
    # Another run of the witness's number is one of a copy of the project, or of before records were lost: not below it.
    files = sorted(run_files(project, image), key=lambda file: (file.order[0], file.id != witness, file.id))
    for file in reversed(files):
        if witness is not None and file.id != witness and file.order[0] < (number_of(witness) or 0):
            break
        is_current = file.id == witness
        try:
            run = read_run(file.path)
        except ReviewError as error:
            # Without a witness no run that has a number is the current one.
            if is_current or (witness is None and not file.order[0]):
                raise
            _log.warning("%s", error)
            continue
        if run.image != image.id:
            continue
        may_be = witness is None and (undone is None or run.number < undone)
        if is_current or (may_be and _is_there(run, present)):
            seen = is_current or not run.number
            return _history(since, state, run, is_seen=seen)
        since.append(run)
    return _history(since, state)


def _history(since: list[Run], state: ImageState, current: Run | None = None, *, is_seen: bool = False) -> History:
    last_undone = state.properties.get(UNDONE)
    return History(
        current=current,
        is_seen=is_seen,
        survivors=next((run.survivors for run in since if run.id == last_undone), ()),
        undone=tuple(run for run in reversed(since) if run.state != "done"),
        overwritten=tuple(run for run in reversed(since) if run.state == "done" and (run.added or run.replaced)),
    )


def _is_there(run: Run, present: Collection[UUID]) -> bool:
    """Whether objects say that data without a witness was saved from a run."""

    def any_of(items: Collection[object]) -> bool:
        return any(item.id in present for item in items)  # type: ignore[attr-defined]

    if any_of(run.added):
        return True
    if run.number or run.state == "undone" or any_of(run.replaced):
        return False
    if run.state == "undoing":
        return not run.undoing and bool(run.replaced)
    if run.state == "pending":
        return not run.added
    # All of it gone at once is taken for overwritten: most likely nobody deleted every object by hand.
    written = (*run.objects, *run.adopted)
    return not written or any_of(written)


def finish_interrupted_runs(project: Project, past: History) -> None:
    """Write down how runs ended that were cut off, or came back, between the project and their file."""
    for run in past.undone:
        if run.state != "undone":
            save_run(project, replace(run, state="undone", undoing=()))
    if past.current is not None and past.current.state != "done":
        save_run(project, replace(past.current, state="done", undoing=()))


def runs_below(past: History, runs: Collection[Run], witness: str | None = None) -> frozenset[str]:
    """Return the ids of the runs that the data of an image builds on: the current one, the one before it, and so on.

    Parameters
    ----------
    past : History
        Of the image.
    runs : collection of Run
        All of the image's runs.
    witness : str, optional
        Id of the run that the image's data bears the witness of, whose file may be gone.
    """
    by_id = {run.id: run for run in runs}
    found: set[str] = set()
    name = witness if past.current is None else past.current.id
    while name is not None and name not in found:
        found.add(name)
        if name not in by_id:
            # Without its file nobody knows what it stood on: what the others say of themselves must do.
            below = number_of(name) or 0
            found.update(run.id for run in runs if run.state == "done" and run.number < below)
            break
        name = by_id[name].former
    if past.current is not None:
        # Runs of before there were numbers do not say what they stood on.
        gone = {run.id for run in past.overwritten}
        found.update(
            run.id
            for run in runs
            if not run.number and run.state == "done" and run.order < past.current.order and run.id not in gone
        )
    return frozenset(found)
