"""Match the objects of a file with those of an image: by content, by id, by outline.

What an object is depends on its content: class, kind, plane and geometry at QuPath's precision, and whose it is; not on
the name of the file or the order in it. An imported object notes in its metadata what it was when it came, so that a
later import knows what a person changed since, and never changes that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from darefine_qupath.annotations import Annotation, annotator_of
from darefine_qupath.exchange.fingerprints import contents, details_of, digest
from darefine_qupath.exchange.overlap import overlapping

__all__ = ["FILE", "ORIGIN", "PREDICTED", "KnownObject", "Matching", "Origin", "described"]

FILE = "darefine.file"
ORIGIN = "darefine.imported"
PREDICTED = "darefine.run"
_MARK = "darefine.place"

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
        """Fingerprint of the file's folder, which does not give away its name."""
        return digest(str(self.path.absolute().parent), 8)


@dataclass(frozen=True, slots=True)
class KnownObject:
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
        """Who drew it, where it says so."""
        return annotator_of(self.record)


def known_object(record: Annotation, content: str, used: Collection[UUID | None]) -> KnownObject:
    parts = record.metadata.get(ORIGIN, "").split(".")
    imported, details, place = parts if len(parts) == 3 else (None, None, None)
    is_touched = (imported, details) != (content, details_of(record)) or record.id in used
    return KnownObject(record, content, imported, is_touched, (record.metadata.get(FILE), place))


class Matching:
    """Finds the object of the image that each record of the file is."""

    def __init__(self, records: Sequence[Annotation], own_ids: frozenset[UUID], origin: Origin) -> None:
        self.records = records
        self.contents = contents(records)
        self.whose = [origin.annotator or annotator_of(record) for record in records]
        self.own_ids = own_ids
        self._numbers = {record.id: number for number, record in enumerate(records)}
        self.origin = origin
        self.found: dict[int, KnownObject] = {}
        self.same: set[int] = set()
        self.doubts: dict[int, str] = {}
        self.known: dict[UUID, KnownObject] = {}
        self.free: dict[UUID, KnownObject] = {}

    def among(self, objects: Sequence[Annotation]) -> None:
        """Match with the objects of an image: by content, by id, by outline."""
        # What holds cells, say, that QuPath found in it.
        used = {item.parent for item in objects if item.kind != "annotation" and ORIGIN not in item.metadata}
        found = zip(objects, contents(objects), strict=True)
        self.known = {record.id: known_object(record, content, used) for record, content in found}
        self.free = dict(self.known)
        self._same(lambda item: item.content)
        # What a person edited since it was imported is there all the same.
        self._same(lambda item: item.imported)
        self._changed()
        self._redrawn()
        self._beside()

    def standing(self, parent: UUID | None, ids: Sequence[UUID]) -> UUID | None:
        """Id of a record's parent in the image."""
        return None if parent is None or parent not in self._numbers else ids[self._numbers[parent]]

    def left(self) -> list[int]:
        """List the records that no object was found for."""
        return [number for number in range(len(self.records)) if number not in self.found]

    def _take(self, number: int, item: KnownObject) -> None:
        self.found[number] = self.free.pop(item.record.id)

    def _of_its_id(self, number: int) -> KnownObject | None:
        identity = self.records[number].id
        return self.free.get(identity) if identity in self.own_ids else None

    def _same(self, content_of: Callable[[KnownObject], str | None]) -> None:
        for number in self.left():
            item = self._of_its_id(number)
            if item is not None and content_of(item) == self.contents[number] and self._may_be(number, item):
                self._take(number, item)
                self.same.add(number)
        waiting: dict[tuple[str | None, ...], list[KnownObject]] = defaultdict(list)
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

    def _may_be(self, number: int, item: KnownObject) -> bool:
        return self.whose[number] in (None, item.annotator)

    def _is_like(self, number: int, item: KnownObject) -> bool:
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
        pairs, crowded = self._alike(left, former)
        of_record = Counter(number for number, _ in pairs)
        of_item = Counter(item.record.id for _, item in pairs)
        for number, item in pairs:
            if of_record[number] == 1 == of_item[item.record.id]:
                self._take(number, item)
            else:
                self.doubts[number] = _SEVERAL
        self.doubts.update(dict.fromkeys(crowded, _SEVERAL))

    def _alike(
        self, numbers: Sequence[int], items: Sequence[KnownObject]
    ) -> tuple[list[tuple[int, KnownObject]], list[int]]:
        """Pairs of much the same outline that may stand for each other, and the records that lie in heaps."""
        shapes = [self.records[number].geometry for number in numbers]
        pairs, crowded = overlapping(shapes, [item.record.geometry for item in items])
        matches = [(numbers[place], items[index]) for place, index in pairs]
        return [pair for pair in matches if self._is_like(*pair)], [numbers[place] for place in crowded]

    def _beside(self) -> None:
        """Name what a new record lies on and does not update: edited or drawn in the project, or of another file."""
        left = [number for number in self.left() if number not in self.doubts]
        drawn = [item for item in self.free.values() if not {PREDICTED, _MARK} & item.record.metadata.keys()]
        pairs, crowded = self._alike(left, drawn)
        for number, item in pairs:
            self.doubts.setdefault(number, f"lies on {described(item.record)}, which {_history(item)}")
        for number in crowded:
            self.doubts.setdefault(number, "lies where so many objects of the project do that they were not compared")


def _history(item: KnownObject) -> str:
    file = item.came_from[0]
    if file is None:
        return "was drawn in the project"
    return f"{file} brought" + (" and was edited in the project since" if item.is_touched else "")


def described(record: Annotation) -> str:
    """Class and place of an object, for messages."""
    if record.geometry is None or record.geometry.is_empty:
        return f"{record.path_class or 'without class'}"
    left, top, right, bottom = record.geometry.bounds
    return f"{record.path_class or 'without class'} at ({(left + right) / 2:.0f}, {(top + bottom) / 2:.0f})"
