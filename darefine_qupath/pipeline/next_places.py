"""Find where in a project a look helps most: by score maps, objects and stains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from darefine_qupath.errors import PredictionError, SlideError
from darefine_qupath.geometry import Box, Size, fit_within
from darefine_qupath.pipeline.slide_tasks import map_folder
from darefine_qupath.prediction import StainStatistics, read_score_map, stain_statistics
from darefine_qupath.prediction.stain import stain_distance
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review import MapLayers, OnError, ReviewPlace, next_places, sort_objects
from darefine_qupath.slides import open_slide

__all__ = ["find_places"]

_MOST_PIXELS = 200_000_000
_PLACE_PX = 64
_OVERVIEW_PX = 4096
_STRANGE = 2.0
"""Distance of stains, in standard deviations of training, that counts as wholly unlike: regions of one case lie 0.1 to
0.3 apart, other laboratories 0.9 to 1.6."""


def find_places(
    project: Project, images: Iterable[ImageEntry] | None, *, count: int, on_error: OnError | None = None
) -> tuple[ReviewPlace, ...]:
    """Find the places where a look helps most, by the score maps where there are any, else by the objects.

    Parameters
    ----------
    images : iterable of ImageEntry or None
        Which; all by default.
    count : int
        How many places.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    tuple of Place
        Best first.
    """
    chosen = tuple(project.images if images is None else images)

    def layers(image: ImageEntry) -> MapLayers | None:
        try:
            found = read_score_map(map_folder(project, image))
        except PredictionError:
            return None
        # A larger map is not held in memory; its image is searched object by object.
        if found.size.width * found.size.height > _MOST_PIXELS:
            return None
        return MapLayers(
            labels=found.read("class"), margin=found.read("margin"), box=found.box, names=found.classes.names
        )

    def unlike(image: ImageEntry, boxes: Sequence[Box]) -> list[float]:
        run = sort_objects(project, image).run
        trained = None if run is None else run.parameters.get("stain")
        return (
            _measure_stain_distances(image, boxes, StainStatistics.from_json(trained))
            if trained
            else [0.0] * len(boxes)
        )

    return next_places(project, chosen, count=count, maps=layers, unlike=unlike, on_error=on_error)


def _measure_stain_distances(image: ImageEntry, boxes: Sequence[Box], trained: StainStatistics) -> list[float]:
    """How far the stain of each place is from that of the training data, 0 to 1; 0 where the slide is not there."""
    if image.path is None or not image.exists or image.unsupported is not None:
        return [0.0] * len(boxes)
    try:
        with open_slide(image.path, crop_bounds=image.crop_bounds) as slide:
            # One small picture of the slide: reading it place by place takes longer.
            shrink = max(1.0, min(box.width for box in boxes) / _PLACE_PX)
            longest = min(_OVERVIEW_PX, round(max(slide.size) / shrink))
            small = fit_within(slide.size, Size(longest, longest))
            picture = slide.read(Box.of(slide.size), small)
            scale = (small.width / slide.size.width, small.height / slide.size.height)
    except SlideError:
        return [0.0] * len(boxes)
    values = []
    for box in boxes:
        left, right = round(box.x * scale[0]), round(box.right * scale[0])
        top, bottom = round(box.y * scale[1]), round(box.bottom * scale[1])
        found = stain_statistics([picture[top : max(bottom, top + 1), left : max(right, left + 1)]])
        values.append(0.0 if found is None else min(1.0, stain_distance(found, trained) / _STRANGE))
    return values
