"""Read what stands beside the objects: server, image type, stains, history, properties, TMA grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from darefine_qupath.errors import ProjectFormatError
from darefine_qupath.javaserial import values
from darefine_qupath.javaserial.decode import decode_until
from darefine_qupath.javaserial.nodes import JavaEnum, JavaObject, Stream
from darefine_qupath.javaserial.strings import JavaString
from darefine_qupath.javaserial.values import NodeError, list_items, text, type_name
from darefine_qupath.project.lenient_json import json_object
from darefine_qupath.project.qpdata.properties import read_properties
from darefine_qupath.project.qpdata.schema import EOF, HIERARCHY, IMAGE_TYPE, ROOT, STAINS, WORKFLOW
from darefine_qupath.project.qpdata.stains import Stains, read_stains

__all__ = ["Items", "TmaGrid", "WorkflowStep", "image_type_of", "read_items", "root_of", "tma_grid"]

_VERSION_PREFIX = "Data file version"


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
    found = decode_until(head, lambda item: isinstance(item, JavaEnum) and item.desc.name == IMAGE_TYPE)
    return found.constant.text if isinstance(found, JavaEnum) else None


def _server(described: str) -> dict[str, Any]:
    wrapper = json_object(described) or {}
    version, server = wrapper.get("qupathVersion"), wrapper.get("server")
    return {
        "server_text": described,
        "qupath_version": None if version is None else str(version),
        "server": server if isinstance(server, dict) else None,
    }


def _locale(node: JavaObject) -> str:
    parts = [text(values.field(node, name)) or "" for name in ("language", "country", "variant")]
    return "_".join(parts).rstrip("_")


def _workflow(node: JavaObject) -> tuple[WorkflowStep, ...]:
    return tuple([_workflow_step(step) for step in node.data if isinstance(step, JavaObject)])


def _workflow_step(step: JavaObject) -> WorkflowStep:
    reader = _STEPS.get(step.desc.name.rpartition(".")[2])
    name, script = (None, None) if reader is None else reader(step)
    return WorkflowStep(java_class=step.desc.name, name=name, script=script)


_Step = tuple[str | None, str | None]


def _simple_step(step: JavaObject) -> _Step:
    strings = [text(part) for part in step.data if not isinstance(part, bytes)]
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


_READERS: dict[str, tuple[str, Callable[[JavaObject], Any]]] = {
    "java.util.Locale": ("locale", _locale),
    STAINS: ("stains", read_stains),
    WORKFLOW: ("workflow", _workflow),
    HIERARCHY: ("hierarchy", lambda node: node),
    "java.util.HashMap": ("properties", read_properties),
    "java.util.LinkedHashMap": ("properties", read_properties),
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
