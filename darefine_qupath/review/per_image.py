"""Do something with every image of a project, so that one that is damaged does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

from darefine_qupath.errors import DarefineError, ReviewError
from darefine_qupath.limits import wording
from darefine_qupath.project import ImageEntry, image_titles

__all__ = ["OnError", "for_images"]


OnError: TypeAlias = Callable[[str, DarefineError], None]
"""Told of an image, or a run's file, by its name, that cannot be dealt with; the others are."""

_Found = TypeVar("_Found")


def for_images(
    images: Iterable[ImageEntry], action: Callable[[ImageEntry], _Found], on_error: OnError | None
) -> Iterator[tuple[ImageEntry, _Found]]:
    """Do something with every image.

    Parameters
    ----------
    images : iterable of ImageEntry
        The images.
    action : callable
        What to do.
    on_error : callable or None
        Told of an image whose data are damaged, say; without it the error ends the walk.

    Yields
    ------
    tuple
        Image, and what the action gave.
    """
    images = tuple(images)
    titles = image_titles({image.id: image.name for image in images})
    for image in images:
        try:
            with wording(ReviewError):
                found = action(image)
        except DarefineError as error:
            if on_error is None:
                raise
            on_error(titles[image.id], error)
        else:
            yield image, found
