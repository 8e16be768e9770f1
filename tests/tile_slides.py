"""Slides for the tile tests: in memory, and pyramids on disk, with pixels that encode their position."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

from darefine_qupath.geometry import Box, Size
from darefine_qupath.slides import Slide
from darefine_qupath.tiles.plan import TilePair
from darefine_qupath.tiles.reading import read_context, read_slice
from darefine_qupath.tiles.spec import PixelSpec


@dataclass
class ArraySlide:
    """A slide in memory; `read` takes the pixels at the centres, and counts itself."""

    pixels: np.ndarray
    mpp: float | None = 0.5
    path: Path = Path("array")
    reads: list[tuple[Box, tuple[int, int]]] = field(default_factory=list)
    is_closed: bool = False

    @property
    def size(self) -> Size:
        return Size(self.pixels.shape[1], self.pixels.shape[0])

    @property
    def levels(self) -> tuple[Size, ...]:
        return (self.size,)

    def read(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        self.reads.append((box, size))
        x = np.floor(box.x + (np.arange(size[0]) + 0.5) * box.width / size[0]).astype(int)
        y = np.floor(box.y + (np.arange(size[1]) + 0.5) * box.height / size[1]).astype(int)
        inside = ((y >= 0) & (y < self.size.height))[:, None] & ((x >= 0) & (x < self.size.width))
        found = self.pixels[y.clip(0, self.size.height - 1)][:, x.clip(0, self.size.width - 1)]
        return np.where(inside[..., None], found, np.uint8(255))

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> ArraySlide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ramps(width: int, height: int) -> np.ndarray:
    """Return triangle waves of x, of y and of x half a turn on: a pixel to the side is a grey level."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.abs((value % 400) - 200) + 20 for value in (x, y, x + 100)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write_pyramid(path: Path, pixels: np.ndarray, downsamples: tuple[int, ...] = (), mpp: float | None = 0.5) -> Path:
    """Write a tiled TIFF whose levels are means of level 0, cut short where a downsample does not divide it."""
    levels, rng = [pixels], np.random.default_rng(0)
    for step in downsamples:
        height, width = pixels.shape[0] // step, pixels.shape[1] // step
        blocks = pixels[: height * step, : width * step].reshape(height, step, width, step, 3)
        # Halves go up or down by chance: always to even would move a ramp by half a pixel.
        levels.append(np.floor(blocks.mean(axis=(1, 3)) + rng.random((height, width, 3))).astype(np.uint8))
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                level, tile=(64, 64), photometric="rgb", compression="zlib", subfiletype=int(number > 0), **resolution
            )
    return path


def area_means(pixels: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Mean of the level-0 pixels under each pixel of the result, by area; white beyond the image."""
    rows = _shares(box.y, box.height, size[1], pixels.shape[0])
    columns = _shares(box.x, box.width, size[0], pixels.shape[1])
    means = np.stack([rows @ pixels[..., channel] @ columns.T for channel in range(3)], axis=-1)
    covered = np.outer(rows.sum(axis=1), columns.sum(axis=1))
    return np.asarray(means + 255 * (1 - covered[..., None]))


def _shares(start: int, length: int, number: int, total: int) -> np.ndarray:
    """Matrix of how much of each output pixel every input pixel makes up, along one axis."""
    edges = start + np.arange(number + 1) * length / number
    pixels = np.arange(total)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(overlap.clip(0) * number / length)


class PairPixels(NamedTuple):
    slice: np.ndarray
    context: np.ndarray


def read_pair(slide: Slide, pair: TilePair, spec: PixelSpec) -> PairPixels:
    """Read slice and context of an undamaged slide."""
    return PairPixels(read_slice(slide, pair.slice, spec), read_context(slide, pair.context, spec)[0])


def centered(box: Box, size: tuple[int, int]) -> Box:
    """Box of the given size around the same center, up and left where they differ by an odd number."""
    return Box(box.x + (box.width - size[0]) // 2, box.y + (box.height - size[1]) // 2, *size)
