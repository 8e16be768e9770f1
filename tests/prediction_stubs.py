"""Slides made of arrays and networks that know the truth, for the tests of prediction.

``python -m tests.prediction_stubs FOLDER SECONDS...`` predicts a slide and is killed after each of the given times (of
work, start-up not counted), until the last run ends by itself.
"""

# N B contexts and slices, H W pixels
# ruff: noqa: N803

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import SlideError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.models import ContextFeatures, Normalization
from darefine_qupath.prediction import PredictionProgress, PredictOptions, ScoreMap, SlideTask, predict_slide
from darefine_qupath.tiles.spec import TileSpec

COLORS = np.array([(230, 60, 60), (60, 200, 60), (60, 60, 230)], np.uint8)
CLASSES = ClassMap(names=("A", "B", "C"))
SPEC = TileSpec(input_px=32, slice_px=64, context_px=256, stride_px=32)


@dataclass
class ArraySlide:
    """Pixels in memory; `damage` cannot be read."""

    pixels: NDArray[np.uint8]
    path: Path
    mpp: float | None = 0.5
    damage: tuple[Box, ...] = ()
    reads: list[Box] = field(default_factory=list)

    @property
    def size(self) -> Size:
        return Size(self.pixels.shape[1], self.pixels.shape[0])

    @property
    def levels(self) -> tuple[Size, ...]:
        return (self.size,)

    def read(self, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        self.reads.append(box)
        if any(box.intersection(hole) for hole in self.damage):
            raise SlideError(f"{self.path}: pixels at {box} cannot be read")
        canvas = np.full((box.height, box.width, 3), 255, np.uint8)
        shown = box.intersection(Box.of(self.size))
        if shown is not None:
            rows, columns = shown.y - box.y, shown.x - box.x
            part = self.pixels[shown.y : shown.bottom, shown.x : shown.right]
            canvas[rows : rows + shown.height, columns : columns + shown.width] = part
        return np.asarray(Image.fromarray(canvas).resize(size, Image.Resampling.BOX))

    def close(self) -> None:
        pass

    def __enter__(self) -> ArraySlide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ColorNetwork(nn.Module):
    """Says which of the colours each pixel has; a context shifts the logits by `trust` times its mean colour."""

    def __init__(self, *, sharpness: float = 20.0, trust: float = 0.0, pause: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("colors", torch.tensor(COLORS).float() / 255)
        self.sharpness, self.trust, self.pause = sharpness, trust, pause
        self.num_contexts = self.num_slices = 0

    def encode_context(self, context_N3HW: Tensor) -> ContextFeatures:
        self.num_contexts += len(context_N3HW)
        return ContextFeatures(pooled=(context_N3HW.mean((2, 3), keepdim=True),))

    def decode(
        self,
        slice_B3HW: Tensor,
        context: ContextFeatures,
        index_B: Tensor | None = None,
        box_B4: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        self.num_slices += len(slice_B3HW)
        time.sleep(self.pause)
        distance = (slice_B3HW[:, None] - self.colors[None, :, :, None, None]).square().sum(2)
        return self.trust * context.of_slices(len(slice_B3HW), index_B).pooled[0] - self.sharpness * distance


def checkpoint(
    network: nn.Module, *, tiles: TileSpec = SPEC, provenance: dict[str, Any] | None = None
) -> SimpleNamespace:
    """What prediction needs of a checkpoint, around any network."""
    return SimpleNamespace(
        tiles=tiles,
        classes=CLASSES,
        normalization=Normalization(mean=(0, 0, 0), std=(1, 1, 1)),
        provenance=provenance or {},
        model_id="0123456789ab",
        build=lambda: network,
    )


def blobs(size: tuple[int, int], *, seed: int = 0, grain: int = 40) -> NDArray[np.uint8]:
    """Labels of a random map of three classes in patches some `grain` pixels wide, shape (height, width)."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((3, size[1] // grain + 2, size[0] // grain + 2)).astype(np.float32)
    fine = [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)) for plane in coarse]
    return np.argmax(np.stack(fine), axis=0).astype(np.uint8)


def array_slide(folder: Path, labels: NDArray[np.uint8], **settings: object) -> ArraySlide:
    """Slide that shows labels in their colours; its file holds nothing."""
    path = folder / "slide.bin"
    if not path.exists():
        path.write_bytes(b"slide")
    return ArraySlide(COLORS[labels], path, **settings)


def _predict(folder: Path) -> None:
    slide = array_slide(folder, blobs((900, 1100)))
    options = PredictOptions(tissue=False, workers=2, batch_size=8, device="cpu")
    torch.set_num_threads(1)
    predict_slide(slide, checkpoint(ColorNetwork(trust=1.0, pause=0.01)), out=folder / "map", options=options)


def run_slowly(task: SlideTask, progress: Callable[[PredictionProgress], None] | None = None) -> ScoreMap:
    """Stand in for `predict_task` on a worker; leaves a file with its process id while it works."""
    task.out.mkdir(parents=True, exist_ok=True)
    slide = array_slide(task.slide.parent, blobs((500, 700), seed=int(task.key)))
    torch.set_num_threads(1)
    (task.out / f"worker-{os.getpid()}").touch()
    model = checkpoint(ColorNetwork(trust=1.0, pause=0.02))
    return predict_slide(slide, model, out=task.out, options=task.options, progress=progress)


def _killed_after(folder: Path, seconds: float) -> bool:
    """Whether a run was killed after some time rather than ending by itself."""
    child = os.fork()
    if child == 0:
        _predict(folder)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    """Run the prediction, kill it, run it again."""
    folder = Path(sys.argv[1])
    kills = sum(_killed_after(folder, float(seconds)) for seconds in sys.argv[2:])
    _predict(folder)
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    main()
