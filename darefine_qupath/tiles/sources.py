"""Describe the images that tiles are cut from: slide file, annotations, case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import MissingMppError
from darefine_qupath.slides import Slide, open_slide
from darefine_qupath.tiles.index import TileImage, case_of
from darefine_qupath.tiles.spec import PixelSpec, TileSpec

__all__ = ["Opener", "TileSource", "open_source", "spec_on"]


@dataclass(frozen=True, kw_only=True)
class TileSource:
    """An image and what is known of it; pickles, so that worker processes open the slide themselves.

    Attributes
    ----------
    id : str
        Entry id in the project; unique.
    name : str
        As shown in QuPath.
    path : Path
        Slide file.
    mpp : float or None
        Micrometres per pixel, over what the file says.
    crop_bounds : bool
        Whether to crop to OpenSlide's bounds, as QuPath does without ``--no-crop``.
    annotations : tuple of Annotation
        All annotations of the image.
    metadata : mapping of str to str
        Project metadata; see `case_of`.
    case : str or None
        Case or patient, over what the metadata name.
    """

    id: str
    name: str
    path: Path
    mpp: float | None = None
    crop_bounds: bool = True
    annotations: tuple[Annotation, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    case: str | None = None

    @property
    def known_case(self) -> str | None:
        """The case; None where nothing names one."""
        return self.case or case_of(self.metadata)

    def image(self, slide: Slide) -> TileImage:
        """Describe the image for an index, with its size and mpp as the open slide has them."""
        mpp = slide.mpp if self.mpp is None else self.mpp
        return TileImage(
            id=self.id, name=self.name, size=slide.size, mpp=mpp, case=self.known_case, metadata=self.metadata
        )


def open_source(source: TileSource) -> Slide:
    """Open the slide of a source."""
    return open_slide(source.path, crop_bounds=source.crop_bounds)


Opener = Callable[[TileSource], Slide]
"""Opens the slide of a source; a function of a module where worker processes are to use it."""


def spec_on(spec: TileSpec, image: TileImage) -> PixelSpec:
    """Give a spec the level-0 pixels of an image; the error for a missing mpp names the image."""
    try:
        return spec.at(image.mpp)
    except MissingMppError as error:
        raise MissingMppError(f"{image.name}: {error}") from None
