"""GeoJSON as QuPath writes it, versions 0.2 to 0.7, in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import geojson
import shapely
from shapely.geometry import shape

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.atomic import replacing
from darefine_qupath.classes import Colour, PathClass, default_colour
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.records import Collector, Imported, snapped

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["feature", "read_features", "write_geojson"]

# 0.2 and 0.3 wrote the Java class as the id, 0.3 also ``object_type``, later ones ``objectType``.
_KINDS: Mapping[str, Kind] = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "TMACoreObject": "tma core",
    "annotation": "annotation",
    "detection": "detection",
    "cell": "cell",
    "tile": "tile",
    "tmaCore": "tma core",
    "tma_core": "tma core",
}
_ROOTS = ("PathRootObject", "root")
_OBJECT_TYPES: Mapping[str, str] = {"tma core": "tmaCore"}

_GEOMETRIES = ("Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection")


def read_features(path: Path, *, classes: Sequence[str] = ()) -> Imported:
    """Read a feature collection, a list of features or a single feature.

    Parameters
    ----------
    path : Path
        The file.
    classes : sequence of str, optional
        Class names of the project.

    Returns
    -------
    Imported
        A bad feature is refused with its index, the others are imported.

    Raises
    ------
    ExchangeError
        If the file is no JSON, or holds no features.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ExchangeError(f"{path}: not valid JSON ({error})") from error
    collector = Collector(path, classes)
    for index, item in enumerate(_items(path, data)):
        _read(collector, f"feature {index}", item, None)
    return collector.result("GeoJSON")


def _items(path: Path, data: object) -> Sequence[object]:
    if isinstance(data, dict) and isinstance(data.get("features"), list):
        data = data["features"]
    elif isinstance(data, dict) and data.get("type") in ("Feature", *_GEOMETRIES):
        data = [data]
    if not isinstance(data, list):
        raise ExchangeError(f"{path}: JSON without features; GeoJSON is a FeatureCollection, a list or a Feature")
    return data


def _read(collector: Collector, item: str, data: object, parent: UUID | None) -> None:
    if isinstance(data, dict) and data.get("type") in _GEOMETRIES:
        data = {"type": "Feature", "geometry": data}
    if not isinstance(data, dict) or data.get("type") != "Feature":
        collector.refuse(item, f"is no Feature but {_short(data)}")
        return
    properties = data.get("properties") or {}
    if not isinstance(properties, dict):
        collector.refuse(item, f"has properties that are {_short(properties)}")
        return
    own = parent
    try:
        annotation = _annotation(collector, item, data, properties, parent)
    except ExchangeError as error:
        collector.refuse(item, str(error))
        annotation = None
    if annotation is not None:
        own = collector.add(item, annotation, own_id=_uuid(data.get("id")) or _uuid(properties.get("id")))
    children = properties.get("childObjects", properties.get("children", []))
    for index, child in enumerate(children if isinstance(children, list) else []):
        _read(collector, f"{item}, child {index}", child, own)


def _annotation(
    collector: Collector, item: str, data: Mapping[str, Any], properties: Mapping[str, Any], parent: UUID | None
) -> Annotation | None:
    kind_name = str(properties.get("objectType", properties.get("object_type", data.get("id", "annotation"))))
    if kind_name in _ROOTS:
        return None
    geometry = collector.shape(item, _geometry(data.get("geometry")))
    if geometry is None:
        return None
    path_class = _class(collector, properties.get("classification"))
    nucleus = data.get("nucleusGeometry")
    member = data["geometry"]
    return Annotation(
        kind=_KINDS.get(kind_name, "annotation"),
        geometry=geometry,
        roi="Ellipse" if member.get("isEllipse") is True else None,
        plane=_plane(member.get("plane")),
        path_class=path_class,
        name=None if properties.get("name") is None else str(properties["name"]),
        locked=properties.get("isLocked", properties.get("locked", False)) is True,
        is_missing=properties.get("isMissing") is True,
        parent=parent,
        colour=_object_colour(properties.get("color")),
        measurements=_measurements(properties.get("measurements")),
        metadata=_metadata(properties.get("metadata")),
        nucleus=None if nucleus is None else snapped(_geometry(nucleus))[0],
    )


def _geometry(member: object) -> BaseGeometry:
    if not isinstance(member, dict) or member.get("type") not in _GEOMETRIES:
        raise ExchangeError(f"has no geometry but {_short(member)}")
    try:
        geometry = shape(member)
    except (shapely.errors.ShapelyError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ExchangeError(f"has a geometry of type {member['type']} that is damaged ({error})") from error
    return shapely.force_2d(geometry)


def _class(collector: Collector, value: object) -> str | None:
    """Full class name of ``classification`` in any of its forms; its colour is noted."""
    if isinstance(value, str):
        return collector.class_name(value)
    if not isinstance(value, dict):
        return None
    name = collector.class_name(": ".join(_class_names(value)))
    colour = value.get("color", value.get("colorRGB"))
    collector.colour(name, _colour(colour))
    return name


def _class_names(value: Mapping[str, Any]) -> list[str]:
    if isinstance(value.get("names"), list):
        return [str(name) for name in value["names"]]
    parent = value.get("parentClass", value.get("parentPathClass"))
    above = _class_names(parent) if isinstance(parent, dict) else []
    return [*above, str(value["name"])] if value.get("name") else above


def _colour(value: object) -> Colour | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return Colour.from_argb(value)
    if isinstance(value, list) and len(value) >= 3 and all(isinstance(band, int) for band in value):
        return Colour(*(min(max(band, 0), 255) for band in value[:3]))
    return None


def _object_colour(value: object) -> int | None:
    colour = _colour(value)
    return None if colour is None else colour.argb


def _measurements(value: object) -> dict[str, float]:
    if isinstance(value, list):
        pairs = [(entry.get("name"), entry.get("value")) for entry in value if isinstance(entry, dict)]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else []
    return {str(name): _float(number) for name, number in pairs if name is not None}


def _float(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def _metadata(value: object) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def _plane(value: object) -> Plane:
    if not isinstance(value, dict):
        return Plane()
    numbers = [value.get(axis, default) for axis, default in zip("czt", Plane(), strict=True)]
    return Plane(*numbers) if all(isinstance(number, int) for number in numbers) else Plane()


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def write_geojson(annotations: Iterable[Annotation], path: Path | str, *, classes: Iterable[PathClass] = ()) -> int:
    """Write one FeatureCollection in QuPath's own form.

    Parameters
    ----------
    annotations : iterable of Annotation
        Objects of an image; those without a ROI are left out, as QuPath's importer would refuse them.
    path : Path or str
        The file; replaced as a whole, or not at all.
    classes : iterable of PathClass, optional
        Colours of the classes; others get their default.

    Returns
    -------
    int
        Features written.
    """
    colours = {path_class.name: path_class.colour for path_class in classes}
    count = 0
    with replacing(Path(path), ExchangeError) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for annotation in annotations:
            made = feature(annotation, colours)
            if made is not None:
                file.write(",\n" if count else "\n")
                file.write(geojson.dumps(made, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
                count += 1
        file.write("\n]}\n")
    return count


def feature(annotation: Annotation, colours: Mapping[str, Colour] | None = None) -> geojson.Feature | None:
    """One object as QuPath's GeoJSON feature.

    Parameters
    ----------
    annotation : Annotation
        The object.
    colours : mapping of str to Colour, optional
        By full class name.

    Returns
    -------
    geojson.Feature or None
        At QuPath's precision of 0.01 px; None for an object without a ROI.
    """
    geometry = None if annotation.geometry is None else snapped(annotation.geometry)[0]
    if geometry is None:
        return None
    members: dict[str, Any] = {}
    if annotation.nucleus is not None:
        members["nucleusGeometry"] = _mapping(annotation.nucleus, Plane())
    made = geojson.Feature(id=str(annotation.id), properties=_properties(annotation, colours or {}), **members)
    made["geometry"] = _mapping(geometry, annotation.plane)
    if annotation.roi == "Ellipse":
        made["geometry"]["isEllipse"] = True
    return made


def _mapping(geometry: BaseGeometry, plane: Plane) -> dict[str, Any]:
    # GEOS writes a point as QuPath does, and is faster than a walk through the coordinates in Python.
    member: dict[str, Any] = json.loads(shapely.to_geojson(geometry))
    if plane != Plane():
        member["plane"] = plane._asdict()
    return member


def _properties(annotation: Annotation, colours: Mapping[str, Colour]) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": _OBJECT_TYPES.get(annotation.kind, annotation.kind)}
    if annotation.name is not None:
        properties["name"] = annotation.name
    if annotation.colour is not None:
        properties["color"] = list(Colour.from_argb(annotation.colour))
    if annotation.path_class is not None:
        properties["classification"] = _classification(annotation.path_class, colours)
    if annotation.locked:
        properties["isLocked"] = True
    if annotation.kind == "tma core":
        properties["isMissing"] = annotation.is_missing
    if annotation.measurements:
        properties["measurements"] = {name: _json_number(value) for name, value in annotation.measurements.items()}
    if annotation.metadata:
        properties["metadata"] = dict(annotation.metadata)
    return properties


def _classification(path_class: str, colours: Mapping[str, Colour]) -> dict[str, Any]:
    names = path_class.split(": ")
    colour = list(colours.get(path_class) or default_colour(path_class))
    return {"name": names[0], "color": colour} if len(names) == 1 else {"names": names, "color": colour}


def _json_number(value: float) -> float | str:
    """QuPath's text for what JSON has no number for."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
