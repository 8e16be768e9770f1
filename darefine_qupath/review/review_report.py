"""Hold a review: what became of every object, the counts, areas and agreement, as a table and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

from darefine_qupath.errors import ReviewError
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.review.ownership import Status
from darefine_qupath.review.run_names import number_of
from darefine_qupath.sheets import write_csv

__all__ = ["NOTHING", "OUTCOMES", "ImageReview", "ObjectReview", "Outcome", "OverwrittenRun", "ReviewReport"]


Outcome: TypeAlias = Status | Literal["drawn"]
OUTCOMES: tuple[Outcome, ...] = (
    "accepted", "reshaped", "reclassified", "edited", "rejected", "drawn", "untouched",
)  # fmt: skip
NOTHING = "(nothing)"
"""Where one side has no object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectReview:
    """What became of one object, or one that the pathologist drew.

    Attributes
    ----------
    id : UUID
        Identity in the project.
    outcome : str
        ``"accepted"``, ``"reshaped"``, ``"reclassified"``, ``"edited"`` (name, colour, description), ``"rejected"``,
        ``"drawn"`` or ``"untouched"``.
    model : str
        Model that predicted it; empty for what was drawn.
    predicted, final : str or None
        Class before and after.
    predicted_px2, final_px2 : float
        Areas in square level-0 pixels, 0 where there is none.
    iou : float or None
        Of the outlines before and after; None where one of them is missing.
    confidence : float or None
        Of the prediction.
    """

    id: UUID
    outcome: Outcome
    model: str
    predicted: str | None
    final: str | None
    predicted_px2: float
    final_px2: float
    iou: float | None
    confidence: float | None


class OverwrittenRun(NamedTuple):
    """A run that was overwritten, and how many objects it had written."""

    run: str
    num_objects: int


@dataclass(frozen=True, kw_only=True)
class ImageReview:
    """The review of one image.

    Attributes
    ----------
    image, image_name : str
        Entry id and name.
    run : str
        The run that the image's data was saved from; empty where there is none.
    mpp : float or None
        Micrometres per level-0 pixel.
    objects : tuple of ObjectReview
        All that we wrote, and what was drawn since the first run.
    classes : tuple of str
        Rows and columns of `confusion`; the last is `NOTHING`.
    confusion : ConfusionMatrix
        Square level-0 pixels by final and predicted class, of what was reviewed; nobody vouches for the rest.
    overwritten : tuple of Lost
        Later runs that vanished with the data they stood in; nothing of them counts as rejected.
    """

    image: str
    image_name: str
    run: str
    mpp: float | None
    objects: tuple[ObjectReview, ...]
    classes: tuple[str, ...]
    confusion: ConfusionMatrix
    overwritten: tuple[OverwrittenRun, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Objects per outcome."""
        return _counts(self.objects)


@dataclass(frozen=True, kw_only=True)
class ReviewReport:
    """The review of a project.

    Attributes
    ----------
    project : str
        Its name.
    images : tuple of ImageReview
        Every image that has a run or objects of one, or that had one until its data was overwritten.
    classes : tuple of str
        Rows and columns of `confusion`; the last is `NOTHING`.
    confusion : ConfusionMatrix
        Sum over the images.
    """

    project: str
    images: tuple[ImageReview, ...]
    classes: tuple[str, ...]
    confusion: ConfusionMatrix

    @property
    def counts(self) -> dict[str, int]:
        """Objects per outcome."""
        return _counts(item for image in self.images for item in image.objects)

    @property
    def by_class(self) -> dict[str, dict[str, int]]:
        """Objects per class (predicted, or drawn) and outcome."""
        found: dict[str, list[ObjectReview]] = {}
        for image in self.images:
            for item in image.objects:
                found.setdefault(item.predicted or item.final or NOTHING, []).append(item)
        return {name: _counts(found[name]) for name in sorted(found)}

    @property
    def iou(self) -> dict[str, float | None]:
        """Agreement per class over what was reviewed; None for a class that was not."""
        values = self.confusion.iou
        pairs = zip(self.classes[:-1], values, strict=False)
        return {name: None if math.isnan(value) else float(value) for name, value in pairs}

    def notes(self) -> Iterator[str]:
        """Say of every image whose data was overwritten what that means; one line each."""
        for image in self.images:
            if image.overwritten:
                runs = ", ".join(f"{lost.run} ({lost.num_objects} objects)" for lost in image.overwritten)
                # Images bear the witness of a run that has a number; of an older one this is what is most likely.
                why = "The image's data was restored, saved in QuPath from a state before it, or copied here"
                if any(number_of(lost.run) is None for lost in image.overwritten):
                    why = "All of its objects are gone at once, as after a restore, or QuPath's Save over them"
                yield f"{image.image_name}: overwritten, not rejected: run {runs}. {why}; predict again writes it"

    def areas_mm2(self) -> dict[str, dict[str, float]]:
        """Square millimetres per class, predicted and final; images of unknown pixel size are left out."""
        found: dict[str, dict[str, float]] = {}
        for image in self.images:
            scale = 0.0 if image.mpp is None else (image.mpp / 1000) ** 2
            for item in image.objects:
                for name, side, area in (
                    (item.predicted, "predicted", item.predicted_px2),
                    (item.final, "final", item.final_px2),
                ):
                    if name is not None:
                        row = found.setdefault(name, {"predicted": 0.0, "final": 0.0})
                        row[side] += area * scale
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "project": self.project,
            "counts": self.counts,
            "by_class": self.by_class,
            "areas_mm2": self.areas_mm2(),
            "agreement": {
                "classes": list(self.classes),
                "iou": self.iou,
                "confusion_px2": self.confusion.counts.tolist(),
            },
            "images": [
                {
                    "image": image.image,
                    "name": image.image_name,
                    "run": image.run,
                    "counts": image.counts,
                    "overwritten": [lost._asdict() for lost in image.overwritten],
                }
                for image in self.images
            ],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per object, for a table."""
        for image in self.images:
            for item in image.objects:
                yield {
                    "image": image.image_name,
                    "entry": image.image,
                    "object": str(item.id),
                    "outcome": item.outcome,
                    "predicted": item.predicted or "",
                    "final": item.final or "",
                    "predicted_um2": _um2(item.predicted_px2, image.mpp),
                    "final_um2": _um2(item.final_px2, image.mpp),
                    "predicted_px2": round(item.predicted_px2, 2),
                    "final_px2": round(item.final_px2, 2),
                    "iou": None if item.iou is None else round(item.iou, 4),
                    "confidence": None if item.confidence is None else round(item.confidence, 4),
                    "model": item.model,
                    "run": image.run,
                }

    def write_csv(self, path: Path) -> None:
        """Write one line per object."""
        rows = list(self.rows())
        columns = list(rows[0]) if rows else ["image", "entry", "object", "outcome"]
        write_csv(path, columns, (tuple(row.values()) for row in rows), ReviewError)


def _counts(items: Iterable[ObjectReview]) -> dict[str, int]:
    found: Mapping[str, int] = Counter(item.outcome for item in items)
    return {outcome: found.get(outcome, 0) for outcome in OUTCOMES}


def _um2(area_px2: float, mpp: float | None) -> float | str:
    return "" if mpp is None else round(area_px2 * mpp * mpp, 2)
