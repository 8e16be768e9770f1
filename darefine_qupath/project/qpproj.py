"""Read and make the content of ``project.qpproj``: the project and its image entries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from darefine_qupath.errors import ProjectFormatError, ProjectUnsupportedError
from darefine_qupath.limits import whole_text
from darefine_qupath.project.lenient_json import (
    JsonObject,
    MisplacedValueError,
    json_bytes,
    locating,
    parse_json,
    scalar_text,
)
from darefine_qupath.project.servers import release_of
from darefine_qupath.project.uris import file_uri

__all__ = [
    "NEW_PROJECT_VERSION",
    "NO_ID",
    "EntryRecord",
    "entry_json",
    "entry_records",
    "new_project",
    "parse_project",
    "version_of",
]


NEW_PROJECT_VERSION = "0.6.0"
"""Form of new projects: 0.6 and 0.7 write the same, and 0.4 to 0.7 all read it."""

NO_ID = 10**18
"""Entry ids are smaller: QuPath's are 64-bit numbers."""


_MILESTONES = ("v0.2.0-m1", "v0.2.0-m2")


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryRecord:
    """One entry of ``images`` as the file says it.

    Attributes
    ----------
    id : int
        Name of the data folder.
    name : str
        As shown in QuPath.
    description : str or None
        Free text.
    metadata : mapping of str to str
        Project metadata of the image.
    builder : dict
        The ``serverBuilder`` object.
    """

    id: int
    name: str
    description: str | None
    metadata: Mapping[str, str]
    builder: JsonObject


def parse_project(data: bytes, path: Path) -> JsonObject:
    """Read ``project.qpproj`` and check what everything else relies on.

    Raises
    ------
    ProjectFormatError
        If it is not a QuPath project.
    ProjectUnsupportedError
        If it is one of QuPath 0.1, or of the first two milestones of 0.2.
    """
    document = parse_json(data, path)
    with locating(data, path):
        return _checked_project(document, path)


def _checked_project(document: Any, path: Path) -> JsonObject:  # noqa: ANN401 - JSON is any value
    if not isinstance(document, dict):
        raise MisplacedValueError("this is not a QuPath project: the JSON is not an object")
    if not {"version", "lastID", "images"} & document.keys():
        raise MisplacedValueError("this is not a QuPath project: no version, lastID or images")
    images = document.get("images", [])
    if not isinstance(images, list) or not all(isinstance(entry, dict) for entry in images):
        raise MisplacedValueError("images is not a list of entries", "images")
    if any("path" in entry and "serverBuilder" not in entry for entry in images):
        raise ProjectUnsupportedError(f"{path} is a project of QuPath 0.1; open and save it in QuPath 0.2 or later")
    if document.get("version") in _MILESTONES:
        version = document["version"]
        raise ProjectUnsupportedError(f"{path} is a project of QuPath {version}, which no later QuPath opens either")
    _checked_records(document)
    return document


def entry_records(document: Mapping[str, Any], path: Path) -> tuple[EntryRecord, ...]:
    """Entries of a project, in its order.

    Parameters
    ----------
    document : mapping
        What `parse_project` gave.
    path : Path
        The file, for messages.

    Returns
    -------
    tuple of EntryRecord
        One for each of ``images``.

    Raises
    ------
    ProjectFormatError
        If an entry has no server or no id of its own.
    """
    try:
        return _checked_records(document)
    except MisplacedValueError as error:
        raise ProjectFormatError(error.message, path=path) from None


def _checked_records(document: Mapping[str, Any]) -> tuple[EntryRecord, ...]:
    records = tuple(_entry_record(entry, index) for index, entry in enumerate(document.get("images", [])))
    seen: set[int] = set()
    for index, record in enumerate(records):
        if record.id in seen:
            raise MisplacedValueError(f"entry id {record.id} occurs twice", "images", index, "entryID")
        seen.add(record.id)
    return records


def _entry_record(entry: Mapping[str, Any], index: int) -> EntryRecord:
    number, builder, metadata = entry.get("entryID"), entry.get("serverBuilder"), entry.get("metadata")
    # The id names a folder: nothing but a plain number may get there.
    if isinstance(number, str) and re.fullmatch(r"[0-9]{1,18}", number):
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < NO_ID:
        message = f"image {index + 1} has entryID {str(number)[:40]!r}, not a number"
        raise MisplacedValueError(message, "images", index, "entryID")
    if not isinstance(builder, dict):
        message = f"image {index + 1} (entry {number}) has no serverBuilder"
        raise MisplacedValueError(message, "images", index, "serverBuilder")
    if not isinstance(metadata, dict | None):
        message = f"image {index + 1} (entry {number}) has metadata that is not an object"
        raise MisplacedValueError(message, "images", index, "metadata")
    name, description = entry.get("imageName"), entry.get("description")
    return EntryRecord(
        id=number,
        name=whole_text(name if isinstance(name, str) else str(builder.get("uri") or number).rsplit("/", 1)[-1]),
        description=whole_text(description) if isinstance(description, str) else None,
        metadata={
            whole_text(key): whole_text(value) if isinstance(value, str) else _brief(value)
            for key, value in (metadata or {}).items()
        },
        builder=builder,
    )


def _brief(value: object) -> str:
    # QuPath keeps texts here and nothing else; what else stands there is shown.
    return scalar_text(value) if not isinstance(value, (dict, list)) else json_bytes(value, pretty=False).decode()[:200]


def version_of(document: Mapping[str, Any]) -> str:
    """QuPath version that wrote the project, ``"unknown"`` where it does not say."""
    version = document.get("version")
    return whole_text(version) if isinstance(version, str) else "unknown"


def new_project(path: Path, *, timestamp_ms: int, version: str = NEW_PROJECT_VERSION) -> JsonObject:
    """Content of a project without images.

    Parameters
    ----------
    path : Path
        The ``project.qpproj``, absolute.
    timestamp_ms : int
        Milliseconds since 1970.
    version : str, optional
        QuPath version that it is written for.

    Returns
    -------
    dict
        For `json_bytes`.
    """
    return {
        "version": version,
        "createTimestamp": timestamp_ms,
        "modifyTimestamp": timestamp_ms,
        "uri": file_uri(path),
        "lastID": 0,
        "images": [],
    }


def entry_json(record: EntryRecord, *, version: str) -> JsonObject:
    """Entry for ``images`` as QuPath `version` writes it, with a new randomised name."""
    entry: JsonObject = {
        "serverBuilder": record.builder,
        "entryID": record.id,
        "randomizedName": str(uuid4()),
        "imageName": record.name,
    }
    if record.description is not None:
        entry["description"] = record.description
    entry["metadata"] = dict(record.metadata)
    if release_of(version) >= (0, 6):
        entry["tags"] = []
    return entry
