"""Write a score map: its TIFFs tile by tile with their pyramids, then the JSON file that completes it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.windows import Window

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import PredictionError
from darefine_qupath.filesystem import followed, keep_attributes, replace_file
from darefine_qupath.geometry import Size
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.scoremap import BAND_ROWS, LAYERS, SIDECAR, TILE_PX, LayerName, ScoreMap, write_json

__all__ = ["write_score_map"]


_CACHE_MB = 64


def write_score_map(score_map: ScoreMap, bands: Iterable[MapRows]) -> None:
    """Write the layers and then, last, ``scoremap.json``: without it the map does not count as finished.

    Memory is that of a few hundred map rows, whatever the slide's size.

    Parameters
    ----------
    score_map : ScoreMap
        What to write about it.
    bands : iterable of MapRows
        All rows of the map from top to bottom, in pieces of any height.

    Raises
    ------
    PredictionError
        If the bands do not make up the map, or the disk does not take it.
    """
    try:
        (score_map.folder / SIDECAR).unlink(missing_ok=True)
    except OSError as error:
        raise PredictionError(f"Cannot replace {score_map.folder / SIDECAR}: {error.strerror}") from error
    targets = {layer: followed(score_map.path(layer)) for layer in LAYERS}
    partial = {layer: target.with_name(f".{layer}.partial.tif") for layer, target in targets.items()}
    try:
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_MB, GDAL_PAM_ENABLED=False, GDAL_TIFF_INTERNAL_MASK=True):
            _write_layers(score_map, bands, partial)
            for layer in LAYERS:
                _add_pyramid(partial[layer], layer, score_map.size)
        lengths = {layer: _synced(path) for layer, path in partial.items()}
        for layer, path in partial.items():
            if targets[layer].is_file():
                keep_attributes(targets[layer], path)
            replace_file(path, targets[layer])
    # Where the disk fills up while overviews are built, rasterio lets GDAL's own error through.
    except (rasterio.errors.RasterioError, CPLE_BaseError, OSError) as error:
        raise PredictionError(f"Cannot write the score map to {score_map.folder}: {error}") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    write_json(score_map.folder / SIDECAR, {**score_map.to_json(), "bytes": lengths})


def _synced(path: Path) -> int:
    """Put a file on the disk for good; gives its length."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def _write_layers(score_map: ScoreMap, bands: Iterable[MapRows], paths: Mapping[LayerName, Path]) -> None:
    writers = {layer: _create(paths[layer], layer, score_map) for layer in LAYERS}
    row = 0
    try:
        for block in _tile_rows(bands):
            height, width = block[0].shape
            window = Window(0, row, width, height)
            for layer, pixels in zip(LAYERS, block, strict=True):
                writers[layer].write(pixels, 1, window=window)
            row += height
    finally:
        for writer in writers.values():
            writer.close()
    if row != score_map.size.height:
        raise PredictionError(f"{row} rows were given for a score map of {score_map.size.height}")


def _tile_rows(bands: Iterable[MapRows]) -> Iterator[tuple[NDArray[np.uint8], ...]]:
    """Regroup rows so that every TIFF tile is written once, whole."""
    waiting: tuple[NDArray[np.uint8], ...] | None = None
    for band in bands:
        new = (band.label, band.confidence, band.margin, band.runner_up)
        waiting = new if waiting is None else tuple(np.concatenate(pair) for pair in zip(waiting, new, strict=True))
        while len(waiting[0]) >= BAND_ROWS:
            yield tuple(pixels[:BAND_ROWS] for pixels in waiting)
            waiting = tuple(pixels[BAND_ROWS:] for pixels in waiting)
    if waiting is not None and len(waiting[0]):
        yield waiting


def _create(path: Path, layer: LayerName, score_map: ScoreMap) -> Any:  # noqa: ANN401 - rasterio has no types
    scale = score_map.downsample
    writer = rasterio.open(
        path,
        "w",
        driver="GTiff",
        dtype="uint8",
        count=1,
        width=score_map.size.width,
        height=score_map.size.height,
        transform=Affine(scale, 0, score_map.box.x, 0, scale, score_map.box.y),
        tiled=True,
        blockxsize=TILE_PX,
        blockysize=TILE_PX,
        compress="deflate",
        # Differences help scores; labels are runs already, and small either way.
        predictor=2 if layer in ("confidence", "margin") else 1,
        bigtiff="IF_SAFER",
        photometric="palette" if layer in ("class", "runner_up") else "minisblack",
    )
    if layer in ("class", "runner_up"):
        writer.write_colormap(1, _palette(score_map.classes))
    if score_map.mpp is not None:
        per_cm = 10_000 / (score_map.mpp * scale)
        writer.update_tags(TIFFTAG_XRESOLUTION=per_cm, TIFFTAG_YRESOLUTION=per_cm, TIFFTAG_RESOLUTIONUNIT="3")
    writer.update_tags(TIFFTAG_SOFTWARE="darefine", TIFFTAG_IMAGEDESCRIPTION=f"{layer} by model {score_map.model_id}")
    return writer


def _palette(classes: ClassMap) -> dict[int, tuple[int, int, int, int]]:
    palette = dict.fromkeys(range(256), (0, 0, 0, 255))
    palette.update({label: (*color, 255) for label, color in enumerate(classes.colors)})
    palette[IGNORE] = (255, 255, 255, 0)
    return palette


def _add_pyramid(path: Path, layer: LayerName, size: Size) -> None:
    factors, factor = [], 2
    while max(size) / factor > TILE_PX / 2:
        factors.append(factor)
        factor *= 2
    if not factors:
        return
    # A mean of labels is another label; the mode is one that is there.
    resampling = Resampling.mode if layer in ("class", "runner_up") else Resampling.average
    with (
        rasterio.Env(COMPRESS_OVERVIEW="DEFLATE", GDAL_TIFF_OVR_BLOCKSIZE=TILE_PX),
        rasterio.open(path, "r+") as target,
    ):
        target.build_overviews(factors, resampling)
