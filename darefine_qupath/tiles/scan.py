"""Find the tiles of annotated slides that are worth training on, and count what is in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import SlideError, TileError
from darefine_qupath.geometry import Box
from darefine_qupath.masks import LabelPainter
from darefine_qupath.slides import Slide, tissue_mask
from darefine_qupath.tiles.index import TileImage, TileIndex
from darefine_qupath.tiles.jobs import ScannedTiles, TileJob, TileScanner, run_jobs
from darefine_qupath.tiles.plan import TilePair, plan_training_tiles
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.tiles.sources import Opener, TileSource, open_source, spec_on
from darefine_qupath.tiles.spec import PixelSpec, TileSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ImagePlan",
    "TileFilter",
    "TileProgress",
    "index_of_plans",
    "index_tiles",
    "jobs_of",
    "plan_sources",
    "scan_plans",
]

_JOB_TILES = 128
_log = logging.getLogger(__name__)

TileProgress = Callable[[int, int], None]
"""Called with tiles done and tiles in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileFilter:
    """Which tiles are kept.

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

    def jobs(self, number: int) -> Iterator[TileJob]:
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
            yield TileJob(number, self.image.id, spec, tuple(pairs))


def plan_sources(
    sources: Sequence[TileSource],
    spec: TileSpec,
    classes: ClassMap,
    tile_filter: TileFilter,
    opener: Opener,
) -> tuple[ImagePlan, ...]:
    """Plan the tiles of every source that may hold a label; the arguments are those of `index_tiles`."""
    ids = [source.id for source in sources]
    if len(set(ids)) != len(ids):
        raise TileError(
            f"Several images have the id {sorted({i for i in ids if ids.count(i) > 1})}; ids must be unique"
        )
    plans = tuple(_plan_source(source, spec, classes, tile_filter, opener) for source in sources)
    empty = [plan.image.name for plan in plans if not len(plan.corners)]
    if empty:
        _log.warning("%d of %d images give no tiles: %s", len(empty), len(plans), ", ".join(empty))
    return plans


def _plan_source(
    source: TileSource, spec: TileSpec, classes: ClassMap, tile_filter: TileFilter, opener: Opener
) -> ImagePlan:
    painter = LabelPainter(source.annotations, classes)
    with opener(source) as slide:
        image = source.image(slide)
        pixels = spec_on(spec, image)
        keep = _slice_filter(slide, image.mpp, painter, tile_filter)
    pairs = plan_training_tiles(image.size, pixels, keep=keep)
    corners = [(pair.slice.x, pair.slice.y, pair.context.x, pair.context.y) for pair in pairs]
    return ImagePlan(image=image, spec=pixels, corners=np.array(corners, np.int32).reshape(-1, 4))


def _slice_filter(
    slide: Slide, mpp: float | None, painter: LabelPainter, tile_filter: TileFilter
) -> Callable[[Box], bool] | None:
    """Choose which slices may hold labels: near an annotation, or on tissue where the unlabelled has a class."""
    if painter.class_map.unlabelled_label == IGNORE or painter.has_regions:
        return painter.touches
    if tile_filter.min_tissue == 0:
        return None
    tissue = tissue_mask(slide, mpp=mpp)
    return lambda box: painter.touches(box) or tissue.fraction(box) >= tile_filter.min_tissue


def index_tiles(
    sources: Sequence[TileSource],
    spec: TileSpec,
    classes: ClassMap,
    *,
    tile_filter: TileFilter | None = None,
    workers: int = 0,
    progress: TileProgress | None = None,
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
    tile_filter : TileFilter, optional
        Which tiles are kept.
    workers : int
        Worker processes; up to 1 means this process.
    progress : callable, optional
        Called with tiles done and tiles in all.
    opener : callable, optional
        Opens the slide of a source.

    Returns
    -------
    TileIndex
        In the order of `sources`, then of `plan_training_tiles`.

    Raises
    ------
    TileError
        If no tile is left.
    MissingMppError
        If `spec` is in micrometres and a slide's pixel size is unknown.
    """
    tile_filter = tile_filter or TileFilter()
    plans = plan_sources(sources, spec, classes, tile_filter, opener)
    scanner = TileScanner(SlideTileReader(sources, classes, opener=opener), classes, tile_filter.min_labelled)
    found: dict[str, ScannedTiles] = {}
    scan_plans(plans, scanner, found, workers=workers, progress=progress)
    return index_of_plans(plans, found, spec, classes)


def scan_plans(
    plans: Sequence[ImagePlan],
    scanner: TileScanner,
    found: dict[str, ScannedTiles],
    *,
    workers: int,
    progress: TileProgress | None,
    note: Callable[[TileJob, ScannedTiles], None] | None = None,
) -> None:
    """Do the jobs of plans that are not done yet.

    Parameters
    ----------
    plans : sequence of ImagePlan
        Of every image.
    scanner : TileScanner
        What does a job.
    found : dict of str to ScannedTiles
        What jobs found, by their key; filled here.
    workers : int
        Worker processes; up to 1 means this process.
    progress : callable, optional
        Called with tiles done and tiles in all.
    note : callable, optional
        Called with every job and what it found.

    Raises
    ------
    SlideError
        If tiles cannot be read and none is left.
    """
    total = sum(len(plan.corners) for plan in plans)
    done = sum(len(job.pairs) for job in jobs_of(plans) if job.key in found)
    if done:
        _log.info("%d of %d tiles were done before", done, total)
    missing = (job for job in jobs_of(plans) if job.key not in found)
    unreadable: list[str] = []
    mended: list[str] = []
    for job, tiles in run_jobs(missing, scanner, workers):
        found[job.key] = tiles
        if note is not None:
            note(job, tiles)
        unreadable += tiles.unreadable
        mended += tiles.mended
        done += len(job.pairs)
        if progress is not None:
            progress(done, total)
    if unreadable and not any(len(tiles.rows) for tiles in found.values()):
        raise SlideError(unreadable[0])
    if unreadable:
        _log.warning("%d tiles cannot be read and are left out; the first: %s", len(unreadable), unreadable[0])
    if mended:
        _log.warning("%d contexts are white where the slide is damaged; the first: %s", len(mended), mended[0])


def jobs_of(plans: Iterable[ImagePlan]) -> Iterator[TileJob]:
    """Cut the plans of all images into jobs."""
    return (job for number, plan in enumerate(plans) for job in plan.jobs(number))


def index_of_plans(
    plans: Sequence[ImagePlan], found: Mapping[str, ScannedTiles], spec: TileSpec, classes: ClassMap
) -> TileIndex:
    """Index what the jobs of all plans found, and say once which classes are missing.

    Raises
    ------
    TileError
        If no tile holds enough labels.
    """
    tables = [found[job.key].rows.reshape(-1, 6 + classes.num_classes) for job in jobs_of(plans)]
    rows = np.concatenate(tables) if tables else ()
    index = TileIndex.of_rows(spec, classes, tuple(plan.image for plan in plans), rows)
    planned = sum(len(plan.corners) for plan in plans)
    if not len(index):
        raise TileError(
            f"None of {planned} tiles on {len(index.images)} images holds enough labelled pixels; annotate areas of "
            f"the classes {list(index.classes.names)}, or lower min_labelled"
        )
    _log.info("%d of %d tiles hold enough labelled pixels", len(index), planned)
    missing = [name for name, pixels in zip(index.classes.names, index.class_pixels, strict=True) if not pixels]
    if missing:
        _log.warning("No tile holds a pixel of %s", ", ".join(missing))
    return index
