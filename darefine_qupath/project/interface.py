"""Define what every engine offers, and the records it gives and takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color, PathClass
from darefine_qupath.errors import ImageNotFoundError
from darefine_qupath.geometry import PixelSize, Size

__all__ = ["Applied", "Changes", "Engine", "ImageEntry", "ImageState", "Project", "image_titles"]

Engine = Literal["embedded", "paquo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEntry:
    """One image of a project.

    Attributes
    ----------
    id : str
        Entry id, the name of its data folder; what ``<entry id>.geojson`` is named by.
    name : str
        As shown in QuPath.
    uri : str or None
        URI of the image, resolved for a project that moved; None when the server has none.
    path : Path or None
        Local file of `uri`; None when it is not a file.
    exists : bool
        Whether that file is there.
    width, height : int or None
        Level-0 pixels as QuPath sees them; None while neither project nor file says.
    mpp : float or None
        Micrometres per pixel by QuPath's pixel calibration; None when not calibrated, or for pixels that are not
        square or of an impossible size.
    pixel_size : PixelSize or None
        What the calibration says, possible or not; None when not calibrated.
    image_type : str
        QuPath's ImageType, ``"BRIGHTFIELD_H_E"`` ...; ``"UNSET"`` while no image data is saved.
    metadata : mapping of str to str
        Project metadata of the image.
    description : str or None
        Free text of the entry.
    server_args : tuple of str
        Arguments of the image server, ``"--no-crop"`` among them.
    unsupported : str or None
        Why the pixels cannot be read by us (a rotated or cropped server, say); None when they can.
    """

    id: str
    name: str
    uri: str | None
    path: Path | None
    exists: bool
    width: int | None = None
    height: int | None = None
    mpp: float | None = None
    pixel_size: PixelSize | None = None
    image_type: str = "UNSET"
    metadata: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None
    server_args: tuple[str, ...] = ()
    unsupported: str | None = None

    @property
    def size(self) -> Size | None:
        """Width and height; None where the project does not say."""
        return None if self.width is None or self.height is None else Size(self.width, self.height)

    @property
    def crop_bounds(self) -> bool:
        """Whether QuPath crops the image to the bounds that the file states, as `slides.open_slide` then does."""
        return is_cropped(self.server_args)


def is_cropped(server_args: Sequence[str]) -> bool:
    """Whether an image server with these arguments crops to the bounds that the file states."""
    return "--no-crop" not in server_args


def image_titles(names: Mapping[str, str]) -> dict[str, str]:
    """Words that tell images apart for people.

    Parameters
    ----------
    names : mapping of str to str
        By entry id, the name, which several images may have: slides of one file name in different folders.

    Returns
    -------
    dict of str to str
        By entry id, the name; with the id behind it where another image has the same one.
    """
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name} (entry {key})" for key, name in names.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageState:
    """What is stored for an image, as it was when it was read.

    Attributes
    ----------
    objects : tuple of Annotation
        Every object but the root, parents before children.
    properties : mapping of str to str
        Image properties that are text. QuPath keeps them when it opens and saves an image.
    version : str
        Fingerprint of the stored data, for `Project.apply`; empty when nothing is stored yet.
    """

    objects: tuple[Annotation, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Edits to the objects of one image, applied all or not at all.

    Attributes
    ----------
    add : sequence of Annotation
        New objects, placed below the root or below their `parent`.
    replace : sequence of Annotation
        Objects whose UUID is there already; kept at their place in the hierarchy, with their children.
    remove : sequence of UUID
        Objects to take out; their children move up to the removed object's parent, as QuPath does by default.
    properties : mapping of str to str or None
        Image properties to set to a text; None takes one out.
    class_colors : mapping of str to Colour
        Of classes that are new in the project.
    """

    add: Sequence[Annotation] = ()
    replace: Sequence[Annotation] = ()
    remove: Sequence[UUID] = ()
    properties: Mapping[str, str | None] = field(default_factory=dict)
    class_colors: Mapping[str, Color] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing would change."""
        return not (self.touches_objects or self.properties)

    @property
    def touches_objects(self) -> bool:
        """Whether objects would change."""
        return bool(self.add or self.replace or self.remove)


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What `Project.apply` did, counted from the file read back.

    Attributes
    ----------
    added, replaced, removed : int
        Objects.
    num_objects : int
        Objects of the image afterwards, the root not counted.
    backup : Path or None
        Copy of the former file; None when there was none, and where no object changed.
    warnings : tuple of str
        What the user should know (the project may be open in QuPath, say).
    digest : str or None
        Version of what is stored for the image afterwards; None when nothing was written.
    """

    added: int
    replaced: int
    removed: int
    num_objects: int
    backup: Path | None
    warnings: tuple[str, ...] = ()
    digest: str | None = None


class Project(ABC):
    """A QuPath project. Use `open_project` and `create_project`, and close it (or use ``with``).

    Attributes
    ----------
    path : Path
        The ``project.qpproj`` file, absolute.
    engine : str
        ``"embedded"`` or ``"paquo"``.
    """

    path: Path
    engine: Engine
    _by_key: tuple[tuple[ImageEntry, ...], dict[str, list[ImageEntry]]] | None = None

    @property
    def folder(self) -> Path:
        """Folder of the project file."""
        return self.path.parent

    @property
    def name(self) -> str:
        """Name of the project's folder."""
        return self.path.parent.name

    @property
    @abstractmethod
    def version(self) -> str:
        """QuPath version that wrote the project file."""

    @property
    @abstractmethod
    def images(self) -> tuple[ImageEntry, ...]:
        """Every image, in the project's order."""

    @property
    @abstractmethod
    def classes(self) -> tuple[PathClass, ...]:
        """The class list, in the project's order."""

    @abstractmethod
    def set_classes(self, classes: Sequence[PathClass]) -> None:
        """Write the class list."""

    @abstractmethod
    def state(self, image: ImageEntry) -> ImageState:
        """Read what is stored for an image.

        Raises
        ------
        ImageNotFoundError
            If the project has no such image.
        ProjectFormatError
            If the image's data is damaged.
        """

    def objects(self, image: ImageEntry) -> tuple[Annotation, ...]:
        """Every object of an image but the root, parents before children.

        Raises
        ------
        ImageNotFoundError, ProjectFormatError
            As for `state`.
        """
        return self.state(image).objects

    def annotations(self, image: ImageEntry) -> tuple[Annotation, ...]:
        """Annotations of an image, parents before children; empty when nothing is saved yet."""
        return tuple(record for record in self.objects(image) if record.kind == "annotation")

    @abstractmethod
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
            What was done.

        Raises
        ------
        ProjectChangedError
            If the image's data has another version by now.
        ProjectLockedError
            If another darefine process is writing.
        ProjectWriteError
            If the write failed; the former state stands.
        """

    def take_back(self, image: ImageEntry, *, digest: str, backup: Path) -> Applied | None:  # noqa: ARG002
        """Bring the backup of a write back, byte for byte, if nothing else was written since.

        Parameters
        ----------
        image : ImageEntry
            The image.
        digest : str
            From the `Applied` of that write.
        backup : Path
            From the same.

        Returns
        -------
        Applied or None
            None, and nothing changed, where the image's data is not that of the write any more, the backup is gone, or
            the engine keeps none.
        """
        return None

    @abstractmethod
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

        Parameters
        ----------
        path : Path
            Image file.
        name : str, optional
            As shown in QuPath; the file name by default.
        mpp : float, optional
            Micrometres per pixel, over what the file says.
        metadata : mapping of str to str, optional
            Project metadata of the image.
        image_type : str, optional
            QuPath's ImageType.

        Returns
        -------
        ImageEntry
            The new entry.
        """

    @abstractmethod
    def add_metadata(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Set keys of the project metadata of images, all with one write; other keys stay as they are.

        Parameters
        ----------
        metadata : mapping of str to mapping
            Keys and values by entry id.

        Raises
        ------
        ProjectChangedError
            If one of the images is no longer in the project; nothing was written.
        ConfigError
            If a key or a value is not text.
        """

    def image(self, key: str) -> ImageEntry:
        """Find an image by entry id or by name.

        Raises
        ------
        ImageNotFoundError
            If there is none, or several of that name.
        """
        images = self.images
        if self._by_key is None or self._by_key[0] is not images:
            by_key: dict[str, list[ImageEntry]] = {}
            for entry in images:
                by_key.setdefault(entry.name, []).append(entry)
            self._by_key = (images, by_key | {entry.id: [entry] for entry in images})
        found = self._by_key[1].get(key, [])
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(entry.id for entry in found)
            raise ImageNotFoundError(f"{len(found)} images are named {key!r}; give the entry id, one of {ids}")
        names = ", ".join(repr(entry.name) for entry in self.images) or "none"
        raise ImageNotFoundError(f"No image {key!r} in {self.path}; there are {names}")

    def close(self) -> None:  # noqa: B027 - an engine that holds nothing need not override it
        """Let go of whatever the engine holds."""

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
