"""Find out what objects of ours were when they were written that the current run does not list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from uuid import UUID

from darefine_qupath.annotations import Annotation
from darefine_qupath.project import Project
from darefine_qupath.review.history import History
from darefine_qupath.review.run import RunObject, digests_of
from darefine_qupath.review.run_names import RunFile, run_files
from darefine_qupath.review.run_records import readable_runs
from darefine_qupath.review.tags import CLASS, DIGEST, RUN

__all__ = ["Origins", "is_ours", "object_from_metadata"]


def is_ours(record: Annotation) -> bool:
    """Whether an object says that darefine wrote it; a copy of such a one says so too."""
    return RUN in record.metadata and record.metadata.get(DIGEST) is not None


class Origins:
    """Finds out what objects were when we wrote them that say they are ours, but that the current run does not list.

    Duplicating an object in QuPath copies its metadata: such a copy is nobody's but the pathologist's.
    """

    def __init__(self, project: Project, past: History, now: Mapping[UUID, Annotation]) -> None:
        self._project = project
        self._runs = {run.id: run for run in (*past.undone, *past.overwritten)}
        if past.current is not None:
            self._runs[past.current.id] = past.current
        self._records: dict[str, dict[UUID, RunObject] | None] = {}
        holders = dict(now)
        for run in self._runs.values():
            holders.update({item.id: item.record for item in (*run.objects, *run.rejected, *run.replaced)})
        self._holders = Counter(record.metadata.get(DIGEST) for record in holders.values())

    @cached_property
    def _files(self) -> dict[str, RunFile]:
        """Runs of all images: a copy may come from another one."""
        return {file.id: file for file in run_files(self._project)}

    def of(self, strangers: Sequence[Annotation]) -> dict[UUID, RunObject]:
        """Objects as they were written, by identity; copies are not among them."""
        pairs = zip(strangers, digests_of(strangers), strict=True)
        found = {record.id: self._origin(record, digest) for record, digest in pairs}
        return {key: item for key, item in found.items() if item is not None}

    def _origin(self, record: Annotation, digest: str) -> RunObject | None:
        if digest == record.metadata[DIGEST]:
            return object_from_metadata(record)
        listed = self._listed(record.metadata[RUN])
        if listed is not None:
            return listed.get(record.id)
        # With another digest it was edited, and is taken for the pathologist's as it is.
        is_copy = self._holders[record.metadata[DIGEST]] > 1
        return None if is_copy else object_from_metadata(replace(record, geometry=None))

    def _listed(self, run_id: str) -> dict[UUID, RunObject] | None:
        """Objects that a run wrote; None where its file is gone or damaged."""
        if run_id not in self._records:
            run = self._runs.get(run_id)
            if run is None and run_id in self._files:
                run = next(iter(readable_runs([self._files[run_id]])), None)
            self._records[run_id] = None if run is None else {item.id: item for item in run.objects}
        return self._records[run_id]


def object_from_metadata(record: Annotation) -> RunObject:
    """Take from its metadata what is known of an object of ours whose run has no file."""
    training_class = record.metadata.get(CLASS, "")
    return RunObject(
        record=replace(record, locked=False),
        training_class=training_class,
        role="region" if training_class else "container",
    )
