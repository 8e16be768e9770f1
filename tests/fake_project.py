"""A project in memory, and what a pathologist does to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import shapely
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap, PathClass
from darefine_qupath.errors import ProjectChangedError, ProjectWriteError
from darefine_qupath.polygons import ClassPolygon
from darefine_qupath.project import Applied, Changes, ImageEntry, ImageState, Project
from darefine_qupath.review import RunResult, write_back

CLASSES = ClassMap(names=("Normal", "Benign", "Invasive"))
SLIDE = ImageEntry(id="7", name="slide.svs", uri=None, path=None, exists=False, width=10_000, height=8_000, mpp=0.5)


class FakeProject(Project):
    """A project in memory; its folder holds only what the review puts there.

    It detects changes as the engines do: by the version that a write was thought out for, or else was last read.
    """

    engine = "embedded"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "project.qpproj"
        self.stored: dict[str, tuple[Annotation, ...]] = {}
        self.properties: dict[str, dict[str, str]] = {}
        self.seen: dict[str, str] = {}
        self.class_list: tuple[PathClass, ...] = ()
        self.fails = False

    @property
    def version(self) -> str:
        return "0.6.0"

    @property
    def images(self) -> tuple[ImageEntry, ...]:
        return (SLIDE, replace(SLIDE, id="8", name="other.svs"))

    @property
    def classes(self) -> tuple[PathClass, ...]:
        return self.class_list

    def set_classes(self, classes: Sequence[PathClass]) -> None:
        self.class_list = tuple(classes)

    def state(self, image: ImageEntry) -> ImageState:
        state = ImageState(
            objects=self.stored.get(image.id, ()),
            properties=dict(self.properties.get(image.id, {})),
            version=self.version_of(image),
        )
        self.seen[image.id] = state.version
        return state

    def version_of(self, image: ImageEntry) -> str:
        if image.id not in self.stored and image.id not in self.properties:
            return ""
        content = repr((self.stored.get(image.id), sorted(self.properties.get(image.id, {}).items())))
        return hashlib.sha256(content.encode()).hexdigest()

    def apply(self, image: ImageEntry, changes: Changes, *, version: str | None = None) -> Applied:
        wanted = self.seen.get(image.id) if version is None else version
        if wanted is not None and wanted != self.version_of(image):
            raise ProjectChangedError(f"{image.name} changed since it was read")
        if self.fails:
            raise ProjectWriteError("the disk is full")
        now = {record.id: record for record in self.objects(image)}
        assert set(changes.remove) <= now.keys()
        for key in changes.remove:
            parent = now[key].parent
            now = {k: replace(r, parent=parent) if r.parent == key else r for k, r in now.items() if k != key}
        for record in changes.add:
            assert record.id not in now
            assert record.parent is None or record.parent in now
            now[record.id] = record
        for record in changes.replace:
            now[record.id] = record
        self.stored[image.id] = tuple(now.values())
        properties = {**self.properties.get(image.id, {}), **changes.properties}
        self.properties[image.id] = {key: value for key, value in properties.items() if value is not None}
        self.seen[image.id] = self.version_of(image)
        return Applied(
            added=len(changes.add), replaced=len(changes.replace), removed=len(changes.remove), num_objects=len(now),
            backup=None, digest=self.seen[image.id],
        )  # fmt: skip

    def add_image(
        self, path: Path, *, name: str | None = None, mpp: float | None = None,
        metadata: Mapping[str, str] | None = None, image_type: str = "BRIGHTFIELD_H_E",
    ) -> ImageEntry:  # fmt: skip
        raise NotImplementedError

    def add_metadata(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        raise NotImplementedError

    # what a pathologist does in QuPath

    def edit(self, key: UUID, **change: object) -> None:
        records = self.stored[SLIDE.id]
        self.stored[SLIDE.id] = tuple(replace(r, **change) if r.id == key else r for r in records)  # type: ignore[arg-type]

    def delete(self, key: UUID) -> None:
        self.stored[SLIDE.id] = tuple(record for record in self.stored[SLIDE.id] if record.id != key)

    def draw(self, geometry: BaseGeometry, path_class: str | None, **more: object) -> Annotation:
        record = Annotation(geometry=geometry, path_class=path_class, **more)  # type: ignore[arg-type]
        self.stored[SLIDE.id] = (*self.stored.get(SLIDE.id, ()), record)
        return record

    def save_from(self, former: ImageState, **more: Annotation) -> None:
        """QuPath's Save, or a restore, over an image: what is stored then was in memory before."""
        self.stored[SLIDE.id] = (*former.objects, *more.values())
        self.properties[SLIDE.id] = dict(former.properties)


def square(x: float, y: float, side: float = 400) -> Polygon:
    return shapely.box(x, y, x + side, y + side)


def polygon(label: int, geometry: Polygon, confidence: float = 0.75) -> ClassPolygon:
    return ClassPolygon(
        label=label, geometry=geometry, area_um2=geometry.area / 4, confidence=confidence, margin=0.5, runner_up=0,
        runner_up_share=0.25,
    )  # fmt: skip


def grid(count: int = 6, *, shift: float = 0.0) -> list[ClassPolygon]:
    return [polygon(1 + index % 2, square(1000 * index + shift, 1000)) for index in range(count)]


def write(project: Project, polygons: Sequence[ClassPolygon], model: str = "m1", **more: object) -> RunResult:
    return write_back(project, SLIDE, polygons, model=model, classes=CLASSES, **more)  # type: ignore[arg-type]


def ours(project: FakeProject) -> list[Annotation]:
    return [record for record in project.objects(SLIDE) if "darefine.run" in record.metadata]


def overlaps(records: Sequence[Annotation]) -> float:
    shapes = [record.geometry for record in records]
    pairs = [(a, b) for index, a in enumerate(shapes) for b in shapes[index + 1 :]]
    return sum(shapely.intersection(a, b).area for a, b in pairs)
