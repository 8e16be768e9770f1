"""Where to look next, from the score maps on disk."""

from __future__ import annotations

from collections.abc import Iterable

from darefine_qupath.errors import PredictionError
from darefine_qupath.pipeline.predicting import map_folder
from darefine_qupath.prediction import read_score_map
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review import MapLayers, Place, next_places

__all__ = ["find_places"]

_MOST_PIXELS = 200_000_000


def find_places(project: Project, images: Iterable[ImageEntry] | None, *, count: int) -> tuple[Place, ...]:
    """Find the places where a look helps most, by the score maps where there are any, else by the objects.

    Parameters
    ----------
    project : Project
        The project.
    images : iterable of ImageEntry or None
        Which; all by default.
    count : int
        How many places.

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

    return next_places(project, chosen, count=count, maps=layers)
