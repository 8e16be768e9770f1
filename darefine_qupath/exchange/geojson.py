"""Read GeoJSON as QuPath writes it, versions 0.2 to 0.7."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import numpy as np
import shapely
from shapely.geometry import GeometryCollection, LineString, MultiLineString, MultiPoint, MultiPolygon, Point, Polygon

from darefine_qupath.annotations import Annotation, Kind, Plane
from darefine_qupath.classes import Color
from darefine_qupath.errors import ClassMapError, ExchangeError
from darefine_qupath.exchange.class_fields import ClassChoice
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.imported import Imported
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.exchange.values import band_color, plain_text, scalars
from darefine_qupath.limits import spoken

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

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

_GEOMETRIES = ("Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection")


_MAX_CHILDREN = 100
"""Levels of objects in objects."""

_MAX_TEXT = 4096
"""Length of a text that may be JSON or Python for a class or colour."""

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
        return isinstance(data.get("features"), list) or data.get("type") in ("Feature", *_GEOMETRIES)
    return isinstance(data, list) and (not data or any(_is_feature(item) for item in data))


def _is_feature(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") in ("Feature", *_GEOMETRIES)


def _items(data: object) -> Sequence[object]:
    if isinstance(data, dict):
        return data["features"] if isinstance(data.get("features"), list) else [data]
    return data if isinstance(data, list) else []


def _read(collector: Collector, item: str, data: object, place: _Place) -> list[tuple[str, object, _Place]]:
    """Take one object in; gives those that lie in it."""
    if isinstance(data, dict) and data.get("type") in _GEOMETRIES:
        data = {"type": "Feature", "geometry": data}
    if not isinstance(data, dict) or data.get("type") != "Feature":
        raise ExchangeError(f"is no Feature but {_short(data)}")
    properties = data.get("properties") or {}
    if not isinstance(properties, dict):
        raise ExchangeError(f"has properties that are {_short(properties)}")
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
    geometry = collector.shape(item, _geometry(data.get("geometry")))
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
        nucleus=None if nucleus is None else collector.shape(f"the nucleus of {item}", _geometry(nucleus)),
    )
    return annotation, choice


def _geometry(member: object, depth: int = 0) -> BaseGeometry:
    if not isinstance(member, dict) or member.get("type") not in _GEOMETRIES:
        raise ExchangeError(f"has no geometry but {_short(member)}")
    kind = str(member["type"])
    try:
        if kind != "GeometryCollection":
            return _BUILDERS[kind](member["coordinates"])
        if depth >= _MAX_COLLECTIONS:
            raise ValueError("collections in collections")
        return GeometryCollection([_geometry(part, depth + 1) for part in member["geometries"]])
    except ExchangeError:
        raise
    except KeyError as error:
        raise ExchangeError(f"has a geometry of type {kind} that is damaged ({error} is missing)") from error
    except (shapely.errors.ShapelyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise ExchangeError(f"has a geometry of type {kind} that is damaged ({spoken(error)})") from error


_MAX_COLLECTIONS = 5


def _positions(value: Any) -> NDArray[np.float64]:  # noqa: ANN401 - JSON is any value
    """Corners of a list of positions, shape (N, 2); heights are left out."""
    if not isinstance(value, list):
        raise TypeError(f"{_short(value)} is no list of positions")
    try:
        corners = np.array(value, np.float64)
    except ValueError:
        corners = _ragged(value)
    if len(value) == 0:
        return np.empty((0, 2))
    if corners.ndim != 2 or corners.shape[1] < 2:
        raise ValueError(f"{_short(value)} is no list of positions")
    if not np.isfinite(corners).all():
        raise ExchangeError("has a coordinate that is not a number")
    return corners[:, :2]


def _ragged(value: list[Any]) -> NDArray[np.float64]:
    """Corners of positions of which some have a height, and some none."""
    try:
        return np.array([position[:2] for position in value], np.float64)
    except ValueError:
        raise ValueError(f"{_short(value)} of other things than pairs of numbers") from None


def _polygon(rings: Any) -> Polygon:  # noqa: ANN401 - JSON is any value
    corners = [_positions(ring) for ring in rings]
    return Polygon(corners[0], corners[1:]) if corners else Polygon()


_BUILDERS: Mapping[str, Callable[[Any], BaseGeometry]] = {
    "Point": lambda value: Point(*_positions([value])) if value else Point(),
    "MultiPoint": lambda value: MultiPoint(_positions(value)),
    "LineString": lambda value: LineString(_positions(value)),
    "MultiLineString": lambda value: MultiLineString([_positions(part) for part in value]),
    "Polygon": _polygon,
    "MultiPolygon": lambda value: MultiPolygon([_polygon(part) for part in value]),
}


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
        raise ExchangeError(f"has a text of {len(text)} characters where a value should be: {_short(text)}")
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ExchangeError(f"has a text that is damaged JSON where a value should be: {_short(text)}") from None


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
        raise ExchangeError(f"has a class name that is {_short(value)}")
    return plain_text(value)


_BANDS = re.compile(r"(?:rgb)?[\[(]\s*(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})\s*[\])]", re.ASCII)


def _color(value: object) -> Color | None:
    if isinstance(value, str):
        value = _colour_value(value.strip())
    if isinstance(value, Color):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Color.from_argb(value)
    return band_color(value)


def _colour_value(text: str) -> object:
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
        raise ExchangeError(f"has a plane that is {_short(value)}")
    return Plane(*(_index(value.get(axis, default), axis) for axis, default in zip("czt", Plane(), strict=True)))


def _index(value: object, axis: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_INT32 <= value < _INT32:
        raise ExchangeError(f"lies on a plane whose {axis} is {_short(value)}, which no image has")
    return int(value)


_INT32 = 2**31


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _short(value: object) -> str:
    """Beginning of a value as JSON; not all of it, which may be as large as it likes."""
    if isinstance(value, (list, dict)) and value:
        return "a list" if isinstance(value, list) else f"an object of {', '.join(map(_short, list(value)[:3]))}"
    text = json.dumps(value[:40] if isinstance(value, str) else value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
