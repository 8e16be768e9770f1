#!/usr/bin/env python3
"""Measure label map to polygons on a noisy map of 12,500 x 12,500 pixels: time, peak memory, and what comes out.

The map is four classes of blobs with ragged borders and specks; `--noise` says how ragged. Each run is a process of its
own, so that its peak memory is its own. With other work on the machine compare processor time only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import features
from rasterio.transform import Affine

from darefine_qupath.geometry import Box
from darefine_qupath.polygons import vectorize

DOWNSAMPLE, MPP = 8, 0.25


def field(side: int, rng: np.random.Generator, noise: float) -> NDArray[np.float32]:
    """Smooth bumps of three sizes, and noise per pixel."""
    total = noise * rng.standard_normal((side, side), dtype=np.float32)
    for cell, height in ((512, 1.0), (128, 0.5), (32, 0.2)):
        knots = rng.standard_normal((side // cell + 2,) * 2).astype(np.float32)
        place = np.arange(side, dtype=np.float32) / cell
        low = place.astype(int)
        share = place - low
        rows = knots[low] * (1 - share)[:, None] + knots[low + 1] * share[:, None]
        total += height * (rows[:, low] * (1 - share) + rows[:, low + 1] * share)
    return total


def noisy_map(side: int, noise: float, seed: int) -> NDArray[np.uint8]:
    """Class of the highest of four fields."""
    rng = np.random.default_rng(seed)
    best = np.full((side, side), -np.inf, np.float32)
    labels = np.zeros((side, side), np.uint8)
    for label in range(4):
        values = field(side, rng, noise)
        higher = values > best
        best[higher] = values[higher]
        labels[higher] = label
    return labels


def one_run(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Vectorise once; numbers of this process."""
    labels = np.load(path)
    side = labels.shape[0]
    layer = labels if options.layers else None
    began, cpu = time.perf_counter(), time.process_time()
    polygons = vectorize(
        labels, box=Box(0, 0, side * DOWNSAMPLE, side * DOWNSAMPLE), mpp=MPP, min_area_um2=options.min_area_um2,
        threads=options.threads, block_px=options.block_px, confidence=layer, margin=layer, runner_up=layer,
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    memory = peak_mib()
    shapes = np.array([item.geometry for item in polygons], np.object_)
    points = shapely.get_coordinates(shapes)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": round(memory),
        "polygons": len(polygons),
        "vertices": len(points),
        "most_vertices": int(shapely.get_num_coordinates(shapes).max()),
        "invalid": int((~shapely.is_valid(shapes)).sum()),
        "not_float32": int((points.astype(np.float32) != points).any(axis=1).sum()),
        "area_missing_px": float((side * DOWNSAMPLE) ** 2 - shapely.area(shapes).sum()),
        "load": round(os.getloadavg()[0], 1),
    }


def peak_mib() -> float:
    """Peak memory of this process alone; the resource module's figure starts with that of the process before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def describe(labels: NDArray[np.uint8]) -> dict[str, int]:
    """Count what the raw map would give."""
    raw = [shape["coordinates"] for shape, _ in features.shapes(labels, connectivity=4, transform=Affine.scale(2))]
    return {"raw_polygons": len(raw), "raw_vertices": sum(len(ring) for rings in raw for ring in rings)}


def main() -> None:
    """Print one line per run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=12_500, help="map pixels")
    parser.add_argument("--noise", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-px", type=int, default=2048)
    parser.add_argument("--min-area-um2", type=float, default=1000.0)
    parser.add_argument("--layers", action="store_true", help="also the means of confidence, margin and runner-up")
    parser.add_argument("--describe", action="store_true", help="also count the raw map's polygons (slow)")
    parser.add_argument("--map", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.map is not None:
        print(json.dumps(one_run(options.map, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.npy"
        labels = noisy_map(options.side, options.noise, options.seed)
        np.save(path, labels)
        if options.describe:
            print(json.dumps(describe(labels)), flush=True)
        del labels
        found = []
        for _ in range(options.runs):
            command = [sys.executable, __file__, *sys.argv[1:], "--map", str(path)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(json.dumps(found[-1]), flush=True)
    middle = {name: statistics.median(run[name] for run in found) for name in ("seconds", "cpu_seconds", "peak_mib")}
    print(json.dumps({"median": middle, "fastest": min(run["seconds"] for run in found)}))


if __name__ == "__main__":
    main()
