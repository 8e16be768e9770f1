"""Set image properties in the map that stands beside the objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, takewhile

from darefine_qupath.javaserial.nodes import Content, JavaObject, Stream, TopLevel
from darefine_qupath.javaserial.strings import JavaString, modified_utf8
from darefine_qupath.javaserial.values import map_items
from darefine_qupath.project.qpdata.build import NodeBuilder
from darefine_qupath.project.qpdata.schema import EOF

__all__ = ["beside", "set_properties"]

_MAPS = ("java.util.HashMap", "java.util.LinkedHashMap")


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
        elif (text := wanted.pop(key.raw)) is not None:  # type: ignore[union-attr]
            kept.append((key, JavaString(text)))
    kept += [(JavaString.of_raw(raw), JavaString(text)) for raw, text in wanted.items() if text is not None]
    made = builder.hash_map(tuple(chain.from_iterable(kept)))
    if holder is not None:
        holder.desc, holder.data = made.desc, made.data
    elif kept:
        stream.contents.insert(len(list(_before_end(stream))), made)


def beside(stream: Stream, names: Mapping[str, object]) -> tuple[tuple[TopLevel, ...], tuple[Content, ...]]:
    """All that stands in a file, and of its image properties those that are not named."""
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
