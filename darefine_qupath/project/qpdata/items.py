"""Read what stands beside the objects: server, image type, stains, history, properties, TMA grid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from darefine_qupath.errors import ProjectFormatError
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.decode import first_of
from darefine_qupath.javaserial.nodes import Content, JavaEnum, JavaObject, Stream
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, list_items, map_items, text, type_name
from darefine_qupath.project.qpdata.schema import EOF, HIERARCHY, IMAGE_TYPE, ROOT, STAINS, WORKFLOW

__all__ = [
    "Items",
    "Opaque",
    "StainVector",
    "Stains",
    "TmaGrid",
    "WorkflowStep",
    "image_type_of",
    "read_items",
    "root_of",
    "tma_grid",
]

_VERSION_PREFIX = "Data file version"
_MAX_PROPERTY_DEPTH = 16


class StainVector(NamedTuple):
    """A stain: name, unit vector in red, green, blue optical density, and whether it is what the others leave."""

    name: str
    rgb: tuple[float, float, float]
    residual: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stains:
    """Colour deconvolution of a brightfield image.

    Attributes
    ----------
    name : str
        As shown in QuPath.
    vectors : tuple of StainVector
        Always three; the third is computed where the file names two.
    background : tuple of float
        Red, green and blue of no stain.
    """

    name: str
    vectors: tuple[StainVector, ...]
    background: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowStep:
    """A step of the image's history.

    Attributes
    ----------
    java_class : str
        Class of the step.
    name : str or None
        As shown in QuPath.
    script : str or None
        Script line that does it again.
    """

    java_class: str
    name: str | None
    script: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TmaGrid:
    """Grid of a tissue microarray: columns, rows, and the cores row by row."""

    width: int
    height: int
    cores: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is kept and not interpreted, by its Java class."""

    java_class: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Items:
    """What stands at the top level of a ``data.qpdata`` file, found by type as QuPath does.

    Attributes
    ----------
    data_version : str
        ``"Data file version 3"``.
    server_text : str
        The JSON (or older text) that names the image.
    qupath_version : str or None
        Version of QuPath that wrote the file; None in old files.
    server : mapping or None
        The image server's builder; None where there is none.
    locale : str or None
        Format locale of the writer, ``"en_US"``.
    image_type : str
        QuPath's ImageType.
    stains : Stains or None
        Of a brightfield image.
    workflow : tuple of WorkflowStep
        History, oldest first.
    properties : mapping of str to value
        Image properties; `Opaque` where the value is an object of a QuPath class.
    hierarchy : JavaObject or None
        Node of the objects; None once they are read.
    """

    data_version: str
    server_text: str = ""
    qupath_version: str | None = None
    server: Mapping[str, Any] | None = None
    locale: str | None = None
    image_type: str = "UNSET"
    stains: Stains | None = None
    workflow: tuple[WorkflowStep, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)
    hierarchy: JavaObject | None = None


def read_items(stream: Stream, data: bytes, path: Path | None) -> Items:
    """Read the items of a whole file.

    Raises
    ------
    NodeError
        If one of them is not what it should be.
    ProjectFormatError
        If the end of the file is missing.
    """
    contents = iter(stream.contents)
    found: dict[str, Any] = {"data_version": _data_version(next(contents, None), stream)}
    for item in contents:
        if isinstance(item, JavaString):
            if item.raw == EOF.encode():
                return Items(**found)
            if "server_text" not in found:
                found |= _server(text(item) or "")
        elif isinstance(item, JavaEnum) and item.desc.name == IMAGE_TYPE:
            found["image_type"] = text(item.constant) or "UNSET"
        elif isinstance(item, JavaObject) and item.desc.name in _READERS:
            name, reader = _READERS[item.desc.name]
            found[name] = reader(item)
    raise ProjectFormatError(
        "The file ends without its closing 'EOF': its end is missing; take QuPath's data.qpdata.bkp or a backup",
        path=path,
        offset=len(data),
    )


def _data_version(first: object, stream: Stream) -> str:
    if not isinstance(first, bytes) or len(first) < 2:
        raise NodeError("The file does not begin with its version", stream.nodes[0] if stream.nodes else None)
    version = text(JavaString.of_raw(first[2:])) or ""
    if not version.startswith(_VERSION_PREFIX):
        raise NodeError(f"The file begins with {version[:40]!r} instead of its version", None)
    return version


def image_type_of(head: bytes) -> str | None:
    """Image type of a file whose beginning is given; None where these bytes do not say."""
    found = first_of(head, lambda item: isinstance(item, JavaEnum) and item.desc.name == IMAGE_TYPE)
    return found.constant.text if isinstance(found, JavaEnum) else None


def _server(described: str) -> dict[str, Any]:
    wrapper = _json(described) or {}
    version, server = wrapper.get("qupathVersion"), wrapper.get("server")
    return {
        "server_text": described,
        "qupath_version": None if version is None else str(version),
        "server": server if isinstance(server, dict) else None,
    }


def _locale(node: JavaObject) -> str:
    parts = [text(values.field(node, name)) or "" for name in ("language", "country", "variant")]
    return "_".join(parts).rstrip("_")


def _triple(value: object, node: JavaObject) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in str(value).split())
    except ValueError:
        raise NodeError(f"{value!r} is not a stain vector", node) from None
    return red, green, blue


def _unit(vector: tuple[float, float, float]) -> tuple[float, float, float]:
    length = math.sqrt(sum(part * part for part in vector))
    if not length > 0:
        return vector
    return vector[0] / length, vector[1] / length, vector[2] / length


def _cross(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _stains(node: JavaObject) -> Stains:
    described = next((text(part) for part in node.content if isinstance(part, JavaString)), None)
    values = _json(described or "")
    if values is None:
        raise NodeError("The colour deconvolution stains cannot be read", node)
    vectors = []
    for number in (1, 2, 3):
        if f"Stain {number}" in values:
            rgb = _unit(_triple(values.get(f"Values {number}"), node))
            vectors.append(StainVector(str(values[f"Stain {number}"]), rgb, residual=False))
    if len(vectors) == 2:
        vectors.append(StainVector("Residual", _unit(_cross(vectors[0].rgb, vectors[1].rgb)), residual=True))
    background = _triple(values.get("Background", "255 255 255"), node)
    return Stains(name=str(values.get("Name", "")), vectors=tuple(vectors), background=background)


def _json(described: str) -> dict[str, Any] | None:
    """Parse as QuPath's lenient Gson would; None for what is no JSON object."""
    try:
        value = json.loads(described, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _workflow(node: JavaObject) -> tuple[WorkflowStep, ...]:
    return tuple([_workflow_step(step) for step in node.content if isinstance(step, JavaObject)])


def _workflow_step(step: JavaObject) -> WorkflowStep:
    reader = _STEPS.get(step.desc.name.rpartition(".")[2])
    name, script = (None, None) if reader is None else reader(step)
    return WorkflowStep(java_class=step.desc.name, name=name, script=script)


_Step = tuple[str | None, str | None]


def _simple_step(step: JavaObject) -> _Step:
    strings = [text(part) for part in step.content if not isinstance(part, bytes)]
    if len(strings) != 5:
        raise NodeError(f"{step.desc.name} has {len(strings)} texts instead of 5", step)
    name, plugin, argument, before, after = strings
    return name, f"{before or ''}runPlugin('{plugin}', '{argument or ''}'){after or ''}"


def _scriptable_step(step: JavaObject) -> _Step:
    return text(values.field(step, "name")), text(values.field(step, "script"))


def _classifier_step(step: JavaObject) -> _Step:
    return text(values.field(step, "name")), f"runClassifier('{text(values.field(step, 'classifierPath')) or ''}')"


def _plugin_step(step: JavaObject) -> _Step:
    argument, before, after = (text(values.field(step, name)) or "" for name in ("arg", "scriptBefore", "scriptAfter"))
    plugin = type_name(values.field(step, "pluginClass"))
    return text(values.field(step, "name")), f"{before}runPlugin('{plugin}', '{argument}'){after}"


_STEPS: dict[str, Callable[[JavaObject], _Step]] = {
    "SimplePluginWorkflowStep": _simple_step,
    "DefaultScriptableWorkflowStep": _scriptable_step,
    "RunSavedClassifierWorkflowStep": _classifier_step,
    "DefaultPluginWorkflowStep": _plugin_step,
}


def _properties(node: JavaObject) -> dict[str, Any]:
    known: dict[int, Any] = {}
    return {str(_key(key)): _plain_value(value, 0, known) for key, value in map_items(node)}


_NUMBERS = {f"java.lang.{name}" for name in ("Integer", "Double", "Boolean", "Long", "Float", "Short", "Byte")}


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


_READERS: dict[str, tuple[str, Callable[[JavaObject], Any]]] = {
    "java.util.Locale": ("locale", _locale),
    STAINS: ("stains", _stains),
    WORKFLOW: ("workflow", _workflow),
    HIERARCHY: ("hierarchy", lambda node: node),
    "java.util.HashMap": ("properties", _properties),
    "java.util.LinkedHashMap": ("properties", _properties),
}


def tma_grid(hierarchy: JavaObject, ids: Mapping[int, UUID]) -> TmaGrid | None:
    """Grid of a tissue microarray, from the identities of its cores by the ids of their nodes."""
    grid = values.field(hierarchy, "tmaGrid")
    if grid is None:
        return None
    if not isinstance(grid, JavaObject):
        raise NodeError(f"{type_name(grid)} where the TMA grid should be", hierarchy)
    cores = list_items(values.field(grid, "cores"))
    if any(id(core) not in ids for core in cores):
        raise NodeError("The TMA grid holds a core that is not in the hierarchy", grid)
    return TmaGrid(
        width=values.field(grid, "gridWidth"),
        height=values.field(grid, "gridHeight"),
        cores=tuple(ids[id(core)] for core in cores),
    )


def root_of(items: Items) -> JavaObject:
    """Root of the hierarchy."""
    if items.hierarchy is None:
        raise NodeError("The file has no object hierarchy", None)
    root = values.field(items.hierarchy, "rootObject")
    if not isinstance(root, JavaObject) or root.desc.name != ROOT:
        raise NodeError(f"{type_name(root)} where the root object should be", items.hierarchy)
    return root
