"""Edit a ``data.qpdata`` that was read: for tests that want the new bytes alone."""

from __future__ import annotations

from collections.abc import Mapping

from darefine_qupath.classes import Color
from darefine_qupath.project.interface import Changes
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.read import ImageData

__all__ = ["edited_data"]


def edited_data(image: ImageData, changes: Changes, colors: Mapping[str, Color] | None = None) -> bytes:
    """Bytes of the file after the changes; `image` stays as it is."""
    return edit_document(Document(image.data, path=image.path), changes, colors or {}).content
