"""Read tiles straight from the slides and paint their masks."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import SlideError, TileError
from darefine_qupath.masks import LabelPainter
from darefine_qupath.slides import Slide
from darefine_qupath.tiles.index import TileRecord
from darefine_qupath.tiles.reading import read_context, read_slice
from darefine_qupath.tiles.sources import Opener, TileSource, open_source
from darefine_qupath.tiles.spec import PixelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from darefine_qupath.geometry import Box

__all__ = ["SlideTileReader", "TilePixels", "TileReader", "describe_white_pieces", "paint_mask"]

_OPEN_SLIDES = 8
_KEPT_CONTEXTS = 32
_log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")


class TilePixels(NamedTuple):
    """Pixels and labels of a tile.

    Attributes
    ----------
    slice : ndarray of uint8, shape (input_px, input_px, 3)
        RGB; white outside the slide.
    context : ndarray of uint8, shape (context_input_px, context_input_px, 3)
        RGB; white outside the slide.
    mask : ndarray of uint8, shape (input_px, input_px)
        Labels of the slice; `IGNORE` where nothing is known.
    """

    slice: NDArray[np.uint8]
    context: NDArray[np.uint8]
    mask: NDArray[np.uint8]


class TileReader(Protocol):
    """Where the pixels of tiles come from; pickles for worker processes."""

    def read(self, record: TileRecord) -> TilePixels:
        """Read one tile."""
        ...


def paint_mask(painter: LabelPainter, box: Box, spec: PixelSpec, image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Paint the labels of a slice, shape (input_px, input_px)."""
    return painter.paint(box, (spec.input_px, spec.input_px), image_size=image_size)


def describe_white_pieces(slide: Slide, box: Box, holes: Sequence[Box]) -> str:
    """Write a sentence about a context with pieces that cannot be read."""
    return f"{slide.path}: {len(holes)} pieces of the context at x {box.x}, y {box.y} cannot be read and are white"


class SlideTileReader:
    """Read tiles straight from the slides, with masks painted on the way.

    Handles are opened where they are used, once per process, never pickled and never carried through a fork; a few
    contexts are kept, since the tiles of a parent context share one. A tile on a damaged spot comes white and without
    labels, so that nothing is learned from it, as `build_dataset` leaves it out; each is reported once.

    Parameters
    ----------
    sources : sequence of TileSource
        The images of the index.
    classes : ClassMap
        Labels of the masks.
    opener : callable, optional
        Opens the slide of a source.
    """

    def __init__(
        self,
        sources: Sequence[TileSource],
        classes: ClassMap,
        *,
        opener: Opener = open_source,
    ) -> None:
        self._sources = {source.id: source for source in sources}
        self._classes = classes
        self._opener = opener
        self._inherited: list[object] = []
        self._reported: set[tuple[str, Box]] = set()
        self._start_empty()

    def _start_empty(self) -> None:
        self._process = os.getpid()
        self._slides: _LruCache[str, tuple[Slide, LabelPainter]] = _LruCache(_OPEN_SLIDES)
        self._contexts: _LruCache[tuple[str, Box], NDArray[np.uint8]] = _LruCache(_KEPT_CONTEXTS)

    def __getstate__(self) -> dict[str, Any]:
        return {"sources": list(self._sources.values()), "classes": self._classes, "opener": self._opener}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["sources"], state["classes"], opener=state["opener"])  # type: ignore[misc]

    def open(self, image_id: str) -> tuple[Slide, LabelPainter]:
        """Slide and painter of an image, opened on first use in this process.

        Raises
        ------
        TileError
            If there is no source of this id.
        """
        if self._process != os.getpid():
            # Kept, not freed: a reader whose threads stayed behind in the parent may hang when it is closed here.
            self._inherited.append(self._slides)
            self._start_empty()
        if image_id not in self._sources:
            raise TileError(f"No image {image_id!r} among the sources {sorted(self._sources)}")
        return self._slides.get(image_id, self._open)

    def _open(self, image_id: str) -> tuple[Slide, LabelPainter]:
        source = self._sources[image_id]
        return self._opener(source), LabelPainter(source.annotations, self._classes)

    def context(self, image_id: str, box: Box, spec: PixelSpec) -> NDArray[np.uint8]:
        """Read a context, or give it again without reading."""
        slide, _ = self.open(image_id)
        return self._contexts.get((image_id, box), lambda key: self._context(slide, key, spec))

    def _context(self, slide: Slide, key: tuple[str, Box], spec: PixelSpec) -> NDArray[np.uint8]:
        pixels, holes = read_context(slide, key[1], spec)
        if holes and self._is_new(key):
            _log.warning("%s", describe_white_pieces(slide, key[1], holes))
        return pixels

    def _is_new(self, place: tuple[str, Box]) -> bool:
        is_new = place not in self._reported
        self._reported.add(place)
        return is_new

    def read(self, record: TileRecord) -> TilePixels:
        """Read one tile."""
        slide, painter = self.open(record.image.id)
        context = self.context(record.image.id, record.pair.context, record.spec)
        try:
            pixels = read_slice(slide, record.pair.slice, record.spec)
        except SlideError as error:
            if self._is_new((record.image.id, record.pair.slice)):
                _log.warning("The tile %s cannot be read and gives no labels: %s", record.id, error)
            white = np.full((record.spec.input_px, record.spec.input_px, 3), 255, np.uint8)
            return TilePixels(white, context, np.full(white.shape[:2], IGNORE, np.uint8))
        return TilePixels(pixels, context, paint_mask(painter, record.pair.slice, record.spec, slide.size))

    def close(self) -> None:
        """Close every slide."""
        self._slides.clear()
        self._contexts.clear()

    def __enter__(self) -> SlideTileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _LruCache(Generic[K, V]):
    """Keep the values that were used last, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        if key not in self._values:
            while len(self._values) >= self._limit:
                _close(self._values.popitem(last=False)[1])
            self._values[key] = make(key)
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        while self._values:
            _close(self._values.popitem()[1])


def _close(value: object) -> None:
    if isinstance(value, tuple):
        value[0].close()
