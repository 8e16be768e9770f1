"""Hold what is known about an annotation file and its image before the file is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darefine_qupath.exchange.collector import Collector
from darefine_qupath.geometry import GlassFrame

__all__ = ["ReadRequest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRequest:
    """An annotation file to be read; the attributes are those of `read_annotations`."""

    path: Path
    mpp: float | None = None
    classes: Sequence[str] = ()
    labels: Mapping[int, str] | None = None
    image_size: tuple[int, int] | None = None
    stretch: bool = False
    class_from: Sequence[str] = ()
    image_name: str | None = None
    glass: Callable[[], GlassFrame | None] | None = None

    def collector(self, *fields: str) -> Collector:
        """Start to collect annotations of a format that has these fields for a class; without any, it may have all.

        Raises
        ------
        ExchangeError
            If the user named a field that is not among them.
        """
        return Collector(self.path, self.classes, class_from=self.class_from, fields=fields)
