"""Read a QuPath project's own files: its images, its class list and the objects of an image. Nothing here writes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from darefine_qupath.classes import PathClass
from darefine_qupath.errors import (
    ImageNotFoundError,
    LimitError,
    ProjectError,
    ProjectFormatError,
    ProjectNotFoundError,
    SlideError,
)
from darefine_qupath.limits import open_file
from darefine_qupath.project import (
    class_list,
    lenient_json,
    qpproj,
    servers,
    staging,
    uris,
)
from darefine_qupath.project.interface import ImageEntry, ImageState, Project
from darefine_qupath.project.qpdata.items import image_type_of
from darefine_qupath.project.qpdata.read import ImageData, read_image_data

__all__ = ["DATA_FILE", "IMAGE_TYPES", "PROJECT_FILE", "UNSET", "ProjectReader", "project_file"]

PROJECT_FILE = "project.qpproj"
DATA_FILE = "data.qpdata"
_HEAD_BYTES = 1 << 18
"""Beginning of a ``data.qpdata`` in which the image type stands, but for the longest descriptions of a server."""
UNSET = "UNSET"
IMAGE_TYPES = ("BRIGHTFIELD_H_E", "BRIGHTFIELD_H_DAB", "BRIGHTFIELD_OTHER", "FLUORESCENCE", "OTHER", UNSET)


def project_file(path: Path) -> Path:
    """Project file of a path that names it or its folder.

    Raises
    ------
    ProjectNotFoundError
        If there is none.
    """
    path = path.absolute()
    if path.is_dir():
        inside = path / PROJECT_FILE
        others = sorted(path.glob("*.qpproj"))
        path = others[0] if len(others) == 1 and not inside.is_file() else inside
    if not path.exists():
        raise ProjectNotFoundError(f"There is no QuPath project at {path}; give a .qpproj file or its folder")
    return path


@dataclass(frozen=True, slots=True)
class _Read:
    """One image's data as last read."""

    stamp: staging.FileVersion
    data: ImageData


class ProjectReader(Project):
    """The half of a project that reads, as both engines do it.

    Parameters
    ----------
    path : Path
        The ``.qpproj`` file or its folder.

    Raises
    ------
    ProjectNotFoundError
        If there is no such file.
    ProjectFormatError
        If it is not a QuPath project.
    """

    def __init__(self, path: Path) -> None:
        self.path = project_file(path)
        self._stamps: dict[str, staging.FileVersion | None] = {}
        self._entries: dict[int, tuple[qpproj.EntryRecord, ImageEntry]] = {}
        self._last: tuple[str, _Read] | None = None
        self._classes_stamp: staging.FileVersion | None = None
        self._classes_read = False
        self._load()

    def _load(self) -> None:
        data, self._stamp = staging.read_with_version(self.path, lenient_json.LIMITS)
        self._document = qpproj.parse_project(data, self.path)
        self._records = {str(record.id): record for record in qpproj.entry_records(self._document, self.path)}
        self._images: tuple[ImageEntry, ...] | None = None

    @property
    def version(self) -> str:
        """QuPath version that wrote the project file."""
        return qpproj.version_of(self._document)

    @property
    def images(self) -> tuple[ImageEntry, ...]:
        """Every image, in the project's order."""
        if self._images is None:
            self._images = tuple(self._known_entry(record) for record in self._records.values())
        return self._images

    def _known_entry(self, record: qpproj.EntryRecord) -> ImageEntry:
        """Entry of a record; of an image whose server is what it was, nothing is looked up on the disk again."""
        known = self._entries.get(record.id)
        if known is None or known[0].builder != record.builder:
            entry = self._entry(record)
        elif known[0] is record:
            return known[1]
        else:
            entry = replace(known[1], name=record.name, metadata=record.metadata, description=record.description)
        self._entries[record.id] = (record, entry)
        return entry

    def _entry(self, record: qpproj.EntryRecord) -> ImageEntry:
        server = servers.server_of(record.builder)
        uri, path, exists = self._resolved(server.uri)
        size, pixel_size = server.size, server.pixel_size
        if exists and path is not None and not server.has_metadata and server.unsupported is None:
            from darefine_qupath.project import imagefile  # noqa: PLC0415 - few projects need it, see its load time

            with contextlib.suppress(SlideError):
                found = imagefile.probe(path, server.args)
                size, pixel_size = found.size, found.pixel_size
        return ImageEntry(
            id=str(record.id),
            name=record.name,
            uri=uri,
            path=path,
            exists=exists,
            width=size.width if size else None,
            height=size.height if size else None,
            mpp=None if pixel_size is None else pixel_size.side,
            pixel_size=pixel_size,
            image_type=self._image_type(str(record.id)),
            metadata=record.metadata,
            description=record.description,
            server_args=server.args,
            unsupported=server.unsupported,
        )

    def _resolved(self, uri: str | None) -> tuple[str | None, Path | None, bool]:
        """URI, file and whether it is there; for a moved project at its new place."""
        path = None if uri is None else uris.local_path(uri)
        if uri is None or path is None:
            return uri, None, False
        if _is_file(Path(path)):
            return uri, Path(path), True
        project_uri = self._document.get("uri")
        if isinstance(project_uri, str):
            moved = uris.relocated(uri, project_uri=project_uri, folder=self.folder)
            if moved is not None and _is_file(moved):
                return uris.file_uri(moved), moved, True
        return uri, Path(path), False

    def _image_type(self, entry_id: str) -> str:
        path = self._data_file(entry_id)
        if not _is_file(path):
            return UNSET
        summary = path.with_name("summary.json")
        with contextlib.suppress(ProjectError, LimitError, OSError):
            if _is_file(summary):
                found = lenient_json.parse_json(staging.read_with_version(summary, lenient_json.LIMITS)[0], summary)
                if isinstance(found, dict) and found.get("imageType") in IMAGE_TYPES:
                    return str(found["imageType"])
            with open_file(path) as file:
                stored = image_type_of(file.read(_HEAD_BYTES))
            return stored or read_image_data(staging.read_with_version(path)[0], path=path).image_type
        return UNSET

    def _data_file(self, entry_id: str) -> Path:
        return self.folder / "data" / entry_id / DATA_FILE

    @property
    def classes(self) -> tuple[PathClass, ...]:
        """The class list, in the project's order."""
        data, self._classes_stamp = self._stored_classes()
        self._classes_read = True
        return () if data is None else class_list.parse_classes(data, self._classes_file)

    @property
    def _classes_file(self) -> Path:
        return self.folder / "classifiers" / "classes.json"

    def _stored_classes(self) -> tuple[bytes | None, staging.FileVersion | None]:
        path = self._classes_file
        return staging.read_with_version(path, lenient_json.LIMITS) if staging.is_there(path) else (None, None)

    def state(self, image: ImageEntry) -> ImageState:
        """Read what is stored for an image."""
        self._check_known(image)
        if not self._has_data(image.id):
            self._stamps[image.id] = None
            return ImageState()
        read = self._read(image.id)
        properties = {key: value for key, value in read.data.properties.items() if isinstance(value, str)}
        return ImageState(objects=read.data.objects, properties=properties, version=read.stamp.digest)

    def _check_known(self, image: ImageEntry) -> None:
        if image.id not in self._records:
            raise ImageNotFoundError(f"No image with entry id {image.id!r} ({image.name!r}) in {self.path}")

    def _has_data(self, entry_id: str) -> bool:
        path = self._data_file(entry_id)
        if staging.is_there(path):
            return True
        left = path.with_name(f"{DATA_FILE}.bkp")
        if left.is_file():
            raise ProjectFormatError(f"QuPath stopped while saving; rename {left.name} to {DATA_FILE}", path=path)
        return False

    def _read(self, entry_id: str) -> _Read:
        path = self._data_file(entry_id)
        data, stamp = staging.read_with_version(path)
        self._stamps[entry_id] = stamp
        if self._last is not None and self._last[0] == entry_id and self._last[1].stamp.digest == stamp.digest:
            return self._last[1]
        read = _Read(stamp, read_image_data(data, path=path))
        self._last = (entry_id, read)
        return read


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
