#!/usr/bin/env python
"""Tiles per second of a slide in the paper's geometry, beside plain OpenSlide reading the slices alone.

Usage: scripts/bench/tiles.py SLIDE [--project PROJECT] [--parents 4] [--rounds 3] [--wall] [--tiatoolbox PYTHON]

Slices of 1000 px every 500 px inside contexts of 5000 px, both as 500 px; the same slices in every way, one way after
the other in every round; medians. Annotations are the project's, or a generated one. Per second of processor time of
all threads, which other work on the machine changes little; with --wall per second of the clock. Memory is the peak
of a process that builds a dataset of the whole slide, once with few tiles and once with three times as many. Give
the Python of an environment with TIAToolbox to run its sliding-window extractor over the same slide, in its own
process: slices alone, without contexts or masks.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import groupby
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path

import numpy as np
import openslide
import shapely

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import ClassMap
from darefine_qupath.masks import LabelPainter
from darefine_qupath.project import open_project
from darefine_qupath.slides import Slide, open_slide
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.plan import TilePair, plan_training_tiles
from darefine_qupath.tiles.reading import hold_slices, read_context, read_slice
from darefine_qupath.tiles.scan import TileFilter
from darefine_qupath.tiles.slide_reader import paint_mask
from darefine_qupath.tiles.sources import TileSource, open_source
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import Storage

TIATOOLBOX = """
import itertools, resource, sys, time
from tiatoolbox.tools.patchextraction import get_patch_extractor
path, number, clock = sys.argv[1], int(sys.argv[2]), getattr(time, sys.argv[3])
found = get_patch_extractor(
    "slidingwindow", input_img=path, patch_size=(500, 500), stride=(250, 250), resolution=0.5, units="baseline"
)
start = clock()
read = sum(1 for _ in itertools.islice(found, number))
print(read / (clock() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

SPEC = TileSpec.paper()
PIXELS = SPEC.at(None)
EVERYTHING = TileFilter(min_labelled=0, min_tissue=0)


def source_of(slide: Path, project: Path | None) -> tuple[TileSource, ClassMap]:
    """Give the slide with its annotations, and classes of which the first stands for the unlabelled."""
    if project is None:
        with open_slide(slide) as image:
            width, height = image.size
        angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
        radius = 0.35 * min(width, height) * (1 + 0.1 * np.sin(9 * angle) + 0.01 * np.sin(200 * angle))
        ring = np.column_stack([width / 2 + radius * np.cos(angle), height / 2 + radius * np.sin(angle)])
        notes: tuple[Annotation, ...] = (Annotation(geometry=shapely.Polygon(ring), path_class="Tumor"),)
        return TileSource(id="1", name=slide.name, path=slide, annotations=notes), _classes(("Normal", "Tumor"))
    with open_project(project, engine="embedded") as opened:
        entry = next(image for image in opened.images if image.path is not None and image.path.name == slide.name)
        names = tuple(path_class.name for path_class in opened.classes if not path_class.name.endswith("*"))
        notes = opened.annotations(entry)
    return TileSource(id=entry.id, name=entry.name, path=slide, annotations=notes), _classes(names)


def _classes(names: tuple[str, ...]) -> ClassMap:
    return ClassMap(names=names, unlabelled=names[0])


def plain(slide: openslide.OpenSlide, pairs: list[TilePair], level: int) -> None:
    """Read the slices alone, as a loop over `read_region` does."""
    side = 1000 >> level
    for pair in pairs:
        slide.read_region((pair.slice.x, pair.slice.y), level, (side, side)).convert("RGB")


def in_memory(slide: Slide, painter: LabelPainter, pairs: list[TilePair]) -> None:
    """Read slices and contexts and paint masks; a context is read once per parent."""
    for context, group in groupby(pairs, key=attrgetter("context")):
        slices = [pair.slice for pair in group]
        near = hold_slices(slide, slices, PIXELS)
        read_context(slide, context, PIXELS)
        for box in slices:
            read_slice(near, box, PIXELS)
            paint_mask(painter, box, PIXELS, slide.size)


def context_each(slide: Slide, painter: LabelPainter, pairs: list[TilePair]) -> None:
    """Read every slice's context anew."""
    for pair in pairs:
        read_slice(slide, pair.slice, PIXELS)
        read_context(slide, pair.context, PIXELS)
        paint_mask(painter, pair.slice, PIXELS, slide.size)


def to_disk(source: TileSource, classes: ClassMap, spec: TileSpec, storage: Storage) -> int:
    """Build a dataset of the whole slide in a folder that goes away; gives the number of tiles."""
    with tempfile.TemporaryDirectory() as folder:
        return len(build_dataset([source], spec, classes, Path(folder), tile_filter=EVERYTHING, storage=storage))


def peak_mb(source: TileSource, classes: ClassMap, stride_px: int) -> tuple[int, float, bool]:
    """Tiles, peak memory of this process after building a dataset, and whether torch was loaded."""
    number = to_disk(source, classes, replace(SPEC, stride_px=stride_px), Storage())
    return number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "torch" in sys.modules


def main() -> None:
    """Print a line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--project", type=Path)
    parser.add_argument("--parents", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--tiatoolbox", type=Path, metavar="PYTHON")
    given = parser.parse_args()
    clock = time.perf_counter if given.wall else time.process_time
    source, classes = source_of(given.slide, given.project)
    slide, raw = open_source(source), openslide.OpenSlide(given.slide)
    # OpenSlide itself reads where GDAL does not agree with it.
    reference = open_slide(given.slide, reader="openslide")
    painter = LabelPainter(source.annotations, classes)
    groups = [list(group) for _, group in groupby(plan_training_tiles(slide.size, PIXELS), key=attrgetter("context"))]
    # Whole parents from the middle of the plan, so that no slice overhangs the slide.
    chosen = [group for group in groups if len(group) == 81][: given.parents] or groups[:1]
    pairs = [pair for group in chosen for pair in group]
    ways: dict[str, Callable[[], int | None]] = {
        "openslide read_region, 500 px at level 1": lambda: plain(raw, pairs, 1),
        "openslide read_region, 1000 px at level 0": lambda: plain(raw, pairs, 0),
        "slice, context, mask": lambda: in_memory(slide, painter, pairs),
        "slice, context, mask, OpenSlide alone": lambda: in_memory(reference, painter, pairs),
        "slice, context, mask, a context each": lambda: context_each(slide, painter, pairs),
        "to disk, JPEG 95": lambda: to_disk(source, classes, SPEC, Storage()),
        "to disk, lossless WebP": lambda: to_disk(source, classes, SPEC, Storage(pixels="webp")),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            start = clock()
            number = way() or len(pairs)
            rates[name].append(number / (clock() - start))
    base = statistics.median(rates["openslide read_region, 500 px at level 1"])
    print(f"{len(pairs)} slices of {len(chosen)} parents; {'clock' if given.wall else 'processor'} time")
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:44}{median:8.0f} slices/s{median / base:8.1f} x")
    if given.tiatoolbox is not None:
        tiatoolbox(given.tiatoolbox, given.slide, len(pairs), wall=given.wall)
    for stride in (1500, 500):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            number, peak, has_torch = pool.submit(peak_mb, source, classes, min(stride, 1000)).result()
        print(f"peak of a worker after {number} tiles: {peak:.0f} MB{' (torch loaded)' if has_torch else ''}")


def tiatoolbox(python: Path, slide: Path, number: int, *, wall: bool) -> None:
    """Print the rate and the peak memory of TIAToolbox, in its own process."""
    clock = "perf_counter" if wall else "process_time"
    words = [str(python), "-c", TIATOOLBOX, str(slide), str(number), clock]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    rate, peak = (float(word) for word in done.stdout.split()[-2:])
    print(f"{'TIAToolbox, 500 px slices alone':44}{rate:8.0f} slices/s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
