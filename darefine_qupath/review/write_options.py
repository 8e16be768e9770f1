"""Choose how predictions become objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from darefine_qupath.errors import ReviewError
from darefine_qupath.limits import require_finite

__all__ = ["WriteOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteOptions:
    """How predictions become objects.

    Attributes
    ----------
    kind : str
        ``"annotation"``, or ``"detection"``: lighter for QuPath, and not editable there.
    container : bool
        Put the objects of a run below one unclassified annotation of the whole image.
    class_suffix : str
        Added to the class, for those who want "Invasive (predicted)".
    over : tuple of str
        Classes that predictions may lie over although a pathologist drew them ("Tissue", say).
    remember_rejections : bool
        Leave out what a pathologist rejected before.
    min_area_um2, min_area_px2 : float
        What is left of a clipped polygon is left out when it is smaller: in square micrometres, and in square level-0
        pixels while the pixel size is unknown.
    """

    kind: Literal["annotation", "detection"] = "annotation"
    container: bool = False
    class_suffix: str = ""
    over: tuple[str, ...] = ()
    remember_rejections: bool = True
    min_area_um2: float = 1000.0
    min_area_px2: float = 4096.0

    def __post_init__(self) -> None:
        require_finite(self, ReviewError, "Option ")
        if any(sign in self.class_suffix for sign in ":\n\r") or self.class_suffix.endswith("*"):
            raise ReviewError(
                f"Class suffix {self.class_suffix!r}: QuPath allows no ':' and no new line, and '*' ignores"
            )
