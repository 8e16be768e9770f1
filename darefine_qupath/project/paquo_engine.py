"""Let a real QuPath write the objects, through paquo: the paquo engine.

A project's files are read as the embedded engine reads them, and every write is staged, verified and backed up as
there; what goes into ``data.qpdata`` is made by QuPath.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darefine_qupath.classes import Color
from darefine_qupath.errors import (
    ProjectUnsupportedError,
    ProjectWriteError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
)
from darefine_qupath.geometry import Size
from darefine_qupath.project import lenient_json, qpproj, servers, uris
from darefine_qupath.project.embedded import EmbeddedProject
from darefine_qupath.project.hierarchy_editor import HierarchyEditor
from darefine_qupath.project.interface import Changes, ImageEntry
from darefine_qupath.project.jvm import java_array, java_class, java_errors, paquo_java, start_qupath
from darefine_qupath.project.qpdata.document import Document
from darefine_qupath.project.qpdata.edit import edit_document
from darefine_qupath.project.qpdata.read import ImageData, read_image_data
from darefine_qupath.project.qpdata.stains import Stains
from darefine_qupath.project.qpdata.stored import expected_objects
from darefine_qupath.project.qpdata.verify import verify_objects

__all__ = ["PaquoProject"]

_log = logging.getLogger(__name__)

_ENTRY_ID = "PROJECT_ENTRY_ID"


class _OpenImage:
    """An image's data in QuPath, read from bytes and written to bytes."""

    def __init__(self, content: bytes, builder: Any) -> None:  # noqa: ANN401 - of Java
        stream = java_class("java.io.ByteArrayInputStream")(java_array("byte", np.frombuffer(content, np.int8)))
        if servers.is_since(start_qupath(), 0, 6):
            self.data = paquo_java().PathIO.readImageData(stream, builder)
        else:
            image = paquo_java().BufferedImage
            self.data = paquo_java().PathIO.readImageData(stream, None, builder.build(), image)
        self.hierarchy = self.data.getHierarchy()

    def written(self) -> bytes:
        """Return the file that QuPath makes of it."""
        stream = paquo_java().ByteArrayOutputStream()
        paquo_java().PathIO.writeImageData(stream, self.data)
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
        for name, value in properties.items():
            if value is None:
                self.data.removeProperty(paquo_java().String(name))
            else:
                self.data.setProperty(paquo_java().String(name), paquo_java().String(value))

    def close(self) -> None:
        """Let go of the image file."""
        if servers.is_since(start_qupath(), 0, 6):
            self.data.close()
        else:
            self.data.getServer().close()


def _server_builder(builder: Mapping[str, Any]) -> Any:  # noqa: ANN401 - of Java
    text = paquo_java().String(json.dumps(builder, ensure_ascii=False))
    made = (
        paquo_java()
        .GsonTools.getInstance()
        .fromJson(text, java_class("qupath.lib.images.servers.ImageServerBuilder$ServerBuilder"))
    )
    if made is None:
        raise ProjectWriteError("QuPath makes nothing of the image server in the project file; nothing was changed")
    return made


# -- the engine


class PaquoProject(EmbeddedProject):
    """A QuPath project whose objects a real QuPath writes."""

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
        with java_errors(f"save {image.name!r}"), contextlib.closing(self._open(image, base.data)) as opened:
            HierarchyEditor(opened.hierarchy, base, colors).apply(changes)
            opened.set_properties(changes.properties)
            opened.keep_history([step.name for step in base.workflow])
            content = opened.written()
        after = read_image_data(content, path=base.path)
        _check_rest(base, after, changes)
        verify_objects(expected_objects(base, changes), after.objects, path=self._data_file(image.id))
        # What is read back from the disk are the same bytes.
        return content, lambda _: None

    def _open(self, image: ImageEntry, content: bytes) -> _OpenImage:
        builder = _server_builder(self._records[image.id].builder)
        moved = java_class("java.util.HashMap")()
        for stored in builder.getURIs():
            uri, path, exists = self._resolved(str(stored.toString()))
            if path is not None and not exists:
                raise ProjectWriteError(
                    f"QuPath cannot save {image.name!r} while its file {path} is missing; put it back, or use "
                    f"engine='embedded'"
                )
            moved.put(stored, java_class("java.net.URI")(uri))
        opened = _OpenImage(content, builder.updateURIs(moved))
        opened.data.setProperty(_ENTRY_ID, f"{self.path}::{image.id}")
        return opened

    # -- images

    def _opened(self, path: Path, name: str, mpp: float | None) -> tuple[lenient_json.JsonObject, Size, bytes]:
        if not path.is_file():
            raise SlideNotFoundError(f"There is no image {path}")
        start_qupath()
        with java_errors(f"open {path}"):
            server = _build_server(path)
            try:
                _set_server_metadata(server, name, (mpp, mpp) if mpp else _own_pixel_size(server, path))
                return _builder_json(server), Size(int(server.getWidth()), int(server.getHeight())), _thumbnail(server)
            finally:
                server.close()

    def _first_data(self, record: qpproj.EntryRecord, image_type: str) -> bytes:
        blank = self._blank(record, image_type)
        with (
            java_errors(f"save {record.name!r}"),
            contextlib.closing(_OpenImage(blank, _server_builder(record.builder))) as opened,
        ):
            opened.keep_history(())
            return opened.written()


def _same_stains(before: Stains | None, after: Stains | None) -> bool:
    """Whether stains differ by no more than QuPath 0.4 writes."""
    if before is None or after is None:
        return before is after
    numbers = [[*(vector.rgb for vector in stains.vectors), stains.background] for stains in (before, after)]
    names = [[stains.name, *(vector.name for vector in stains.vectors)] for stains in (before, after)]
    return names[0] == names[1] and np.allclose(numbers[0], numbers[1], rtol=0, atol=1e-6)


def _check_rest(before: ImageData, after: ImageData, changes: Changes) -> None:
    """Make sure that QuPath kept what is not an object: it passes over what it does not know, with a log line."""

    def parts(data: ImageData) -> dict[str, object]:
        return {
            "image type": data.image_type,
            "TMA grid": data.tma_grid,
            "history": [(step.java_class, step.name, step.script) for step in data.workflow],
            "properties": {*data.properties, _ENTRY_ID},
        }

    ours, theirs = parts(before), parts(after)
    wanted = {name for name, value in changes.properties.items() if value is not None}
    ours["properties"] = ({*before.properties, _ENTRY_ID} - changes.properties.keys()) | wanted
    if any(after.properties.get(name) != value for name, value in changes.properties.items()):
        theirs["properties"] = None
    lost = [name for name, value in ours.items() if value != theirs[name]]
    if not _same_stains(before.stains, after.stains):
        lost.append("stains")
    if lost:
        raise ProjectWriteError(
            f"QuPath {start_qupath()} does not keep the {', '.join(lost)} of {before.path}; nothing was changed, use "
            f"engine='embedded'"
        )


def _build_server(path: Path) -> Any:  # noqa: ANN401
    """Open an image file as QuPath does."""
    support = paquo_java().ImageServerProvider.getPreferredUriImageSupport(
        paquo_java().BufferedImage, paquo_java().String(uris.file_uri(path))
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
    metadata = java_class("qupath.lib.images.servers.ImageServerMetadata$Builder")(server.getMetadata())
    metadata.name(java_class("java.lang.String")(name))
    if mpp is not None:
        metadata.pixelSizeMicrons(*(java_class("java.lang.Double").valueOf(float(side)) for side in mpp))
    server.setMetadata(metadata.build())


def _builder_json(server: Any) -> lenient_json.JsonObject:  # noqa: ANN401
    kind = java_class("qupath.lib.images.servers.ImageServerBuilder$ServerBuilder")
    builder = server.getBuilder()
    if builder is None:
        raise ProjectUnsupportedError(f"QuPath cannot keep {server.getPath()} in a project")
    found: lenient_json.JsonObject = json.loads(str(paquo_java().GsonTools.getInstance().toJson(builder, kind.class_)))
    return found


def _thumbnail(server: Any) -> bytes:  # noqa: ANN401
    image = paquo_java().ProjectImportImagesCommand_getThumbnailRGB(server, None)
    stream = paquo_java().ByteArrayOutputStream()
    java_class("javax.imageio.ImageIO").write(image, "JPEG", stream)
    return bytes(memoryview(stream.toByteArray()))
