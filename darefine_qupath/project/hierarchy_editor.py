"""Edit the object hierarchy of an image that QuPath has open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from uuid import UUID

import numpy as np

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.classes import Color, default_color
from darefine_qupath.errors import ProjectWriteError
from darefine_qupath.project import servers
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.jvm import call_hidden, java_array, java_class, paquo_java, set_hidden, start_qupath
from darefine_qupath.project.qpdata.build import signed
from darefine_qupath.project.qpdata.compare import same_geometry, same_numbers
from darefine_qupath.project.qpdata.read import ImageData
from darefine_qupath.project.qpdata.roi_specs import specs_of
from darefine_qupath.project.qpdata.schema import ROI_KINDS
from darefine_qupath.project.qpdata.stored import stored_record

__all__ = ["HierarchyEditor", "id_of"]

_ROI_MAKERS = {"Rectangle": "createRectangleROI", "Ellipse": "createEllipseROI", "Line": "createLineROI"}
_POINT_MAKERS = {"Polygon": "createPolygonROI", "Polyline": "createPolylineROI", "Points": "createPointsROI"}


class HierarchyEditor:
    """Edits of one image's hierarchy; one event at the end, none per object."""

    def __init__(self, hierarchy: Any, base: ImageData, colors: Mapping[str, Color]) -> None:  # noqa: ANN401 - of Java
        self._java = paquo_java()
        self._root = hierarchy.getRootObject()
        self._hierarchy = hierarchy
        self._former = {record.id: record for record in base.objects}
        # A class and its colour are the JVM's, whatever project they come from; the file's own colours stay.
        self._colors = {**colors, **base.colors}
        self._classes: dict[str, Any] = {}
        for name in base.colors:
            self._path_class(name)
        self._found = self._root.getDescendantObjects(self._java.ArrayList())
        if len(self._found) != len(base.objects):
            raise ProjectWriteError(
                f"QuPath reads {len(self._found)} of {len(base.objects)} objects in {base.path}; nothing was changed"
            )

    @cached_property
    def _objects(self) -> dict[UUID, Any]:
        """Objects that the file has, by identity; asking Java for each of them takes longer than most changes."""
        return {id_of(item): item for item in self._found}

    def apply(self, changes: Changes) -> None:
        """Make all changes."""
        for record in changes.replace:
            self._replace(self._objects[record.id], record, self._former[record.id])
        gone = set(changes.remove)
        self._remove(gone)
        self._add(changes.add, gone)
        self._hierarchy.fireHierarchyChangedEvent(self._root)

    # -- removing

    def _remove(self, gone: set[UUID]) -> None:
        leaves: dict[UUID, list[Any]] = {}
        owners: dict[UUID, Any] = {}
        for identity in gone:
            item = self._objects[identity]
            parent = item.getParent()
            if not item.hasChildObjects():
                leaves.setdefault(id_of(parent), []).append(item)
                owners.setdefault(id_of(parent), parent)
        for key, items in leaves.items():
            owners[key].removeChildObjects(self._java.ArrayList(items))
        inner = [identity for identity in gone if self._objects[identity].getParent() is not None]
        for owner in {id_of(owner): owner for owner in (self._owner(identity, gone) for identity in inner)}.values():
            children = self._kept_children(owner, gone)
            owner.clearChildObjects()
            owner.addChildObjects(self._java.ArrayList(children))

    def _owner(self, identity: UUID, gone: set[UUID]) -> Any:  # noqa: ANN401
        """Nearest object above that stays."""
        above = self._objects[identity].getParent()
        while id_of(above) in gone:
            above = above.getParent()
        return above

    def _kept_children(self, owner: Any, gone: set[UUID]) -> list[Any]:  # noqa: ANN401
        kept = []
        pending = list(reversed(list(owner.getChildObjects())))
        while pending:
            child = pending.pop()
            if id_of(child) in gone:
                pending.extend(reversed(list(child.getChildObjects())))
            else:
                kept.append(child)
        return kept

    # -- adding

    def _add(self, records: Sequence[Annotation], gone: set[UUID]) -> None:
        new = {record.id: self._new(record) for record in records}
        below: dict[UUID | None, list[Any]] = {}
        for record in records:
            below.setdefault(self._standing(record.parent, gone), []).append(new[record.id])
        for key, items in below.items():
            owner = self._root if key is None else new.get(key) or self._objects[key]
            owner.addChildObjects(self._java.ArrayList(items))

    def _standing(self, parent: UUID | None, gone: set[UUID]) -> UUID | None:
        """Identity of the object that a new one stands below; in place of one that is removed, the next one above."""
        while parent in gone:
            parent = self._former[parent].parent
        return None if parent is None or parent == id_of(self._root) else parent

    def _new(self, record: Annotation) -> Any:  # noqa: ANN401
        roi = self._roi(record.geometry, record.roi, record.plane)
        path_class = self._path_class(record.path_class)
        make = self._java.PathObjects
        if record.kind == "cell":
            item = make.createCellObject(roi, self._roi(record.nucleus, None, record.plane), path_class, None)
        elif record.kind == "tile":
            item = make.createTileObject(roi, path_class, None)
        elif record.kind == "detection":
            item = make.createDetectionObject(roi, path_class, None)
        else:
            item = make.createAnnotationObject(roi, path_class, None)
        item.setID(java_class("java.util.UUID").fromString(str(record.id)))
        self._set_class(item, record)
        item.setLocked(record.locked)
        if record.name is not None:
            item.setName(self._java.String(record.name))
        if record.metadata:
            self._set_metadata(item, record.metadata)
        if record.measurements:
            self._set_measurements(item, record.measurements)
        return item

    # -- replacing

    def _replace(self, item: Any, record: Annotation, former: Annotation) -> None:  # noqa: ANN401
        """Set what differs; the rest stays to the bit."""
        stored = stored_record(record, former)
        moved = stored.plane != former.plane or not same_geometry(stored.geometry, former.geometry)
        if moved:
            item.setROI(self._roi(record.geometry, record.roi, record.plane))
        if record.kind == "cell" and (moved or not same_geometry(stored.nucleus, former.nucleus)):
            set_hidden(item, "nucleus", self._roi(record.nucleus, None, record.plane))
        if record.kind == "tma core":
            item.setMissing(record.is_missing)
        self._set_class(item, record)
        item.setLocked(record.locked)
        item.setName(None if record.name is None else self._java.String(record.name))
        if dict(record.metadata) != dict(former.metadata):
            self._set_metadata(item, record.metadata)
        # QuPath takes an object's measurements away when it gets another ROI.
        if (moved and record.measurements) or not same_numbers(stored.measurements, former.measurements):
            self._set_measurements(item, record.measurements)

    # -- parts of an object

    def _set_class(self, item: Any, record: Annotation) -> None:  # noqa: ANN401
        item.setPathClass(self._path_class(record.path_class), float(record.class_probability))
        # A class takes the object's own colour away, so it is set afterwards.
        color = None if record.color is None else self._java.Integer.valueOf(signed(record.color))
        item.setColor(color)

    def _path_class(self, name: str | None) -> Any:  # noqa: ANN401
        if not name:
            return None
        parts = [part.strip() for part in name.split(":")]
        full = ": ".join(parts)
        if full not in self._classes:
            above = self._path_class(": ".join(parts[:-1]))
            color = self._java.Integer.valueOf((self._colors.get(full) or default_color(full)).argb)
            made = self._java.PathClass.getInstance(above, self._java.String(parts[-1]), color)
            made.setColor(color)
            self._classes[full] = made
        return self._classes[full]

    def _set_metadata(self, item: Any, metadata: Mapping[str, str]) -> None:  # noqa: ANN401
        pairs = [(self._java.String(str(key)), self._java.String(str(value))) for key, value in metadata.items()]
        if servers.is_since(start_qupath(), 0, 6):
            store = item.getMetadata()
            store.clear()
            for key, value in pairs:
                store.put(key, value)
            return
        # Before, this is for QuPath's own classes only.
        call_hidden(item, "clearMetadataMap")
        for key, value in pairs:
            call_hidden(item, "storeMetadataValue", key, value)

    def _set_measurements(self, item: Any, measurements: Mapping[str, float]) -> None:  # noqa: ANN401
        store = item.getMeasurementList()
        store.clear()
        for name, value in measurements.items():
            store.put(self._java.String(name), float(value))
        store.close()

    def _roi(self, geometry: Any, wanted: Any, plane: Plane) -> Any:  # noqa: ANN401
        """ROI of a geometry, of the kind and with the numbers that both engines store."""
        if geometry is None:
            return None
        (spec,) = specs_of([(geometry, wanted)])
        kind = ROI_KINDS[spec.proxy]
        place = java_class("qupath.lib.regions.ImagePlane").getPlaneWithChannel(*plane)
        if kind == "Geometry":
            return self._geometry_roi(spec.arrays["wkb"], place)
        if kind in _POINT_MAKERS:
            axes = [java_array("double", np.frombuffer(spec.arrays[axis], ">f4").astype(np.float64)) for axis in "xy"]
            return getattr(self._java.ROIs, _POINT_MAKERS[kind])(*axes, place)
        x, y, x2, y2 = (float(spec.numbers[name]) for name in ("x", "y", "x2", "y2"))
        end = (x2, y2) if kind == "Line" else (x2 - x, y2 - y)
        return getattr(self._java.ROIs, _ROI_MAKERS[kind])(x, y, *end, place)

    def _geometry_roi(self, wkb: bytes, place: Any) -> Any:  # noqa: ANN401
        # From 0.6 on QuPath wants its own precision of 0.01 px; before, that was 32 bits, which would move vertices.
        is_modern = servers.is_since(start_qupath(), 0, 6)
        factory = [self._java.GeometryTools.getDefaultFactory()] if is_modern else []
        reader = self._java.WKBReader(*factory)
        geometry = reader.read(java_array("byte", np.frombuffer(wkb, np.int8)))
        roi = self._java.GeometryTools.geometryToROI(geometry, place)
        if isinstance(roi, self._java.GeometryROI):
            return roi
        # Asked for, though QuPath would choose a simpler kind.
        make = self._java.GeometryROI.class_.getDeclaredConstructor(
            java_class("org.locationtech.jts.geom.Geometry"), java_class("qupath.lib.regions.ImagePlane")
        )
        make.setAccessible(True)
        return make.newInstance(geometry, place)


def id_of(item: Any) -> UUID:  # noqa: ANN401
    """Give the identity of an object in QuPath."""
    return UUID(str(item.getID().toString()))
