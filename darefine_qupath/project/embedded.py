"""Write a QuPath project's own files without Java or QuPath: the embedded engine."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from darefine_qupath.classes import Color, PathClass, default_color
from darefine_qupath.errors import (
    ClassMapError,
    ConfigError,
    ProjectChangedError,
    ProjectFormatError,
    ProjectWriteError,
)
from darefine_qupath.geometry import Size
from darefine_qupath.javaserial.nodes import paused_garbage_collection
from darefine_qupath.project import (
    backups,
    class_list,
    lenient_json,
    qpproj,
    running_qupath,
    servers,
    staging,
    uris,
)
from darefine_qupath.project.backups import Backup
from darefine_qupath.project.interface import Applied, Changes, Engine, ImageEntry
from darefine_qupath.project.project_reader import IMAGE_TYPES, PROJECT_FILE, UNSET, ProjectReader
from darefine_qupath.project.qpdata.create import create_image_data
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.read import read_image_data
from darefine_qupath.project.qpdata.summary import summarize
from darefine_qupath.project.qpdata.verify import verify_edit

if TYPE_CHECKING:
    from typing_extensions import Self


__all__ = ["EmbeddedProject"]

_log = logging.getLogger(__name__)

_Verify = Callable[[Document], None]
"""Compares what was read back with what should be there; raises `ProjectWriteError`."""


class EmbeddedProject(ProjectReader):
    """A QuPath project, without QuPath; made and opened as `ProjectReader` says.

    Opening and reading never write. Every write holds the project's lock, is read back and compared before it takes
    the place of the former file, and keeps that file as a backup.
    """

    engine: Engine = "embedded"

    @classmethod
    def create(cls, path: Path, classes: Sequence[PathClass] = ()) -> Self:
        """Make a project without images in a folder, or of the name of a ``.qpproj`` file.

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
        with staging.StagedFiles(path.parent) as batch:
            if classes:
                target = path.parent / "classifiers" / "classes.json"
                batch.stage(target, class_list.classes_json(classes, None, target))
            batch.stage(path.parent / "data" / "metadata.json", b"{}")
            batch.stage(path, lenient_json.json_bytes(document))
            batch.commit()
        return cls(path)

    @classmethod
    def _new_version(cls) -> str:
        """QuPath version in whose form a new project is written."""
        return qpproj.NEW_PROJECT_VERSION

    def _opened_data(self, image: ImageEntry) -> Document:
        """Open the objects of an image to be edited; those of an image that has none yet as QuPath would save them."""
        path = self._data_file(image.id)
        if not self._has_data(image.id):
            return Document(self._blank(self._records[image.id], image.image_type), path=path)
        data, self._stamps[image.id] = staging.read_with_version(path)
        return Document(data, path=path)

    def apply(self, image: ImageEntry, changes: Changes, *, version: str | None = None) -> Applied:
        """Add, replace and remove objects: all of it, read back and verified, or nothing."""
        with paused_garbage_collection(), self._writing(image) as path:
            self._check_version(image, version)
            # What was read before is about to change, and takes more memory than the write.
            self._last = None
            before = self._opened_data(image)
            if changes.is_empty:
                return Applied(added=0, replaced=0, removed=0, num_objects=before.num_objects, backup=None)
            warnings = (*running_qupath.qupath_warnings(path, image.path), *self._project_warnings())
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
        if version is None or version == (staging.read_with_version(path)[1].digest if path.is_file() else ""):
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

    def backups(self, image: ImageEntry) -> tuple[Backup, ...]:
        """Former states of an image's objects, newest first."""
        self._check_known(image)
        return backups.without_present(backups.backups_of(self.folder, image.id), self._data_file(image.id))

    def restore(self, image: ImageEntry, backup: Backup) -> Applied:
        """Bring back a former state of an image's objects, one of `backups`; the present one is kept as a backup.

        Raises
        ------
        ProjectFormatError
            If the backup is damaged.
        """
        with self._writing(image) as path:
            content = staging.read_with_version(backup.path)[0]
            restored = {record.id for record in read_image_data(content, path=backup.path).objects}
            self._last = None
            kept: set[UUID] = set()
            if path.is_file():
                with contextlib.suppress(ProjectFormatError):  # restoring is what one does when the file is damaged
                    kept = {item.id for item in self._opened_data(image).objects[1:]}
            warnings = running_qupath.qupath_warnings(path, image.path)
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
        stamp = staging.read_with_version(self._data_file(image.id))[1]
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
            backups.drop_copy_of_present(self.folder, image.id, path)
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
        with staging.StagedFiles(self.folder) as batch:
            if classes is not None:
                self._stage_classes(batch, classes)
            backup = backups.backup_path(self.folder, entry_id) if is_kept and path.is_file() else None
            after = _read_back(batch.stage(path, content, backup=backup), content, path)
            verify(after)
            summary = summarize(after, size=self._size_of(entry_id), timestamp_ms=_now_ms())
            batch.stage(path.with_name("summary.json"), lenient_json.json_bytes(summary, pretty=False), like=path)
            staging.check_unchanged(path, basis)
            batch.commit()
        backups.prune_backups(self.folder, entry_id)
        self._stamps[entry_id] = staging.read_with_version(path)[1]
        del self._entries[int(entry_id)]  # its image type may be another
        self._images = None
        return after, backup

    def _size_of(self, entry_id: str) -> Size | None:
        return self._known_entry(self._records[entry_id]).size

    def _first_data(self, record: qpproj.EntryRecord, image_type: str) -> bytes:
        """Make the ``data.qpdata`` of an image that is added."""
        return self._blank(record, image_type)

    def _blank(self, record: qpproj.EntryRecord, image_type: str) -> bytes:
        """Make the ``data.qpdata`` of an image without objects, as QuPath would save it first."""
        return create_image_data(
            image_type=image_type,
            server=record.builder,
            entry_id=f"{self.path}::{record.id}",
            version=self.version,
        )

    def _project_warnings(self) -> tuple[str, ...]:
        if staging.read_with_version(self.path)[1].digest == self._stamp.digest:
            return ()
        return (f"{self.path.name} was saved by another program while this one ran: QuPath may have the project open",)

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
        with staging.write_lock(self.folder), staging.StagedFiles(self.folder) as batch:
            staging.remove_leftovers(self.folder, self._classes_file.parent)
            if self._classes_read:
                staging.check_unchanged(self._classes_file, self._classes_stamp)
            self._stage_classes(batch, classes)
            batch.commit()
        self._classes_read = False

    def _stage_classes(self, batch: staging.StagedFiles, classes: Sequence[PathClass]) -> None:
        former, _ = self._stored_classes()
        content = class_list.classes_json(classes, former, self._classes_file)
        if content != former and (classes or former is not None):
            batch.stage(self._classes_file, content)

    def _classes_for(self, changes: Changes, data: Document) -> tuple[PathClass, ...]:
        """Return the class list with the classes that new objects bring, in the colours they already have."""
        former, _ = self._stored_classes()
        listed = () if former is None else class_list.parse_classes(former, self._classes_file)
        names = dict.fromkeys(record.path_class for record in (*changes.add, *changes.replace))
        known = {**changes.class_colors, **data.colors}
        more = [PathClass(name, known.get(name, default_color(name))) for name in names if name is not None]
        return class_list.merged_classes(listed, more)

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
            batch.stage(folder / "server.json", servers.server_json(builder, version=version))
            if image_type != UNSET:
                self._stage_blank(batch, record, size, image_type)
            batch.commit()
        self._load()
        return self.image(str(record.id))

    def _opened(self, path: Path, name: str, mpp: float | None) -> tuple[lenient_json.JsonObject, Size, bytes]:
        """Open an image file to be added: its server builder, level-0 size and thumbnail."""
        from darefine_qupath.project import imagefile  # noqa: PLC0415

        found, small = imagefile.probe(path), imagefile.thumbnail(path)
        return imagefile.builder_of(path, name, found, mpp, self.version), found.size, small

    def _stage_blank(self, batch: staging.StagedFiles, record: qpproj.EntryRecord, size: Size, image_type: str) -> None:
        path = self._data_file(str(record.id))
        content = self._first_data(record, image_type)
        data = _read_back(batch.stage(path, content), content, path)
        summary = summarize(data, size=size, timestamp_ms=_now_ms())
        batch.stage(path.with_name("summary.json"), lenient_json.json_bytes(summary, pretty=False))

    def add_metadata(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Set keys of the project metadata of images, all with one write; other keys stay as they are."""
        for values in metadata.values():
            _check_image_arguments(None, values, UNSET)
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
    def _editing(self) -> Iterator[tuple[lenient_json.JsonObject, staging.StagedFiles]]:
        """Give the project file as it is now, not as it was when opened: what others wrote meanwhile stays."""
        with staging.write_lock(self.folder), staging.StagedFiles(self.folder) as batch:
            staging.remove_leftovers(self.folder)
            yield qpproj.parse_project(staging.read_with_version(self.path, lenient_json.LIMITS)[0], self.path), batch

    def _stage_project(self, batch: staging.StagedFiles, document: lenient_json.JsonObject) -> None:
        former = staging.read_with_version(self.path, lenient_json.LIMITS)[0]
        batch.stage(self.path.with_name(f"{self.path.name}.backup"), former, like=self.path)
        batch.stage(self.path, lenient_json.json_bytes(self._at_home(document)))

    def _at_home(self, document: lenient_json.JsonObject) -> lenient_json.JsonObject:
        """Rewrite the URIs of a moved project as QuPath does, but only when every image was found.

        Until then the former place in ``uri`` is what leads to the images that are still missing.
        """
        stored = document.get("uri")
        if not isinstance(stored, str) or uris.local_path(stored) == self.path:
            return document
        entries = []
        for entry, record in zip(document["images"], qpproj.entry_records(document, self.path), strict=True):
            stored = servers.server_of(record.builder).uri
            uri, path, exists = self._resolved(stored)
            builder = record.builder if uri is None else servers.with_uri(record.builder, uri)
            if (path is not None and not exists) or (uri != stored and builder is record.builder):
                return document
            entries.append(entry | {"serverBuilder": builder})
        return document | {"uri": uris.file_uri(self.path), "images": entries}

    def _next_id(self, document: lenient_json.JsonObject) -> int:
        number = _last_id(document) + 1
        while (folder := self._data_file(str(number)).parent).exists():
            staging.remove_leftovers(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            number += 1
        return number


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _last_id(document: Mapping[str, object]) -> int:
    last, images = document.get("lastID"), document.get("images")
    ids = [int(entry["entryID"]) for entry in images] if isinstance(images, list) else []
    return max([0, *ids, last if isinstance(last, int) and last < qpproj.NO_ID else 0])


def _check_image_arguments(mpp: float | None, metadata: Mapping[str, str], image_type: str) -> None:
    if image_type not in IMAGE_TYPES:
        raise ConfigError(f"Image type {image_type!r} is not one of {list(IMAGE_TYPES)}")
    if mpp is not None and not 0 < mpp < math.inf:
        raise ConfigError(f"mpp must be a positive number of micrometres per pixel, got {mpp}")
    for item in metadata.items():
        if not all(isinstance(text, str) for text in item):
            raise ConfigError(f"Image metadata is text, got {item[0]!r}: {item[1]!r}")


def _read_back(staged: Path, content: bytes, path: Path) -> Document:
    """Open what was staged for `path`."""
    try:
        if staging.read_with_version(staged)[0] != content:
            raise ProjectWriteError(f"{staged} did not come back as it was written; nothing was changed")
        return Document(content, path=path)
    except ProjectFormatError as error:
        raise ProjectWriteError(f"What was written cannot be read back, nothing was changed: {error}") from error
