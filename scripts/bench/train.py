#!/usr/bin/env python3
"""Measure training on this machine, in one run: what the tiles deliver, what a step takes.

``data``  tiles per second out of a dataset folder and straight from slides, with as many workers as training takes
``step``  tiles per second of whole optimiser steps, augmentation included, in plain float32 (never TF32) and in every
          faster way this device has; peak memory, and the fraction of the matrix-product peak measured beside it

Usage: scripts/bench/train.py [--device cuda] [--encoder resnet50] [--size 500] [--batch 12] [--width 256] [--json]

Without a GPU the defaults are ResNet-18, width 64, and tiles of 128 px. On a CPU, times are of the clock, and other
work on the machine shows; the processor time of a step stands beside them, and fractions of the peak go by it. Memory
is then the largest resident set of the whole process, where the system tells (Linux).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from darefine_qupath.classes import ClassMap
from darefine_qupath.demo import CLASSES, draw_slide
from darefine_qupath.devices import DTYPES, choose_device, choose_precision, full_float32
from darefine_qupath.models import ModelConfig, Normalization
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.dataset import DatasetReader
from darefine_qupath.tiles.slide_reader import SlideTileReader, TileReader
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig
from darefine_qupath.training.augment import draw_augmentation
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.initialize import FrozenLayers, initial_network
from darefine_qupath.training.loader import BatchPlan, LoadedBatch, load_batches, num_workers, plan_epoch
from darefine_qupath.training.tile_dataset import TileDataset
from darefine_qupath.training.train_step import Stepper

PLAIN = "plain fp32"
WARM_STEPS = 3
ONES_2 = torch.ones(2)
CLEAR_REFS = Path("/proc/self/clear_refs")
CLASS_MAP = ClassMap(names=tuple(known.name for known in CLASSES), unlabelled="Normal")


def main() -> None:
    """Measure and print."""
    options = parse()
    device = choose_device(options.device)
    base = config_of(options, device)
    report: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        readers, data = make_tiles(Path(folder), options.size)
        report |= {"tiles": len(data), "input_px": options.size, "batch": options.batch, "workers": num_workers(base)}
        report["data"] = {
            name: bench_data(TileDataset(data.tiles, reader), base, options.seconds) for name, reader in readers.items()
        }
        first = next(
            iter(load_batches(data, plan_epoch(data.tiles, base, None, 0), workers=0, pin=device.type == "cuda"))
        )
    configs = ways(base, device, low=options.low_precision, compiled=options.compile)
    types = {
        name: str(DTYPES[choose_precision(config.precision, device, training=True)]).removeprefix("torch.")
        for name, config in configs.items()
    }
    report["peak_tflops"] = {kind: matmul_peak(device, kind) for kind in dict.fromkeys(types.values())}
    report["step"] = {
        name: {
            "type": types[name],
            **bench_step(model_of(options), config, first, device, options.steps),
        }
        for name, config in configs.items()
    }
    finish(report)
    print(json.dumps(report, indent=2) if options.json else table(report))


def parse() -> argparse.Namespace:
    """Read the command line."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--encoder", default="resnet50" if has_gpu else "resnet18", help="of slice and context")
    parser.add_argument("--size", type=int, default=500 if has_gpu else 128, help="side of a tile in pixels")
    parser.add_argument("--batch", type=int, default=12 if has_gpu else 8)
    parser.add_argument("--width", type=int, default=256 if has_gpu else 64)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=30 if has_gpu else 6, help="timed steps of each way")
    parser.add_argument("--seconds", type=float, default=10, help="to read tiles for")
    # On by default where they pay; on a CPU they can be asked for, which shows that the same code runs.
    parser.add_argument("--low-precision", action=argparse.BooleanOptionalAction, default=has_gpu)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=has_gpu)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the generated slide and its tiles")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def config_of(options: argparse.Namespace, device: torch.device) -> TrainConfig:
    """Recipe of the measured steps."""
    return TrainConfig.from_preset("modern", batch_size=options.batch, workers=options.workers, device=str(device))


def model_of(options: argparse.Namespace) -> ModelConfig:
    """Network of the measured steps."""
    return ModelConfig(slice_encoder=options.encoder, context_encoder=options.encoder, width=options.width)


def device_name(device: torch.device) -> str:
    """Name the device for people."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def make_tiles(folder: Path, size: int) -> tuple[dict[str, TileReader], TileDataset]:
    """Tiles of a generated slide: slices of twice `size` level-0 pixels in contexts of ten times, as the paper's."""
    side = max(6144, 12 * size)
    drawn = draw_slide(folder / "slide.tif", seed=1, size=(side, side))
    sources = [TileSource(id="a", name="a", path=drawn.path, annotations=drawn.annotations)]
    spec = TileSpec(input_px=size, slice_px=2 * size, context_px=10 * size, stride_px=size)
    index = build_dataset(sources, spec, CLASS_MAP, folder / "tiles")
    reader = DatasetReader(folder / "tiles")
    return {"dataset": reader, "slides": SlideTileReader(sources, CLASS_MAP)}, TileDataset(index, reader)


def bench_data(data: TileDataset, config: TrainConfig, seconds: float) -> float:
    """Tiles per second that the workers deliver, after their first batches."""
    planned: Iterator[BatchPlan] = cycle(plan_epoch(data.tiles, config, None, 0))
    batches = load_batches(data, planned, workers=num_workers(config), pin=config.device.startswith("cuda"))
    warm = 4 * num_workers(config) + 2
    for _ in islice(batches, warm):
        pass
    started, count = time.perf_counter(), 0
    for loaded in batches:
        count += len(loaded.ids)
        if time.perf_counter() - started > seconds:
            break
    return count / (time.perf_counter() - started)


def ways(base: TrainConfig, device: torch.device, *, low: bool, compiled: bool) -> dict[str, TrainConfig]:
    """Plain float32, and every faster way that was asked for."""
    plain = replace(base, precision="fp32", channels_last=False)
    fast, name = replace(plain, channels_last=True), "fp32, channels last"
    found = {PLAIN: plain, name: fast}
    if low:
        chosen = choose_precision(base.precision, device, training=True)
        precision: Literal["fp16", "bf16"] = "fp16" if chosen == "fp16" else "bf16"
        fast, name = replace(fast, precision=precision), f"{precision}, channels last"
        found[name] = fast
    if compiled:
        found[f"{name}, compiled"] = replace(fast, compile=True)
    return found


def bench_step(
    model: ModelConfig, config: TrainConfig, loaded: LoadedBatch, device: torch.device, num_steps: int
) -> dict[str, float]:
    """Tiles per second of steps on one batch, copied to the device and augmented each time."""
    # What the way before this one has left must not count as memory of this one.
    torch.compiler.reset()
    gc.collect()
    torch.backends.cudnn.benchmark = True
    network, trained = initial_network(model, config, CLASS_MAP, None)
    frozen = FrozenLayers(network, config, trained)
    stepper = Stepper(network, config, group=ProcessGroup(device=device), normalization=Normalization(), frozen=frozen)
    draws = [draw_augmentation(config, epoch=0, position=position) for position in range(config.batch_size)]
    flops = (
        0 if config.compile else 3 * count_flops(lambda: stepper.loss_of(loaded.batch.to(device), ONES_2.to(device)))
    )
    for _ in range(WARM_STEPS):
        stepper.train_on(loaded.batch, draws, 1.0)
    forget_peak_memory(device)
    took, busy, clock = [], [], busy_clock(device)
    # The queue of a GPU is filled ahead, as in training; a CPU that others use is looked at step by step.
    at_once = num_steps if device.type == "cuda" else 1
    for _ in range(num_steps // at_once):
        synchronise(device)
        started = time.perf_counter(), clock()
        for _ in range(at_once):
            stepper.train_on(loaded.batch, draws, 1.0)
        synchronise(device)
        took.append((time.perf_counter() - started[0]) / at_once)
        busy.append((clock() - started[1]) / at_once)
    seconds = statistics.median(took)
    return {
        "images_per_second": config.batch_size / seconds,
        "flops": flops,
        "seconds": seconds,
        "busy_seconds": statistics.median(busy),
        "memory_gib": peak_memory(device),
    }


def forget_peak_memory(device: torch.device) -> None:
    """Start counting anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB at most since then: on the GPU, or resident; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if not CLEAR_REFS.exists():
        return math.nan
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 2**20 if found else math.nan


def count_flops(step: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions going forward; a whole step has three times as many.

    Torch counts the backward of depthwise convolutions as if they were dense.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_clock(device: torch.device) -> Callable[[], float]:
    """Clock for rates that are compared: a CPU may be shared, so that processor time says more."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def matmul_peak(device: torch.device, kind: str) -> float:
    """Best rate of a large square matrix product of a type, in 10^12 operations per second; of one core on a CPU."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, kind)) for _ in range(2))
    took = []
    clock = busy_clock(device)
    with full_float32():
        for _ in range(20):
            synchronise(device)
            started = clock()
            a @ b
            synchronise(device)
            took.append(clock() - started)
    return float(2 * side**3 / min(took) / 1e12)


def finish(report: dict[str, Any]) -> None:
    """Add what follows from the measurements."""
    steps = report["step"]
    plain = steps[PLAIN]
    fastest = max(steps.values(), key=lambda row: row["images_per_second"])
    for row in steps.values():
        peak = report["peak_tflops"][row["type"]]
        row["speedup"] = row["images_per_second"] / plain["images_per_second"]
        row["flops"] = row["flops"] or plain["flops"]
        row["peak_fraction"] = row["flops"] / row["busy_seconds"] / 1e12 / peak
    report["data_over_step"] = {name: rate / fastest["images_per_second"] for name, rate in report["data"].items()}


def table(report: dict[str, Any]) -> str:
    """Lay out the report for people."""
    lines = [
        f"{report['device']}, {report['cores']} cores, torch {report['torch']}; tiles of {report['input_px']} px, "
        f"batch {report['batch']}, {report['workers']} workers",
        "",
        f"{'data':<32}{'tiles/s':>9}{'x fastest step':>16}",
        *(f"{name:<32}{rate:>9.1f}{report['data_over_step'][name]:>16.2f}" for name, rate in report["data"].items()),
        "",
        f"{'step':<32}{'tiles/s':>9}{'x plain':>9}{'of peak':>9}{'GiB':>7}{'s':>8}{'busy s':>8}",
        *(
            f"{name:<32}{row['images_per_second']:>9.1f}{row['speedup']:>9.2f}{row['peak_fraction']:>9.2f}"
            f"{row['memory_gib']:>7.1f}{row['seconds']:>8.3f}{row['busy_seconds']:>8.3f}"
            for name, row in report["step"].items()
        ),
        "",
        f"matrix products{'' if report['device_type'] == 'cuda' else ', one core'}: "
        + ", ".join(f"{name} {rate:.2f} TFLOP/s" for name, rate in report["peak_tflops"].items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
