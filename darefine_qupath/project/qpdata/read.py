"""Read a whole ``data.qpdata`` file: the objects of an image as records, and what stands beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color
from darefine_qupath.errors import DarefineError, JavaStreamError, ProjectFormatError
from darefine_qupath.javaserial.decode import decode
from darefine_qupath.javaserial.nodes import JavaObject, Stream, paused_garbage_collection
from darefine_qupath.javaserial.packed import unpack
from darefine_qupath.javaserial.values import NodeError
from darefine_qupath.limits import spoken
from darefine_qupath.project.qpdata.hierarchy import duplicates_of, walk
from darefine_qupath.project.qpdata.items import Items, TmaGrid, read_items, root_of, tma_grid
from darefine_qupath.project.qpdata.objects import ObjectReader, ObjectRow
from darefine_qupath.project.qpdata.rois import RoiBatch, RoiError
from darefine_qupath.project.qpdata.schema import PATH_CLASS
from darefine_qupath.project.servers import is_since

__all__ = ["ImageData", "decode_compact", "naming_file", "read_image_data", "roi_batch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageData(Items):
    """All that a ``data.qpdata`` file says: its `Items`, and its objects as records.

    Attributes
    ----------
    path : Path or None
        The file, for messages.
    data : bytes
        Its bytes.
    objects : tuple of Annotation
        Every object but the root, parents before children.
    root_id : UUID
        Identity of the root.
    tma_grid : TmaGrid or None
        Of a tissue microarray.
    colors : mapping of str to Color
        Colors of the path classes met, by full name.
    duplicates : frozenset of UUID
        Identities that more than one object has.
    has_ids : bool
        Whether every object's identity is in the file; otherwise identities are derived from positions.
    """

    path: Path | None
    data: bytes
    objects: tuple[Annotation, ...]
    root_id: UUID
    tma_grid: TmaGrid | None
    colors: Mapping[str, Color]
    duplicates: frozenset[UUID]
    has_ids: bool


class _Collected(NamedTuple):
    """All that a file says but for the geometries; no node of its stream."""

    items: Items
    reader: ObjectReader
    rows: list[ObjectRow]
    tma_grid: TmaGrid | None


def _collect(stream: Stream, data: bytes, path: Path | None, rois: RoiBatch | None = None) -> _Collected:
    items = read_items(stream, data, path)
    if rois is None:
        rois = roi_batch(items, data)
    reader = ObjectReader(len(data), rois)
    rows = reader.rows(walk(root_of(items), items.server_text))
    grid = tma_grid(items.hierarchy, reader.cores)  # type: ignore[arg-type]
    return _Collected(replace(items, hierarchy=None), reader, rows, grid)


def roi_batch(items: Items, data: bytes) -> RoiBatch:
    """Batch for the ROIs of a file."""
    return RoiBatch(8 * len(data) + 1_000_000, rounds_all=is_since(items.qupath_version or "", 0, 6))


def decode_compact(data: bytes) -> Stream:
    """Decode a file; objects that are alike stay bytes, but for those that define a path class."""
    stream = decode(data, is_compact=True)
    unpack(stream, PATH_CLASS)
    return stream


def _decode_and_collect(data: bytes, path: Path | None) -> _Collected:
    with contextlib.suppress(NodeError):
        return _collect(decode_compact(data), data, path)
    # Only the whole tree knows where a node stands.
    stream = decode(data)
    try:
        return _collect(stream, data, path)
    except NodeError as error:
        raise ProjectFormatError(error.message, path=path, offset=stream.offset_of(error.node) or 4) from None


class _RoiFinder(RoiBatch):
    """Counts ROIs up to one of them."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self.slot = slot

    def add(self, node: JavaObject) -> int:
        number = super().add(node)
        if number == self.slot:
            raise NodeError("", node)
        return number


def _offset_of_roi(slot: int, data: bytes) -> int | None:
    """Where a ROI stands; its node is gone when its geometry turns out to be none, so the file is decoded again."""
    stream = decode(data)
    try:
        _collect(stream, data, None, _RoiFinder(slot))
    except NodeError as error:
        return stream.offset_of(error.node)
    return None


@contextlib.contextmanager
def naming_file(path: Path | None) -> Iterator[None]:
    """Turn every unexpected error into one that names the file."""
    try:
        yield
    except JavaStreamError as error:
        raise ProjectFormatError(error.message, path=path, offset=error.offset) from None
    except (DarefineError, NodeError, RoiError, Warning):
        raise
    except Exception as error:
        raise ProjectFormatError(f"The image data cannot be read: {spoken(error)}", path=path) from error


def read_image_data(data: bytes, *, path: Path | None = None) -> ImageData:
    """Read a ``data.qpdata`` file.

    Parameters
    ----------
    data : bytes
        The whole file.
    path : Path, optional
        Named in errors.

    Returns
    -------
    ImageData
        Objects as records, and everything beside them.

    Raises
    ------
    ProjectFormatError
        If the file is damaged or holds something that cannot be read; names file, offset and class.
    """
    with naming_file(path), paused_garbage_collection():
        items, reader, rows, grid = _decode_and_collect(data, path)
        try:
            rois = reader.rois.build()
        except RoiError as error:
            raise ProjectFormatError(error.message, path=path, offset=_offset_of_roi(error.slot, data)) from None
        objects = []
        rows.reverse()
        while rows:
            objects.append(rows.pop().record(rois))
    return ImageData(
        **{item.name: getattr(items, item.name) for item in fields(items)},
        path=path,
        data=data,
        objects=tuple(objects),
        root_id=reader.ids[0],
        tma_grid=grid,
        colors=reader.colors,
        duplicates=duplicates_of(reader.ids),
        has_ids=reader.has_ids,
    )
