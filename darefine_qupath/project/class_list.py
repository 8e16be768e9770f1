"""Read and make ``classifiers/classes.json``, the class list of a QuPath project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from darefine_qupath.classes import Color, PathClass, default_color
from darefine_qupath.limits import whole_text
from darefine_qupath.project.lenient_json import JsonObject, MisplacedValueError, json_bytes, locating, parse_json

__all__ = ["classes_json", "merged_classes", "parse_classes"]


def _class_list(data: bytes, path: Path) -> tuple[JsonObject, list[JsonObject]]:
    """Read a class list: the whole document, and its classes."""
    document = parse_json(data, path)
    with locating(data, path):
        return document, _class_items(document)


def _class_items(document: object) -> list[JsonObject]:
    items = document.get("pathClasses", []) if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise MisplacedValueError("this is not a class list: pathClasses is not a list of classes", "pathClasses")
    for index, item in enumerate(items):
        if not isinstance(item.get("name"), str):
            raise MisplacedValueError("a class in pathClasses has no name", "pathClasses", index, "name")
    return items


def parse_classes(data: bytes, path: Path) -> tuple[PathClass, ...]:
    """Class list of ``classes.json``; a class without a colour gets its default one.

    Raises
    ------
    ProjectFormatError
        If it is not a class list.
    """
    classes: dict[str, PathClass] = {}
    for item in _class_list(data, path)[1]:
        argb = item.get("color")
        name = whole_text(item["name"])
        color = Color.from_argb(argb) if isinstance(argb, int) else default_color(name)
        classes.setdefault(name, PathClass(name, color))
    return tuple(classes.values())


def classes_json(classes: Sequence[PathClass], former: bytes | None, path: Path) -> bytes:
    """Content of ``classes.json``.

    Parameters
    ----------
    classes : sequence of PathClass
        The whole list, in order.
    former : bytes or None
        Present content; keys of it that we do not know are kept.
    path : Path
        The file, for messages.

    Returns
    -------
    bytes
        As QuPath writes it.
    """
    document, stored = ({}, []) if former is None else _class_list(former, path)
    known = {whole_text(item["name"]): item for item in stored}
    items = [
        known.get(path_class.name, {}) | {"name": path_class.name, "color": path_class.color.argb}
        for path_class in classes
    ]
    return json_bytes(document | {"pathClasses": items})


def merged_classes(classes: Sequence[PathClass], more: Sequence[PathClass]) -> tuple[PathClass, ...]:
    """`classes`, then those of `more` whose names are new; what stands there keeps its colour."""
    merged = {path_class.name: path_class for path_class in more}
    first = {path_class.name: path_class for path_class in classes}
    return (*classes, *(path_class for name, path_class in merged.items() if name not in first))
