"""Write a project's annotations as GeoJSON or as label images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from darefine_qupath.annotations import by_annotators, class_counts
from darefine_qupath.classes import is_ignored
from darefine_qupath.exchange import write_geojson, write_label_tiff
from darefine_qupath.masks import LabelPainter
from darefine_qupath.pipeline.selection import (
    check_annotators,
    choose_images,
    every_annotation,
    warn_of_several_annotators,
    warn_of_unlearnable_objects,
)
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import ImageEntry, Project
from darefine_qupath.review import OnError, for_images

__all__ = ["export_geojson", "export_labels"]

_log = logging.getLogger(__name__)


def export_geojson(
    project: Project,
    out: Path,
    names: Sequence[str] = (),
    *,
    annotators: Sequence[str] = (),
    on_error: OnError | None = None,
) -> dict[str, int]:
    """Write one FeatureCollection per image, ``<entry id>.geojson``.

    Parameters
    ----------
    annotators : sequence of str, optional
        Only annotations of these; see `by_annotators`.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    dict of str to int
        Features by entry id.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = [project.image(name) for name in names] if names else project.images
    classes = project.classes
    check_annotators(every_annotation(project, images), annotators)

    def write(image: ImageEntry) -> int:
        records = by_annotators(project.annotations(image), annotators)
        return write_geojson(records, out / f"{image.id}.geojson", classes=classes)

    return {image.id: count for image, count in for_images(images, write, on_error)}


def export_labels(
    project: Project,
    settings: Settings,
    out: Path,
    *,
    downsample: int,
    names: Sequence[str] = (),
    annotators: Sequence[str] = (),
    on_error: OnError | None = None,
) -> dict[str, tuple[int, int]]:
    """Write one label image per annotated image, ``<entry id>.tif``.

    Parameters
    ----------
    downsample : int
        Of the label images.
    annotators : sequence of str, optional
        Only annotations of these; see `by_annotators`.
    on_error : callable, optional
        Told of an image that cannot be read, which is left out; without it that is an error.

    Returns
    -------
    dict of str to tuple of int
        Width and height by entry id.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, skipped = choose_images(project, names)
    for left_out in skipped:
        _log.warning("%s is left out: %s", left_out.name, left_out.why)
    check_annotators(every_annotation(project, images), annotators)
    drawn = [
        (image, by_annotators(records, annotators))
        for image, records in for_images(images, project.annotations, on_error)
    ]
    counts = class_counts(record for _, records in drawn for record in records)
    class_map = settings.class_map(project.classes, {k: v for k, v in counts.items() if not is_ignored(k)})
    warn_of_unlearnable_objects(drawn)
    warn_of_several_annotators(records for _, records in drawn)
    records_of = {image.id: records for image, records in drawn if class_counts(records)}

    def write(image: ImageEntry) -> tuple[int, int] | None:
        if image.size is None:
            return None
        painter = LabelPainter(records_of[image.id], class_map)
        size = write_label_tiff(painter, image.size, out / f"{image.id}.tif", downsample=downsample)
        return size.width, size.height

    written = for_images([image for image, _ in drawn if image.id in records_of], write, on_error)
    return {image.id: size for image, size in written if size is not None}
