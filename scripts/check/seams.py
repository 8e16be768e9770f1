#!/usr/bin/env python3
"""Look for seams: is a trained model wrong more often near the borders of slices and contexts than elsewhere.

Usage: scripts/check/seams.py MODEL [--seeds 1 2 3 4 5 6] [--distance 20]

On generated slides, and on slides of the same kind with no tumour, whose truth is one class throughout. Ends with 1
when the error near borders is more than a tenth above that elsewhere. What lies near a border is chance as well: the
same count is made with the borders moved about, and its range says how much the ratio varies where no border is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint
from darefine_qupath.classes import IGNORE
from darefine_qupath.demo.layout import plan_layout
from darefine_qupath.demo.painting import paint
from darefine_qupath.demo.slides import draw_slide, write_slide
from darefine_qupath.masks import LabelPainter
from darefine_qupath.prediction import PredictOptions, predict_slide
from darefine_qupath.prediction.plan import SlidePlan, plan_slide
from darefine_qupath.tiles.spec import TileSpec

MPP = 0.5
SIZE = (6144, 6144)
TOLERANCE = 1.1


@dataclass
class Count:
    """Pixels near borders and elsewhere, and how many of them are wrong."""

    near: int = 0
    near_wrong: int = 0
    far: int = 0
    far_wrong: int = 0

    def add(self, wrong: NDArray[np.bool_], known: NDArray[np.bool_], near: NDArray[np.bool_]) -> None:
        """Count the pixels of a slide."""
        self.near += int((known & near).sum())
        self.near_wrong += int((wrong & near).sum())
        self.far += int((known & ~near).sum())
        self.far_wrong += int((wrong & ~near).sum())

    @property
    def ratio(self) -> float:
        """Error near borders over error elsewhere; 1 where there is none at all."""
        elsewhere = self.far_wrong / max(1, self.far)
        here = self.near_wrong / max(1, self.near)
        return here / elsewhere if elsewhere else float(here > 0) * float("inf") if here else 1.0


def borders(plan: SlidePlan, kind: str) -> tuple[set[int], set[int]]:
    """Level-0 columns and rows on which slices, or contexts, begin and end."""
    parents = [parent for row in plan.rows for parent in row.groups]
    boxes = [parent.context for parent in parents]
    if kind == "slices":
        boxes = [box for parent in parents for box in parent.slices]
    return {x for box in boxes for x in (box.x, box.right)}, {y for box in boxes for y in (box.y, box.bottom)}


def near(edges: set[int], centers: NDArray[np.float64], distance: float) -> NDArray[np.bool_]:
    """Which of some positions lie within `distance` of an edge; the slide's own edges do not count."""
    inner = np.array([edge for edge in edges if distance < edge < SIZE[0] - distance], float)
    found: NDArray[np.bool_] = (np.abs(centers[:, None] - inner) <= distance).any(axis=1)
    return found


def plain_slide(path: Path, seed: int) -> tuple[Annotation, ...]:
    """Draw a slide without tumour: its truth is one class."""
    rng = np.random.default_rng(seed)
    layout = replace(plan_layout(SIZE, rng), nests=())
    write_slide(path, paint(layout, rng), mpp=MPP)
    return ()


def errors(
    checkpoint: Checkpoint, slide: Path, truth: tuple[Annotation, ...], out: Path
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which map pixels are wrong, and which are predicted at all."""
    found = predict_slide(slide, checkpoint, out=out, options=PredictOptions(output_stride=2))
    labels = found.read("class")
    painter = LabelPainter(truth, replace(checkpoint.classes, unlabelled="Normal"))
    known = labels != IGNORE
    wrong = (labels != painter.paint(found.box, (found.size.width, found.size.height))) & known
    return wrong, known


def ratios(
    maps: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
    edges: tuple[set[int], set[int]],
    distance: float,
    *,
    moves: int = 200,
) -> tuple[Count, NDArray[np.float64]]:
    """Count with the borders where they are, and ratios with the same borders moved about."""
    rng = np.random.default_rng(0)
    places = [(0, 0)] + [tuple(rng.integers(0, 5000, 2).tolist()) for _ in range(moves)]
    found = []
    for right, down in places:
        count = Count()
        for wrong, known in maps:
            scale = SIZE[0] / wrong.shape[1]
            centers = (np.arange(wrong.shape[1]) + 0.5) * scale
            columns, rows = (
                near(edge, (centers + move) % SIZE[0], distance)
                for edge, move in zip(edges, (right, down), strict=True)
            )
            count.add(wrong, known, columns[None] | rows[:, None])
        found.append(count)
    return found[0], np.array([count.ratio for count in found[1:]])


def main() -> int:
    """Predict, count, print; 1 when there are seams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105, 106])
    parser.add_argument("--distance", type=float, default=20, help="level-0 pixels")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model)
    tiles: TileSpec = checkpoint.tiles
    plan = plan_slide(SIZE, tiles.at(MPP), PredictOptions(output_stride=2))
    worst = 0.0
    for name, draw in (
        ("generated slides", lambda path, seed: draw_slide(path, seed=seed).annotations),
        ("one class throughout", plain_slide),
    ):
        maps = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                slide = Path(folder) / "slide.tif"
                maps.append(errors(checkpoint, slide, draw(slide, seed), Path(folder) / "map"))
        for kind in ("slices", "contexts"):
            count, moved = ratios(maps, borders(plan, kind), args.distance)
            worst = max(worst, count.ratio)
            low, high = np.quantile(moved, [0.05, 0.95])
            alone = [ratios([single], borders(plan, kind), args.distance, moves=0)[0].ratio for single in maps]
            here, elsewhere = count.near_wrong / max(1, count.near), count.far_wrong / max(1, count.far)
            part = count.near / (count.near + count.far)
            print(
                f"{name}, {kind}: error {here:.4%} within {args.distance:g} px of a border ({part:.0%} of the pixels), "
                f"{elsewhere:.4%} elsewhere: ratio {count.ratio:.3f}; borders moved about: {low:.3f} to {high:.3f}; "
                f"slide by slide {', '.join(f'{ratio:.2f}' for ratio in alone)}",
                flush=True,
            )
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
