"""What an import gives, and the geometry rules that all importers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import shapely
from shapely.geometry import MultiLineString, MultiPolygon, Polygon

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Colour
from darefine_qupath.errors import ExchangeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

__all__ = ["Collector", "Imported", "Note", "ellipse", "number", "snapped"]

_ELLIPSE_CORNERS = 100
_PRECISION = 0.01

_MAX_CROSSINGS = 50_000
"""Crossings of a shape with itself up to which it can be repaired in seconds; a scribble has millions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something that happened to one item of a file.

    Attributes
    ----------
    item : str
        Which one, as the file counts or names it.
    reason : str
        What was wrong with it, and what became of it.
    """

    item: str
    reason: str

    def __str__(self) -> str:
        return f"{self.item}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Annotations of a file, and what became of the rest.

    Every item of the file is in `annotations`, in `refused` or, as a cut-out, part of another.

    Attributes
    ----------
    path : Path
        The file.
    format : str
        ``"Aperio XML"``, ``"ASAP XML"``, ``"GeoJSON"`` or ``"label mask"``.
    annotations : tuple of Annotation
        In the order of the file.
    items : tuple of str
        For each annotation, what the file counts or names it as.
    own_ids : frozenset of UUID
        Ids of annotations that the file itself gives; the others were made up when it was read.
    repaired : tuple of Note
        Shapes that crossed themselves, say; they are among the annotations.
    refused : tuple of Note
        Items without an area, say; they are not.
    cut_outs : int
        Items that became holes of others.
    colours : mapping of str to Colour
        Class colours by the file.
    mpp : float or None
        Micrometres per pixel by the file.
    warnings : tuple of str
        What the user should know about the file as a whole.
    """

    path: Path
    format: str
    annotations: tuple[Annotation, ...]
    items: tuple[str, ...] = ()
    own_ids: frozenset[UUID] = frozenset()
    repaired: tuple[Note, ...] = ()
    refused: tuple[Note, ...] = ()
    cut_outs: int = 0
    colours: Mapping[str, Colour] = field(default_factory=dict)
    mpp: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def num_items(self) -> int:
        """Items in the file."""
        return len(self.annotations) + len(self.refused) + self.cut_outs

    def __str__(self) -> str:
        parts = [f"{len(self.annotations)} annotations"]
        parts += [f"{len(self.repaired)} of them repaired"] if self.repaired else []
        parts += [f"{self.cut_outs} cut-outs"] if self.cut_outs else []
        parts += [f"{len(self.refused)} refused"] if self.refused else []
        return f"{self.path} ({self.format}): {', '.join(parts)}"


def snapped(geometry: BaseGeometry) -> tuple[BaseGeometry | None, bool]:
    """Bring a geometry to QuPath's precision, and make it valid there.

    Parameters
    ----------
    geometry : shapely geometry
        In level-0 pixels.

    Returns
    -------
    shapely geometry or None
        On a grid of 0.01 px, valid; None where an areal geometry has no area, or a line no length.
    bool
        Whether it was not valid. A ring that crosses itself keeps all that it encloses, as QuPath fills it.
    """
    rounded = shapely.transform(geometry, _on_grid)
    if geometry.geom_type in ("LineString", "MultiLineString"):
        return _with_length(rounded), False
    if geometry.geom_type not in ("Polygon", "MultiPolygon", "GeometryCollection"):
        return (None if rounded.is_empty else rounded), False
    repaired = not rounded.is_valid
    if repaired:
        fixed = shapely.make_valid(rounded, method="structure", keep_collapsed=False)
        rounded = shapely.set_precision(fixed, _PRECISION)
    parts = shapely.get_parts(shapely.get_parts(rounded))
    polygons = [part for part in parts if part.geom_type == "Polygon" and part.area > 0]
    if not polygons:
        return None, repaired
    return (polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)), repaired


def _with_length(lines: BaseGeometry) -> BaseGeometry | None:
    """Lines without those whose points are all the same, a ruler's, say; None where none is left."""
    if lines.is_valid and not lines.is_empty:
        return lines
    parts = [part for part in shapely.get_parts(lines) if part.length > 0]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else MultiLineString(parts)


def _is_tangled(geometry: BaseGeometry) -> bool:
    """Whether a shape crosses itself so often that a repair would not end; stops counting there."""
    if geometry.geom_type not in ("Polygon", "MultiPolygon") or geometry.is_valid:
        return False
    corners, ring = shapely.get_coordinates(shapely.get_rings(geometry), return_index=True)
    inside = ring[:-1] == ring[1:]
    segments = shapely.linestrings(np.stack([corners[:-1][inside], corners[1:][inside]], axis=1))
    tree = shapely.STRtree(segments)
    crossings = 0
    for start in range(0, len(segments), 1000):
        crossings += tree.query(segments[start : start + 1000], predicate="crosses").shape[1]
        # Each crossing is found from both its segments.
        if crossings > 2 * _MAX_CROSSINGS:
            return True
    return False


def _on_grid(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    # Halves upwards, as Java rounds.
    return np.asarray(np.floor(coordinates * 100 + 0.5) / 100)


def ellipse(left: float, top: float, right: float, bottom: float) -> Polygon:
    """Ellipse in a rectangle, as the polygon of 100 corners that QuPath makes of it."""
    angles = np.arange(_ELLIPSE_CORNERS) * (2 * math.pi / _ELLIPSE_CORNERS)
    x = (left + right) / 2 + (right - left) / 2 * np.cos(angles)
    y = (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angles)
    return Polygon(np.column_stack([x, y]))


class Collector:
    """Gathers the items of one file.

    Parameters
    ----------
    path : Path
        The file.
    classes : sequence of str, optional
        Class names of the project: a name of the file that differs only in case becomes the project's.
    """

    def __init__(self, path: Path, classes: Sequence[str] = ()) -> None:
        self.path = path
        self.annotations: list[Annotation] = []
        self.repaired: list[Note] = []
        self.refused: list[Note] = []
        self.warnings: list[str] = []
        self.colours: dict[str, Colour] = {}
        self.cut_outs = 0
        self._items: list[str] = []
        self._first: dict[UUID, Annotation] = {}
        self._spelling = {name.casefold(): name for name in reversed(classes)}

    def class_name(self, text: str | None) -> str | None:
        """Name of a class: the first spelling seen, whatever the case; None for an empty one."""
        name = " ".join((text or "").split())
        return self._spelling.setdefault(name.casefold(), name) if name else None

    def shape(self, item: str, geometry: BaseGeometry) -> BaseGeometry | None:
        """Bring a geometry to QuPath's precision; notes a repair, and refuses what is empty."""
        if not np.isfinite(shapely.get_coordinates(geometry)).all():
            self.refuse(item, "has a coordinate that is not a number")
            return None
        if geometry.is_empty:
            self.refuse(item, "has no coordinates")
            return None
        if _is_tangled(geometry):
            self.refuse(item, f"crosses itself more than {_MAX_CROSSINGS:,} times; draw it again")
            return None
        usable, repaired = snapped(geometry)
        if usable is None:
            is_line = geometry.geom_type in ("LineString", "MultiLineString")
            self.refuse(item, "has points that are all the same" if is_line else "encloses no area")
        elif repaired:
            before, after = abs(_signed_area(geometry)), usable.area
            self.repaired.append(Note(item=item, reason=f"crossed itself; {before:.0f} px^2 drawn, {after:.0f} kept"))
        return usable

    def add(self, item: str, annotation: Annotation, *, own_id: UUID | None = None) -> UUID:
        """Take an annotation in.

        Parameters
        ----------
        item : str
            What the file counts or names it as.
        annotation : Annotation
            What was read.
        own_id : UUID, optional
            Id that the file gives; a second shape of one id gets a new one.

        Returns
        -------
        UUID
            Of the annotation, for what stands below it.
        """
        first = self._first.get(own_id) if own_id is not None else None
        if own_id is not None and first is None:
            annotation = replace(annotation, id=own_id)
            self._first[own_id] = annotation
        elif first is not None and replace(annotation, id=first.id) == first:
            self.refuse(item, f"stands in the file twice (id {own_id})")
            return first.id
        elif first is not None:
            self.repaired.append(Note(item=item, reason=f"has the id {own_id} of another one and gets a new one"))
        self.annotations.append(annotation)
        self._items.append(item)
        return annotation.id

    def refuse(self, item: str, reason: str) -> None:
        """Note an item that cannot be imported."""
        self.refused.append(Note(item=item, reason=reason))

    def colour(self, name: str | None, colour: Colour | None) -> None:
        """Note the colour of a class; the first one stays."""
        if name is not None and colour is not None:
            self.colours.setdefault(name, colour)

    def result(self, format_name: str, *, mpp: float | None = None) -> Imported:
        """Everything gathered."""
        return Imported(
            path=self.path,
            format=format_name,
            annotations=tuple(self.annotations),
            items=tuple(self._items),
            own_ids=frozenset(self._first),
            repaired=tuple(self.repaired),
            refused=tuple(self.refused),
            cut_outs=self.cut_outs,
            colours=self.colours,
            mpp=mpp,
            warnings=tuple(self.warnings),
        )


def _signed_area(geometry: BaseGeometry) -> float:
    """Area by the corners in their order; a part that runs the other way round counts against the rest."""
    total = 0.0
    for polygon in shapely.get_parts(geometry):
        if polygon.geom_type == "Polygon":
            rings = [polygon.exterior, *polygon.interiors]
            areas = [_ring_area(shapely.get_coordinates(ring)) for ring in rings]
            total += abs(areas[0]) - sum(abs(area) for area in areas[1:])
    return total


def _ring_area(points: NDArray[np.float64]) -> float:
    moved = points - points[0]
    return float(np.sum(moved[:-1, 0] * moved[1:, 1] - moved[1:, 0] * moved[:-1, 1]) / 2)


def number(text: str | None, item: str) -> float:
    """Read a coordinate; some writers use a decimal comma.

    Raises
    ------
    ExchangeError
        If it is none.
    """
    try:
        value = float((text or "").strip().replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ExchangeError(f"{item} has {text!r} where a number should be")
    return value
