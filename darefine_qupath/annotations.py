"""Hold the annotations of an image as records, which every engine and importer gives and takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import UUID, uuid4

from darefine_qupath.classes import REGION, is_ignored

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry


__all__ = [
    "ANNOTATOR",
    "NOBODY",
    "Annotation",
    "Kind",
    "Plane",
    "RoiKind",
    "annotator_of",
    "by_annotators",
    "class_counts",
]

Kind = Literal["annotation", "detection", "cell", "tile", "tma core"]
RoiKind = Literal["Rectangle", "Ellipse", "Line", "Polyline", "Polygon", "Points", "Geometry"]

ANNOTATOR = "darefine.annotator"
"""Metadata key for who drew an object, where an import knows."""

NOBODY = "-"
"""Stands among annotators for objects that have none: what was drawn in QuPath, say."""


class Plane(NamedTuple):
    """Image plane of an object: channel (-1 = all), z-slice and time point."""

    c: int = -1
    z: int = 0
    t: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One object of an image.

    Attributes
    ----------
    geometry : shapely geometry or None
        In level-0 pixels, as QuPath's own ``getGeometry`` gives it; None for an object without a ROI.
    path_class : str or None
        Full class name (``"Tumor: Positive"``); None = unclassified.
    id : UUID
        Identity in the project.
    kind : str
        ``"annotation"``, ``"detection"``, ``"cell"``, ``"tile"`` or ``"tma core"``.
    name : str or None
        As shown in QuPath.
    locked : bool
        Locked in QuPath.
    parent : UUID or None
        The object it lies below; None = the root.
    measurements : mapping of str to float
        In order.
    metadata : mapping of str to str
        Without the identity.
    roi : str or None
        QuPath's ROI type; None on a new record lets the geometry decide.
    plane : Plane
        Where it lies in a stack.
    color : int or None
        Color of this one object (ARGB), over that of its class.
    class_probability : float
        NaN = not set.
    nucleus : shapely geometry or None
        Of a cell.
    is_missing : bool
        Of a TMA core.
    """

    geometry: BaseGeometry | None
    path_class: str | None = None
    id: UUID = field(default_factory=uuid4)
    kind: Kind = "annotation"
    name: str | None = None
    locked: bool = False
    parent: UUID | None = None
    measurements: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    roi: RoiKind | None = None
    plane: Plane = Plane()
    color: int | None = None
    class_probability: float = math.nan
    nucleus: BaseGeometry | None = None
    is_missing: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether all is the same; two probabilities that are not set are, which dataclasses deny since Python 3.13."""
        return _values(self) == _values(other) if isinstance(other, Annotation) else NotImplemented

    @property
    def area(self) -> float:
        """Area in square level-0 pixels, exact for an ellipse (its geometry is a 100-cornered polygon)."""
        if self.geometry is None:
            return 0.0
        if self.roi == "Ellipse":
            left, top, right, bottom = self.geometry.bounds
            return float(math.pi * (right - left) * (bottom - top) / 4)
        return float(self.geometry.area)


# Tuples take a value for equal to itself, and every NaN of a record is `math.nan`.
_values = attrgetter(*(item.name for item in fields(Annotation)))


def class_counts(annotations: Iterable[Annotation]) -> dict[str, int]:
    """Count annotations per class, unclassified ones left out; sorted by name."""
    counts: dict[str, int] = {}
    for annotation in annotations:
        if annotation.path_class is not None:
            counts[annotation.path_class] = counts.get(annotation.path_class, 0) + 1
    return dict(sorted(counts.items()))


def annotator_of(annotation: Annotation) -> str | None:
    """Return who drew an annotation; None where it does not say."""
    return annotation.metadata.get(ANNOTATOR) or None


def by_annotators(annotations: Iterable[Annotation], names: Sequence[str]) -> tuple[Annotation, ...]:
    """Select the annotations of some annotators, `NOBODY` for those that have none; all of them where no name is given.

    What bounds the work (``Region*``, ``Ignore*``) and has no annotator counts for every one.
    """
    return tuple(
        record
        for record in annotations
        if not names
        or (annotator_of(record) or NOBODY) in names
        or (_is_bound(record) and annotator_of(record) is None)
    )


def annotators_in(annotations: Iterable[Annotation]) -> set[str]:
    """Whose classes the annotations of an image hold, `NOBODY` among them; ``Region*`` and ``Ignore*`` are nobody's."""
    return {
        annotator_of(record) or NOBODY
        for record in annotations
        if record.kind == "annotation"
        and record.path_class is not None
        and not _is_bound(record)
        and (annotator_of(record) is not None or "darefine.run" not in record.metadata)
    }


def _is_bound(record: Annotation) -> bool:
    return record.path_class is not None and (record.path_class == REGION or is_ignored(record.path_class))
