"""The paquo engine: objects written by a real QuPath, through paquo. The only module that imports paquo or jpype.

A project's files are read as the embedded engine reads them, and every write is staged, verified and backed up as
there; what goes into ``data.qpdata`` is made by QuPath. So importing this module, opening a project and reading it
start no Java. It starts with the first write (`start_qupath`), with a bounded heap, and stays until the process ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.classes import Color, default_color
from darefine_qupath.errors import (
    EngineError,
    ProjectUnsupportedError,
    ProjectWriteError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
)
from darefine_qupath.geometry import Size
from darefine_qupath.project import qpproj, uris
from darefine_qupath.project.embedded import EmbeddedProject
from darefine_qupath.project.interface import Changes, ImageEntry
from darefine_qupath.project.qpdata.build import signed
from darefine_qupath.project.qpdata.compare import same_geometry, same_numbers
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.items import Stains
from darefine_qupath.project.qpdata.read import ImageData, read_image_data
from darefine_qupath.project.qpdata.roi_specs import specs_of
from darefine_qupath.project.qpdata.schema import ROI_KINDS
from darefine_qupath.project.qpdata.stored import expected_objects, stored_record
from darefine_qupath.project.qpdata.verify import verify_objects

__all__ = ["DEFAULT_HEAP", "PaquoProject", "find_qupath", "start_qupath"]

_log = logging.getLogger(__name__)

DEFAULT_HEAP = "-Xmx2g"
"""Java heap unless ``PAQUO_JAVA_OPTS`` (or ``java_opts`` in ``.paquo.toml``) says otherwise."""

_HEAP_OPTIONS = ("-Xmx", "-XX:MaxRAMPercentage", "-XX:MaxRAMFraction", "-XX:MaxHeapSize", "-mx")
_PAQUO_DEFAULTS = ["-XX:MaxRAMPercentage=50"]
_OLDEST = (0, 4)
_GET_QUPATH = "run `paquo get_qupath --install-path FOLDER` and set PAQUO_QUPATH_DIR to what it prints"
_ENTRY_ID = "PROJECT_ENTRY_ID"
_ROI_MAKERS = {"Rectangle": "createRectangleROI", "Ellipse": "createEllipseROI", "Line": "createLineROI"}
_POINT_MAKERS = {"Polygon": "createPolygonROI", "Polyline": "createPolylineROI", "Points": "createPointsROI"}

# -- the JVM

_pid = os.getpid()
_starting = threading.Lock()
_version: str | None = None


def _settings() -> dict[str, Any]:
    import paquo._config  # noqa: PLC0415 - it takes longer to load than most projects to read

    return dict(paquo._config.to_kwargs(paquo._config.settings))


def _find(settings: Mapping[str, Any]) -> Any:  # noqa: ANN401 - paquo's record of the places
    """Where QuPath and its Java are, or None."""
    from paquo import jpype_backend  # noqa: PLC0415

    try:
        # paquo appends to the options that it is given.
        return jpype_backend.find_qupath(**{**settings, "java_opts": []})
    except (ValueError, OSError) as error:
        if settings.get("qupath_dir"):
            _log.warning("There is no QuPath that paquo can use in PAQUO_QUPATH_DIR=%s", settings["qupath_dir"])
        else:
            _log.debug("paquo finds no QuPath: %s", error)
        return None


def find_qupath() -> Path | None:
    """Folder of the QuPath that paquo would use; starts no Java.

    Returns
    -------
    Path or None
        What ``PAQUO_QUPATH_DIR`` names, or one of paquo's search folders has; None when there is none.
    """
    found = _find(_settings())
    if found is None:
        return None
    app = Path(found.app_dir).absolute()
    return app.parent if sys.platform == "win32" else app.parent.parent


def _java_options(settings: Mapping[str, Any], runtime: Path) -> list[str]:
    """Options for the JVM: the user's, with a bounded heap, nothing of Java's own on standard output, no window."""
    given = settings.get("java_opts") or []
    options = shlex.split(given) if isinstance(given, str) else [str(option) for option in given]
    if "PAQUO_JAVA_OPTS" not in os.environ and options == _PAQUO_DEFAULTS:
        options = []  # half of the machine
    if not any(option.startswith(_HEAP_OPTIONS) for option in options):
        options.append(DEFAULT_HEAP)
    # -Xrs leaves Ctrl-C to Python.
    options += ["-XX:+DisplayVMOutputToStderr", "-Djava.awt.headless=true", "-Xrs"]
    if _java_release(runtime) >= 24:
        options.append("--enable-native-access=ALL-UNNAMED")
    return options


def _java_release(runtime: Path) -> int:
    try:
        found = re.search(r'JAVA_VERSION="(\d+)', (runtime / "release").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def start_qupath() -> str:
    """Start QuPath's Java in this process, unless it runs already.

    Returns
    -------
    str
        QuPath's version.

    Raises
    ------
    EngineError
        If there is no QuPath, it does not start, it is too old, or this process was forked from one that had loaded
        this module: a JVM does not survive a fork.
    """
    global _version
    if os.getpid() != _pid:
        raise EngineError(
            "QuPath cannot run in a forked process; write projects in the main process, or start the worker with the "
            "multiprocessing method 'spawn'"
        )
    with _starting:
        if _version is None:
            _version = _start()
    return _version


def _start() -> str:
    try:
        import jpype  # noqa: PLC0415
        from paquo import jpype_backend  # noqa: PLC0415
    except ImportError as error:
        raise EngineError(f"paquo cannot be loaded ({error}); `pip install paquo`, then {_GET_QUPATH}") from None
    settings = _settings()
    found = _find(settings)
    if found is None:
        raise EngineError(f"paquo finds no QuPath; {_GET_QUPATH}")
    if not jpype.isJVMStarted():
        options = _java_options(settings, Path(found.runtime_dir))
        _log.info("Starting QuPath with %s", " ".join(options))
        with _own_interrupts():
            try:
                jpype_backend.start_jvm(finder_kwargs={**settings, "java_opts": options})
            except (RuntimeError, OSError, TypeError, ValueError, jpype.JException) as error:
                raise EngineError(f"QuPath's Java does not start ({_first_line(error)}); {_GET_QUPATH}") from error
    return _settle()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Keep Python's handling of Ctrl-C over the start of the JVM."""
    former = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if former is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, former)


def _settle() -> str:
    """Keep what Java prints off standard output, load what paquo needs of QuPath, and check the version."""
    import jpype  # noqa: PLC0415

    system = jpype.JClass("java.lang.System")
    system.setOut(system.err)
    try:
        import paquo.java  # noqa: PLC0415
        import paquo.projects  # noqa: PLC0415 - sets up logging
    except (ImportError, TypeError, jpype.JException) as error:
        raise EngineError(f"paquo cannot use this QuPath ({_first_line(error)}); {_GET_QUPATH}") from error
    if paquo.java.LogManager is not None:
        paquo.java.LogManager.setError()
    version = str(paquo.java.qupath_version or "unknown")
    if not qpproj.is_since(version, *_OLDEST):
        raise EngineError(f"QuPath {version} gives objects no identity; the paquo engine needs 0.4 or later")
    with contextlib.suppress(TypeError, AttributeError):
        # In QuPath itself an extension does this; until then 0.5 passes over OpenSlide when it chooses a reader.
        jpype.JClass("qupath.lib.images.servers.openslide.jna.OpenSlideLoader").tryToLoadQuietly()
    return version


def _java(name: str) -> Any:  # noqa: ANN401 - a Java class
    import jpype  # noqa: PLC0415

    return jpype.JClass(name)


@contextlib.contextmanager
def _java_errors(what: str) -> Iterator[None]:
    """Turn an exception of Java into a `ProjectWriteError`."""
    import jpype  # noqa: PLC0415

    try:
        yield
    except jpype.JException as error:
        raise ProjectWriteError(f"QuPath cannot {what}: {_first_line(error)}; nothing was changed") from error
    except TypeError as error:
        # jpype's word for a method or class that this QuPath does not have
        raise EngineError(f"QuPath {_version} cannot {what} through paquo: {_first_line(error)}") from error


# -- data


class _OpenImage:
    """An image's data in QuPath, read from bytes and written to bytes."""

    def __init__(self, content: bytes, builder: Any) -> None:  # noqa: ANN401 - of Java
        import jpype  # noqa: PLC0415
        import paquo.java  # noqa: PLC0415

        array = jpype.JArray(jpype.JByte)(np.frombuffer(content, np.int8))
        stream = _java("java.io.ByteArrayInputStream")(array)
        if qpproj.is_since(start_qupath(), 0, 6):
            self.data = paquo.java.PathIO.readImageData(stream, builder)
        else:
            image = paquo.java.BufferedImage
            self.data = paquo.java.PathIO.readImageData(stream, None, builder.build(), image)
        self.hierarchy = self.data.getHierarchy()

    def written(self) -> bytes:
        """Return the file that QuPath makes of it."""
        import paquo.java  # noqa: PLC0415

        stream = paquo.java.ByteArrayOutputStream()
        paquo.java.PathIO.writeImageData(stream, self.data)
        return bytes(memoryview(stream.toByteArray()))

    def keep_history(self, names: Sequence[str | None]) -> None:
        """Take out the steps that QuPath 0.6 and later add by merely reading an image."""
        workflow = self.data.getHistoryWorkflow()
        steps = [None if step.getName() is None else str(step.getName()) for step in workflow.getSteps()]
        wanted = list(names)
        for first in range(len(steps) - len(wanted) + 1):
            if steps[first : first + len(wanted)] == wanted:
                kept = range(first, first + len(wanted))
                for index in reversed([index for index in range(len(steps)) if index not in kept]):
                    workflow.removeStep(index)
                return

    def set_properties(self, properties: Mapping[str, str | None]) -> None:
        """Set image properties, or take them out."""
        import paquo.java  # noqa: PLC0415

        for name, value in properties.items():
            if value is None:
                self.data.removeProperty(paquo.java.String(name))
            else:
                self.data.setProperty(paquo.java.String(name), paquo.java.String(value))

    def close(self) -> None:
        """Let go of the image file."""
        if qpproj.is_since(start_qupath(), 0, 6):
            self.data.close()
        else:
            self.data.getServer().close()


def _server_builder(builder: Mapping[str, Any]) -> Any:  # noqa: ANN401 - of Java
    import paquo.java  # noqa: PLC0415

    text = paquo.java.String(json.dumps(builder, ensure_ascii=False))
    made = paquo.java.GsonTools.getInstance().fromJson(
        text, _java("qupath.lib.images.servers.ImageServerBuilder$ServerBuilder")
    )
    if made is None:
        raise ProjectWriteError("QuPath makes nothing of the image server in the project file; nothing was changed")
    return made


class _Editor:
    """Edits of one image's hierarchy; one event at the end, none per object."""

    def __init__(self, image: _OpenImage, base: ImageData, colors: Mapping[str, Color]) -> None:
        import paquo.java  # noqa: PLC0415

        self._java = paquo.java
        self._root = image.hierarchy.getRootObject()
        self._hierarchy = image.hierarchy
        self._former = {record.id: record for record in base.objects}
        # A class and its colour are the JVM's, whatever project they come from; the file's own colours stay.
        self._colors = {**colors, **base.colors}
        self._classes: dict[str, Any] = {}
        for name in base.colors:
            self._path_class(name)
        self._found = self._root.getDescendantObjects(self._java.ArrayList())
        if len(self._found) != len(base.objects):
            raise ProjectWriteError(
                f"QuPath reads {len(self._found)} of {len(base.objects)} objects in {base.path}; nothing was changed"
            )

    @cached_property
    def _objects(self) -> dict[UUID, Any]:
        """Objects that the file has, by identity; asking Java for each of them takes longer than most changes."""
        return {_id_of(item): item for item in self._found}

    def apply(self, changes: Changes) -> None:
        """Make all changes."""
        for record in changes.replace:
            self._replace(self._objects[record.id], record, self._former[record.id])
        gone = set(changes.remove)
        self._remove(gone)
        self._add(changes.add, gone)
        self._hierarchy.fireHierarchyChangedEvent(self._root)

    # -- removing

    def _remove(self, gone: set[UUID]) -> None:
        leaves: dict[UUID, list[Any]] = {}
        owners: dict[UUID, Any] = {}
        for identity in gone:
            item = self._objects[identity]
            parent = item.getParent()
            if not item.hasChildObjects():
                leaves.setdefault(_id_of(parent), []).append(item)
                owners.setdefault(_id_of(parent), parent)
        for key, items in leaves.items():
            owners[key].removeChildObjects(self._java.ArrayList(items))
        inner = [identity for identity in gone if self._objects[identity].getParent() is not None]
        for owner in {_id_of(owner): owner for owner in (self._owner(identity, gone) for identity in inner)}.values():
            children = self._kept_children(owner, gone)
            owner.clearChildObjects()
            owner.addChildObjects(self._java.ArrayList(children))

    def _owner(self, identity: UUID, gone: set[UUID]) -> Any:  # noqa: ANN401
        """Nearest object above that stays."""
        above = self._objects[identity].getParent()
        while _id_of(above) in gone:
            above = above.getParent()
        return above

    def _kept_children(self, owner: Any, gone: set[UUID]) -> list[Any]:  # noqa: ANN401
        kept = []
        pending = list(reversed(list(owner.getChildObjects())))
        while pending:
            child = pending.pop()
            if _id_of(child) in gone:
                pending.extend(reversed(list(child.getChildObjects())))
            else:
                kept.append(child)
        return kept

    # -- adding

    def _add(self, records: Sequence[Annotation], gone: set[UUID]) -> None:
        new = {record.id: self._new(record) for record in records}
        below: dict[UUID | None, list[Any]] = {}
        for record in records:
            below.setdefault(self._standing(record.parent, gone), []).append(new[record.id])
        for key, items in below.items():
            owner = self._root if key is None else new.get(key) or self._objects[key]
            owner.addChildObjects(self._java.ArrayList(items))

    def _standing(self, parent: UUID | None, gone: set[UUID]) -> UUID | None:
        """Identity of the object that a new one stands below; in place of one that is removed, the next one above."""
        while parent in gone:
            parent = self._former[parent].parent
        return None if parent is None or parent == _id_of(self._root) else parent

    def _new(self, record: Annotation) -> Any:  # noqa: ANN401
        roi = self._roi(record.geometry, record.roi, record.plane)
        path_class = self._path_class(record.path_class)
        make = self._java.PathObjects
        if record.kind == "cell":
            item = make.createCellObject(roi, self._roi(record.nucleus, None, record.plane), path_class, None)
        elif record.kind == "tile":
            item = make.createTileObject(roi, path_class, None)
        elif record.kind == "detection":
            item = make.createDetectionObject(roi, path_class, None)
        else:
            item = make.createAnnotationObject(roi, path_class, None)
        item.setID(_java("java.util.UUID").fromString(str(record.id)))
        self._set_class(item, record)
        item.setLocked(record.locked)
        if record.name is not None:
            item.setName(self._java.String(record.name))
        if record.metadata:
            self._set_metadata(item, record.metadata)
        if record.measurements:
            self._set_measurements(item, record.measurements)
        return item

    # -- replacing

    def _replace(self, item: Any, record: Annotation, former: Annotation) -> None:  # noqa: ANN401
        """Set what differs; the rest stays to the bit."""
        stored = stored_record(record, former)
        moved = stored.plane != former.plane or not same_geometry(stored.geometry, former.geometry)
        if moved:
            item.setROI(self._roi(record.geometry, record.roi, record.plane))
        if record.kind == "cell" and (moved or not same_geometry(stored.nucleus, former.nucleus)):
            _set_field(item, "nucleus", self._roi(record.nucleus, None, record.plane))
        if record.kind == "tma core":
            item.setMissing(record.is_missing)
        self._set_class(item, record)
        item.setLocked(record.locked)
        item.setName(None if record.name is None else self._java.String(record.name))
        if dict(record.metadata) != dict(former.metadata):
            self._set_metadata(item, record.metadata)
        # QuPath takes an object's measurements away when it gets another ROI.
        if (moved and record.measurements) or not same_numbers(stored.measurements, former.measurements):
            self._set_measurements(item, record.measurements)

    # -- parts of an object

    def _set_class(self, item: Any, record: Annotation) -> None:  # noqa: ANN401
        item.setPathClass(self._path_class(record.path_class), float(record.class_probability))
        # A class takes the object's own colour away, so it is set afterwards.
        color = None if record.color is None else self._java.Integer.valueOf(signed(record.color))
        item.setColor(color)

    def _path_class(self, name: str | None) -> Any:  # noqa: ANN401
        if not name:
            return None
        parts = [part.strip() for part in name.split(":")]
        full = ": ".join(parts)
        if full not in self._classes:
            above = self._path_class(": ".join(parts[:-1]))
            color = self._java.Integer.valueOf((self._colors.get(full) or default_color(full)).argb)
            made = self._java.PathClass.getInstance(above, self._java.String(parts[-1]), color)
            made.setColor(color)
            self._classes[full] = made
        return self._classes[full]

    def _set_metadata(self, item: Any, metadata: Mapping[str, str]) -> None:  # noqa: ANN401
        pairs = [(self._java.String(str(key)), self._java.String(str(value))) for key, value in metadata.items()]
        if qpproj.is_since(start_qupath(), 0, 6):
            store = item.getMetadata()
            store.clear()
            for key, value in pairs:
                store.put(key, value)
            return
        # Before, this is for QuPath's own classes only.
        _call(item, "clearMetadataMap")
        for key, value in pairs:
            _call(item, "storeMetadataValue", key, value)

    def _set_measurements(self, item: Any, measurements: Mapping[str, float]) -> None:  # noqa: ANN401
        store = item.getMeasurementList()
        store.clear()
        for name, value in measurements.items():
            store.put(self._java.String(name), float(value))
        store.close()

    def _roi(self, geometry: Any, wanted: Any, plane: Plane) -> Any:  # noqa: ANN401
        """ROI of a geometry, of the kind and with the numbers that both engines store."""
        if geometry is None:
            return None
        import jpype  # noqa: PLC0415

        (spec,) = specs_of([(geometry, wanted)])
        kind = ROI_KINDS[spec.proxy]
        place = _java("qupath.lib.regions.ImagePlane").getPlaneWithChannel(*plane)
        if kind == "Geometry":
            return self._geometry_roi(spec.arrays["wkb"], place)
        if kind in _POINT_MAKERS:
            double = jpype.JArray(jpype.JDouble)
            axes = [double(np.frombuffer(spec.arrays[axis], ">f4").astype(np.float64)) for axis in "xy"]
            return getattr(self._java.ROIs, _POINT_MAKERS[kind])(*axes, place)
        x, y, x2, y2 = (float(spec.numbers[name]) for name in ("x", "y", "x2", "y2"))
        end = (x2, y2) if kind == "Line" else (x2 - x, y2 - y)
        return getattr(self._java.ROIs, _ROI_MAKERS[kind])(x, y, *end, place)

    def _geometry_roi(self, wkb: bytes, place: Any) -> Any:  # noqa: ANN401
        import jpype  # noqa: PLC0415

        # From 0.6 on QuPath wants its own precision of 0.01 px; before, that was 32 bits, which would move vertices.
        is_modern = qpproj.is_since(start_qupath(), 0, 6)
        factory = [self._java.GeometryTools.getDefaultFactory()] if is_modern else []
        reader = self._java.WKBReader(*factory)
        geometry = reader.read(jpype.JArray(jpype.JByte)(np.frombuffer(wkb, np.int8)))
        roi = self._java.GeometryTools.geometryToROI(geometry, place)
        if isinstance(roi, self._java.GeometryROI):
            return roi
        # Asked for, though QuPath would choose a simpler kind.
        make = self._java.GeometryROI.class_.getDeclaredConstructor(
            _java("org.locationtech.jts.geom.Geometry"), _java("qupath.lib.regions.ImagePlane")
        )
        make.setAccessible(True)
        return make.newInstance(geometry, place)


def _id_of(item: Any) -> UUID:  # noqa: ANN401
    return UUID(str(item.getID().toString()))


def _declared(item: Any, find: str, name: str, *types: Any) -> Any:  # noqa: ANN401
    """Find a member of an object that is not public."""
    import jpype  # noqa: PLC0415

    java_class = item.getClass()
    while java_class is not None:
        with contextlib.suppress(jpype.JException):
            member = getattr(java_class, find)(name, *types)
            member.setAccessible(True)
            return member
        java_class = java_class.getSuperclass()
    raise EngineError(f"QuPath {_version} has no {name}; use another version or engine='embedded'")


def _call(item: Any, name: str, *arguments: Any) -> None:  # noqa: ANN401
    string = _java("java.lang.String")
    _declared(item, "getDeclaredMethod", name, *[string for _ in arguments]).invoke(item, *arguments)


def _set_field(item: Any, name: str, value: Any) -> None:  # noqa: ANN401
    _declared(item, "getDeclaredField", name).set(item, value)


# -- the engine


class PaquoProject(EmbeddedProject):
    """A QuPath project whose objects a real QuPath writes.

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

    engine = "paquo"

    @classmethod
    def _new_version(cls) -> str:
        return start_qupath()

    def _edited(
        self, image: ImageEntry, before: Document, changes: Changes, colors: Mapping[str, Color]
    ) -> tuple[bytes, Callable[[Document], None]]:
        """Let QuPath make the changes; what it may not lose is compared before anything is replaced."""
        if not changes.touches_objects:
            # A text beside the objects needs no QuPath, which would make every object anew.
            return super()._edited(image, before, changes, colors)
        start_qupath()
        base = read_image_data(before.data, path=before.path)
        edit_document(before, changes, colors)  # the same refusals as the embedded engine, before QuPath sees anything
        with _java_errors(f"save {image.name!r}"), contextlib.closing(self._open(image, base.data)) as opened:
            _Editor(opened, base, colors).apply(changes)
            opened.set_properties(changes.properties)
            opened.keep_history([step.name for step in base.workflow])
            content = opened.written()
        after = read_image_data(content, path=base.path)
        _check_rest(base, after, changes)
        verify_objects(expected_objects(base, changes), after.objects, path=self._data_file(image.id))
        # What is read back from the disk are the same bytes.
        return content, lambda _: None

    def _open(self, image: ImageEntry, content: bytes) -> _OpenImage:
        builder = _server_builder(self._record(image).builder)
        moved = _java("java.util.HashMap")()
        for stored in builder.getURIs():
            uri, path, exists = self._resolved(str(stored.toString()))
            if path is not None and not exists:
                raise ProjectWriteError(
                    f"QuPath cannot save {image.name!r} while its file {path} is missing; put it back, or use "
                    f"engine='embedded'"
                )
            moved.put(stored, _java("java.net.URI")(uri))
        opened = _OpenImage(content, builder.updateURIs(moved))
        opened.data.setProperty(_ENTRY_ID, f"{self.path}::{image.id}")
        return opened

    # -- images

    def _opened(self, path: Path, name: str, mpp: float | None) -> tuple[qpproj.JsonObject, Size, bytes]:
        if not path.is_file():
            raise SlideNotFoundError(f"There is no image {path}")
        start_qupath()
        with _java_errors(f"open {path}"):
            server = _build_server(path)
            try:
                _set_server_metadata(server, name, (mpp, mpp) if mpp else _own_pixel_size(server, path))
                return _builder_json(server), Size(int(server.getWidth()), int(server.getHeight())), _thumbnail(server)
            finally:
                server.close()

    def _first_data(self, record: qpproj.EntryRecord, image_type: str) -> bytes:
        blank = self._blank(record, image_type)
        with (
            _java_errors(f"save {record.name!r}"),
            contextlib.closing(_OpenImage(blank, _server_builder(record.builder))) as opened,
        ):
            opened.keep_history(())
            return opened.written()


class _Stains:
    """Stains, equal to those that differ by no more than QuPath 0.4 writes."""

    def __init__(self, stains: Stains | None) -> None:
        self._names = [] if stains is None else [stains.name, *(vector.name for vector in stains.vectors)]
        self._values = np.array([] if stains is None else [*(v.rgb for v in stains.vectors), stains.background])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Stains)
            and self._names == other._names
            and np.allclose(self._values, other._values, rtol=0, atol=1e-6)
        )

    __hash__ = None  # type: ignore[assignment]


def _check_rest(before: ImageData, after: ImageData, changes: Changes) -> None:
    """Make sure that QuPath kept what is not an object: it passes over what it does not know, with a log line."""

    def parts(data: ImageData) -> dict[str, object]:
        return {
            "image type": data.image_type,
            "TMA grid": data.tma_grid,
            "history": [(step.java_class, step.name, step.script) for step in data.workflow],
            "properties": {*data.properties, _ENTRY_ID},
            "stains": _Stains(data.stains),
        }

    ours, theirs = parts(before), parts(after)
    wanted = {name for name, value in changes.properties.items() if value is not None}
    ours["properties"] = ({*before.properties, _ENTRY_ID} - changes.properties.keys()) | wanted
    if any(after.properties.get(name) != value for name, value in changes.properties.items()):
        theirs["properties"] = None
    lost = [name for name, value in ours.items() if value != theirs[name]]
    if lost:
        raise ProjectWriteError(
            f"QuPath {_version} does not keep the {', '.join(lost)} of {before.path}; nothing was changed, use "
            f"engine='embedded'"
        )


def _build_server(path: Path) -> Any:  # noqa: ANN401
    """Open an image file as QuPath does."""
    import paquo.java  # noqa: PLC0415

    support = paquo.java.ImageServerProvider.getPreferredUriImageSupport(
        paquo.java.BufferedImage, paquo.java.String(uris.file_uri(path))
    )
    builders = [] if support is None else list(support.getBuilders())
    server = builders[0].build() if builders else None
    if server is None:
        raise SlideFormatError(f"QuPath cannot open {path}")
    if len(builders) > 1:
        _log.warning("%s holds %d images; the first one is added", path, len(builders))
    return server


def _own_pixel_size(server: Any, path: Path) -> tuple[float, float] | None:  # noqa: ANN401
    """Pixel size that the file gives where QuPath finds none: the OpenSlide of QuPath 0.4 passes over TIFF tags."""
    if server.getPixelCalibration().hasPixelSizeMicrons():
        return None
    from darefine_qupath.project import imagefile  # noqa: PLC0415 - few projects need it, see its load time

    with contextlib.suppress(SlideError):
        return imagefile.probe(path).pixel_size
    return None


def _set_server_metadata(server: Any, name: str, mpp: tuple[float, float] | None) -> None:  # noqa: ANN401
    metadata = _java("qupath.lib.images.servers.ImageServerMetadata$Builder")(server.getMetadata())
    metadata.name(_java("java.lang.String")(name))
    if mpp is not None:
        metadata.pixelSizeMicrons(*(_java("java.lang.Double").valueOf(float(side)) for side in mpp))
    server.setMetadata(metadata.build())


def _builder_json(server: Any) -> qpproj.JsonObject:  # noqa: ANN401
    import paquo.java  # noqa: PLC0415

    kind = _java("qupath.lib.images.servers.ImageServerBuilder$ServerBuilder")
    builder = server.getBuilder()
    if builder is None:
        raise ProjectUnsupportedError(f"QuPath cannot keep {server.getPath()} in a project")
    found: qpproj.JsonObject = json.loads(str(paquo.java.GsonTools.getInstance().toJson(builder, kind.class_)))
    return found


def _thumbnail(server: Any) -> bytes:  # noqa: ANN401
    import paquo.java  # noqa: PLC0415

    image = paquo.java.ProjectImportImagesCommand_getThumbnailRGB(server, None)  # type: ignore[no-untyped-call]
    stream = paquo.java.ByteArrayOutputStream()
    _java("javax.imageio.ImageIO").write(image, "JPEG", stream)
    return bytes(memoryview(stream.toByteArray()))
