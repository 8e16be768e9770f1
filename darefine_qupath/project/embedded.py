"""The embedded engine: QuPath's own files, read and written without Java or QuPath."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from darefine_qupath.classes import Color, PathClass, default_color
from darefine_qupath.errors import (
    ClassMapError,
    ConfigError,
    ImageNotFoundError,
    LimitError,
    ProjectChangedError,
    ProjectError,
    ProjectFormatError,
    ProjectNotFoundError,
    ProjectUnsupportedError,
    ProjectWriteError,
    SlideError,
)
from darefine_qupath.geometry import Size
from darefine_qupath.javaserial.nodes import paused_garbage_collection
from darefine_qupath.limits import open_file
from darefine_qupath.project import qpproj, staging, uris
from darefine_qupath.project.interface import Applied, Changes, Engine, ImageEntry, ImageState, Project
from darefine_qupath.project.qpdata.create import create_image_data
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.items import image_type_of
from darefine_qupath.project.qpdata.read import ImageData, read_image_data
from darefine_qupath.project.qpdata.summary import summarize
from darefine_qupath.project.qpdata.verify import verify_edit

if TYPE_CHECKING:
    from typing_extensions import Self

    from darefine_qupath.project.imagefile import ImageFile

__all__ = ["PROJECT_FILE", "EmbeddedProject", "project_file"]

_log = logging.getLogger(__name__)

PROJECT_FILE = "project.qpproj"
_DATA_FILE = "data.qpdata"
_HEAD_BYTES = 1 << 18
"""Beginning of a ``data.qpdata`` in which the image type stands, but for the longest descriptions of a server."""
_UNSET = "UNSET"
_IMAGE_TYPES = ("BRIGHTFIELD_H_E", "BRIGHTFIELD_H_DAB", "BRIGHTFIELD_OTHER", "FLUORESCENCE", "OTHER", _UNSET)


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


_Verify = Callable[[Document], None]
"""Compares what was read back with what should be there; raises `ProjectWriteError`."""


@dataclass(frozen=True, slots=True)
class _Read:
    """One image's data as last read."""

    stamp: staging.FileVersion
    data: ImageData


class EmbeddedProject(Project):
    """A QuPath project, without QuPath.

    Opening and reading never write. Every write holds the project's lock, is read back and compared before it takes
    the place of the former file, and keeps that file as a backup.

    Parameters
    ----------
    path : Path
        The ``.qpproj`` file.

    Raises
    ------
    ProjectNotFoundError
        If there is no such file.
    ProjectFormatError
        If it is not a QuPath project.
    """

    engine: Engine = "embedded"

    def __init__(self, path: Path) -> None:
        self.path = project_file(path)
        self._stamps: dict[str, staging.FileVersion | None] = {}
        self._entries: dict[int, tuple[qpproj.EntryRecord, ImageEntry]] = {}
        self._last: tuple[str, _Read] | None = None
        self._classes_stamp: staging.FileVersion | None = None
        self._classes_read = False
        self._load()

    @classmethod
    def create(cls, path: Path, classes: Sequence[PathClass] = ()) -> Self:
        """Make a project without images.

        Parameters
        ----------
        path : Path
            Its folder, or the ``.qpproj`` file to be made in it.
        classes : sequence of PathClass, optional
            The class list.

        Returns
        -------
        EmbeddedProject
            The new project.

        Raises
        ------
        ProjectWriteError
            If there is a project already, or it cannot be written.
        """
        path = path.absolute()
        path = path if path.suffix == ".qpproj" else path / PROJECT_FILE
        if path.exists():
            raise ProjectWriteError(f"There is a project already: {path}; open it or give another folder")
        document = qpproj.new_project(path, timestamp_ms=_now_ms(), version=cls._new_version())
        with staging.Batch(path.parent) as batch:
            if classes:
                target = path.parent / "classifiers" / "classes.json"
                batch.stage(target, qpproj.classes_json(classes, None, target))
            batch.stage(path.parent / "data" / "metadata.json", b"{}")
            batch.stage(path, qpproj.json_bytes(document))
            batch.commit()
        return cls(path)

    @classmethod
    def _new_version(cls) -> str:
        """QuPath version in whose form a new project is written."""
        return qpproj.NEW_PROJECT_VERSION

    def _load(self) -> None:
        data, self._stamp = staging.read_stamped(self.path, qpproj.LIMITS)
        self._document = qpproj.parse_project(data, self.path)
        self._records = {str(record.id): record for record in qpproj.entry_records(self._document, self.path)}
        self._images: tuple[ImageEntry, ...] | None = None

    # -- reading

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
        server = qpproj.server_of(record.builder)
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
            return _UNSET
        summary = path.with_name("summary.json")
        with contextlib.suppress(ProjectError, LimitError, OSError):
            if _is_file(summary):
                found = qpproj.parse_json(staging.read_stamped(summary, qpproj.LIMITS)[0], summary)
                if isinstance(found, dict) and found.get("imageType") in _IMAGE_TYPES:
                    return str(found["imageType"])
            with open_file(path) as file:
                stored = image_type_of(file.read(_HEAD_BYTES))
            return stored or read_image_data(staging.read_stamped(path)[0], path=path).image_type
        return _UNSET

    def _data_file(self, entry_id: str) -> Path:
        return self.folder / "data" / entry_id / _DATA_FILE

    @property
    def classes(self) -> tuple[PathClass, ...]:
        """The class list, in the project's order."""
        data, self._classes_stamp = self._stored_classes()
        self._classes_read = True
        return () if data is None else qpproj.parse_classes(data, self._classes_file)

    @property
    def _classes_file(self) -> Path:
        return self.folder / "classifiers" / "classes.json"

    def _stored_classes(self) -> tuple[bytes | None, staging.FileVersion | None]:
        path = self._classes_file
        return staging.read_stamped(path, qpproj.LIMITS) if staging.is_there(path) else (None, None)

    def state(self, image: ImageEntry) -> ImageState:
        """Read what is stored for an image.

        Raises
        ------
        ImageNotFoundError
            If the project has no such image.
        ProjectFormatError
            If the image's data is damaged.
        """
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
        left = path.with_name(f"{_DATA_FILE}.bkp")
        if left.is_file():
            raise ProjectFormatError(f"QuPath stopped while saving; rename {left.name} to {_DATA_FILE}", path=path)
        return False

    def _read(self, entry_id: str) -> _Read:
        path = self._data_file(entry_id)
        data, stamp = staging.read_stamped(path)
        self._stamps[entry_id] = stamp
        if self._last is not None and self._last[0] == entry_id and self._last[1].stamp.digest == stamp.digest:
            return self._last[1]
        read = _Read(stamp, read_image_data(data, path=path))
        self._last = (entry_id, read)
        return read

    def _opened_data(self, image: ImageEntry) -> Document:
        """Open the objects of an image to be edited; those of an image that has none yet as QuPath would save them."""
        path = self._data_file(image.id)
        if not self._has_data(image.id):
            return Document(self._blank(self._record(image), image.image_type), path=path)
        data, self._stamps[image.id] = staging.read_stamped(path)
        return Document(data, path=path)

    # -- objects

    def apply(self, image: ImageEntry, changes: Changes, *, version: str | None = None) -> Applied:
        """Add, replace and remove objects: all of it, read back and verified, or nothing.

        Parameters
        ----------
        image : ImageEntry
            The image.
        changes : Changes
            What to do.
        version : str, optional
            What the changes were thought out for, from `ImageState`; by default what was last read.

        Returns
        -------
        Applied
            What was done, counted from the file read back.

        Raises
        ------
        ImageNotFoundError
            If the project has no such image.
        AnnotationError
            If an object to replace or remove is not there, or one to add is.
        ProjectChangedError
            If the image's data has another version by now.
        ProjectLockedError
            If another darefine process is writing.
        ProjectWriteError
            If the write failed; the former state stands.
        """
        with paused_garbage_collection(), self._writing(image) as path:
            self._check_version(image, version)
            # What was read before is about to change, and takes more memory than the write.
            self._last = None
            before = self._opened_data(image)
            if changes.is_empty:
                return Applied(added=0, replaced=0, removed=0, num_objects=before.num_objects, backup=None)
            warnings = (*staging.qupath_warnings(path, image.path), *self._project_warnings())
            classes = self._classes_for(changes, before)
            content, verify = self._edited(image, before, changes, {known.name: known.color for known in classes})
            del before  # its nodes are changed and used up
            after, backup = self._store(image.id, content, verify, classes, is_kept=changes.touches_objects)
        return Applied(
            added=len(changes.add),
            replaced=len(changes.replace),
            removed=len(changes.remove),
            num_objects=after.num_objects,
            backup=backup,
            warnings=warnings,
            digest=self._digest(image),
        )

    def _check_version(self, image: ImageEntry, version: str | None) -> None:
        """Make sure that the image's data is what changes were thought out for, or else what was last read."""
        if version is None and image.id in self._stamps:
            version = self._digest(image) or ""
        path = self._data_file(image.id)
        if version is None or version == (staging.read_stamped(path)[1].digest if path.is_file() else ""):
            return
        raise ProjectChangedError(
            f"{path} changed since it was read (QuPath or another program saved it); nothing was written, run it again"
        )

    def _edited(
        self,
        image: ImageEntry,
        before: Document,
        changes: Changes,
        colors: Mapping[str, Color],
    ) -> tuple[bytes, _Verify]:
        """Make the new ``data.qpdata``, and what compares it; `colors` are those of the project's classes."""
        path, former = self._data_file(image.id), before.data
        content, touched = edit_document(before, changes, colors)
        # What was made is compared with the former file as it is, not with the nodes that the edit changed.
        return content, lambda after: verify_edit(Document(former, path=path), changes, touched, after, path=path)

    def backups(self, image: ImageEntry) -> tuple[staging.Backup, ...]:
        """Former states of an image's objects, newest first."""
        self._check_known(image)
        return staging.without_present(staging.backups_of(self.folder, image.id), self._data_file(image.id))

    def restore(self, image: ImageEntry, backup: staging.Backup) -> Applied:
        """Bring back a former state of an image's objects; the present one is kept as a backup.

        Parameters
        ----------
        image : ImageEntry
            The image.
        backup : Backup
            One of `backups`.

        Returns
        -------
        Applied
            With the backup of the state that was replaced.

        Raises
        ------
        ProjectFormatError
            If the backup is damaged.
        ProjectChangedError, ProjectLockedError, ProjectWriteError
            As for `apply`.
        """
        with self._writing(image) as path:
            content = staging.read_stamped(backup.path)[0]
            restored = {record.id for record in read_image_data(content, path=backup.path).objects}
            self._last = None
            kept: set[UUID] = set()
            if path.is_file():
                with contextlib.suppress(ProjectFormatError):  # restoring is what one does when the file is damaged
                    kept = {item.id for item in self._opened_data(image).found[1:]}
            warnings = staging.qupath_warnings(path, image.path)
            after, former = self._store(image.id, content, lambda _: None, None)
        return Applied(
            added=len(restored - kept),
            replaced=0,
            removed=len(kept - restored),
            num_objects=after.num_objects,
            backup=former,
            warnings=warnings,
            digest=self._digest(image),
        )

    def take_back(self, image: ImageEntry, *, digest: str, backup: Path) -> Applied | None:
        """Bring the backup of a write back, byte for byte, if nothing else was written since."""
        kept = next((known for known in self.backups(image) if known.path == backup), None)
        if kept is None or not self._has_data(image.id):
            return None
        stamp = staging.read_stamped(self._data_file(image.id))[1]
        return self.restore(image, kept) if stamp.digest == digest else None

    def _digest(self, image: ImageEntry) -> str | None:
        stamp = self._stamps[image.id]
        return None if stamp is None else stamp.digest

    @contextlib.contextmanager
    def _writing(self, image: ImageEntry) -> Iterator[Path]:
        self._check_known(image)
        path = self._data_file(image.id)
        with staging.write_lock(self.folder):
            staging.remove_leftovers(self.folder, self._classes_file.parent, path.parent)
            staging.drop_copy_of_present(self.folder, image.id, path)
            yield path

    def _store(
        self,
        entry_id: str,
        content: bytes,
        verify: _Verify,
        classes: Sequence[PathClass] | None,
        *,
        is_kept: bool = True,
    ) -> tuple[Document, Path | None]:
        """Replace an image's data, its summary and the class list together; give what was read back and the backup.

        Without `is_kept` there is no backup: no object changed, and a state worth keeping would go for it.
        """
        path = self._data_file(entry_id)
        basis = self._stamps.get(entry_id) if path.is_file() else None
        with staging.Batch(self.folder) as batch:
            if classes is not None:
                self._stage_classes(batch, classes)
            backup = staging.backup_path(self.folder, entry_id) if is_kept and path.is_file() else None
            after = _read_back(batch.stage(path, content, backup=backup), content, path)
            verify(after)
            summary = summarize(after, size=self._size_of(entry_id), timestamp_ms=_now_ms())
            batch.stage(path.with_name("summary.json"), qpproj.json_bytes(summary, pretty=False), like=path)
            staging.check_unchanged(path, basis)
            batch.commit()
        staging.prune_backups(self.folder, entry_id)
        self._stamps[entry_id] = staging.read_stamped(path)[1]
        del self._entries[int(entry_id)]  # its image type may be another
        self._images = None
        return after, backup

    def _size_of(self, entry_id: str) -> Size | None:
        image = self._known_entry(self._records[entry_id])
        return None if image.width is None or image.height is None else Size(image.width, image.height)

    def _first_data(self, record: qpproj.EntryRecord, image_type: str) -> bytes:
        """Make the ``data.qpdata`` of an image that was just added."""
        return self._blank(record, image_type)

    def _blank(self, record: qpproj.EntryRecord, image_type: str) -> bytes:
        """Make the data of an image without objects, as QuPath would save it first."""
        return create_image_data(
            image_type=image_type,
            server=record.builder,
            entry_id=f"{self.path}::{record.id}",
            version=self.version,
        )

    def _record(self, image: ImageEntry) -> qpproj.EntryRecord:
        return self._records[image.id]

    def _project_warnings(self) -> tuple[str, ...]:
        if staging.read_stamped(self.path)[1].digest == self._stamp.digest:
            return ()
        return (f"{self.path.name} was saved by another program while this one ran: QuPath may have the project open",)

    # -- classes

    def set_classes(self, classes: Sequence[PathClass]) -> None:
        """Write the class list.

        Raises
        ------
        ClassMapError
            If a class is named twice.
        ProjectChangedError
            If the list changed since it was read.
        """
        names = [path_class.name for path_class in classes]
        if len(set(names)) != len(names) or not all(names):
            raise ClassMapError(f"Class names must be there and differ, got {names}")
        with staging.write_lock(self.folder), staging.Batch(self.folder) as batch:
            staging.remove_leftovers(self.folder, self._classes_file.parent)
            if self._classes_read:
                staging.check_unchanged(self._classes_file, self._classes_stamp)
            self._stage_classes(batch, classes)
            batch.commit()
        self._classes_read = False

    def _stage_classes(self, batch: staging.Batch, classes: Sequence[PathClass]) -> None:
        former, _ = self._stored_classes()
        content = qpproj.classes_json(classes, former, self._classes_file)
        if content != former and (classes or former is not None):
            batch.stage(self._classes_file, content)

    def _classes_for(self, changes: Changes, data: Document) -> tuple[PathClass, ...]:
        """Return the class list with the classes that new objects bring, in the colours they already have."""
        former, _ = self._stored_classes()
        listed = () if former is None else qpproj.parse_classes(former, self._classes_file)
        names = dict.fromkeys(record.path_class for record in (*changes.add, *changes.replace))
        known = {**changes.class_colors, **data.colors}
        more = [PathClass(name, known.get(name, default_color(name))) for name in names if name is not None]
        return qpproj.merged_classes(listed, more)

    # -- images

    def add_image(
        self,
        path: Path,
        *,
        name: str | None = None,
        mpp: float | None = None,
        metadata: Mapping[str, str] | None = None,
        image_type: str = "BRIGHTFIELD_H_E",
    ) -> ImageEntry:
        """Add an image file with thumbnail and server metadata.

        The image type is kept where QuPath keeps it, in a ``data.qpdata`` (without objects); for ``"UNSET"`` there is
        none, and QuPath asks when the image is first opened.

        Raises
        ------
        SlideError
            If the image is not there or cannot be read.
        ConfigError
            If an argument makes no sense.
        """
        _check_image_arguments(mpp, metadata or {}, image_type)
        path = Path(path).absolute()
        builder, size, small = self._opened(path, name or path.name, mpp)
        with self._editing() as (document, batch):
            version = qpproj.version_of(document)
            record = qpproj.EntryRecord(
                id=self._next_id(document),
                name=name or path.name,
                description=None,
                metadata=dict(metadata or {}),
                builder=builder,
            )
            document.setdefault("images", []).append(qpproj.entry_json(record, version=version))
            document["lastID"] = record.id
            # The project file comes first: an entry without its data is what QuPath makes too, data without an entry
            # would be taken for that of the next image.
            self._stage_project(batch, document)
            folder = self._data_file(str(record.id)).parent
            batch.stage(folder / "thumbnail.jpg", small)
            batch.stage(folder / "server.json", qpproj.server_json(builder, version=version))
            if image_type != _UNSET:
                self._stage_blank(batch, record, size, image_type)
            batch.commit()
        self._load()
        return self.image(str(record.id))

    def _opened(self, path: Path, name: str, mpp: float | None) -> tuple[qpproj.JsonObject, Size, bytes]:
        """Open an image file to be added: its server builder, level-0 size and thumbnail."""
        from darefine_qupath.project import imagefile  # noqa: PLC0415

        found, small = imagefile.probe(path), imagefile.thumbnail(path)
        return _builder(path, name, found, mpp, self.version), found.size, small

    def _stage_blank(self, batch: staging.Batch, record: qpproj.EntryRecord, size: Size, image_type: str) -> None:
        path = self._data_file(str(record.id))
        content = self._first_data(record, image_type)
        data = _read_back(batch.stage(path, content), content, path)
        summary = summarize(data, size=size, timestamp_ms=_now_ms())
        batch.stage(path.with_name("summary.json"), qpproj.json_bytes(summary, pretty=False))

    def remove_image(self, image: ImageEntry, *, delete_data: bool = False) -> None:
        """Take an image out of the project.

        Its data folder stays, as in QuPath; with `delete_data` it is moved to ``darefine/backups/<entry id>/``, so
        that nothing is lost for good.
        """
        with self._editing() as (document, batch):
            document["images"].remove(self._raw_entry(document, image))
            document["lastID"] = max(_last_id(document), int(image.id))
            self._stage_project(batch, document)
            batch.commit()
            data = self._data_file(image.id).parent
            if delete_data and data.is_dir():
                _move_folder(data, staging.backup_path(self.folder, image.id).with_suffix(""))
        self._stamps.pop(image.id, None)
        self._load()

    def set_metadata(self, image: ImageEntry, metadata: Mapping[str, str]) -> ImageEntry:
        """Replace the project metadata of an image.

        Raises
        ------
        ProjectChangedError
            If the image is no longer in the project.
        ConfigError
            If a key or a value is not text.
        """
        _check_image_arguments(None, metadata, _UNSET)
        with self._editing() as (document, batch):
            self._raw_entry(document, image)["metadata"] = dict(metadata)
            self._stage_project(batch, document)
            batch.commit()
        self._load()
        return self.image(image.id)

    def add_metadata(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Set keys of the project metadata of images, all with one write; other keys stay as they are.

        Raises
        ------
        ProjectChangedError
            If one of the images is no longer in the project; nothing was written.
        ConfigError
            If a key or a value is not text.
        """
        for values in metadata.values():
            _check_image_arguments(None, values, _UNSET)
        if not metadata:
            return
        with self._editing() as (document, batch):
            records = qpproj.entry_records(document, self.path)
            entries = {str(record.id): entry for record, entry in zip(records, document["images"], strict=True)}
            for entry_id, values in metadata.items():
                if entry_id not in entries:
                    raise ProjectChangedError(f"Entry {entry_id} was taken out of {self.path} meanwhile")
                entries[entry_id]["metadata"] = {**(entries[entry_id].get("metadata") or {}), **values}
            self._stage_project(batch, document)
            batch.commit()
        self._load()

    @contextlib.contextmanager
    def _editing(self) -> Iterator[tuple[qpproj.JsonObject, staging.Batch]]:
        """Give the project file as it is now, not as it was when opened: what others wrote meanwhile stays."""
        with staging.write_lock(self.folder), staging.Batch(self.folder) as batch:
            staging.remove_leftovers(self.folder)
            yield qpproj.parse_project(staging.read_stamped(self.path, qpproj.LIMITS)[0], self.path), batch

    def _raw_entry(self, document: qpproj.JsonObject, image: ImageEntry) -> qpproj.JsonObject:
        self._check_known(image)
        records = qpproj.entry_records(document, self.path)
        for entry, record in zip(document["images"], records, strict=True):
            if str(record.id) == image.id:
                found: qpproj.JsonObject = entry
                return found
        raise ProjectChangedError(f"{image.name!r} (entry {image.id}) was taken out of {self.path} meanwhile")

    def _stage_project(self, batch: staging.Batch, document: qpproj.JsonObject) -> None:
        former = staging.read_stamped(self.path, qpproj.LIMITS)[0]
        batch.stage(self.path.with_name(f"{self.path.name}.backup"), former, like=self.path)
        batch.stage(self.path, qpproj.json_bytes(self._at_home(document)))

    def _at_home(self, document: qpproj.JsonObject) -> qpproj.JsonObject:
        """Rewrite the URIs of a moved project as QuPath does, but only when every image was found.

        Until then the former place in ``uri`` is what leads to the images that are still missing.
        """
        stored = document.get("uri")
        if not isinstance(stored, str) or uris.local_path(stored) == self.path:
            return document
        entries = []
        for entry, record in zip(document["images"], qpproj.entry_records(document, self.path), strict=True):
            stored = qpproj.server_of(record.builder).uri
            uri, path, exists = self._resolved(stored)
            builder = record.builder if uri is None else qpproj.with_uri(record.builder, uri)
            if (path is not None and not exists) or (uri != stored and builder is record.builder):
                return document
            entries.append(entry | {"serverBuilder": builder})
        return document | {"uri": uris.file_uri(self.path), "images": entries}

    def _next_id(self, document: qpproj.JsonObject) -> int:
        number = _last_id(document) + 1
        while (folder := self._data_file(str(number)).parent).exists():
            staging.remove_leftovers(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            number += 1
        return number


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _last_id(document: Mapping[str, object]) -> int:
    last, images = document.get("lastID"), document.get("images")
    ids = [int(entry["entryID"]) for entry in images] if isinstance(images, list) else []
    return max([0, *ids, last if isinstance(last, int) and last < qpproj.NO_ID else 0])


def _move_folder(folder: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    except OSError as error:
        raise ProjectWriteError(
            f"The image was taken out of the project, but its data could not be moved: {folder}: {error.strerror}"
        ) from error


def _check_image_arguments(mpp: float | None, metadata: Mapping[str, str], image_type: str) -> None:
    if image_type not in _IMAGE_TYPES:
        raise ConfigError(f"Image type {image_type!r} is not one of {list(_IMAGE_TYPES)}")
    if mpp is not None and not 0 < mpp < math.inf:
        raise ConfigError(f"mpp must be a positive number of micrometres per pixel, got {mpp}")
    for item in metadata.items():
        if not all(isinstance(text, str) for text in item):
            raise ConfigError(f"Image metadata is text, got {item[0]!r}: {item[1]!r}")


def _builder(path: Path, name: str, found: ImageFile, mpp: float | None, version: str) -> qpproj.JsonObject:
    metadata = None
    if found.is_rgb:
        metadata = qpproj.image_metadata(
            name=name,
            levels=found.levels,
            tile=found.tile,
            mpp=found.pixel_size if mpp is None else (mpp, mpp),
            magnification=found.magnification,
            has_timepoints=found.provider == qpproj.IMAGEJ and qpproj.is_since(version, 0, 6),
        )
    elif mpp is not None and found.is_readable:
        _log.warning(
            "%s: the project cannot hold the pixel size of %s um of a file of this kind; set it in QuPath, or give "
            "--mpp each time",
            path,
            mpp,
        )
    elif mpp is not None:
        raise ProjectUnsupportedError(
            f"{path} is not an 8-bit RGB image: its pixel size cannot be set here; set it in QuPath"
        )
    return qpproj.server_builder(uris.file_uri(path), provider=found.provider, args=found.args, metadata=metadata)


def _read_back(staged: Path, content: bytes, path: Path) -> Document:
    """Open what was staged for `path`."""
    try:
        if staging.read_stamped(staged)[0] != content:
            raise ProjectWriteError(f"{staged} did not come back as it was written; nothing was changed")
        return Document(content, path=path)
    except ProjectFormatError as error:
        raise ProjectWriteError(f"What was written cannot be read back, nothing was changed: {error}") from error
