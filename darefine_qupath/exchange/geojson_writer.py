"""Write annotations as GeoJSON in QuPath's own form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import geojson
import shapely
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.classes import Color, PathClass, default_color
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.shapes import snapped
from darefine_qupath.filesystem import atomic_write

__all__ = ["feature", "write_geojson"]

_OBJECT_TYPES: Mapping[str, str] = {"tma core": "tmaCore"}


def write_geojson(annotations: Iterable[Annotation], path: Path | str, *, classes: Iterable[PathClass] = ()) -> int:
    """Write one FeatureCollection in QuPath's own form.

    Parameters
    ----------
    annotations : iterable of Annotation
        Objects of an image; those without a ROI are left out, as QuPath's importer would refuse them.
    path : Path or str
        The file; replaced as a whole, or not at all.
    classes : iterable of PathClass, optional
        Colors of the classes; others get their default.

    Returns
    -------
    int
        Features written.
    """
    colors = {path_class.name: path_class.color for path_class in classes}
    count = 0
    with atomic_write(Path(path), ExchangeError) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for annotation in annotations:
            made = feature(annotation, colors)
            if made is not None:
                file.write(",\n" if count else "\n")
                file.write(geojson.dumps(made, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
                count += 1
        file.write("\n]}\n")
    return count


def feature(annotation: Annotation, colors: Mapping[str, Color] | None = None) -> geojson.Feature | None:
    """One object as QuPath's GeoJSON feature.

    Parameters
    ----------
    annotation : Annotation
        The object.
    colors : mapping of str to Color, optional
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
    made = geojson.Feature(id=str(annotation.id), properties=_properties(annotation, colors or {}), **members)
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


def _properties(annotation: Annotation, colors: Mapping[str, Color]) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": _OBJECT_TYPES.get(annotation.kind, annotation.kind)}
    if annotation.name is not None:
        properties["name"] = annotation.name
    if annotation.color is not None:
        properties["color"] = list(Color.from_argb(annotation.color))
    if annotation.path_class is not None:
        properties["classification"] = _classification(annotation.path_class, colors)
    if annotation.locked:
        properties["isLocked"] = True
    if annotation.kind == "tma core":
        properties["isMissing"] = annotation.is_missing
    if annotation.measurements:
        properties["measurements"] = {name: _json_number(value) for name, value in annotation.measurements.items()}
    if annotation.metadata:
        properties["metadata"] = dict(annotation.metadata)
    return properties


def _classification(path_class: str, colors: Mapping[str, Color]) -> dict[str, Any]:
    names = path_class.split(": ")
    color = list(colors.get(path_class) or default_color(path_class))
    return {"name": names[0], "color": color} if len(names) == 1 else {"names": names, "color": color}


def _json_number(value: float) -> float | str:
    """QuPath's text for what JSON has no number for."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
