"""List all tiles of some images: where each lies and how many pixels of each class it holds.

Columns are arrays, so that a million tiles take some 60 MB and sampling is arithmetic on columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import TileError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.tiles.plan import TilePair
from darefine_qupath.tiles.spec import PixelSpec, TileSpec

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["TileImage", "TileIndex", "TileRecord", "case_of"]

_CASE_KEYS = ("caseid", "case", "patientid", "patient", "subjectid", "subject")


def case_of(metadata: Mapping[str, str]) -> str | None:
    """Find the case that an image's metadata name.

    Parameters
    ----------
    metadata : mapping of str to str
        Keys such as ``"Case ID"``, ``"case"`` or ``"patient_id"`` count, in any case.

    Returns
    -------
    str or None
        The case; None when no key names one.
    """
    known = {re.sub(r"[^a-z]", "", key.lower()): value.strip() for key, value in metadata.items()}
    return next((known[key] for key in _CASE_KEYS if known.get(key)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileImage:
    """An image that tiles come from.

    Attributes
    ----------
    id : str
        Entry id in the project; unique in an index.
    name : str
        As shown in QuPath.
    size : Size
        Level-0 pixels.
    mpp : float or None
        Micrometres per pixel the tiles were planned with.
    case : str or None
        Case or patient; images of one case never part in a split.
    metadata : mapping of str to str
        Project metadata.
    """

    id: str
    name: str
    size: Size
    mpp: float | None = None
    case: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str]:
        """What a split keeps together: the case, or the image where none is named."""
        return ("image", self.id) if self.case is None else ("case", self.case)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same record back."""
        return {
            "id": self.id,
            "name": self.name,
            "size": list(self.size),
            "mpp": self.mpp,
            "case": self.case,
            "metadata": dict(sorted(self.metadata.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TileImage:
        """Rebuild the image that `to_json` wrote."""
        image = cls(**{**data, "size": Size(*map(int, data["size"]))})
        if not all(isinstance(text, str) for text in (image.id, image.name, image.case or "")):
            raise TypeError("id, name and case of an image are not all text")
        if not isinstance(image.mpp, (int, float, type(None))):
            raise TypeError(f"the pixel size {image.mpp!r} is no number")
        return image


@dataclass(frozen=True, kw_only=True, slots=True)
class TileRecord:
    """One tile of an index.

    Attributes
    ----------
    image : TileImage
        Where it comes from.
    pair : TilePair
        Slice and context in level-0 pixels.
    spec : PixelSpec
        The sizes on this image.
    counts : tuple of int
        Mask pixels per class, in label order.
    ignored : int
        Mask pixels that are `IGNORE`.
    """

    image: TileImage
    pair: TilePair
    spec: PixelSpec
    counts: tuple[int, ...]
    ignored: int

    @property
    def id(self) -> str:
        """``<image id>/<x>_<y>`` of the slice; unique in an index and the same in every run with one spec."""
        return f"{self.image.id}/{self.pair.slice.x}_{self.pair.slice.y}"


@dataclass(frozen=True, kw_only=True, eq=False)
class TileIndex:
    """All tiles of some images.

    Attributes
    ----------
    spec : TileSpec
        What the tiles were planned with.
    classes : ClassMap
        Labels of the masks.
    images : tuple of TileImage
        Every image, also those without a tile.
    image : ndarray of int32, shape (N,)
        Index into `images`.
    slice_xy, context_xy : ndarray of int32, shape (N, 2)
        Top left corners of slice and context in level-0 pixels.
    counts : ndarray of int64, shape (N, K + 1)
        Mask pixels per class; the last column counts `IGNORE`.
    """

    spec: TileSpec
    classes: ClassMap
    images: tuple[TileImage, ...]
    image: NDArray[np.int32]
    slice_xy: NDArray[np.int32]
    context_xy: NDArray[np.int32]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        number, columns = len(self.image), self.classes.num_classes + 1
        shapes = (self.slice_xy.shape, self.context_xy.shape, self.counts.shape)
        if shapes != ((number, 2), (number, 2), (number, columns)):
            raise TileError(f"The columns of a tile index do not fit: {number} tiles, shapes {shapes}")
        ids = [image.id for image in self.images]
        if len(set(ids)) != len(ids):
            twice = sorted({name for name in ids if ids.count(name) > 1})
            raise TileError(f"Several images have the id {twice}; ids must be unique")

    def __len__(self) -> int:
        return len(self.image)

    def __iter__(self) -> Iterator[TileRecord]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> TileRecord:
        image = self.images[self.image[index]]
        spec = self.pixel_specs[self.image[index]]
        counts = tuple(self.counts[index].tolist())
        slice_x, slice_y = self.slice_xy[index].tolist()
        context_x, context_y = self.context_xy[index].tolist()
        pair = TilePair(
            Box(slice_x, slice_y, spec.slice_px, spec.slice_px),
            Box(context_x, context_y, spec.context_px, spec.context_px),
        )
        return TileRecord(image=image, pair=pair, spec=spec, counts=counts[:-1], ignored=counts[-1])

    @cached_property
    def pixel_specs(self) -> tuple[PixelSpec, ...]:
        """The spec in level-0 pixels, per image."""
        return tuple(self.spec.at(image.mpp) for image in self.images)

    @property
    def class_pixels(self) -> NDArray[np.int64]:
        """Mask pixels per class over all tiles, shape (K,); a pixel counts once for every slice that shows it."""
        return np.asarray(self.counts[:, :-1].sum(axis=0), np.int64)

    @property
    def class_tiles(self) -> NDArray[np.int64]:
        """Tiles per class that hold at least one pixel of it, shape (K,)."""
        return np.asarray(np.count_nonzero(self.counts[:, :-1], axis=0), np.int64)

    def ids(self) -> list[str]:
        """Return the tile ids, in order."""
        names = [image.id for image in self.images]
        corners = zip(self.image.tolist(), self.slice_xy.tolist(), strict=True)
        return [f"{names[image]}/{x}_{y}" for image, (x, y) in corners]

    def subset(self, chosen: ArrayLike) -> TileIndex:
        """Return the tiles at these positions, or where a boolean mask of length N is true; all images stay."""
        picked = np.asarray(chosen)
        picked = picked if picked.dtype == bool else picked.astype(np.int64)
        return replace(
            self,
            image=self.image[picked],
            slice_xy=self.slice_xy[picked],
            context_xy=self.context_xy[picked],
            counts=self.counts[picked],
        )

    @classmethod
    def of_rows(cls, spec: TileSpec, classes: ClassMap, images: tuple[TileImage, ...], rows: ArrayLike) -> TileIndex:
        """Make an index of a table.

        Parameters
        ----------
        spec : TileSpec
            What the tiles were planned with.
        classes : ClassMap
            Labels of the masks.
        images : tuple of TileImage
            Where they come from.
        rows : array-like of int, shape (N, 6 + K)
            Image, slice x, y, context x, y, pixels per class, ignored pixels.

        Returns
        -------
        TileIndex
            One tile per row.
        """
        table = np.asarray(rows, np.int64).reshape(-1, 6 + classes.num_classes)
        return cls(
            spec=spec,
            classes=classes,
            images=images,
            image=table[:, 0].astype(np.int32),
            slice_xy=table[:, 1:3].astype(np.int32),
            context_xy=table[:, 3:5].astype(np.int32),
            counts=table[:, 5:].copy(),
        )
