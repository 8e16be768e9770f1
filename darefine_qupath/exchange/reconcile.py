"""Decide which objects of a file are in an image already, which changed, and which are new.

What an object is, is told by its content: class, kind, plane and geometry at QuPath's precision, and whose it is; not
by the file's name or its place in the file. An imported object notes in its metadata what it was when it came, so that
what a person changed since is known, and never changed by a later import.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

import numpy as np
import shapely

from darefine_qupath.annotations import ANNOTATOR, Annotation, annotator_of
from darefine_qupath.exchange.imported import Note
from darefine_qupath.exchange.shapes import on_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.exchange.imported import Imported

__all__ = ["Origin", "Reconciled", "contents", "reconcile"]

_FILE, _ORIGIN = "darefine.file", "darefine.imported"
_OURS = "darefine."
_PREDICTED, _MARK = "darefine.run", "darefine.place"

_SAME_OUTLINE = 0.5
"""Share of what two outlines cover together that both cover, from which one can be a new form of the other."""

_PAIRS_EACH = 50
"""Objects near a record that it is compared with; where there are more, several can be meant."""

_AT_ONCE = 256
_SEVERAL = "may be a new form of several objects that an earlier import brought"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where annotations come from.

    Attributes
    ----------
    path : Path
        The file.
    image : str
        Entry id of the image.
    annotator : str or None
        Whose they are; None = as each object says itself.
    """

    path: Path
    image: str
    annotator: str | None = None

    @property
    def place(self) -> str:
        """What tells the folder of the file from others, and does not tell its name."""
        return _digest(str(self.path.absolute().parent), 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciled:
    """What an import does to the objects of an image.

    Attributes
    ----------
    add, update : tuple of Annotation
        New objects; objects that stand there, with their new content.
    remove : tuple of UUID
        Former objects of the file, where they are to go.
    already : int
        Objects of the file that stand there.
    notes : tuple of Note
        What became of objects for which that is no matter of course.
    remarks : tuple of str
        What the user should know about the file as a whole.
    """

    add: tuple[Annotation, ...] = ()
    update: tuple[Annotation, ...] = ()
    remove: tuple[UUID, ...] = ()
    already: int = 0
    notes: tuple[Note, ...] = ()
    remarks: tuple[str, ...] = ()


def contents(records: Sequence[Annotation]) -> list[str]:
    """Fingerprints of what annotations are: kind, class, plane and geometry, whatever their ids and file order.

    Parameters
    ----------
    records : sequence of Annotation
        As they are stored or read back.

    Returns
    -------
    list of str
        Equal where the annotations are the same at QuPath's precision.
    """
    geometries = np.array([record.geometry for record in records], object)
    stored = shapely.normalize(shapely.transform(shapely.force_2d(geometries), _as_stored))
    shapes = shapely.to_wkb(stored, byte_order=1)
    return [
        _digest(f"{record.kind}|{record.path_class}|{tuple(record.plane)}|", 16, shape or b"")
        for record, shape in zip(records, shapes.tolist(), strict=True)
    ]


def _as_stored(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    # QuPath keeps corners as 32-bit numbers: this gives the same for a coordinate and for what is read back of it.
    with np.errstate(over="ignore"):
        return on_grid(coordinates).astype(np.float32).astype(np.float64)


def _details(record: Annotation) -> str:
    """Fingerprint of what a person changes in an object beside its content; measurements are QuPath's."""
    others = sorted((key, text) for key, text in record.metadata.items() if not key.startswith(_OURS))
    return _digest(repr((record.name, record.locked, record.color, others)), 8)


def _digest(text: str, length: int, data: bytes = b"") -> str:
    return sha256(text.encode("utf-8", "surrogatepass") + data).hexdigest()[:length]


@dataclass(frozen=True, slots=True)
class _Known:
    """An object of the image, and what it was when it was imported."""

    record: Annotation
    content: str
    imported: str | None
    is_touched: bool
    """Whether it is not, or not any more, just what an import made of it."""
    came_from: tuple[str | None, str | None]
    """Name of the file, and its place."""

    @property
    def annotator(self) -> str | None:
        return annotator_of(self.record)


def _known(record: Annotation, content: str, used: Collection[UUID | None]) -> _Known:
    parts = record.metadata.get(_ORIGIN, "").split(".")
    imported, details, place = parts if len(parts) == 3 else (None, None, None)
    is_touched = (imported, details) != (content, _details(record)) or record.id in used
    return _Known(record, content, imported, is_touched, (record.metadata.get(_FILE), place))


class _Matching:
    """Finds the object of the image that each record of the file is."""

    def __init__(self, records: Sequence[Annotation], own_ids: frozenset[UUID], origin: Origin) -> None:
        self.records = records
        self.contents = contents(records)
        self.whose = [origin.annotator or annotator_of(record) for record in records]
        self.own_ids = own_ids
        self._numbers = {record.id: number for number, record in enumerate(records)}
        self.origin = origin
        self.found: dict[int, _Known] = {}
        self.same: set[int] = set()
        self.doubts: dict[int, str] = {}
        self.known: dict[UUID, _Known] = {}
        self.free: dict[UUID, _Known] = {}

    def among(self, objects: Sequence[Annotation]) -> None:
        """Match with the objects of an image: by content, by id, by outline."""
        # What holds cells, say, that QuPath found in it.
        used = {item.parent for item in objects if item.kind != "annotation" and _ORIGIN not in item.metadata}
        found = zip(objects, contents(objects), strict=True)
        self.known = {record.id: _known(record, content, used) for record, content in found}
        self.free = dict(self.known)
        self._same(lambda item: item.content)
        # What a person edited since it was imported is there all the same.
        self._same(lambda item: item.imported)
        self._changed()
        self._redrawn()
        self._beside()

    def standing(self, parent: UUID | None, ids: Sequence[UUID]) -> UUID | None:
        """Id under which the parent of a record stands in the image."""
        return None if parent is None or parent not in self._numbers else ids[self._numbers[parent]]

    def left(self) -> list[int]:
        return [number for number in range(len(self.records)) if number not in self.found]

    def _take(self, number: int, item: _Known) -> None:
        self.found[number] = self.free.pop(item.record.id)

    def _of_its_id(self, number: int) -> _Known | None:
        identity = self.records[number].id
        return self.free.get(identity) if identity in self.own_ids else None

    def _same(self, content_of: Callable[[_Known], str | None]) -> None:
        for number in self.left():
            item = self._of_its_id(number)
            if item is not None and content_of(item) == self.contents[number] and self._may_be(number, item):
                self._take(number, item)
                self.same.add(number)
        waiting: dict[tuple[str | None, ...], list[_Known]] = defaultdict(list)
        for item in reversed(self.free.values()):
            waiting[content_of(item), item.annotator].append(item)
            waiting[(content_of(item),)].append(item)
        for number in self.left():
            content, whose = self.contents[number], self.whose[number]
            for items in (waiting[content, whose], waiting[(content,)] if whose is None else []):
                while items and items[-1].record.id not in self.free:
                    items.pop()
                if items:
                    self._take(number, items.pop())
                    self.same.add(number)
                    break

    def _may_be(self, number: int, item: _Known) -> bool:
        return self.whose[number] in (None, item.annotator)

    def _is_like(self, number: int, item: _Known) -> bool:
        """Whether a record may take the place of an object."""
        record = self.records[number]
        return self.whose[number] == item.annotator and (record.kind, record.plane) == (
            item.record.kind,
            item.record.plane,
        )

    def _changed(self) -> None:
        for number in self.left():
            item = self._of_its_id(number)
            if item is None or not self._is_like(number, item):
                continue
            if item.is_touched:
                self.doubts[number] = "differs from the object of its id, which was drawn or edited in the project"
            else:
                self._take(number, item)

    def _redrawn(self) -> None:
        """Match what has another class, or much the same outline, where the file was saved anew at its place."""
        here = (self.origin.path.name, self.origin.place)
        former = [item for item in self.free.values() if item.came_from == here and not item.is_touched]
        left = [number for number in self.left() if number not in self.doubts]
        pairs, crowded = _overlapping({number: self.records[number] for number in left}, former)
        pairs = [(number, item) for number, item in pairs if self._is_like(number, item)]
        of_record = Counter(number for number, _ in pairs)
        of_item = Counter(item.record.id for _, item in pairs)
        for number, item in pairs:
            if of_record[number] == 1 == of_item[item.record.id]:
                self._take(number, item)
            else:
                self.doubts[number] = _SEVERAL
        self.doubts.update(dict.fromkeys(crowded, _SEVERAL))

    def _beside(self) -> None:
        """Name what a new record lies on and does not update: edited or drawn in the project, or of another file."""
        left = {number: self.records[number] for number in self.left() if number not in self.doubts}
        drawn = [item for item in self.free.values() if not {_PREDICTED, _MARK} & item.record.metadata.keys()]
        pairs, crowded = _overlapping(left, drawn)
        for number, item in pairs:
            if self._is_like(number, item):
                self.doubts.setdefault(number, f"lies on {_described(item.record)}, which {_history(item)}")
        for number in crowded:
            self.doubts.setdefault(number, "lies where so many objects of the project do that they were not compared")


def _history(item: _Known) -> str:
    file = item.came_from[0]
    if file is None:
        return "was drawn in the project"
    return f"{file} brought" + (" and was edited in the project since" if item.is_touched else "")


def _overlapping(
    records: Mapping[int, Annotation], items: Sequence[_Known]
) -> tuple[list[tuple[int, _Known]], list[int]]:
    """Pairs of which each covers most of the other, of lines and points those that are equal.

    Shapes that lie in heaps are not compared one by one: they come second, as records of which several can be meant.
    """
    pairs: list[tuple[int, _Known]] = []
    crowded: list[int] = []
    numbers, tree = list(records), shapely.STRtree([item.record.geometry for item in items])
    looked_at, most = 0, _PAIRS_EACH * (len(records) + len(items))
    for first in range(0, len(numbers), _AT_ONCE):
        some = numbers[first : first + _AT_ONCE]
        if looked_at > most:
            crowded += numbers[first:]
            break
        ours = np.array([records[number].geometry for number in some], object)
        one, two = tree.query(ours)
        looked_at += len(one)
        near = _may_be_alike(ours[one], tree.geometries[two])
        one, two = one[near], two[near]
        is_crowded = np.bincount(one, minlength=len(some)) > _PAIRS_EACH
        crowded += [some[place] for place in np.flatnonzero(is_crowded)]
        few = ~is_crowded[one]
        pairs += [
            (some[place], items[index])
            for place, index in zip(one[few].tolist(), two[few].tolist(), strict=True)
            if _are_alike(ours[place], tree.geometries[index])
        ]
    return pairs, crowded


def _may_be_alike(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether areas and bounds allow it, which costs little to know; of the rest, whether both are valid."""
    sizes = np.stack([shapely.area(ours), shapely.area(theirs)])
    a, b = shapely.bounds(ours), shapely.bounds(theirs)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    least, most = _SAME_OUTLINE * sizes.max(axis=0), sides.clip(min=0).prod(axis=1)
    fits = (sizes.min(axis=0) >= least) & (most >= least)
    fits[fits] = shapely.is_valid(ours[fits]) & shapely.is_valid(theirs[fits])
    return np.asarray(fits)


def _are_alike(one: BaseGeometry, two: BaseGeometry) -> bool:
    whole = shapely.union(one, two).area
    if whole == 0:
        return bool(shapely.equals(one, two))
    return bool(shapely.intersection(one, two).area >= _SAME_OUTLINE * whole)


def reconcile(found: Imported, objects: Sequence[Annotation], origin: Origin, *, replaces: bool = False) -> Reconciled:
    """Decide what an import does to the objects of an image.

    What stands there with the same content stays. What changed is updated, by its id or by its outline, where only one
    object can be meant that nobody edited since it was imported; all else is added. Without `replaces` nothing is
    removed.

    Parameters
    ----------
    found : Imported
        What was read; each annotation as it will be stored.
    objects : sequence of Annotation
        Of the image.
    origin : Origin
        Where they come from.
    replaces : bool, optional
        Remove what an earlier import of a file of this name (and annotator) brought, and this one does not hold;
        what a person edited since stays.

    Returns
    -------
    Reconciled
    """
    matching = _Matching(found.annotations, found.own_ids, origin)
    matching.among(objects)
    ids = _ids(matching)
    add: list[Annotation] = []
    update: list[Annotation] = []
    notes: list[Note] = []
    for number, (record, item) in enumerate(zip(found.annotations, found.items, strict=True)):
        marked = replace(record, id=ids[number], metadata=_marked(matching, number))
        known = matching.found.get(number)
        if known is None:
            add.append(replace(marked, parent=matching.standing(record.parent, ids)))
            notes += _doubt(matching, number, item)
        elif number not in matching.same or _has_new_details(record, known):
            is_same = number in matching.same
            kept = {**known.record.measurements, **record.measurements} if is_same else record.measurements
            update.append(replace(marked, parent=known.record.parent, measurements=kept))
            notes.append(Note(item=item, reason=f"updated; it was {_described(known.record)}"))
    former = _former(matching)
    gone = [item for item in former if not item.is_touched]
    replaces = replaces and not found.is_partial
    return Reconciled(
        add=tuple(add),
        update=tuple(update),
        remove=tuple(item.record.id for item in gone) if replaces else (),
        already=len(found.annotations) - len(add) - len(update),
        notes=tuple(notes),
        remarks=tuple(_remarks(matching, former, gone, replaces=replaces, is_partial=found.is_partial)),
    )


def _has_new_details(record: Annotation, known: _Known) -> bool:
    return not known.is_touched and _details(record) != _details(known.record)


def _marked(matching: _Matching, number: int) -> Mapping[str, str]:
    """Metadata of a record with where it comes from."""
    record, whose = matching.records[number], matching.whose[number]
    origin = matching.origin
    marks = {} if whose is None else {ANNOTATOR: whose}
    if _PREDICTED not in record.metadata:
        marks[_FILE] = origin.path.name
        marks[_ORIGIN] = f"{matching.contents[number]}.{_details(record)}.{origin.place}"
    return {**record.metadata, **marks}


def _ids(matching: _Matching) -> list[UUID]:
    """Ids of the records in the image: what the file says, where it is free, else made of the content."""
    taken = set(matching.known) | {record.id for record in matching.records}
    copies: Counter[str] = Counter()
    ids = []
    for number, record in enumerate(matching.records):
        if number in matching.found:
            ids.append(matching.found[number].record.id)
        elif record.id in matching.own_ids and record.id not in matching.known:
            ids.append(record.id)
        else:
            name = f"darefine:{matching.origin.image}/{matching.whose[number] or ''}/{matching.contents[number]}"
            identity = uuid5(NAMESPACE_URL, name)
            while identity in taken:
                copies[name] += 1
                identity = uuid5(NAMESPACE_URL, f"{name}/{copies[name]}")
            taken.add(identity)
            ids.append(identity)
    return ids


def _doubt(matching: _Matching, number: int, item: str) -> Iterator[Note]:
    record = matching.records[number]
    if number in matching.doubts:
        yield Note(item=item, reason=f"{matching.doubts[number]}; added beside it, look at both")
    elif record.id in matching.own_ids and record.id in matching.known:
        yield Note(item=item, reason=f"gets a new id, {record.id} is that of another object in the project")


def _former(matching: _Matching) -> list[_Known]:
    """Objects that an earlier import of a file of this name brought, and this file does not hold."""
    whose = {*matching.whose, matching.origin.annotator} if matching.origin.annotator or matching.whose else {None}
    name = matching.origin.path.name
    return [item for item in matching.free.values() if item.came_from[0] == name and item.annotator in whose]


def _remarks(
    matching: _Matching, former: Sequence[_Known], gone: Sequence[_Known], *, replaces: bool, is_partial: bool
) -> Iterator[str]:
    edited = sum(matching.found[number].content != matching.contents[number] for number in matching.same)
    if edited:
        yield f"{edited} of what is there already were edited in the project since, and stay as they are"
    name = matching.origin.path.name
    nobodys = Counter(item.content for item in matching.free.values() if item.annotator is None)
    twice = Counter(matching.contents[number] for number in matching.left() if matching.whose[number] is not None)
    if nobodys & twice:
        yield f"{(nobodys & twice).total()} of those added are in the project without an annotator too"
    if gone and is_partial:
        yield (
            f"{len(gone)} objects that {name} brought before are not in this file and stay, because some of the file's "
            f"objects were refused and may be among them; mend the file and import it with --replace"
        )
    elif gone and not replaces:
        yield (
            f"{len(gone)} objects that {name} brought before are not in this file and stay; if it is the corrected "
            f"file, import it with --replace, if it is another rater's, with --annotator NAME"
        )
    kept = len(former) - len(gone)
    if kept and replaces:
        yield f"{kept} objects that {name} brought before were edited in the project since, and stay"


def _described(record: Annotation) -> str:
    if record.geometry is None or record.geometry.is_empty:
        return f"{record.path_class or 'without class'}"
    left, top, right, bottom = record.geometry.bounds
    return f"{record.path_class or 'without class'} at ({(left + right) / 2:.0f}, {(top + bottom) / 2:.0f})"
