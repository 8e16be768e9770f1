"""Hold what was read from an annotation file: annotations, repairs and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID, uuid4

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color

__all__ = ["Imported", "Note", "merged"]


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
    colors : mapping of str to Color
        Class colors by the file.
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
