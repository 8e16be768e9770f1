#!/usr/bin/env python3
"""Measure prediction against the plain way of doing it, on this machine, in one run.

``forward``  the network alone: plain float32 pairs, and everything prediction does to be faster; equal scores
``shared``   part of a slide, with contexts read and encoded once or once per slice; equal maps
``labels``   a trained model's labels in the precision of this processor against float32
``overlap``  reading beside computing: the whole against the larger of the two
``memory``   slides of growing size with a network that does nothing: peak memory, time per tissue
``tiatoolbox`` TIAToolbox's SemanticSegmentor on the same slide, with the python of an environment that has it

Times are medians; with other work on the machine compare ratios only.
"""

# B N batch and contexts, H W pixels
# ruff: noqa: N803, N806

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast
from unittest import mock

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.devices import choose_precision
from darefine_qupath.geometry import Box
from darefine_qupath.models import ContextFeatures, ModelConfig, Normalization, blocks, box_within, build_model
from darefine_qupath.models.network import SegmentationNetwork
from darefine_qupath.prediction import PredictOptions, predict_slide, read_score_map
from darefine_qupath.prediction import slide as slide_module
from darefine_qupath.prediction.engine import Engine, EngineSettings
from darefine_qupath.prediction.prefetch import BatchPixels, SliceBatch
from darefine_qupath.tiles.spec import PixelSpec, TileSpec

TILE = 512
_SHARED_FROM = 12


class Idle(nn.Module):
    """A network that labels by brightness; `seconds` per slice stand for a device beside the processor."""

    def __init__(self, num_classes: int = 4, seconds: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.seconds = num_classes, seconds

    def encode_context(self, context_N3HW: Tensor) -> ContextFeatures:
        """Take next to nothing of a context."""
        return ContextFeatures(pooled=(context_N3HW[:, :, :1, :1],))

    def decode(
        self,
        slice_B3HW: Tensor,
        context: ContextFeatures,  # noqa: ARG002
        index_B: Tensor | None = None,  # noqa: ARG002
        box_B4: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Wait, then give the brightness in as many shares as there are classes."""
        time.sleep(self.seconds * len(slice_B3HW))
        gray_B1HW = slice_B3HW.mean(1, keepdim=True)
        return torch.cat([gray_B1HW * (label + 1) / self.num_classes for label in range(self.num_classes)], 1)


def checkpoint(network: nn.Module, tiles: TileSpec) -> Any:  # noqa: ANN401
    """Stand in for a `Checkpoint` around any network."""
    names = tuple(f"class {label}" for label in range(4))
    return SimpleNamespace(
        tiles=tiles, classes=ClassMap(names=names), normalization=Normalization(), provenance={}, model_id="benchmark",
        build=lambda: network,
    )  # fmt: skip


def medians(ways: dict[str, tuple[Callable[[], object], int]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds per slice of some calls, each for a number of slices, by the clock that was asked for.

    Taken in turns, so that other work on the machine hits all of them.
    """
    clock = time.process_time if args.processor_time else time.perf_counter
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, (function, slices) in ways.items():
            start = clock()
            function()
            times[way].append((clock() - start) / slices)
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def forward(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the network's plain use with ours, on one context and some of its slices (naive: the first few of them).

    Plain is what one writes first: float32, contiguous, torch's own pooling, and the whole network for every slice.
    """
    example = Example(args.size, args.slices)
    config = ModelConfig(slice_encoder=args.encoder, context_encoder=args.encoder, width=args.width, dropout=0)
    network = build_model(config, seed=0).eval()
    image, around = (Normalization().apply(torch.from_numpy(pixels[None].copy())) for pixels in example.first_pair)
    image, around = image.contiguous(), around.contiguous()

    def plain() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(image, around)
            return logits.softmax(1)

    results: dict[str, Any] = {
        "slices": args.slices,
        "network": config.title,
        "input_px": args.size,
        "threads": torch.get_num_threads(),
        "clock": "processor" if args.processor_time else "wall",
        "part of the multiply-adds that is the context's": context_share(network, image, around),
    }
    plain()
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "plain float32": (partial(with_torchs_pooling, plain), 1),
        "plain float32, our pooling": (plain, 1),
    }
    kinds = tuple(dict.fromkeys((*args.precision, choose_precision("auto", torch.device("cpu")))))
    few = min(args.slices, 3 * args.batch)
    for kind in kinds:
        settings = EngineSettings(device="cpu", precision=kind, batch_size=args.batch)
        engine = Engine(copy.deepcopy(network), Normalization(), settings)
        # The comparison is their warm-up.
        naive, shared = example.naive(engine, few), example.shared(engine, few)
        results[f"{kind}, largest difference of a score, naive to shared"] = max(
            float(np.abs(a[0] - b[0]).max()) for a, b in zip(naive, shared, strict=True)
        )
        ways[f"{kind} naive"] = (partial(example.naive, engine, few), few)
        ways[f"{kind} shared"] = (partial(example.shared, engine, args.slices), args.slices)
    times = medians(ways, args)
    results |= {f"{way}, s/slice": seconds for way, seconds in times.items()}
    for kind in kinds:
        results[f"{kind}, shared is faster by"] = times[f"{kind} naive"] / times[f"{kind} shared"]
        results[f"{kind}, together faster than plain by"] = times["plain float32"] / times[f"{kind} shared"]
    return results


def with_torchs_pooling(function: Callable[[], object]) -> None:
    """Call with torch's kernel in the place of our pooling."""
    ours = blocks.max_pool_5x5
    blocks.max_pool_5x5 = partial(nn.functional.max_pool2d, kernel_size=5, stride=1, padding=2)
    try:
        function()
    finally:
        blocks.max_pool_5x5 = ours


class Example:
    """A context and some of the slices inside it; smooth pictures, since noise is a picture that no slide shows."""

    def __init__(self, side: int, number: int) -> None:
        rng = np.random.default_rng(0)
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
        picture = np.asarray(coarse.resize((5 * side, 5 * side)))
        self.context = np.asarray(Image.fromarray(picture).resize((side, side)))
        corners = range(0, 4 * side + 1, side // 2)
        places = [Box(x, y, side, side) for y in corners for x in corners]
        places = places[:: max(1, len(places) // number)][:number]
        self.slices = [picture[box.y : box.bottom, box.x : box.right] for box in places]
        whole = Box(0, 0, 5 * side, 5 * side)
        self.boxes = np.array([box_within(box, whole) for box in places], np.float32)

    @property
    def first_pair(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """A slice and its context."""
        return self.slices[0], self.context

    def shared(self, engine: Engine, number: int) -> list[Any]:
        """Score the first slices with the context encoded once."""
        features = engine.encode([self.context])
        return self._scored(engine, number, lambda count: (features, [0] * count))

    def naive(self, engine: Engine, number: int) -> list[Any]:
        """Score the first slices with the context encoded for each."""
        return self._scored(engine, number, lambda count: (engine.encode([self.context] * count), list(range(count))))

    def _scored(self, engine: Engine, number: int, context_of: Callable[[int], tuple[Any, list[int]]]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, number, engine.batch_size):
            part = slice(start, min(number, start + engine.batch_size))
            images = self.slices[part]
            features, index = context_of(len(images))
            found += engine.score(images, features, index, self.boxes[part], [(0, 0)] * len(images)).fetch()
        return found


def context_share(network: SegmentationNetwork, image: Tensor, around: Tensor) -> float:
    """Count the multiply-adds of a pair: no sharing can save more than this part of them."""
    with torch.inference_mode(), FlopCounterMode(display=False) as context:
        features = network.encode_context(around)
    with torch.inference_mode(), FlopCounterMode(display=False) as rest:
        network.decode(image, features)
    share: float = context.get_total_flops() / (context.get_total_flops() + rest.get_total_flops())
    return share


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """Predict the 25 slices of one context, which is read and encoded once, or once per slice; equal maps."""
    config = ModelConfig(slice_encoder=args.encoder, context_encoder=args.encoder, width=args.width, dropout=0)
    model = checkpoint(build_model(config, seed=0), TileSpec.paper())
    results: dict[str, Any] = {"network": config.title}
    with tempfile.TemporaryDirectory() as folder:
        slide = args.slide or write_slide(Path(folder) / "slide.tif", 20_000, 1.0)
        # Touched by the slices in the middle of the context at (5000, 5000), and by no others.
        within = shapely.box(6750, 6750, 8250, 8250)
        times: dict[str, list[float]] = {"naive": [], "shared": []}
        clock = time.process_time if args.processor_time else time.perf_counter
        for _ in range(args.repeats):
            for name, share in (("naive", False), ("shared", True)):
                options = PredictOptions(
                    device="cpu", tissue=False, resume=False, share_context=share, workers=args.workers, within=within
                )
                start = clock()
                found = predict_slide(slide, model, out=Path(folder) / name, options=options)
                times[name].append(clock() - start)
                results["slices"] = found.num_slices
        maps = [read_score_map(Path(folder) / name).read("confidence").astype(int) for name in times]
    for name, seconds in times.items():
        results[f"{name}, s"] = statistics.median(seconds)
    results["largest difference of a score, 0 to 255"] = int(np.abs(maps[0] - maps[1]).max())
    results["shared is faster by"] = results["naive, s"] / results["shared, s"]
    return results


def overlap(args: argparse.Namespace) -> dict[str, Any]:
    """Read only, compute only, and both, with a device that works beside the processor.

    To compute is all but reading: what the network does on the processor, and blending and writing, too.
    """
    tiles = TileSpec.paper()
    options = PredictOptions(device="cpu", precision="fp32", workers=args.workers, tissue=False, resume=False)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        slide = args.slide or write_slide(Path(folder) / "slide.tif", 20_000, 1.0)

        def run(seconds: float) -> float:
            start = time.perf_counter()
            found = predict_slide(
                slide, checkpoint(Idle(seconds=seconds), tiles), out=Path(folder) / "map", options=options
            )
            results["slices"] = found.num_slices
            return time.perf_counter() - start

        def without_reading(seconds: float) -> float:
            with mock.patch.object(slide_module, "read_batch", unread):
                return run(seconds)

        run(0.0)
        reading = run(0.0)
        results["reading, with next to no computing, s"] = reading
        for factor in (0.5, 1.0, 2.0):
            seconds = factor * reading / results["slices"]
            computing, total = without_reading(seconds), run(seconds)
            results[f"computing alone {computing:.1f} s, both {total:.1f} s: over the larger"] = total / max(
                reading, computing
            )
    return results


def unread(handles: object, spec: PixelSpec, batch: SliceBatch) -> BatchPixels:  # noqa: ARG001 (as `read_batch` has it)
    """Stand in for `read_batch` where reading is to take no time."""
    image, context = (np.full((side, side, 3), 200, np.uint8) for side in (spec.input_px, spec.context_input_px))
    return BatchPixels(batch, (image,) * len(batch.slices), (context,) * len(batch.new_contexts), ())


def labels(args: argparse.Namespace) -> dict[str, Any]:
    """Predict a slide with a trained model in float32 and in the precision of this processor."""
    if args.slide is None or args.model is None:
        raise SystemExit("labels needs --slide and --model (a trained one)")
    kinds = ["fp32", choose_precision("auto", torch.device("cpu"))]
    maps = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            options = PredictOptions(device="cpu", precision=cast("Any", kind), resume=False, workers=args.workers)
            maps[kind] = predict_slide(args.slide, args.model, out=Path(folder) / kind, options=options).read("class")
    seen = maps["fp32"] != IGNORE
    return {
        "pixels": int(seen.sum()),
        f"part that {kinds[1]} labels otherwise": float((maps["fp32"] != maps[kinds[1]])[seen].mean()),
    }


def write_slide(path: Path, side: int, tissue: float) -> Path:
    """Write a pyramidal TIFF with a disc of tissue; its tiles share their data, so that it is small.

    Parameters
    ----------
    path : Path
        The file.
    side : int
        Pixels of level 0 along either axis.
    tissue : float
        Part of the slide that the disc covers.

    Returns
    -------
    Path
        The file.
    """
    rng = np.random.default_rng(0)
    shared = [jpeg(np.full((TILE, TILE, 3), 244, np.uint8))]
    shared += [jpeg(stained(rng.normal(0, 25, (32, 32, 3)), (TILE, TILE))) for _ in range(8)]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        places = [append(file, data) for data in shared]
        pointer, downsample = 4, 1
        while side / downsample > TILE or downsample == 1:
            level = math.ceil(side / downsample)
            per_row = math.ceil(level / TILE)
            if per_row >= _SHARED_FROM:
                inside = disc(per_row, TILE * downsample / side, tissue)
                tiles = [places[kind] for kind in np.where(inside, rng.integers(1, 9, inside.shape), 0).ravel()]
            else:
                # A tile of a coarse level shows the edge of the disc: it is drawn.
                whole = np.full((per_row * TILE,) * 2 + (3,), 244, np.uint8)
                inside = disc(per_row * TILE, downsample / side, tissue)
                whole[inside] = stained(rng.normal(0, 9, (int(inside.sum()), 3)), None)
                squares = whole.reshape(per_row, TILE, per_row, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
                tiles = [append(file, jpeg(square)) for square in squares]
            pointer = write_level(file, pointer, level, downsample, tiles)
            downsample *= 4
    return path


def disc(num: int, step: float, tissue: float) -> NDArray[np.bool_]:
    """Which of `num` by `num` squares, each `step` of the slide wide, have their centre in the disc."""
    centers = (np.arange(num) + 0.5) * step - 0.5
    return centers[:, None] ** 2 + centers[None] ** 2 <= (tissue / math.pi if tissue < 1 else 1)


def stained(noise: NDArray[np.float64], size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Noise around the colour of H&E, enlarged to `size`."""
    pixels = (noise + np.array([190, 120, 175])).clip(0, 255).astype(np.uint8)
    return pixels if size is None else np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Compress a tile."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=85, subsampling=2)
    return stream.getvalue()


def append(file: BinaryIO, data: bytes) -> tuple[int, int]:
    """Write some bytes and say where they are."""
    place = file.tell(), len(data)
    file.write(data)
    return place


def write_level(file: BinaryIO, pointer: int, side: int, downsample: int, tiles: list[tuple[int, int]]) -> int:
    """Write one directory, enter it at `pointer`, and return where the next one is to be entered."""
    offsets, lengths = zip(*tiles, strict=True)
    at = file.tell() + file.tell() % 2
    file.seek(at)
    per_cm = 10_000 / (0.25 * downsample)
    extra = struct.pack("<3H", 8, 8, 8) + struct.pack("<2I", round(per_cm * 1000), 1000)
    arrays = struct.pack(f"<{len(offsets)}I", *offsets) + struct.pack(f"<{len(lengths)}I", *lengths)
    file.write(extra + arrays)
    bits, resolution, first = at, at + 6, at + 14
    inline = len(offsets) == 1
    tags = [
        (254, 4, 1, int(downsample > 1)), (256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, bits), (259, 3, 1, 7),
        (262, 3, 1, 6), (277, 3, 1, 3), (282, 5, 1, resolution), (283, 5, 1, resolution), (284, 3, 1, 1),
        (296, 3, 1, 3), (322, 3, 1, TILE), (323, 3, 1, TILE),
        (324, 4, len(offsets), offsets[0] if inline else first),
        (325, 4, len(lengths), lengths[0] if inline else first + 4 * len(offsets)),
        (530, 3, 2, 2 | 2 << 16),
    ]  # fmt: skip
    directory = file.tell() + file.tell() % 2
    file.seek(directory)
    file.write(struct.pack("<H", len(tags)))
    for tag, kind, count, value in tags:
        file.write(struct.pack("<HHII", tag, kind, count, value))
    following = file.tell()
    file.write(struct.pack("<I", 0))
    end = file.tell()
    file.seek(pointer)
    file.write(struct.pack("<I", directory))
    file.seek(end)
    return following


_ONE_SIZE = """
import json, sys, time
from pathlib import Path


def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024


namespace = {"__name__": "bench"}
exec(compile(Path(sys.argv[1]).read_text(), sys.argv[1], "exec"), namespace)
start, busy = time.perf_counter(), time.process_time()
options = namespace["PredictOptions"](device="cpu", precision="fp32", resume=False)
model = namespace["checkpoint"](namespace["Idle"](), namespace["TileSpec"].paper())
before = memory("VmRSS")
found = namespace["predict_slide"](sys.argv[2], model, out=Path(sys.argv[3]), options=options)
files = sum(found.path(layer).stat().st_size for layer in ("class", "confidence", "margin", "runner_up"))
times = {"seconds": time.perf_counter() - start, "processor s": time.process_time() - busy}
print(json.dumps({**times, "slices": found.num_slices, "peak MB": memory("VmHWM"),
                  "before MB": before, "map MB": files / 2**20}))
"""


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Predict slides of growing size, each in a process of its own."""
    results: dict[str, Any] = {}
    for side in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            slide = write_slide(Path(folder) / "slide.tif", side, args.tissue)
            command = [sys.executable, "-c", _ONE_SIZE, __file__, str(slide), str(Path(folder) / "map")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            found["file MB"] = slide.stat().st_size / 2**20
            found["processor ms per slice"] = 1000 * found["processor s"] / found["slices"]
            results[f"{side} x {side}"] = found
    return results


_POINTWISE = """
import json, sys, time
from pathlib import Path
import torch


def layer():
    # The same weights on both sides; this seed's labels are regions with some speckle, not noise.
    torch.manual_seed(4)
    return torch.nn.Conv2d(3, 4, 1)


def report(start, busy, **more):
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    times = {"wall s": time.perf_counter() - start, "processor s": time.process_time() - busy}
    print(json.dumps({**times, "peak MB": int(peak.split()[1]) / 1024, **more}))


slide, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
"""

_TIATOOLBOX = (
    _POINTWISE
    + """
import tiatoolbox
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC


class Pointwise(ModelABC):
    def __init__(self):
        super().__init__()
        self.layer = layer()
        self.class_dict = {label: f"class {label}" for label in range(4)}

    def forward(self, image):
        return self.layer(image)

    @staticmethod
    def postproc(image):
        return image.argmax(-1)

    @staticmethod
    def infer_batch(model, batch, *, device="cpu"):
        image = batch.to(device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            return model(image).softmax(1).permute(0, 2, 3, 1).cpu().numpy()


half = [{"units": "baseline", "resolution": 0.5}]
config = IOSegmentorConfig(
    input_resolutions=half, output_resolutions=half, save_resolution=half[0],
    patch_input_shape=[500, 500], patch_output_shape=[500, 500], stride_shape=[250, 250],
)
start, busy = time.perf_counter(), time.process_time()
SemanticSegmentor(model=Pointwise(), batch_size=8, num_workers=0, verbose=False).run(
    images=[slide], ioconfig=config, patch_mode=False, output_type="zarr" if kind == "map" else "qupath",
    device="cpu", save_dir=out / "out", overwrite=True, auto_get_mask=False,
)
report(start, busy, version=tiatoolbox.__version__)
"""
)

_OURS = (
    _POINTWISE
    + """
import shapely
from darefine_qupath.models import ContextFeatures, Normalization
from darefine_qupath.polygons import vectorize
from darefine_qupath.prediction import PredictOptions, predict_slide
from darefine_qupath.tiles.spec import TileSpec

namespace = {"__name__": "bench"}
exec(compile(Path(sys.argv[4]).read_text(), sys.argv[4], "exec"), namespace)


class Pointwise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = layer()
        self.config = namespace["SimpleNamespace"](uses_context=False)

    def encode_context(self, context):
        return ContextFeatures()

    def decode(self, image, context, index=None, box=None):
        return self.layer(image)


model = namespace["checkpoint"](Pointwise(), TileSpec.paper())
model.normalization = Normalization(mean=(0, 0, 0), std=(1, 1, 1))
stride, smallest = int(sys.argv[5]), float(sys.argv[6])
start, busy = time.perf_counter(), time.process_time()
options = PredictOptions(device="cpu", precision="fp32", tissue=False, resume=False, overlap=0.5, output_stride=stride)
found = predict_slide(slide, model, out=out, options=options)
features = []
if kind == "polygons":
    layers = {name: (lambda window, name=name: found.read(name, window)) for name in ("class", "confidence")}
    polygons = vectorize(
        layers["class"], box=found.box, size=found.size, mpp=found.mpp, min_area_um2=smallest,
        confidence=layers["confidence"],
    )
    features = [
        {"type": "Feature", "geometry": json.loads(shapely.to_geojson(polygon.geometry)),
         "properties": {"classification": {"name": f"class {polygon.label}"}}}
        for polygon in polygons
    ]
    (out / "out.json").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
report(start, busy, slices=found.num_slices)
"""
)


def tiatoolbox(args: argparse.Namespace) -> dict[str, Any]:
    """Run TIAToolbox and ourselves over one slide: 500 px at half of level 0, stride 250, one 1x1 convolution.

    Ours once as users get it (a map pixel is 4 x 4 pixels of the input, regions below 1000 um^2 go to their
    surroundings) and once with as much in the map and the polygons as theirs.
    """
    if args.slide is None or args.tiatoolbox is None:
        raise SystemExit("the comparison needs --slide, and --tiatoolbox PYTHON of an environment with it")
    ours = [sys.executable, "-c", _OURS]
    ways = {
        "TIAToolbox": ([args.tiatoolbox, "-c", _TIATOOLBOX], []),
        "darefine": (ours, [__file__, "4", "1000"]),
        "darefine, every input pixel and region": (ours, [__file__, "1", "0"]),
    }
    results: dict[str, Any] = {}
    for kind in ("map", "polygons"):
        found = {name: _measured(command, args.slide, kind, more) for name, (command, more) in ways.items()}
        theirs = found["TIAToolbox"]
        for name, own in found.items():
            own["TIAToolbox over this"] = {key: theirs[key] / own[key] for key in ("wall s", "processor s", "peak MB")}
            print(
                f"{kind:9}{name:40}" + "".join(_cell(own, key) for key in ("wall s", "processor s", "peak MB")),
                flush=True,
            )
        results[kind] = found
    return results


def _cell(found: dict[str, Any], key: str) -> str:
    return f"  {found[key]:8.1f} {key} ({found['TIAToolbox over this'][key]:.1f}x)"


def _measured(command: list[str], slide: Path, kind: str, more: list[str]) -> dict[str, Any]:
    """Run a process; what it says of itself, and how many of the polygons that it wrote are valid."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*command, str(slide), folder, kind, *more]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        for path in Path(folder).rglob("*.json"):
            if kind == "polygons" and path.name != "scoremap.json":
                shapes = [json.dumps(feature["geometry"]) for feature in json.loads(path.read_text())["features"]]
                valid = shapely.is_valid(shapely.from_geojson(shapes, on_invalid="ignore"))
                found |= {
                    "polygons": len(shapes),
                    "invalid": int((~valid).sum()),
                    "file MB": path.stat().st_size / 2**20,
                }
    return found


def main() -> None:
    """Parse the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT")
    parser.add_argument(
        "--slices", type=int, default=25,
        help="slices of a context: the paper's tiles make it 25 as prediction lays them out, 81 as training does",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=500, help="side of slices and context in pixels")
    parser.add_argument("--encoder", default="efficientnet-lite0", help="the default is what trains without a GPU")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread, for a machine with other work: implies --threads 1",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--slide", type=Path, default=None)
    parser.add_argument("--model", type=Path, default=None, help="of 'labels'")
    parser.add_argument(
        "--precision", nargs="*", default=["fp32"], help="of 'forward', besides the one that suits this processor"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--tissue", type=float, default=0.05, help="part of the synthetic slides that is tissue")
    parser.add_argument("--tiatoolbox", default=None, metavar="PYTHON", help="of an environment with TIAToolbox")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.processor_time else args.threads)
    known = {
        "forward": forward,
        "shared": shared,
        "labels": labels,
        "overlap": overlap,
        "memory": memory,
        "tiatoolbox": tiatoolbox,
    }
    unknown = [what for what in args.what if what not in known]
    if unknown:
        parser.error(f"{unknown} is not one of {list(known)}")
    usual = ["forward", "overlap", "memory"] if args.tiatoolbox is None else ["tiatoolbox"]
    for what in args.what or usual:
        print(json.dumps({what: known[what](args)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
