"""Read GeoJSON as QuPath writes it, versions 0.2 to 0.7."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import UUID

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Color
from darefine_qupath.errors import ClassMapError, ExchangeError
from darefine_qupath.exchange.class_fields import ClassChoice
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.geojson_shapes import GEOMETRIES, shape_of
from darefine_qupath.exchange.imported import Imported
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.exchange.values import band_color, plain_text, scalars, short_json

__all__ = ["holds_features", "read_features"]

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


_MAX_CHILDREN = 100
"""Levels of objects in objects."""

_MAX_TEXT = 4096
"""Length of a text that may be JSON or Python for a class or color."""

_CLASS = "classification"
_OWN = (
    "objectType", "object_type", "color", "isLocked", "locked", "isMissing", "measurements", "metadata", "childObjects",
    "children", "id",
)  # fmt: skip
"""Properties that are no class whatever they hold."""

_NO_CLASS = ("null", "none", "nan", "undefined")
"""What table programs write for a value that is not there."""


def read_features(request: ReadRequest, data: object) -> Imported:
    """Read a feature collection, a list of features or a single feature.

    Parameters
    ----------
    request : ReadRequest
        The file; its `class_from` names properties that hold the class, by default ``classification``.
    data : object
        Its JSON, of which `holds_features` is true.

    Returns
    -------
    Imported
        A bad feature is refused with its index, the others are imported.

    Raises
    ------
    ExchangeError
        If no feature has a property of `class_from`.
    """
    collector = request.collector()
    waiting = [(f"feature {index}", item, _Place()) for index, item in enumerate(_items(data))][::-1]
    while waiting:
        item, value, place = waiting.pop()
        with collector.item(item):
            waiting += reversed(_read(collector, item, value, place))
    return collector.result("GeoJSON")


class _Place(NamedTuple):
    """Where an object lies in the hierarchy."""

    parent: UUID | None = None
    depth: int = 0


def holds_features(data: object) -> bool:
    """Whether JSON is GeoJSON, or a list that may be one of features."""
    if isinstance(data, dict):
        return isinstance(data.get("features"), list) or data.get("type") in ("Feature", *GEOMETRIES)
    return isinstance(data, list) and (not data or any(_is_feature(item) for item in data))


def _is_feature(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") in ("Feature", *GEOMETRIES)


def _items(data: object) -> Sequence[object]:
    if isinstance(data, dict):
        return data["features"] if isinstance(data.get("features"), list) else [data]
    return data if isinstance(data, list) else []


def _read(collector: Collector, item: str, data: object, place: _Place) -> list[tuple[str, object, _Place]]:
    """Take one object in; gives those that lie in it."""
    if isinstance(data, dict) and data.get("type") in GEOMETRIES:
        data = {"type": "Feature", "geometry": data}
    if not isinstance(data, dict) or data.get("type") != "Feature":
        raise ExchangeError(f"is no Feature but {short_json(data)}")
    properties = data.get("properties") or {}
    if not isinstance(properties, dict):
        raise ExchangeError(f"has properties that are {short_json(properties)}")
    if place.depth >= _MAX_CHILDREN:
        raise ExchangeError(f"lies in more than {_MAX_CHILDREN} others, one in the other")
    parent = place.parent
    with collector.item(item):
        found = _annotation(collector, item, data, properties, parent)
        if found is not None:
            own_id = _uuid(data.get("id")) or _uuid(properties.get("id"))
            parent = collector.add(item, *found, own_id=own_id) or parent
    children = properties.get("childObjects", properties.get("children", []))
    below = _Place(parent, place.depth + 1)
    if not isinstance(children, list):
        return []
    return [(f"{item}, child {index}", child, below) for index, child in enumerate(children)]


def _annotation(
    collector: Collector, item: str, data: Mapping[str, Any], properties: Mapping[str, Any], parent: UUID | None
) -> tuple[Annotation, ClassChoice] | None:
    kind_name = str(properties.get("objectType", properties.get("object_type", data.get("id", "annotation"))))
    if kind_name in _ROOTS:
        return None
    geometry = collector.shape(item, shape_of(data.get("geometry")))
    if geometry is None:
        return None
    choice = _choice(collector, properties)
    nucleus = data.get("nucleusGeometry")
    member = data["geometry"]
    annotation = Annotation(
        kind=_KINDS.get(kind_name, "annotation"),
        geometry=geometry,
        roi="Ellipse" if member.get("isEllipse") is True else None,
        plane=_plane(member.get("plane")),
        path_class=choice.name,
        name=None if properties.get("name") is None else str(properties["name"]),
        locked=properties.get("isLocked", properties.get("locked", False)) is True,
        is_missing=properties.get("isMissing") is True,
        parent=parent,
        color=_object_color(properties.get("color")),
        measurements=_measurements(_unwrapped(properties.get("measurements"))),
        metadata=_metadata(_unwrapped(properties.get("metadata"))),
        nucleus=None if nucleus is None else collector.shape(f"the nucleus of {item}", shape_of(nucleus)),
    )
    return annotation, choice


def _choice(collector: Collector, properties: Mapping[str, Any]) -> ClassChoice:
    """Class of an object by ``classification``, or by the properties that the user named; its color is noted."""
    names: dict[str, str | None] = {}
    for field in collector.fields.asked or (_CLASS,):
        name, color = _class(_property(properties, field))
        names[field] = name
        known = collector.class_name(name)
        if known is not None:
            collector.color(known, color)
            break
    choice = collector.choose(names)
    if choice.name is not None:
        return choice
    return replace(choice, others=scalars(properties, (*_OWN, *collector.fields.asked)))


def _property(properties: Mapping[str, Any], field: str) -> object:
    if field in properties or field == _CLASS:
        return properties.get(field)
    return next((value for name, value in properties.items() if name.casefold() == field.casefold()), None)


def _class(value: object) -> tuple[str | None, Color | None]:
    """Full class name and color of ``classification`` in any of its forms, JSON or Python as text too."""
    value = _unwrapped(value)
    if isinstance(value, list):
        value = {"names": value}
    if isinstance(value, dict):
        return ": ".join(_class_names(value)), _color(value.get("color", value.get("colorRGB")))
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None, None
    text = _class_part(value)
    return (None if text.strip().casefold() in _NO_CLASS else text), None


def _unwrapped(value: object) -> object:
    """Value that went through a table program as text: JSON, or what Python prints."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[", '"')):
        return value
    text = value.strip()
    if len(text) > _MAX_TEXT:
        raise ExchangeError(f"has a text of {len(text)} characters where a value should be: {short_json(text)}")
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ExchangeError(f"has a text that is damaged JSON where a value should be: {short_json(text)}") from None


def _class_names(value: Mapping[str, Any]) -> list[str]:
    if isinstance(value.get("names"), list):
        names = value["names"] if any(name is not None for name in value["names"]) else []
        return [_class_part(name) for name in names]
    parts: list[str] = []
    level: object = value
    while isinstance(level, dict):
        parts += [_class_part(level["name"])] if level.get("name") else []
        level = level.get("parentClass", level.get("parentPathClass"))
    return parts[::-1]


def _class_part(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ExchangeError(f"has a class name that is {short_json(value)}")
    return plain_text(value)


_BANDS = re.compile(r"(?:rgb)?[\[(]\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*[\])]", re.ASCII)


def _color(value: object) -> Color | None:
    if isinstance(value, str):
        value = _color_value(value.strip())
    if isinstance(value, Color):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Color.from_argb(value)
    return band_color(value)


def _color_value(text: str) -> object:
    """Color that is written as text: a list, ``#rrggbb``, or a number."""
    bands = _BANDS.fullmatch(text)
    if bands:
        return [int(band) for band in bands.groups()]
    try:
        return Color.from_hex(text) if text.startswith("#") else int(text)
    except (ClassMapError, ValueError):
        return None


def _object_color(value: object) -> int | None:
    color = _color(value)
    return None if color is None else color.argb


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
    if value is None:
        return Plane()
    if not isinstance(value, dict):
        raise ExchangeError(f"has a plane that is {short_json(value)}")
    return Plane(*(_index(value.get(axis, default), axis) for axis, default in zip("czt", Plane(), strict=True)))


def _index(value: object, axis: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_INT32 <= value < _INT32:
        raise ExchangeError(f"lies on a plane whose {axis} is {short_json(value)}, which no image has")
    return int(value)


_INT32 = 2**31


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None
