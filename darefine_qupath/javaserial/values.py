"""Read and order values of Java's own library: strings, numbers, lists and maps."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from darefine_qupath.errors import JavaStreamError
from darefine_qupath.javaserial.descriptors import ClassDesc, ProxyDesc
from darefine_qupath.javaserial.nodes import Content, JavaArray, JavaObject
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.limits import whole_text

__all__ = [
    "NodeError",
    "field",
    "hash_code",
    "hash_order",
    "list_items",
    "map_items",
    "number",
    "table_size",
    "text",
    "type_name",
    "whole_number",
]

_UNWRAPPED_LISTS = {
    "java.util.Collections$UnmodifiableList": "list",
    "java.util.Collections$UnmodifiableRandomAccessList": "list",
    "java.util.Collections$UnmodifiableCollection": "c",
    "java.util.Collections$SynchronizedList": "list",
    "java.util.Collections$SynchronizedRandomAccessList": "list",
}
_UNWRAPPED_MAPS = {"java.util.Collections$UnmodifiableMap": "m", "java.util.Collections$SynchronizedMap": "m"}
_MAX_WRAPPERS = 16


class NodeError(Exception):
    """A node is not what it should be; whoever reads the file adds the file's name and the node's offset.

    Parameters
    ----------
    message : str
        What is wrong.
    node : object
        The node, or the nearest one around it that stands in the stream.
    """

    def __init__(self, message: str, node: object) -> None:
        super().__init__(message)
        self.message = message
        self.node = node


def type_name(node: Content) -> str:
    """Java class of a value, for messages and for choosing by type."""
    if node is None:
        return "null"
    if isinstance(node, (bytes, JavaString)):
        return "block data" if isinstance(node, bytes) else "java.lang.String"
    return node.name if isinstance(node, (ClassDesc, ProxyDesc)) else node.desc.name


def text(node: Content) -> str | None:
    """Text of a string, None of null."""
    if node is None:
        return None
    if not isinstance(node, JavaString):
        raise NodeError(f"{type_name(node)} where a string should be", node)
    try:
        return whole_text(node.text)
    except JavaStreamError as error:
        raise NodeError(error.message, node) from None


def field(node: JavaObject, name: str) -> Any:  # noqa: ANN401 - a field holds whatever its type says
    """Value of a field.

    Raises
    ------
    NodeError
        If the class has no such field.
    """
    try:
        return node.get(name)
    except KeyError:
        raise NodeError(f"{node.desc.name} has no field {name!r}", node) from None


def number(node: Content) -> float | int | bool:
    """Value of an Integer, Double, Boolean and the like."""
    if isinstance(node, JavaObject):
        value = field(node, "value")
        if isinstance(value, (int, float)):
            return value
    raise NodeError(f"{type_name(node)} where a number should be", node)


def whole_number(node: Content) -> int:
    """Value of an Integer.

    Raises
    ------
    NodeError
        If it is none, or one that Java's ``int`` does not hold.
    """
    value = number(node)
    if not -(1 << 31) <= value < 1 << 31 or value != int(value):  # NaN is beyond every bound
        raise NodeError(f"{value} where a whole number should be", node)
    return int(value)


def _unwrap(node: Content, wrappers: dict[str, str], what: str) -> JavaObject:
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(node, JavaObject):
            break
        inner = wrappers.get(node.desc.name)
        if inner is None:
            return node
        node = field(node, inner)
    raise NodeError(f"{type_name(node)} where {what} should be", node)


def _counted(node: JavaObject, owner: str, per_item: int = 1) -> tuple[Content, ...]:
    """Values that follow the block of counts in a ``writeObject`` annotation."""
    annotation = field(node, f"@{owner}")
    values: tuple[Content, ...] = annotation[1:]
    if not annotation or not isinstance(annotation[0], bytes) or len(annotation[0]) < 4 or len(values) % per_item:
        raise NodeError(f"{node.desc.name} does not hold what it should", node)
    return values


def list_items(node: Content) -> Sequence[Content]:
    """Elements of a list of any usual class.

    Raises
    ------
    NodeError
        If it is no list, or of a class whose layout is not known.
    """
    holder = _unwrap(node, _UNWRAPPED_LISTS, "a list")
    name = holder.desc.name
    if name in ("java.util.ArrayList", "java.util.CollSer"):
        return _counted(holder, name)
    if name == "java.util.Collections$SingletonList":
        return (field(holder, "element"),)
    if name == "java.util.Collections$EmptyList":
        return ()
    if name == "java.util.Arrays$ArrayList":
        items = field(holder, "a")
        if isinstance(items, JavaArray) and isinstance(items.data, tuple):
            return items.data
    raise NodeError(f"{name} is not a list that can be read", holder)


def map_items(node: Content) -> list[tuple[Content, Content]]:
    """Entries of a map of any usual class, in the order in which it was written.

    Raises
    ------
    NodeError
        If it is no map, or of a class whose layout is not known.
    """
    holder = _unwrap(node, _UNWRAPPED_MAPS, "a map")
    name = holder.desc.name
    if name in ("java.util.HashMap", "java.util.LinkedHashMap"):
        values = _counted(holder, "java.util.HashMap", 2)
        return list(zip(values[::2], values[1::2], strict=True))
    if name == "java.util.Collections$SingletonMap":
        return [(field(holder, "k"), field(holder, "v"))]
    if name == "java.util.Collections$EmptyMap":
        return []
    raise NodeError(f"{name} is not a map that can be read", holder)


def hash_code(string: str) -> int:
    """Java's ``String.hashCode``, unsigned."""
    code = 0
    for (unit,) in struct.iter_unpack("<H", string.encode("utf-16-le", "surrogatepass")):
        code = (31 * code + unit) & 0xFFFFFFFF
    return code


def table_size(count: int) -> int:
    """Return the number of buckets of a Java HashMap that grew to `count` entries."""
    size = 16
    while count > size * 3 // 4:
        size *= 2
    return size


def hash_order(keys: Iterable[str]) -> list[str]:
    """Return distinct keys in the order in which a Java HashMap that they were put into one by one gives them."""
    distinct = list(dict.fromkeys(keys))
    mask = table_size(len(distinct)) - 1

    def bucket(key: str) -> int:
        code = hash_code(key)
        return (code ^ (code >> 16)) & mask

    return sorted(distinct, key=bucket)
