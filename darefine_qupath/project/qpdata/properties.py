"""Read image properties, and set them in the map that stands beside the objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.nodes import Content, JavaObject, Stream, TopLevel
from darefine_qupath.javaserial.strings import JavaString, modified_utf8
from darefine_qupath.javaserial.values import NodeError, list_items, map_items, text, type_name
from darefine_qupath.project.qpdata.build import NodeBuilder
from darefine_qupath.project.qpdata.schema import EOF

__all__ = ["Opaque", "read_properties", "set_properties", "without_properties"]

_MAPS = ("java.util.HashMap", "java.util.LinkedHashMap")
_NUMBERS = {f"java.lang.{name}" for name in ("Integer", "Double", "Boolean", "Long", "Float", "Short", "Byte")}
_MAX_PROPERTY_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is kept and not interpreted, by its Java class."""

    java_class: str


def read_properties(node: JavaObject) -> dict[str, Any]:
    """Read the map of the image properties as Python values."""
    known: dict[int, Any] = {}
    return {str(_key(key)): _plain_value(value, 0, known) for key, value in map_items(node)}


def _plain_value(node: Content, depth: int, known: dict[int, Any]) -> Any:  # noqa: ANN401 - a property is anything
    """Python value of a property; each node once, since handles may share one a million times."""
    if node is None or isinstance(node, JavaString):
        return text(node)
    if id(node) not in known:
        known[id(node)] = Opaque(type_name(node))
        if isinstance(node, JavaObject) and depth < _MAX_PROPERTY_DEPTH:
            known[id(node)] = _plain_object(node, depth, known)
    return known[id(node)]


def _plain_object(node: JavaObject, depth: int, known: dict[int, Any]) -> Any:  # noqa: ANN401
    name = node.desc.name
    if name in _NUMBERS:
        return values.number(node)
    try:
        if name.endswith("Map"):
            pairs = map_items(node)
            return {_key(key): _plain_value(value, depth + 1, known) for key, value in pairs}
        if name.endswith("List") or name == "java.util.CollSer":
            return [_plain_value(item, depth + 1, known) for item in list_items(node)]
    except NodeError:
        return Opaque(name)
    return Opaque(name)


def _key(node: Content) -> str | float | int | bool | None:
    """Text or number of a key; of any other its class, since lists that share lists have no end as text."""
    if node is None or isinstance(node, JavaString):
        return text(node)
    return values.number(node) if type_name(node) in _NUMBERS else type_name(node)


def set_properties(stream: Stream, properties: Mapping[str, str | None], builder: NodeBuilder) -> None:
    """Set image properties, or take them out; the others keep their nodes and their order.

    Parameters
    ----------
    stream : Stream
        The file, to be edited.
    properties : mapping of str to str or None
        New values; None takes one out.
    builder : NodeBuilder
        Of the stream.
    """
    holder = _holder(stream)
    entries = [] if holder is None else map_items(holder)
    wanted = {modified_utf8(key): value for key, value in properties.items()}
    kept: list[tuple[Content, Content]] = []
    for key, value in entries:
        if not _is_key(key, wanted):
            kept.append((key, value))
        elif (new := wanted.pop(key.raw)) is not None:  # type: ignore[union-attr]
            kept.append((key, JavaString(new)))
    kept += [(JavaString.of_raw(raw), JavaString(new)) for raw, new in wanted.items() if new is not None]
    made = builder.hash_map(tuple(chain.from_iterable(kept)))
    if holder is not None:
        holder.desc, holder.data = made.desc, made.data
    elif kept:
        stream.contents.insert(len(list(_before_end(stream))), made)


def without_properties(stream: Stream, names: Mapping[str, object]) -> tuple[tuple[TopLevel, ...], tuple[Content, ...]]:
    """Everything in a file but the image properties that are named."""
    holder = _holder(stream)
    rest = tuple(item for item in stream.contents if item is not holder)
    wanted = {modified_utf8(key): None for key in names}
    entries = () if holder is None else map_items(holder)
    return rest, tuple(chain.from_iterable(entry for entry in entries if not _is_key(entry[0], wanted)))


def _before_end(stream: Stream) -> Iterator[TopLevel]:
    return takewhile(lambda item: not (isinstance(item, JavaString) and item.raw == EOF.encode()), stream.contents)


def _holder(stream: Stream) -> JavaObject | None:
    """Find the map of the image properties; QuPath takes the last one."""
    maps = [item for item in _before_end(stream) if isinstance(item, JavaObject) and item.desc.name in _MAPS]
    return maps[-1] if maps else None


def _is_key(key: Content, wanted: Mapping[bytes, object]) -> bool:
    return isinstance(key, JavaString) and key.raw in wanted
