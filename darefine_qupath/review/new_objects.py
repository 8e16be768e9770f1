"""Make the objects that a run writes: identity, class, name, measurements, metadata.

The same prediction gives the same identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID, uuid5

import numpy as np
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap
from darefine_qupath.polygons import ClassPolygon
from darefine_qupath.project import ImageEntry
from darefine_qupath.review.ownership import ImageObjects
from darefine_qupath.review.run import RunObject, digests_of
from darefine_qupath.review.tags import CLASS, DIGEST, MODEL, RUN, RUNNER_UP
from darefine_qupath.review.write_options import WriteOptions

__all__ = ["ObjectMaker", "cut_to", "with_digests"]


_NAMESPACE = UUID("6d1f0a52-8f0e-5c58-9d3b-7c0f3f1f8a61")


_PREFIX = "DA-RefineNet: "
_AREA = "area µm^2"


@dataclass(frozen=True)
class ObjectMaker:
    """Makes records of one run."""

    run_id: str
    image: ImageEntry
    model: str
    classes: ClassMap
    options: WriteOptions

    def objects(self, polygons: Sequence[ClassPolygon], found: ImageObjects) -> list[RunObject]:
        """Make the objects of polygons, below a container where the options want one."""
        taken = {record.id for record in found.user_objects} | {
            item.written.id for item in found.adopted_with_containers
        }
        parent = self._container(polygons, found)
        made = [] if parent is None or parent.id in taken else [parent]
        outlines = shapely.to_wkb(shapely.normalize([polygon.geometry for polygon in polygons]), hex=True)
        regions: list[Annotation] = []
        for polygon, outline in zip(polygons, outlines, strict=True):
            record = self._region(polygon, outline, taken, None if parent is None else parent.id)
            taken.add(record.id)
            regions.append(record)
        names = [self.classes.names[polygon.label] for polygon in polygons]
        made += [
            RunObject(record=record, training_class=name)
            for record, name in zip(with_digests(regions), names, strict=True)
        ]
        return made

    def _container(self, polygons: Sequence[ClassPolygon], found: ImageObjects) -> RunObject | None:
        if not self.options.container or not polygons:
            return None
        identity = uuid5(_NAMESPACE, f"{self.image.id}/{self.model}/container")
        former = [item for item in found.containers if item.written.id == identity and item.status != "rejected"]
        if former:
            return former[0].written
        bounds = shapely.total_bounds([item.geometry for item in polygons])
        if self.image.width is not None and self.image.height is not None:
            bounds = (0, 0, self.image.width, self.image.height)
        record = Annotation(
            id=identity, geometry=shapely.box(*bounds), name=f"DA-RefineNet {self.model}", metadata=self._metadata("")
        )
        return RunObject(record=with_digests([record])[0], training_class="", role="container")

    def _region(self, polygon: ClassPolygon, outline: str, taken: set[UUID], parent: UUID | None) -> Annotation:
        name = self.classes.names[polygon.label]
        path_class = name + self.options.class_suffix
        key = f"{self.image.id}/{self.model}/{path_class}/{self.options.kind}/{parent or ''}/"
        key += outline
        identity, number = uuid5(_NAMESPACE, key), 2
        # An object that was moved away keeps its identity, so what is found again at its place needs another.
        while identity in taken:
            identity, number = uuid5(_NAMESPACE, f"{key}#{number}"), number + 1
        seconds = {} if polygon.runner_up is None else {RUNNER_UP: self.classes.names[polygon.runner_up]}
        return Annotation(
            id=identity,
            geometry=polygon.geometry,
            path_class=path_class,
            kind=self.options.kind,
            name=name if polygon.confidence is None else f"{name} {polygon.confidence:.0%}",
            parent=parent,
            measurements=_measurements(polygon),
            metadata={**self._metadata(name), **seconds},
        )

    def _metadata(self, training_class: str) -> dict[str, str]:
        return {RUN: self.run_id, MODEL: self.model, CLASS: training_class}


def with_digests(records: Sequence[Annotation]) -> list[Annotation]:
    """Give objects their digests."""
    pairs = zip(records, digests_of(records), strict=True)
    return [replace(record, metadata={**record.metadata, DIGEST: digest}) for record, digest in pairs]


def cut_to(record: Annotation, polygon: ClassPolygon, identity: UUID) -> Annotation:
    """Return an object of ours with another outline, as an object of its own."""
    area = {} if polygon.area_um2 is None else {f"{_PREFIX}{_AREA}": float(np.float32(polygon.area_um2))}
    measurements = {**record.measurements, **area}
    return with_digests([replace(record, id=identity, geometry=polygon.geometry, measurements=measurements)])[0]


def _measurements(polygon: ClassPolygon) -> dict[str, float]:
    values = {
        "confidence": polygon.confidence,
        "margin": polygon.margin,
        "runner-up share": polygon.runner_up_share,
        _AREA: polygon.area_um2,
    }
    # QuPath keeps a detection's measurements as float32; what is read back must be what was written.
    return {f"{_PREFIX}{name}": float(np.float32(value)) for name, value in values.items() if value is not None}
