"""Read slices and contexts ahead in threads while the device computes, in order, within a bounded memory."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Box
from darefine_qupath.tiles.reading import hold_slices, read_context, read_slice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from darefine_qupath.prediction.plan import ContextGroup
    from darefine_qupath.slides import Slide
    from darefine_qupath.tiles.spec import PixelSpec

__all__ = ["BatchPixels", "SliceBatch", "SlideHandles", "cut_batches", "read_ahead", "read_batch"]


@dataclass(frozen=True, slots=True)
class SliceBatch:
    """Slices that the network sees at once.

    Attributes
    ----------
    slices : tuple of Box
        Level-0 pixels.
    group_numbers : tuple of int
        Per slice, the number of its group in the row.
    new_contexts : tuple of (int, Box)
        Numbers of the groups whose first slice is here, with their contexts.
    """

    slices: tuple[Box, ...]
    group_numbers: tuple[int, ...]
    new_contexts: tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True)
class BatchPixels:
    """What was read for a batch.

    Attributes
    ----------
    batch : SliceBatch
        What was to be read.
    slices : tuple of (ndarray of uint8, shape (S, S, 3), or None)
        None where the slide cannot be read.
    contexts : tuple of ndarray of uint8, shape (S, S, 3)
        Of the batch's `new_contexts`.
    damaged : tuple of Box
        Pieces of contexts that cannot be read and are white instead; level-0 pixels.
    """

    batch: SliceBatch
    slices: tuple[NDArray[np.uint8] | None, ...]
    contexts: tuple[NDArray[np.uint8], ...]
    damaged: tuple[Box, ...]


def cut_batches(groups: Sequence[ContextGroup], size: int, *, contexts: bool = True) -> Iterator[SliceBatch]:
    """Cut the slices of a row into batches; one batch may hold slices of several groups.

    Parameters
    ----------
    groups : sequence of ContextGroup
        Of one row.
    size : int
        Slices per batch.
    contexts : bool
        Whether contexts are to be read.

    Yields
    ------
    SliceBatch
        In order; each context is read with the first of its slices.
    """
    jobs = [(number, box) for number, group in enumerate(groups) for box in group.slices]
    opened: set[int] = set()
    for start in range(0, len(jobs), size):
        part = jobs[start : start + size]
        numbers = tuple(number for number, _ in part)
        new = tuple(dict.fromkeys(number for number in numbers if contexts and number not in opened))
        opened.update(new)
        yield SliceBatch(
            tuple(box for _, box in part), numbers, tuple((number, groups[number].context) for number in new)
        )


class SlideHandles:
    """A handle of the slide for every thread that reads it; most readers allow no sharing.

    Parameters
    ----------
    slide : Slide
        Copied for each thread; a copy opens the file again by itself.
    """

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._local = threading.local()
        self._lock = threading.Lock()
        self._copies: list[Slide] = []

    def get(self) -> Slide:
        """Handle of this thread."""
        handle: Slide | None = getattr(self._local, "slide", None)
        if handle is None:
            with self._lock:
                handle = copy.copy(self._slide)
                self._copies.append(handle)
            self._local.slide = handle
        return handle

    def close(self) -> None:
        """Close every copy."""
        for handle in self._copies:
            handle.close()
        self._copies.clear()


def read_ahead(
    work: Iterator[SliceBatch], read: Callable[[SliceBatch], BatchPixels], pool: ThreadPoolExecutor, *, ahead: int
) -> Iterator[BatchPixels]:
    """Read batches in threads, hand them out in order, and never hold more than `ahead` of them.

    Parameters
    ----------
    work : iterator of SliceBatch
        In the order wanted.
    read : callable
        Reads one batch; runs in the pool's threads.
    pool : ThreadPoolExecutor
        The threads.
    ahead : int
        Batches that are read or being read at a time.

    Yields
    ------
    BatchPixels
        In the order of `work`.
    """
    waiting: deque[Future[BatchPixels]] = deque()
    try:
        for batch in work:
            waiting.append(pool.submit(read, batch))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def read_batch(handles: SlideHandles, spec: PixelSpec, batch: SliceBatch) -> BatchPixels:
    """Read the slices of a batch and the contexts that are new in it.

    A slice that cannot be read becomes None; for a context see `read_context`.

    Parameters
    ----------
    handles : SlideHandles
        The slide.
    spec : PixelSpec
        Of the plan.
    batch : SliceBatch
        What to read.

    Returns
    -------
    BatchPixels
        Everything that could be read.
    """
    slide = handles.get()
    near = hold_slices(slide, batch.slices, spec)
    slices = tuple(_slice_or_none(near, box, spec) for box in batch.slices)
    contexts = [read_context(slide, box, spec) for _, box in batch.new_contexts]
    damaged = tuple(hole for _, holes in contexts for hole in holes)
    return BatchPixels(batch, slices, tuple(pixels for pixels, _ in contexts), damaged)


def _slice_or_none(slide: Slide, box: Box, spec: PixelSpec) -> NDArray[np.uint8] | None:
    try:
        return read_slice(slide, box, spec)
    except SlideError:
        return None
