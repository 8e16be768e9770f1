"""What an import gives, and the geometry rules that all importers share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import numpy as np
import shapely
from shapely.geometry import MultiLineString, MultiPolygon, Polygon

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color
from darefine_qupath.errors import DarefineError, ExchangeError
from darefine_qupath.exchange.classfields import ClassChoice, FieldTally
from darefine_qupath.limits import DATA, Budget, naming, proper_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

__all__ = ["Collector", "Imported", "Note", "crossings", "ellipse", "merged", "number", "on_grid", "snapped"]

_ELLIPSE_CORNERS = 100
_POLYGON = 3
"""GEOS's number of polygons; those of collections and of multiple shapes are larger."""

_PRECISION = 0.01

_MAX_CROSSINGS = 50_000
"""Crossings of a shape with itself up to which it can be repaired in seconds; a scribble has millions."""

_FILE_CROSSINGS = 50_000
"""The same for all shapes of a file, on top of one for each of its corners."""

_PAIRS = 8_000_000
"""Pairs of segments that are looked at at a time, at most: all of a shape of 100,000 corners would be 10^10."""

_FREE_PAIRS = 20
"""Neighbours of a segment that cost nothing: any shape has them."""

_PAIRS_PER_CROSSING = 200
"""Pairs of segments that take as long to be looked at as a crossing to be repaired."""

_INT32 = 2**31
"""A coordinate, plane or time point from here on is no place in an image: QuPath counts in 32 bits."""

_LISTED = 5
_MAX_CLASS_DEPTH = 20
"""Parts of a derived class (``Tumor: Positive``); QuPath nests a class in a class for each."""


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
    class_notes : tuple of str
        Which field gave the classes, what other fields hold, and how many objects have none.
    """

    path: Path
    format: str
    annotations: tuple[Annotation, ...]
    items: tuple[str, ...] = ()
    own_ids: frozenset[UUID] = frozenset()
    repaired: tuple[Note, ...] = ()
    refused: tuple[Note, ...] = ()
    cut_outs: int = 0
    colors: Mapping[str, Color] = field(default_factory=dict)
    mpp: float | None = None
    warnings: tuple[str, ...] = ()
    class_notes: tuple[str, ...] = ()

    @property
    def is_partial(self) -> bool:
        """Whether the file holds objects that could not be read."""
        return bool(self.refused)

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

    def in_member(self, name: str) -> Imported:
        """Give the same, with the name of the file in the archive before each item."""
        return replace(
            self,
            items=tuple(f"{name}, {item}" for item in self.items),
            repaired=tuple(Note(item=f"{name}, {note.item}", reason=note.reason) for note in self.repaired),
            refused=tuple(Note(item=f"{name}, {note.item}", reason=note.reason) for note in self.refused),
            warnings=tuple(f"{name}: {warning}" for warning in self.warnings),
            class_notes=tuple(f"{name}: {note}" for note in self.class_notes),
        )


def _renamed(identity: UUID | None, new: Mapping[UUID, UUID]) -> UUID | None:
    return None if identity is None else new.get(identity, identity)


def merged(parts: Sequence[Imported]) -> Imported:
    """All that the files of an archive hold, as if it were one."""
    if len(parts) == 1:
        return parts[0]
    taken: set[UUID] = set()
    annotations = []
    for part in parts:
        # The same id in another file is another object: QuPath exports one image per file.
        new = {record.id: uuid4() for record in part.annotations if record.id in taken}
        annotations += [
            replace(record, id=new.get(record.id, record.id), parent=_renamed(record.parent, new))
            for record in part.annotations
        ]
        taken |= {record.id for record in part.annotations}
    return Imported(
        path=parts[0].path,
        format=" and ".join(sorted({part.format for part in parts})),
        annotations=tuple(annotations),
        items=tuple(item for part in parts for item in part.items),
        own_ids=frozenset().union(*(part.own_ids for part in parts)),
        repaired=tuple(note for part in parts for note in part.repaired),
        refused=tuple(note for part in parts for note in part.refused),
        cut_outs=sum(part.cut_outs for part in parts),
        colors={name: color for part in reversed(parts) for name, color in part.colors.items()},
        mpp=next((part.mpp for part in parts if part.mpp is not None), None),
        warnings=tuple(warning for part in parts for warning in part.warnings),
        class_notes=tuple(note for part in parts for note in part.class_notes),
    )


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
    if geometry.geom_type == "GeometryCollection":
        # Only what has an area is a shape; polygons that overlap become one.
        geometry = MultiPolygon(_polygons(geometry))
    rounded = shapely.transform(geometry, on_grid)
    if geometry.geom_type in ("LineString", "MultiLineString"):
        return _with_length(rounded), False
    if geometry.geom_type not in ("Polygon", "MultiPolygon", "GeometryCollection"):
        return (None if rounded.is_empty else rounded), False
    repaired = not rounded.is_valid
    if repaired:
        fixed = shapely.make_valid(rounded, method="structure", keep_collapsed=False)
        rounded = shapely.set_precision(fixed, _PRECISION)
    polygons = [part for part in _polygons(rounded) if part.area > 0]
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


def crossings(geometry: BaseGeometry, most: int) -> float:
    """How often the rings of a shape meet, other than from corner to corner; stops counting beyond `most`.

    Pairs of segments that only lie near each other count for the time that it takes to look at them.
    """
    starts, ends = _segments(geometry)
    if len(starts) == 0:
        return 0.0
    tree = shapely.STRtree(shapely.linestrings(np.stack([starts, ends], axis=1)))
    count, step = 0.0, max(_PAIRS // len(starts), 8)
    for first in range(0, len(starts), step):
        # Their boxes meet; each pair is found from both sides, and once is enough.
        one, other = tree.query(tree.geometries[first : first + step])
        one, other = one[other > one + first] + first, other[other > one + first]
        met = _meet(starts[one], ends[one], starts[other], ends[other])
        looked_at = min(step, len(starts) - first)
        # Each meets the next one.
        count += max(int(met.sum()) - looked_at, 0)
        count += max(len(one) - _FREE_PAIRS * looked_at, 0) / _PAIRS_PER_CROSSING
        if count > most:
            break
    return count


def _segments(geometry: BaseGeometry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of each segment of the rings of a shape, shape (N, 2); where the pen stood still is none."""
    corners, ring = shapely.get_coordinates(shapely.get_rings(_polygons(geometry)), return_index=True)
    is_segment = (ring[:-1] == ring[1:]) & (corners[:-1] != corners[1:]).any(axis=1)
    return corners[:-1][is_segment], corners[1:][is_segment]


def _meet(
    a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64], d: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether the segments a-b and c-d, whose boxes meet, do so too."""
    across = _side(a, b, c) * _side(a, b, d) <= 0
    return np.asarray(across & (_side(c, d, a) * _side(c, d, b) <= 0))


def _side(a: NDArray[np.float64], b: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    along, to = b - a, point - a
    return np.sign(along[:, 0] * to[:, 1] - along[:, 1] * to[:, 0])


def _polygons(geometry: BaseGeometry) -> list[BaseGeometry]:
    """Polygons of a geometry, those in collections of collections too."""
    parts = shapely.get_parts([geometry])
    while (shapely.get_type_id(parts) > _POLYGON).any():
        parts = shapely.get_parts(parts)
    return list(parts[shapely.get_type_id(parts) == _POLYGON])


def on_grid(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates at QuPath's precision of 0.01 px."""
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
    class_from : sequence of str, optional
        Fields that hold the class, the first that has a value counts; default those of the format.
    fields : sequence of str, optional
        Fields that the format has; empty = any.

    Raises
    ------
    ExchangeError
        If the format does not have a field of `class_from`.
    """

    def __init__(
        self,
        path: Path,
        classes: Sequence[str] = (),
        *,
        class_from: Sequence[str] = (),
        fields: Sequence[str] = (),
    ) -> None:
        for name in class_from if fields else ():
            if name not in fields:
                raise ExchangeError(f"{path}: {name!r} is no field for a class here; there are {', '.join(fields)}")
        self.path = path
        self.fields = FieldTally(class_from)
        self.budget = Budget(DATA)
        self.annotations: list[Annotation] = []
        self.repaired: list[Note] = []
        self.refused: list[Note] = []
        self.warnings: list[str] = []
        self.colors: dict[str, Color] = {}
        self.cut_outs = 0
        self._crossings = float(_FILE_CROSSINGS)
        self._items: list[str] = []
        self._first: dict[UUID, Annotation] = {}
        self._classes = frozenset(classes)
        self._spelling = {name.casefold(): name for name in reversed(classes)}
        self._respelled: dict[str, str] = {}

    def class_name(self, text: str | None) -> str | None:
        """Name of a class: as the project has it, else the first spelling seen whatever the case; None for no text."""
        name = " ".join((text or "").split())
        if not name or name in self._classes:
            return name or None
        known = self._spelling.setdefault(name.casefold(), name)
        if known != name:
            self._respelled[name] = known
        return known

    @contextmanager
    def item(self, item: str) -> Iterator[None]:
        """Refuse an item by name, whatever goes wrong inside; the others of the file are read."""
        self.budget.spend()
        try:
            with naming(item, ExchangeError):
                yield
        except DarefineError as error:
            self.refuse(item, str(error).removeprefix(item).removeprefix(":").strip())

    def choose(self, fields: Mapping[str, str | None], others: Mapping[str, str] | None = None) -> ClassChoice:
        """Class of an object by its fields: the first that has a value, of those the user named or of all.

        Parameters
        ----------
        fields : mapping of str to str
            What the format has for a class, in its order.
        others : mapping of str to str, optional
            Whatever else may hold it.
        """
        words = {name: " ".join((text or "").split()) for name, text in fields.items()}
        order = self.fields.asked or tuple(fields)
        source = next((name for name in order if words.get(name)), None)
        found = None if source is None else self.class_name(words[source])
        left = {name: word for name, word in words.items() if word and name != source and not _is_same(word, found)}
        return ClassChoice(name=found, source=source, others={**left, **(others or {})})

    def shape(self, item: str, geometry: BaseGeometry) -> BaseGeometry | None:
        """Bring a geometry to QuPath's precision; notes a repair, and refuses what is empty."""
        corners = shapely.get_coordinates(geometry)
        if not np.isfinite(corners).all():
            self.refuse(item, "has a coordinate that is not a number")
            return None
        if geometry.is_empty:
            self.refuse(item, "has no coordinates")
            return None
        largest = float(np.abs(corners).max())
        if largest >= _INT32:
            self.refuse(item, f"has a coordinate of {largest:g}, where no image reaches")
            return None
        self.budget.spend(len(corners))
        # As many more crossings as corners: what it may take grows with the file, and no faster.
        self._crossings += len(corners)
        if self._is_tangled(item, geometry):
            return None
        usable, repaired = snapped(geometry)
        if usable is None:
            is_line = geometry.geom_type in ("LineString", "MultiLineString")
            self.refuse(item, "has points that are all the same" if is_line else "encloses no area")
        elif repaired:
            before, after = abs(_signed_area(geometry)), usable.area
            self.repaired.append(Note(item=item, reason=f"crossed itself; {before:.0f} px^2 drawn, {after:.0f} kept"))
        return usable

    def _is_tangled(self, item: str, geometry: BaseGeometry) -> bool:
        """Whether a shape, or all of the file, crosses itself so often that a repair would not end; refuses it."""
        polygons = _polygons(geometry)
        if not polygons or (polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)).is_valid:
            return False
        if self._crossings > 0:
            count = crossings(geometry, _MAX_CROSSINGS)
            self._crossings -= count
            if count > _MAX_CROSSINGS:
                self.refuse(item, f"crosses itself more than {_MAX_CROSSINGS:,} times; draw it again")
                return True
        if self._crossings <= 0:
            self.refuse(
                item,
                f"crosses itself, and the shapes of the file before it did so more than {_FILE_CROSSINGS:,} times; "
                f"repair or divide the file",
            )
        return self._crossings <= 0

    def add(
        self, item: str, annotation: Annotation, choice: ClassChoice | None = None, *, own_id: UUID | None = None
    ) -> UUID | None:
        """Take an annotation in, if a project can hold it.

        Parameters
        ----------
        item : str
            What the file counts or names it as.
        annotation : Annotation
            What was read.
        choice : ClassChoice, optional
            What its class was taken from.
        own_id : UUID, optional
            Id that the file gives; a second shape of one id gets a new one.

        Returns
        -------
        UUID or None
            Of the annotation, for what stands below it; None where it is refused.
        """
        reason = _unusable(annotation)
        if reason is not None:
            self.refuse(item, reason)
            return None
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
        if choice is not None:
            self.fields.add(choice)
        return annotation.id

    def refuse(self, item: str, reason: str) -> None:
        """Note an item that cannot be imported."""
        self.refused.append(Note(item=item, reason=reason))

    def color(self, name: str | None, color: Color | None) -> None:
        """Note the colour of a class; the first one stays."""
        if name is not None and color is not None:
            self.colors.setdefault(name, color)

    def result(self, format_name: str, *, mpp: float | None = None) -> Imported:
        """Everything gathered.

        Raises
        ------
        ExchangeError
            If no object has a field that the user named.
        """
        if self.fields.is_fruitless:
            raise ExchangeError(
                f"{self.path}: no object has a class in {' or '.join(self.fields.asked)}; fields with values are "
                f"{self.fields.known()}"
            )
        if self._respelled:
            pairs = ", ".join(f"{name!r} as {known!r}" for name, known in list(self._respelled.items())[:_LISTED])
            more = f" and {len(self._respelled) - _LISTED} more" if len(self._respelled) > _LISTED else ""
            self.warnings.append(f"{self.path}: class names that differ only in case are taken as one: {pairs}{more}")
        return Imported(
            path=self.path,
            format=format_name,
            annotations=tuple(self.annotations),
            items=tuple(self._items),
            own_ids=frozenset(self._first),
            repaired=tuple(self.repaired),
            refused=tuple(self.refused),
            cut_outs=self.cut_outs,
            colors=self.colors,
            mpp=mpp,
            warnings=tuple(self.warnings),
            class_notes=self.fields.notes(),
        )


def _is_same(word: str, name: str | None) -> bool:
    return name is not None and word.casefold() == name.casefold()


def _unusable(annotation: Annotation) -> str | None:
    """Why a project cannot hold an object, whatever its geometry; None where it can."""
    texts = [annotation.path_class or "", annotation.name or "", *annotation.measurements]
    for text in (*texts, *annotation.metadata, *annotation.metadata.values()):
        try:
            proper_text(text)
        except UnicodeEncodeError:
            return f"holds half a character (a lone surrogate) in the text {text[:30]!a}"
    if any(not -_INT32 <= number < _INT32 for number in annotation.plane):
        return f"lies on a plane (c, z, t) of {', '.join(map('{:g}'.format, annotation.plane))}, which no image has"
    parts = (annotation.path_class or "").count(": ") + 1
    if parts > _MAX_CLASS_DEPTH:
        return f"has a class of {parts} parts; QuPath's are one or two, at most {_MAX_CLASS_DEPTH} are read"
    return None


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
