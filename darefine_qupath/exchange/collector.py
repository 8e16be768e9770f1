"""Collect the annotations of one file, repair or refuse each, and note what became of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np
import shapely
from shapely.geometry import MultiPolygon

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color
from darefine_qupath.errors import DarefineError, ExchangeError
from darefine_qupath.exchange.class_fields import ClassChoice, FieldTally
from darefine_qupath.exchange.imported import Imported, Note
from darefine_qupath.exchange.shapes import crossings, polygons_of, signed_area, snapped
from darefine_qupath.limits import DATA, Budget, naming, proper_text

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["Collector"]

_MAX_CROSSINGS = 50_000
"""Crossings of a shape with itself up to which it can be repaired in seconds; a scribble has millions."""

_FILE_CROSSINGS = 50_000
"""The same for all shapes of a file, on top of one for each of its corners."""

_INT32 = 2**31
"""A coordinate, plane or time point from here on lies in no image: QuPath counts in 32 bits."""

_LISTED = 5
_MAX_CLASS_DEPTH = 20
"""Parts of a derived class (``Tumor: Positive``); QuPath nests a class in a class for each."""


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
                raise ExchangeError(f"{path}: {name!r} is no field for a class here; choose among {', '.join(fields)}")
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
        """Name of a class as the project spells it, else as the file first does; None for no text."""
        name = " ".join((text or "").split())
        if not name or name in self._classes:
            return name or None
        known = self._spelling.setdefault(name.casefold(), name)
        if known != name:
            self._respelled[name] = known
        return known

    @contextmanager
    def item(self, item: str) -> Iterator[None]:
        """Refuse this item, and no other, when anything goes wrong inside."""
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
        # One more crossing for each corner: the work allowed grows with the file, and no faster.
        self._crossings += len(corners)
        if self._is_tangled(item, geometry):
            return None
        usable, repaired = snapped(geometry)
        if usable is None:
            is_line = geometry.geom_type in ("LineString", "MultiLineString")
            self.refuse(item, "has points that are all the same" if is_line else "encloses no area")
        elif repaired:
            before, after = abs(signed_area(geometry)), usable.area
            self.repaired.append(Note(item=item, reason=f"crossed itself; {before:.0f} px^2 drawn, {after:.0f} kept"))
        return usable

    def _is_tangled(self, item: str, geometry: BaseGeometry) -> bool:
        """Whether a shape, or all of the file, crosses itself so often that a repair would not end; refuses it."""
        polygons = polygons_of(geometry)
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
            Id of the annotation, for the objects below it; None where it is refused.
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
            self.refuse(item, f"is in the file twice (id {own_id})")
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
        """Note the color of a class; the first one stays."""
        if name is not None and color is not None:
            self.colors.setdefault(name, color)

    def result(self, format_name: str, *, mpp: float | None = None) -> Imported:
        """Give all that was collected.

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
    """Say why a project cannot hold an object, apart from its geometry; None where it can."""
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
