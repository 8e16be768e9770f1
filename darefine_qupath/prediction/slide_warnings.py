"""Say what is unusual about a slide, what could not be read of it, and how much of it has no label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from darefine_qupath.geometry import Box

__all__ = ["SlideWarning", "damage_warnings", "merge_damage_warnings", "warn_of_unpredicted"]

_UNPREDICTED_LIMIT = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideWarning:
    """Something about a slide that its reader should know.

    Attributes
    ----------
    kind : str
        ``"mpp"``, ``"stain"``, ``"no tissue"``, ``"unreadable"``, ``"context"`` or ``"unpredicted"``.
    message : str
        What is wrong, with the number.
    value : float
        That number.
    boxes : tuple of Box
        Where, in level-0 pixels; empty when it is about the whole slide.
    """

    kind: Literal["mpp", "stain", "no tissue", "unreadable", "context", "unpredicted"]
    message: str
    value: float
    boxes: tuple[Box, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        boxes = [[box.x, box.y, box.width, box.height] for box in self.boxes]
        return {"kind": self.kind, "message": self.message, "value": self.value, "boxes": boxes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SlideWarning:
        """Warning of what `to_json` gave."""
        boxes = msgspec.convert(data["boxes"], list[tuple[int, int, int, int]])
        return msgspec.convert({**data, "boxes": [Box(*numbers) for numbers in boxes]}, cls)


def damage_warnings(unreadable: list[Box], white: list[Box]) -> Iterator[SlideWarning]:
    """Warnings of slices that cannot be read, and of pieces of contexts that are white instead."""
    if unreadable:
        yield SlideWarning(
            kind="unreadable",
            message=f"{len(unreadable)} slices cannot be read and were not predicted",
            value=float(len(unreadable)),
            boxes=tuple(unreadable),
        )
    if white:
        yield SlideWarning(
            kind="context",
            message=f"{len(white)} pieces of contexts cannot be read; the network saw white there",
            value=float(len(white)),
            boxes=tuple(white),
        )


def merge_damage_warnings(warnings: tuple[SlideWarning, ...]) -> tuple[SlideWarning, ...]:
    """One warning per kind of damage instead of one per row."""
    boxes: dict[str, list[Box]] = {"unreadable": [], "context": []}
    rest = []
    for warning in warnings:
        if warning.boxes:
            boxes[warning.kind].extend(warning.boxes)
        else:
            rest.append(warning)
    return (*rest, *damage_warnings(boxes["unreadable"], boxes["context"]))


def warn_of_unpredicted(warnings: tuple[SlideWarning, ...], share: float) -> Iterator[SlideWarning]:
    """Add which share of the tissue asked for has no label, where that is more than a little."""
    told = share <= _UNPREDICTED_LIMIT
    words = f"{100 * share:.1f} % of the tissue asked for has no label"
    for warning in warnings:
        if warning.kind == "unreadable" and warning.boxes and not told:
            yield replace(warning, message=f"{warning.message}: {words}")
            told = True
        else:
            yield warning
    if not told:
        yield SlideWarning(kind="unpredicted", message=f"{words} and was not predicted", value=share)
