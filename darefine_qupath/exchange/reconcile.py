"""Decide which objects of a file are in an image already, which changed, and which are new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, UUID, uuid5

from darefine_qupath.annotations import ANNOTATOR, Annotation
from darefine_qupath.exchange.fingerprints import details_of
from darefine_qupath.exchange.imported import Note
from darefine_qupath.exchange.matching import FILE, ORIGIN, PREDICTED, KnownObject, Matching, Origin, described

if TYPE_CHECKING:
    from darefine_qupath.exchange.imported import Imported

__all__ = ["Reconciled", "reconcile"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciled:
    """What an import does to the objects of an image.

    Attributes
    ----------
    add, update : tuple of Annotation
        New objects; objects of the image, with their new content.
    remove : tuple of UUID
        Former objects of the file, where they are to go.
    already : int
        Objects of the file that are there.
    notes : tuple of Note
        Objects that were updated, or of which a person should look at two.
    remarks : tuple of str
        What the user should know about the file as a whole.
    """

    add: tuple[Annotation, ...] = ()
    update: tuple[Annotation, ...] = ()
    remove: tuple[UUID, ...] = ()
    already: int = 0
    notes: tuple[Note, ...] = ()
    remarks: tuple[str, ...] = ()


def reconcile(found: Imported, objects: Sequence[Annotation], origin: Origin, *, replaces: bool = False) -> Reconciled:
    """Decide what an import does to the objects of an image.

    What is there with the same content stays. What changed is updated, by its id or by its outline, where only one
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
    matching = Matching(found.annotations, found.own_ids, origin)
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
            notes.append(Note(item=item, reason=f"updated; it was {described(known.record)}"))
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


def _has_new_details(record: Annotation, known: KnownObject) -> bool:
    return not known.is_touched and details_of(record) != details_of(known.record)


def _marked(matching: Matching, number: int) -> Mapping[str, str]:
    """Metadata of a record with where it comes from."""
    record, whose = matching.records[number], matching.whose[number]
    origin = matching.origin
    marks = {} if whose is None else {ANNOTATOR: whose}
    if PREDICTED not in record.metadata:
        marks[FILE] = origin.path.name
        marks[ORIGIN] = f"{matching.contents[number]}.{details_of(record)}.{origin.place}"
    return {**record.metadata, **marks}


def _ids(matching: Matching) -> list[UUID]:
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


def _doubt(matching: Matching, number: int, item: str) -> Iterator[Note]:
    record = matching.records[number]
    if number in matching.doubts:
        yield Note(item=item, reason=f"{matching.doubts[number]}; added beside it, look at both")
    elif record.id in matching.own_ids and record.id in matching.known:
        yield Note(item=item, reason=f"gets a new id, {record.id} is that of another object in the project")


def _former(matching: Matching) -> list[KnownObject]:
    """Objects that an earlier import of a file of this name brought, and this file does not hold."""
    whose = {*matching.whose, matching.origin.annotator} if matching.origin.annotator or matching.whose else {None}
    name = matching.origin.path.name
    return [item for item in matching.free.values() if item.came_from[0] == name and item.annotator in whose]


def _remarks(
    matching: Matching, former: Sequence[KnownObject], gone: Sequence[KnownObject], *, replaces: bool, is_partial: bool
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
