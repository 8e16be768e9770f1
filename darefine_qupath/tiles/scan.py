"""Finding the tiles of annotated slides that are worth training on, and counting what is in them."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice, pairwise
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from darefine_qupath.annotations import LabelPainter
from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import SlideError, TileError
from darefine_qupath.geometry import Box
from darefine_qupath.slides import Slide, tissue_mask
from darefine_qupath.tiles.index import TileImage, TileIndex
from darefine_qupath.tiles.plan import TilePair, plan_tiles
from darefine_qupath.tiles.reading import hold_slices, read_context, read_slice
from darefine_qupath.tiles.sources import (
    Opener,
    SlideReader,
    TileSource,
    count_labels,
    open_source,
    paint_mask,
    spec_on,
    white_context,
)
from darefine_qupath.tiles.spec import PixelSpec, TileSpec
from darefine_qupath.tiles.storage import PixelFolder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Finder", "Found", "ImagePlan", "Job", "Progress", "Screening", "index_tiles", "plan_sources", "run_jobs"]

_JOB_TILES = 128
_AHEAD = 4
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with tiles done and tiles in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Screening:
    """Which tiles are worth having.

    Attributes
    ----------
    min_labelled : float
        Smallest share of a mask that must have a label; one pixel is needed at least.
    min_tissue : float
        Smallest share of a slice that must be tissue where no annotation touches it; 0 keeps glass. Matters only
        where the class map gives unlabelled pixels a class.
    """

    min_labelled: float = 0.01
    min_tissue: float = 0.05

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise TileError(f"{name} is a share between 0 and 1, got {value}")


class Job(NamedTuple):
    """Tiles of one image that a process does in one go; they share a context where contexts are shared."""

    image: int
    image_id: str
    spec: PixelSpec
    pairs: tuple[TilePair, ...]

    @property
    def key(self) -> str:
        """Names the job in any run over the same plan."""
        first = self.pairs[0].slice
        return f"{self.image_id}/{first.x}_{first.y}"


class Found(NamedTuple):
    """The tiles of a job that passed the screening.

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


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """Tiles planned on one image, as corners: sixteen bytes a tile.

    Attributes
    ----------
    image : TileImage
        The image.
    spec : PixelSpec
        The sizes on it.
    corners : ndarray of int32, shape (N, 4)
        Slice x, y, context x, y.
    """

    image: TileImage
    spec: PixelSpec
    corners: NDArray[np.int32]

    def jobs(self, number: int) -> Iterator[Job]:
        """Cut the plan into jobs: wherever the context changes, if it is shared, and every so many tiles."""
        corners, spec = self.corners, self.spec
        starts = set(range(0, len(corners), _JOB_TILES))
        if spec.placement == "parent":
            starts.update((np.flatnonzero((np.diff(corners[:, 2:], axis=0) != 0).any(axis=1)) + 1).tolist())
        bounds = [*sorted(starts), len(corners)]
        for start, end in pairwise(bounds):
            pairs = (
                TilePair(Box(x, y, spec.slice_px, spec.slice_px), Box(u, v, spec.context_px, spec.context_px))
                for x, y, u, v in corners[start:end].tolist()
            )
            yield Job(number, self.image.id, spec, tuple(pairs))


def plan_sources(
    sources: Sequence[TileSource],
    spec: TileSpec,
    classes: ClassMap,
    screening: Screening,
    opener: Opener,
) -> tuple[ImagePlan, ...]:
    """Plan the tiles of every source that may hold a label.

    Parameters
    ----------
    sources : sequence of TileSource
        Images with their annotations.
    spec : TileSpec
        Geometry of the tiles.
    classes : ClassMap
        Names to labels.
    screening : Screening
        Which tiles are worth having.
    opener : callable
        Opens the slide of a source.

    Returns
    -------
    tuple of ImagePlan
        One per source.
    """
    ids = [source.id for source in sources]
    if len(set(ids)) != len(ids):
        raise TileError(
            f"Several images have the id {sorted({i for i in ids if ids.count(i) > 1})}; ids must be unique"
        )
    plans = tuple(_plan_source(source, spec, classes, screening, opener) for source in sources)
    empty = [plan.image.name for plan in plans if not len(plan.corners)]
    if empty:
        _log.warning("%d of %d images give no tiles: %s", len(empty), len(plans), ", ".join(empty))
    return plans


def _plan_source(
    source: TileSource, spec: TileSpec, classes: ClassMap, screening: Screening, opener: Opener
) -> ImagePlan:
    painter = LabelPainter(source.annotations, classes)
    with opener(source) as slide:
        image = source.image(slide)
        pixels = spec_on(spec, image)
        keep = _keeper(slide, image.mpp, painter, screening)
    pairs = plan_tiles(image.size, pixels, keep=keep)
    corners = [(pair.slice.x, pair.slice.y, pair.context.x, pair.context.y) for pair in pairs]
    return ImagePlan(image=image, spec=pixels, corners=np.array(corners, np.int32).reshape(-1, 4))


def _keeper(
    slide: Slide, mpp: float | None, painter: LabelPainter, screening: Screening
) -> Callable[[Box], bool] | None:
    """Whether a slice may hold labels: near an annotation, or on tissue where the unlabelled has a class."""
    if painter.class_map.unlabelled_label == IGNORE or painter.has_regions:
        return painter.touches
    if screening.min_tissue == 0:
        return None
    tissue = tissue_mask(slide, mpp=mpp)
    return lambda box: painter.touches(box) or tissue.fraction(box) >= screening.min_tissue


class Finder:
    """Does jobs: paints masks, counts, screens, and stores pixels where asked; pickles.

    Parameters
    ----------
    reader : SlideReader
        The slides.
    classes : ClassMap
        Names to labels.
    min_labelled : float
        As in `Screening`.
    folder : PixelFolder, optional
        Where to store pixels; they are not even read without it.
    """

    def __init__(
        self, reader: SlideReader, classes: ClassMap, min_labelled: float, folder: PixelFolder | None = None
    ) -> None:
        self._reader = reader
        self._num_classes = classes.num_classes
        self._min_labelled = min_labelled
        self._folder = folder

    def do(self, job: Job) -> Found:
        """Do one job."""
        slide, painter = self._reader.open(job.image_id)
        enough = max(1, math.ceil(self._min_labelled * job.spec.input_px**2))
        rows, kept = [], []
        for pair in job.pairs:
            mask = paint_mask(painter, pair.slice, job.spec, slide.size)
            counts = count_labels(mask, self._num_classes)
            if counts[:-1].sum() >= enough:
                rows.append((job.image, pair.slice.x, pair.slice.y, pair.context.x, pair.context.y, *counts.tolist()))
                if self._folder is not None:
                    kept.append((pair, mask))
        table = np.array(rows, np.int64).reshape(-1, 6 + self._num_classes)
        if self._folder is None:
            return Found(table, ())
        return _store(self._folder, slide, job, table, kept)

    def close(self) -> None:
        """Close the slides."""
        self._reader.close()


def _store(
    folder: PixelFolder,
    slide: Slide,
    job: Job,
    rows: NDArray[np.int64],
    tiles: Sequence[tuple[TilePair, NDArray[np.uint8]]],
) -> Found:
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
                mended.append(white_context(slide, pair.context, holes))
        digest = sha256(folder.write(job.image_id, "slice", pair.slice, pixels))
        digest.update(folder.write(job.image_id, "mask", pair.slice, mask))
        digest.update(context_data)
        digests.append(digest.hexdigest())
        stored.append(number)
    return Found(rows[stored], tuple(digests), tuple(unreadable), tuple(mended))


def run_jobs(jobs: Iterable[Job], finder: Finder, workers: int) -> Iterator[tuple[Job, Found]]:
    """Do jobs here or in worker processes.

    Parameters
    ----------
    jobs : iterable of Job
        Drawn from as workers get free, so that a long list need not exist.
    finder : Finder
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
                yield job, finder.do(job)
        finally:
            finder.close()
        return
    # Spawned, not forked: OpenSlide handles and threads of this process must not follow.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(finder,))
    try:
        waiting: deque[tuple[Job, Future[Found]]] = deque()
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


_finder: Finder | None = None


def _start_worker(finder: Finder) -> None:
    global _finder
    _finder = finder


def _work(job: Job) -> Found:
    assert _finder is not None
    return _finder.do(job)


def index_tiles(
    sources: Sequence[TileSource],
    spec: TileSpec,
    classes: ClassMap,
    *,
    screening: Screening | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    opener: Opener = open_source,
) -> TileIndex:
    """Find and count the tiles of annotated slides without storing pixels.

    Parameters
    ----------
    sources : sequence of TileSource
        Images with their annotations.
    spec : TileSpec
        Geometry of the tiles.
    classes : ClassMap
        Names to labels.
    screening : Screening, optional
        Which tiles are worth having.
    workers : int
        Worker processes; up to 1 means this process.
    progress : callable, optional
        Called with tiles done and tiles in all.
    opener : callable, optional
        Opens the slide of a source.

    Returns
    -------
    TileIndex
        In the order of `sources`, then of `plan_tiles`.

    Raises
    ------
    TileError
        If no tile is left.
    MissingMppError
        If `spec` is in micrometres and a slide's pixel size is unknown.
    """
    screening = screening or Screening()
    plans = plan_sources(sources, spec, classes, screening, opener)
    finder = Finder(SlideReader(sources, classes, opener=opener), classes, screening.min_labelled)
    jobs = (job for number, plan in enumerate(plans) for job in plan.jobs(number))
    done, total = 0, sum(len(plan.corners) for plan in plans)
    tables = [np.zeros((0, 6 + classes.num_classes), np.int64)]
    for job, found in run_jobs(jobs, finder, workers):
        done += len(job.pairs)
        tables.append(found.rows)
        if progress is not None:
            progress(done, total)
    index = TileIndex.of_rows(spec, classes, tuple(plan.image for plan in plans), np.concatenate(tables))
    check_index(index, total)
    return index


def check_index(index: TileIndex, planned: int) -> None:
    """Refuse an index without tiles, and say once which classes are missing.

    Parameters
    ----------
    index : TileIndex
        What was found.
    planned : int
        Tiles looked at.

    Raises
    ------
    TileError
        If the index is empty.
    """
    if not len(index):
        raise TileError(
            f"None of {planned} tiles on {len(index.images)} images holds enough labelled pixels; annotate areas of "
            f"the classes {list(index.classes.names)}, or lower min_labelled"
        )
    _log.info("%d of %d tiles hold enough labelled pixels", len(index), planned)
    missing = [name for name, pixels in zip(index.classes.names, index.class_pixels, strict=True) if not pixels]
    if missing:
        _log.warning("No tile holds a pixel of %s", ", ".join(missing))
