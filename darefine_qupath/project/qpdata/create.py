"""Create the ``data.qpdata`` of an image that has no objects yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

from darefine_qupath.errors import ProjectUnsupportedError
from darefine_qupath.javaserial.encode import encode
from darefine_qupath.javaserial.nodes import Stream
from darefine_qupath.javaserial.strings import JavaString, modified_utf8
from darefine_qupath.project import lenient_json, servers
from darefine_qupath.project.qpdata.build import NodeBuilder
from darefine_qupath.project.qpdata.schema import EOF, HIERARCHY, IMAGE_TYPE, ROOT, STAINS, WORKFLOW
from darefine_qupath.project.qpdata.stains import DEFAULT_STAINS, default_stains

__all__ = ["create_image_data"]

_IMAGE_TYPES = (*DEFAULT_STAINS, "FLUORESCENCE", "OTHER", "UNSET")


def create_image_data(
    *,
    image_type: str,
    server: Mapping[str, Any] | None,
    entry_id: str,
    version: str,
    root_id: UUID | None = None,
) -> bytes:
    """Make the data of an image that has no objects yet.

    Parameters
    ----------
    image_type : str
        QuPath's ImageType; a brightfield type gets QuPath's default stains.
    server : mapping or None
        Builder of the image server, as in the project file.
    entry_id : str
        ``<project file>::<entry id>``.
    version : str
        QuPath version to write for.
    root_id : UUID, optional
        Identity of the root; random by default.

    Returns
    -------
    bytes
        A ``data.qpdata`` file.

    Raises
    ------
    ProjectUnsupportedError
        If QuPath has no such image type.
    """
    if image_type not in _IMAGE_TYPES:
        raise ProjectUnsupportedError(f"{image_type!r} is not an image type; give one of {', '.join(_IMAGE_TYPES)}")
    is_modern = servers.is_since(version, 0, 6)
    builder = NodeBuilder(Stream(()), is_modern=is_modern, colors={})
    header = {"dataVersion": 3, "qupathVersion": version} | ({} if server is None else {"server": dict(server)})
    empty = JavaString("")
    locale = dict.fromkeys(("country", "extensions", "script", "variant"), empty) | {"language": JavaString("en")}
    title = modified_utf8("Data file version 3")
    root = builder.external(
        ROOT,
        (None, None, builder.metadata({}, root_id or uuid4()), None, bytes(4)),
    )
    stains = None
    if image_type in DEFAULT_STAINS:
        described = JavaString(default_stains(image_type, is_modern=is_modern))
        stains = builder.external(STAINS, ((1).to_bytes(4, "big"), described))
    properties = builder.hash_map((JavaString("PROJECT_ENTRY_ID"), JavaString(entry_id)))
    return encode(
        Stream(
            (
                len(title).to_bytes(2, "big") + title,
                JavaString(lenient_json.json_bytes(header, pretty=False).decode()),
                builder.object("java.util.Locale", {"hashcode": -1, **locale}),
                builder.enum(IMAGE_TYPE, image_type),
                stains,
                builder.external(WORKFLOW, (bytes.fromhex("0000000100000000"),)),
                builder.object(HIERARCHY, {"rootObject": root}),
                properties,
                JavaString(EOF),
            )
        )
    )
