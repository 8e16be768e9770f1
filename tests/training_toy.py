"""Tiles in memory for the tests of training: classes that differ in colour, and everything around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.geometry import Size
from darefine_qupath.models import ModelConfig
from darefine_qupath.tiles.index import TileImage, TileIndex, TileRecord
from darefine_qupath.tiles.slide_reader import TilePixels
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig, TrainResult, train
from darefine_qupath.training.tile_dataset import TileDataset

CLASSES = ClassMap(names=("Normal", "Benign", "Invasive"))
COLORS = np.array([[200, 160, 190], [120, 60, 140], [60, 40, 110]])


class ToyReader:
    """Pixels and masks that follow from a tile's place: two classes per tile, parted by a line, with noise."""

    def __init__(self, spec: TileSpec, bad: str | None = None) -> None:
        self.spec = spec
        self.bad = bad

    def read(self, record: TileRecord) -> TilePixels:
        if record.id == self.bad:
            raise RuntimeError(f"tile {record.id} cannot be read")
        size = self.spec.input_px
        seed = record.pair.slice.x // record.pair.slice.width
        return TilePixels(*toy_pixels(size, self.spec.context_input_px or size, seed))


def toy_pixels(size: int, context_size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    edge = rows * np.sin(seed) + columns * np.cos(seed) > size * (np.sin(seed) + np.cos(seed)) / 2
    mask = np.where(edge, seed % 3, (seed + 1) % 3).astype(np.uint8)
    image = COLORS[mask] + rng.normal(0, 12, (size, size, 3))
    context = COLORS[seed % 3] + rng.normal(0, 12, (context_size, context_size, 3))
    mask[:2] = IGNORE
    return image.clip(0, 255).astype(np.uint8), context.clip(0, 255).astype(np.uint8), mask


def toy_data(num_tiles: int, size: int = 32, *, start: int = 0, bad: str | None = None) -> TileDataset:
    """Tiles of one wide slide, left to right."""
    spec = toy_spec(size)
    image = TileImage(id="a", name="a.svs", size=Size(40 * (start + num_tiles + 4), 200))
    rows = []
    for seed in range(start, start + num_tiles):
        mask = toy_pixels(size, size, seed)[2]
        counts = np.bincount(mask.ravel(), minlength=256)
        rows.append([0, 40 * seed, 80, 40 * seed - 80, 0, *counts[:3], counts[IGNORE]])
    return TileDataset(TileIndex.of_rows(spec, CLASSES, (image,), rows), ToyReader(spec, bad))


def toy_spec(size: int = 32) -> TileSpec:
    return TileSpec(input_px=size, slice_px=40, context_px=200, stride_px=40, placement="centred")


def toy_model(**changes: object) -> ModelConfig:
    """The smallest network there is; without dropout unless asked for."""
    settings = {"network": "unet", "width": 16, "num_classes": 3, "dropout": 0.0, **changes}
    return ModelConfig(**settings)


def toy_config(**changes: object) -> TrainConfig:
    settings = {"epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu", **changes}
    return TrainConfig.from_mapping(settings)


def toy_train(out: Path, config: TrainConfig | None = None, **changes: object) -> TrainResult:
    """Train on ten tiles, validate on four."""
    settings = {"train_data": toy_data(10), "val_data": toy_data(4, start=30), "model": toy_model(), **changes}
    return train(
        settings.pop("train_data"),
        settings.pop("val_data"),
        config=config or toy_config(),
        out=out,
        class_map=settings.pop("classes", CLASSES),
        tile_spec=toy_spec(),
        **settings,
    )
