"""Hold what one prediction of one image by one model wrote, object by object, with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from uuid import UUID

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation

__all__ = ["PackedObjects", "Role", "Run", "RunObject", "State", "digest_of", "digests_of"]


State = Literal["pending", "done", "undoing", "undone"]
Role = Literal["region", "container"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunObject:
    """One object as a run wrote it.

    Attributes
    ----------
    record : Annotation
        The object.
    training_class : str
        The model's class it stands for; `record.path_class` may have a suffix. Empty for a container.
    role : str
        ``"region"``, or ``"container"`` for the annotation that holds the others.
    kept : bool
        Whether the run before had written it already.
    """

    record: Annotation
    training_class: str
    role: Role = "region"
    kept: bool = False

    @property
    def id(self) -> UUID:
        """Identity in the project."""
        return self.record.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One prediction of one image by one model.

    Attributes
    ----------
    id : str
        Number, image, and a random part that no other project's run has, nor a copy's of this project; without it in
        older runs, and a date instead of the number in the oldest.
    number : int
        Orders the runs of a project; 0 in runs of before there were numbers.
    batch : str
        Common to the runs of one call of predict.
    image, image_name : str
        Entry id and name.
    model : str
        Id of the model file.
    date : str
        ISO 8601, UTC, by this machine's clock.
    state : str
        ``"pending"`` until the project has been written, then ``"done"``; ``"undoing"`` and ``"undone"`` likewise.
    mpp : float or None
        Micrometres per level-0 pixel.
    parameters : mapping
        What the prediction was made with; plain JSON values.
    objects : tuple of RunObject
        All of ours that nobody had touched when the run ended.
    adopted : tuple of RunObject
        Objects of former runs, as they were written, that belong to the pathologist now.
    rejected : tuple of RunObject
        Objects of former runs, as they were written, that the pathologist deleted or rejected.
    replaced : tuple of RunObject
        Objects of the run before that this one removed.
    survivors : tuple of RunObject
        Of an undone run: objects of ours that stayed in the image, because they belong to the pathologist.
    min_area_px2 : float or None
        What was left of a clipped polygon was left out when it was smaller; None in older runs.
    known : tuple of UUID
        Annotations that were there before the first run.
    undoing : tuple of UUID
        What an undo removes.
    digest, backup : str or None
        Fingerprint of the image's data as this run left it, and where it is kept as it was before, relative to the
        project's folder. None where the run changed no object, or there was nothing before.
    basis : str
        Version of the image's data that the run was planned for; empty in runs of before there were numbers.
    former : str or None
        Run that the image's data bore the witness of before; None where it bore none.
    packed : PackedObjects or None
        See `with_packed`.
    """

    id: str
    batch: str
    image: str
    image_name: str
    model: str
    date: str
    state: State
    number: int = 0
    mpp: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    objects: tuple[RunObject, ...] = ()
    adopted: tuple[RunObject, ...] = ()
    rejected: tuple[RunObject, ...] = ()
    replaced: tuple[RunObject, ...] = ()
    survivors: tuple[RunObject, ...] = ()
    min_area_px2: float | None = None
    known: tuple[UUID, ...] = ()
    undoing: tuple[UUID, ...] = ()
    digest: str | None = None
    backup: str | None = None
    basis: str = ""
    former: str | None = None
    packed: PackedObjects | None = field(default=None, repr=False, compare=False)

    @property
    def order(self) -> tuple[int, str]:
        """Where the run stands among all of the project."""
        return self.number, self.id

    @property
    def added(self) -> tuple[RunObject, ...]:
        """Objects that this run brought."""
        return tuple(item for item in self.objects if not item.kept)


def digest_of(record: Annotation) -> str:
    """Fingerprint of what makes an object what it is: identity, kind, class, name and outline.

    The outline counts as a set of points at QuPath's precision, so that neither the order of its rings nor where they
    start matters: engines and QuPath versions differ in both.
    """
    return digests_of([record])[0]


def digests_of(records: Sequence[Annotation]) -> list[str]:
    """As `digest_of`, of many objects at once."""
    outlines = _outlines([record.geometry for record in records])
    texts = ("\n".join((str(item.id), item.kind, item.path_class or "", item.name or "")) for item in records)
    pairs = zip(texts, outlines, strict=True)
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass") + outline).hexdigest()[:32] for text, outline in pairs]


def _outlines(geometries: Sequence[BaseGeometry | None]) -> Iterator[bytes]:
    if not geometries:
        return
    canonical = shapely.normalize(np.array(geometries, object))
    points, owners = shapely.get_coordinates(canonical, return_index=True)
    numbers = np.rint(points * 100).astype("<i8")
    ends = np.searchsorted(owners, np.arange(len(geometries)), side="right").tolist()
    for shape, (start, end) in zip(canonical, pairwise([0, *ends]), strict=True):
        yield b"" if shape is None else str(shape.geom_type).encode() + numbers[start:end].tobytes()


class PackedObjects(NamedTuple):
    """Objects of a run as they stand in its file, and what they were made of."""

    text: str
    lists: tuple[tuple[RunObject, ...], ...]
