"""Collect the labels that train, object by object, and find the model to fine-tune."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from darefine_qupath.annotations import Annotation, by_annotators
from darefine_qupath.checkpoint.model_file import read_header
from darefine_qupath.errors import DarefineError
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review import manual_annotations, reviewed_annotations, run_states

__all__ = ["MODEL_FILE", "LabelCollector", "Labels", "find_former_model", "summarize_objects"]

MODEL_FILE = "model_file"
"""Parameter of a prediction run under which its model file stands."""

Labels = Literal["manual", "reviewed"]
"""Which annotations train: the pathologist's own, or those and the reviewed predictions."""

_log = logging.getLogger(__name__)

Objects = Mapping[str, tuple[str, ...]]

_KINDS = ("drawn", "reviewed", "rejected")


class LabelCollector:
    """Gives the annotations of an image that train, and notes which objects they are.

    Parameters
    ----------
    labels : str
        ``"manual"`` or ``"reviewed"``.
    annotators : sequence of str, optional
        Of what a person drew, only what is by these; see `by_annotators`.

    Attributes
    ----------
    objects : dict of str to mapping
        By entry id: UUIDs of what was ``"drawn"`` by a person, ``"reviewed"`` (accepted or corrected predictions) and
        ``"rejected"`` (their area is ignored).
    """

    def __init__(self, labels: Labels, annotators: Sequence[str] = ()) -> None:
        self._labels = labels
        self._annotators = annotators
        self.objects: dict[str, Objects] = {}

    def __call__(self, project: Project, image: ImageEntry) -> tuple[Annotation, ...]:
        """Annotations of an image that count."""
        kinds: tuple[tuple[UUID, ...], ...]
        if self._labels == "manual":
            annotations = by_annotators(manual_annotations(project, image, taken_over=False), self._annotators)
            kinds = (tuple(record.id for record in annotations), (), ())
        else:
            labels = reviewed_annotations(project, image)
            others = {*labels.reviewed, *labels.rejected}
            chosen = {record.id for record in by_annotators(labels.annotations, self._annotators)} | others
            annotations = tuple(record for record in labels.annotations if record.id in chosen)
            drawn = tuple(each for each in labels.drawn if each in chosen)
            kinds = (drawn, labels.reviewed, labels.rejected)
        self.objects[image.id] = {
            kind: tuple(str(each) for each in ids) for kind, ids in zip(_KINDS, kinds, strict=True)
        }
        return annotations

    def of(self, images: Collection[str]) -> dict[str, Objects]:
        """Objects of some images, by entry id."""
        return {image: objects for image, objects in sorted(self.objects.items()) if image in images}


def summarize_objects(objects: Mapping[str, Objects]) -> dict[str, Any]:
    """Count objects by kind, with a digest of all their ids: what goes into a model file."""
    counts = {kind: sum(len(of_image[kind]) for of_image in objects.values()) for kind in _KINDS}
    ids = sorted(each for of_image in objects.values() for found in of_image.values() for each in found)
    return {**counts, "sha256": sha256("\n".join(ids).encode()).hexdigest()}


def find_former_model(project: Project) -> Path | None:
    """Model file of the newest prediction that stands in a project.

    Returns
    -------
    Path or None
        None where nothing has been predicted, or the file is gone or has become another model; that is logged.
    """
    done = [run for run, state in run_states(project, on_error=_warn) if state == "done"]
    if not done:
        return None
    newest = max(done, key=lambda run: run.order)
    path = Path(str(newest.parameters.get(MODEL_FILE, "")))
    try:
        found = read_header(path).model_id if path.name else None
    except (DarefineError, OSError):
        found = None
    if found != newest.model:
        _log.warning(
            "The model %s, whose predictions were reviewed, cannot be found%s; give it with --from, or the new one "
            "starts without it",
            newest.model,
            f" at {path}" if path.name else "",
        )
        return None
    return path


def _warn(_: str, error: DarefineError) -> None:
    _log.warning("%s", error)
