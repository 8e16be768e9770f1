"""Say what a write or an undo did to one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a write or an undo did to one image, or would do.

    Attributes
    ----------
    run : str
        Run id.
    image, image_name : str
        Entry id and name.
    added, kept, removed : int
        Objects of ours; `kept` were there already, the same to the last point.
    adopted, rejected : int
        Objects of ours that belong to the pathologist, and that were rejected; none of them was changed.
    clipped, hidden, suppressed : int
        New polygons that were clipped, hidden wholly by a pathologist's objects, and left out where rejected before.
    classes : mapping of str to int
        Objects of ours afterwards, by class.
    is_dry : bool
        Whether nothing was written.
    warnings : tuple of str
        What the user should know.
    """

    run: str
    image: str
    image_name: str
    added: int
    kept: int
    removed: int
    adopted: int = 0
    rejected: int = 0
    clipped: int = 0
    hidden: int = 0
    suppressed: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    is_dry: bool = False
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        names = [name for name in self.__slots__ if name not in ("classes", "warnings")]
        return {
            **{name: getattr(self, name) for name in names},
            "classes": dict(self.classes),
            "warnings": list(self.warnings),
        }
