#!/usr/bin/env python
"""Regions per second of a slide: plain OpenSlide, plain GDAL, and what darefine reads them with.

Usage: scripts/bench/slides.py SLIDE [--regions 60] [--seed 0] [--wall]

Each way reads the same places in turn; medians. Per second of processor time, all threads together, which other work
on the machine does not change much; with --wall per second of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide

from darefine_qupath.geometry import Box
from darefine_qupath.slides import open_slide
from darefine_qupath.slides.tiff_reader import TiffReader

# Name, side in level-0 pixels, side of the result, level that plain readers are asked for.
CASES = (
    ("1000 px at level 0", 1000, 1000, 0),
    ("1000 -> 500 (500 px at level 1)", 1000, 500, 1),
    ("5000 -> 625 (625 px at level 3)", 5000, 625, 3),
    ("5000 -> 500 (a context)", 5000, 500, 3),
)


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--regions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wall", action="store_true")
    given = parser.parse_args()
    clock = time.perf_counter if given.wall else time.process_time
    plain, fast = openslide.OpenSlide(given.slide), TiffReader(given.slide)
    ours, reference = open_slide(given.slide), open_slide(given.slide, reader="openslide")
    rng = np.random.default_rng(given.seed)
    print(f"{'regions/s (median)':32}{'openslide':>11}{'darefine, openslide':>21}{'GDAL':>11}{'darefine':>10}")
    for name, side, result, level in CASES:
        places = [
            (
                int(rng.integers(0, ours.size.width - side) // 8 * 8),
                int(rng.integers(0, ours.size.height - side) // 8 * 8),
            )
            for _ in range(given.regions)
        ]
        count = round(side / 2**level)
        ways: tuple[Callable[[int, int], object], ...] = (
            lambda x, y: plain.read_region((x, y), level, (count, count)).convert("RGB"),  # noqa: B023
            lambda x, y: reference.read(Box(x, y, side, side), (result, result)),  # noqa: B023
            lambda x, y: fast.read(level, Box(x >> level, y >> level, count, count)),  # noqa: B023
            lambda x, y: ours.read(Box(x, y, side, side), (result, result)),  # noqa: B023
        )
        rates = [
            1 / statistics.median(times)
            for times in zip(*(timed(clock, ways, *place) for place in places), strict=True)
        ]
        print(f"{name:32}{rates[0]:11.0f}{rates[1]:21.0f}{rates[2]:11.0f}{rates[3]:10.0f}")
    print(f"darefine reads through {ours.reader}")


def timed(clock: Callable[[], float], ways: tuple[Callable[[int, int], object], ...], x: int, y: int) -> list[float]:
    """Return the seconds of each way to read a place."""
    seconds = []
    for way in ways:
        start = clock()
        way(x, y)
        seconds.append(clock() - start)
    return seconds


if __name__ == "__main__":
    main()
