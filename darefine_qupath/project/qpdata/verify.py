"""Verify what was written: every object, and all that stands beside the objects, before anything is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import ProjectWriteError
from darefine_qupath.javaserial.packed import is_packed
from darefine_qupath.javaserial.values import NodeError
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.compare import NodeComparison, changed_field
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.hierarchy import remaining_parents
from darefine_qupath.project.qpdata.properties import without_properties
from darefine_qupath.project.qpdata.read import naming_file

__all__ = ["verify_edit", "verify_objects"]


# Objects that are read back at once.
_PORTION = 256


def verify_edit(
    before: Document, changes: Changes, touched: Sequence[Annotation], after: Document, *, path: Path
) -> None:
    """Compare a file that was made with the one that it was made of, object by object.

    Every object that the changes do not name must be there, in its order and below the same object, and hold the same
    values down to the last byte; so must everything beside the objects. Those that were added or replaced
    must be read back as `touched`.

    Parameters
    ----------
    before : Document
        The former file; opened anew, since an edit changes the nodes.
    changes : Changes
        The edit.
    touched : sequence of Annotation
        Objects that were replaced, and then the new ones, as they are stored.
    after : Document
        The new file.
    path : Path
        Named in errors.

    Raises
    ------
    ProjectWriteError
        If anything differs; says what.
    """
    try:
        with naming_file(path):
            difference = _difference(before, changes, after)
    except NodeError as error:
        raise _failed(path, error.message) from None
    if difference is not None:
        raise _failed(path, difference)
    wanted = {record.id for record in touched}
    numbers = {item.id: number for number, item in enumerate(after.objects) if item.id in wanted}
    for first in range(0, len(touched), _PORTION):
        portion = touched[first : first + _PORTION]
        verify_objects(portion, after.records([numbers[record.id] for record in portion]), path=path)


def _difference(before: Document, changes: Changes, after: Document) -> str | None:
    """Find what should have stayed and did not; None where all did."""
    gone, new = set(changes.remove), {record.id for record in changes.add}
    removed = {number for number, item in enumerate(before.objects) if item.id in gone}
    parents = remaining_parents(before.objects, removed)
    ours = [number for number in range(len(before.objects)) if number not in removed]
    theirs = [item for item in after.objects if item.id not in new]
    if len(after.objects) != len(ours) + len(new) or len(theirs) != len(ours):
        return f"{len(ours) + len(new) - 1} objects were written and {after.num_objects} read back"
    replaced = {record.id for record in changes.replace}
    comparison = NodeComparison()
    for number, two in zip(ours, theirs, strict=True):
        one = before.objects[number]
        if one.id != two.id:
            return "objects came back in another order"
        if number and before.objects[parents[number]].id != after.objects[two.parent].id:
            return f"object {one.id} came back below another one"
        if one.id not in replaced and not comparison.same_object(one.node, two.node):
            return f"object {one.id} came back changed"
    # Connections and the TMA grid refer to objects, which may have other children now, or be other ones.
    for number, two in zip(ours, theirs, strict=True):
        one = before.objects[number]
        if one.id in replaced or not is_packed(one.node):
            comparison.assume_same(one.node, two.node)
    if not comparison.same(_beside(before, changes), _beside(after, changes)):
        return "what stands beside the objects came back changed"
    wrong = [name for name, value in changes.properties.items() if after.items.properties.get(name) != value]
    return f"the image property {wrong[0]!r} came back wrong" if wrong else None


def _beside(document: Document, changes: Changes) -> tuple[Any, ...]:
    names = changes.properties
    return without_properties(document.stream, names) if names else tuple(document.stream.contents)


def verify_objects(expected: Sequence[Annotation], found: Sequence[Annotation], *, path: Path) -> None:
    """Compare what was read back with what should be there, object by object.

    NaN equals NaN, and geometries must have the same coordinates in the same order.

    Parameters
    ----------
    expected : sequence of Annotation
        Every object, as it is stored; in any order.
    found : sequence of Annotation
        Objects read back.
    path : Path
        The file, for messages.

    Raises
    ------
    ProjectWriteError
        If anything differs.
    """
    # Records that share an identity keep their order.
    ours, theirs = (sorted(records, key=lambda record: record.id.int) for records in (expected, found))
    if [record.id for record in ours] != [record.id for record in theirs]:
        raise _failed(path, f"{len(expected)} objects were written and {len(found)} read back")
    for record, read in zip(ours, theirs, strict=True):
        name = changed_field(record, read)
        if name is not None:
            raise _failed(path, f"object {record.id} came back with another {name}")


def _failed(path: Path, difference: str) -> ProjectWriteError:
    return ProjectWriteError(f"{path}: {difference}; nothing was changed")
