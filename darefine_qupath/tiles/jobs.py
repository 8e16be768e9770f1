"""Paint, count and store planned tiles, in this process or in workers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import SlideError
from darefine_qupath.slides import Slide
from darefine_qupath.tiles.plan import TilePair
from darefine_qupath.tiles.reading import hold_slices, read_context, read_slice
from darefine_qupath.tiles.slide_reader import SlideTileReader, describe_white_pieces, paint_mask
from darefine_qupath.tiles.spec import PixelSpec
from darefine_qupath.tiles.storage import PixelFolder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ScannedTiles", "TileJob", "TileScanner", "run_jobs"]

_AHEAD = 4
"""Jobs that wait for each worker."""


class TileJob(NamedTuple):
    """Tiles of one image that a process scans in one go; they share a context where contexts are shared."""

    image: int
    image_id: str
    spec: PixelSpec
    pairs: tuple[TilePair, ...]

    @property
    def key(self) -> str:
        """Name of the job, the same whenever the same tiles are planned."""
        first = self.pairs[0].slice
        return f"{self.image_id}/{first.x}_{first.y}"


class ScannedTiles(NamedTuple):
    """The tiles of a job that hold enough labels.

    Attributes
    ----------
    rows : ndarray of int64, shape (N, 6 + K)
        As `TileIndex.of_rows` takes them.
    digests : tuple of str
        SHA-256 of each tile's stored pixels; empty when none are stored.
    unreadable : tuple of str
        What the slide said where it is damaged; those tiles are not among the rows.
    mended : tuple of str
        One sentence for every context that is white where the slide is damaged.
    """

    rows: NDArray[np.int64]
    digests: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()


def _count_labels(mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """Count pixels per class and, last, of `IGNORE`; shape (num_classes + 1,)."""
    # Pillow counts bytes three times as fast as numpy, which widens them first.
    counts = Image.fromarray(mask).histogram()
    return np.array([*counts[:num_classes], counts[IGNORE]], np.int64)


class TileScanner:
    """Paint the masks of tiles, count their labels, drop poor ones, and store pixels where asked; pickles.

    Parameters
    ----------
    reader : SlideTileReader
        The slides.
    classes : ClassMap
        Names to labels.
    min_labelled : float
        As in `TileFilter`.
    folder : PixelFolder, optional
        Where to store pixels; they are not even read without it.
    """

    def __init__(
        self, reader: SlideTileReader, classes: ClassMap, min_labelled: float, folder: PixelFolder | None = None
    ) -> None:
        self._reader = reader
        self._num_classes = classes.num_classes
        self._min_labelled = min_labelled
        self._folder = folder

    def scan(self, job: TileJob) -> ScannedTiles:
        """Paint, count and perhaps store the tiles of one job."""
        slide, painter = self._reader.open(job.image_id)
        enough = max(1, math.ceil(self._min_labelled * job.spec.input_px**2))
        rows, kept = [], []
        for pair in job.pairs:
            mask = paint_mask(painter, pair.slice, job.spec, slide.size)
            counts = _count_labels(mask, self._num_classes)
            if counts[:-1].sum() >= enough:
                rows.append((job.image, pair.slice.x, pair.slice.y, pair.context.x, pair.context.y, *counts.tolist()))
                if self._folder is not None:
                    kept.append((pair, mask))
        table = np.array(rows, np.int64).reshape(-1, 6 + self._num_classes)
        if self._folder is None:
            return ScannedTiles(table, ())
        return _store(self._folder, slide, job, table, kept)

    def close(self) -> None:
        """Close the slides."""
        self._reader.close()


def _store(
    folder: PixelFolder,
    slide: Slide,
    job: TileJob,
    rows: NDArray[np.int64],
    tiles: Sequence[tuple[TilePair, NDArray[np.uint8]]],
) -> ScannedTiles:
    """Write tiles of a job, each context once, and leave out those on a damaged spot of the slide."""
    near = hold_slices(slide, [pair.slice for pair, _ in tiles], job.spec)
    stored, digests = [], []
    unreadable, mended, context, context_data = [], [], None, b""
    for number, (pair, mask) in enumerate(tiles):
        try:
            pixels = read_slice(near, pair.slice, job.spec)
        except SlideError as error:
            unreadable.append(str(error))
            continue
        if pair.context != context:
            found, holes = read_context(slide, pair.context, job.spec)
            context, context_data = pair.context, folder.write(job.image_id, "context", pair.context, found)
            if holes:
                mended.append(describe_white_pieces(slide, pair.context, holes))
        digest = sha256(folder.write(job.image_id, "slice", pair.slice, pixels))
        digest.update(folder.write(job.image_id, "mask", pair.slice, mask))
        digest.update(context_data)
        digests.append(digest.hexdigest())
        stored.append(number)
    return ScannedTiles(rows[stored], tuple(digests), tuple(unreadable), tuple(mended))


def run_jobs(jobs: Iterable[TileJob], scanner: TileScanner, workers: int) -> Iterator[tuple[TileJob, ScannedTiles]]:
    """Do jobs here or in worker processes.

    Parameters
    ----------
    jobs : iterable of Job
        Drawn from as workers get free, so that a long list need not exist.
    scanner : TileScanner
        Sent to each worker once.
    workers : int
        Processes; up to 1 means here.

    Yields
    ------
    Job
        In order.
    Found
        What became of it.
    """
    if workers <= 1:
        try:
            for job in jobs:
                yield job, scanner.scan(job)
        finally:
            scanner.close()
        return
    # Spawned, not forked: OpenSlide handles and threads of this process must not follow.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(scanner,))
    try:
        waiting: deque[tuple[TileJob, Future[ScannedTiles]]] = deque()
        source = iter(jobs)
        while True:
            for job in islice(source, _AHEAD * workers - len(waiting)):
                waiting.append((job, pool.submit(_work, job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            yield job, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_scanner: TileScanner | None = None


def _start_worker(scanner: TileScanner) -> None:
    global _scanner
    _scanner = scanner


def _work(job: TileJob) -> ScannedTiles:
    assert _scanner is not None
    return _scanner.scan(job)
