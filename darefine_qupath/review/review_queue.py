"""Find the places where a look helps most: uncertain, large, near class borders, unlike the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

import numpy as np
import shapely

from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import ReviewError
from darefine_qupath.geometry import Box
from darefine_qupath.review.clipping import areal
from darefine_qupath.review.ownership import sort_objects
from darefine_qupath.review.per_image import OnError, for_images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darefine_qupath.project import ImageEntry, Project

__all__ = ["MapLayers", "ReviewPlace", "next_places"]

_BORDER_SHARE = 0.05
_PREDICTED_SHARE = 0.25
_DOUBTFUL_SHARE = 0.1
_WEIGHTS = (2.0, 1.0, 1.0, 2.0)

Unlike: TypeAlias = "Callable[[ImageEntry, Sequence[Box]], Sequence[float]]"
"""Says how unlike the training data boxes of an image are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewPlace:
    """A place that is worth a look.

    Attributes
    ----------
    image, image_name : str
        Entry id and name.
    box : Box
        In level-0 pixels.
    path_class : str
        What is predicted there, for the most part.
    score : float
        Mean of the four below, of which uncertainty and unlikeness count twice; higher is more worth a look.
    uncertainty : float
        1 minus the margin between the first and second class, 0 to 1; in a score map, over the least certain tenth of
        the place, since a doubtful nest must not drown in the tissue around it.
    size : float
        0 for a speck, 1 for the largest regions.
    border : float
        How much of it lies near a border between classes, 0 to 1.
    unlike : float
        How unlike the training data, 0 to 1; 0 where the caller does not know.
    object : UUID or None
        The predicted object; None for a place in a score map.
    """

    image: str
    image_name: str
    box: Box
    path_class: str
    score: float
    uncertainty: float
    size: float
    border: float
    unlike: float
    object: UUID | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__ if name not in ("box", "object")}
        where = {"x": self.box.x, "y": self.box.y, "width": self.box.width, "height": self.box.height}
        return {**values, **where, "object": None if self.object is None else str(self.object)}


@dataclass(frozen=True, kw_only=True)
class MapLayers:
    """What a network said about an image, pixel by pixel.

    Attributes
    ----------
    labels : ndarray of uint8, shape (height, width)
        Label per map pixel, `IGNORE` where nothing is predicted.
    margin : ndarray of uint8, shape (height, width)
        First score minus second, 255 for 1.
    box : Box
        What the map covers, in level-0 pixels.
    names : sequence of str
        Classes in label order.
    """

    labels: NDArray[np.uint8]
    margin: NDArray[np.uint8]
    box: Box
    names: Sequence[str]


def next_places(
    project: Project,
    images: Iterable[ImageEntry] | None = None,
    *,
    count: int = 10,
    side_um: float = 500.0,
    side_px: int = 1000,
    maps: Mapping[str, MapLayers] | Callable[[ImageEntry], MapLayers | None] | None = None,
    unlike: Unlike | None = None,
    on_error: OnError | None = None,
) -> tuple[ReviewPlace, ...]:
    """Find the places where a look helps most.

    Parameters
    ----------
    project : Project
        Open project.
    images : iterable of ImageEntry, optional
        Which; all by default.
    count : int, optional
        How many places at most, over all images.
    side_um, side_px : float, int, optional
        Side of a place, in micrometres, and in level-0 pixels where the pixel size is unknown.
    maps : mapping of str to MapLayers, or callable, optional
        By entry id, or a function of the image that reads its map, so that one is held at a time. With its map an
        image is searched window by window; without it, object by object.
    unlike : callable, optional
        Says of boxes of an image how unlike the training data each is, 0 to 1.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    tuple of Place
        Best first; no two overlap by more than a quarter.

    Raises
    ------
    ReviewError
        If `count` is below 1, or a run's file is damaged.
    ProjectFormatError
        If an image's data are.
    """
    if count < 1:
        raise ReviewError(f"{count} places to look at next make no sense; ask for 1 or more")

    def search(image: ImageEntry) -> list[ReviewPlace]:
        side = side_px if image.mpp is None else max(1, round(side_um / image.mpp))
        layers = maps(image) if callable(maps) else (maps or {}).get(image.id)
        if layers is None:
            places = _places_of_objects(project, image, side)
        else:
            places = _places_of_map(image, layers, side, _looked_at(project, image))
        strange = unlike(image, [place.box for place in places]) if unlike and places else [0.0] * len(places)
        return [_scored(place, unlike=value) for place, value in zip(places, strange, strict=True)]

    chosen = project.images if images is None else images
    found = [place for _, places in for_images(chosen, search, on_error) for place in places]
    found.sort(key=lambda place: (-place.score, place.image, place.box))
    return _apart(found, count)


def _apart(places: Sequence[ReviewPlace], count: int) -> tuple[ReviewPlace, ...]:
    chosen: list[ReviewPlace] = []
    for place in places:
        if len(chosen) == count:
            break
        if not any(other.image == place.image and _overlap(other.box, place.box) > 0.25 for other in chosen):
            chosen.append(place)
    return tuple(chosen)


def _overlap(first: Box, second: Box) -> float:
    common = first.intersection(second)
    return 0.0 if common is None else common.area / min(first.area, second.area)


def _scored(place: ReviewPlace, *, unlike: float) -> ReviewPlace:
    parts = (place.uncertainty, place.size, place.border, unlike)
    score = sum(weight * part for weight, part in zip(_WEIGHTS, parts, strict=True)) / sum(_WEIGHTS)
    return replace(place, unlike=unlike, score=score)


def _places_of_objects(project: Project, image: ImageEntry, side: int) -> list[ReviewPlace]:
    items = [
        item
        for item in sort_objects(project, image).predictions
        if item.status == "untouched" and item.current is not None
    ]
    shapes = np.array([item.written.record.geometry for item in items], np.object_)
    if not len(items):
        return []
    areas, lengths = shapely.area(shapes), shapely.length(shapes)
    sizes = areas / (areas + np.median(areas))
    borders = np.minimum(1.0, lengths * side * _BORDER_SHARE / np.maximum(areas, 1.0))
    centers = shapely.get_coordinates(shapely.point_on_surface(shapes))
    places = []
    for index, item in enumerate(items):
        values = item.written.record.measurements
        sure = values.get("DA-RefineNet: margin", values.get("DA-RefineNet: confidence", 1.0))
        parts = (1.0 - sure, float(sizes[index]), float(borders[index]))
        places.append(
            _place(image, _window(image, centers[index], side), item.written.training_class, parts, item.written.id)
        )
    return places


def _place(
    image: ImageEntry,
    box: Box,
    path_class: str,
    parts: tuple[float, float, float],
    identity: UUID | None = None,
) -> ReviewPlace:
    uncertainty, size, border = parts
    return ReviewPlace(
        image=image.id, image_name=image.name, box=box, path_class=path_class, score=0.0,
        uncertainty=uncertainty, size=size, border=border, unlike=0.0, object=identity,
    )  # fmt: skip


def _window(image: ImageEntry, center: NDArray[np.float64], side: int) -> Box:
    """Square around a point, moved into the image."""
    corner = []
    for value, limit in zip(center.tolist(), (image.width, image.height), strict=True):
        start = round(value - side / 2)
        corner.append(max(0, start if limit is None else min(start, limit - side)))
    box = Box(corner[0], corner[1], side, side)
    return box if image.size is None else box.intersection(Box.of(image.size)) or box


def _looked_at(project: Project, image: ImageEntry) -> list[Any]:
    """Where a pathologist has been already."""
    found = sort_objects(project, image)
    records = [record for record in found.user_objects if record.kind == "annotation" and record.path_class is not None]
    records += [item.current or item.written.record for item in found.predictions if item.status != "untouched"]
    shapes = [areal(record.geometry) for record in records]
    return [shape for shape in shapes if shape is not None]


def _places_of_map(image: ImageEntry, layers: MapLayers, side: int, looked_at: Sequence[Any]) -> list[ReviewPlace]:
    height, width = layers.labels.shape
    scale = layers.box.width / width
    step = max(1, round(side / scale))
    predicted = layers.labels != IGNORE
    edge = np.zeros_like(predicted)
    edge[:, 1:] |= (layers.labels[:, 1:] != layers.labels[:, :-1]) & predicted[:, 1:] & predicted[:, :-1]
    edge[1:] |= (layers.labels[1:] != layers.labels[:-1]) & predicted[1:] & predicted[:-1]
    num_pixels = _cell_sums(predicted, step)
    # A border that crosses a cell from side to side counts a half; more of it, more.
    length = _cell_sums(edge, step)
    border = length / (length + step)
    seen = shapely.union_all(list(looked_at))
    shapely.prepare(seen)
    places = []
    for row, column in np.argwhere(num_pixels >= _PREDICTED_SHARE * step * step).tolist():
        window = Box(column * step, row * step, min(step, width - column * step), min(step, height - row * step))
        center = np.array([window.x + window.width / 2, window.y + window.height / 2]) * scale
        center += (layers.box.x, layers.box.y)
        if shapely.intersects_xy(seen, *center):
            continue
        cell = layers.labels[window.y : window.bottom, window.x : window.right]
        label = int(np.bincount(cell[cell != IGNORE]).argmax())
        margins = layers.margin[window.y : window.bottom, window.x : window.right][cell != IGNORE]
        share = float(num_pixels[row, column]) / (step * step)
        parts = (_doubt(margins), share, float(border[row, column]))
        places.append(_place(image, _window(image, center, side), layers.names[label], parts))
    return places


def _doubt(margins: NDArray[np.uint8]) -> float:
    """1 minus the mean margin of the least certain pixels."""
    count = max(1, round(len(margins) * _DOUBTFUL_SHARE))
    return 1.0 - float(np.partition(margins, count - 1)[:count].mean()) / 255


def _cell_sums(values: NDArray[Any], step: int) -> NDArray[np.float64]:
    rows, columns = (np.arange(0, length, step) for length in values.shape)
    across = np.add.reduceat(values, columns, axis=1, dtype=np.float64)
    return np.asarray(np.add.reduceat(across, rows, axis=0), np.float64)
