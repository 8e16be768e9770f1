"""Write label masks as TIFF, with the class colors as palette and notes by which they are read back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from darefine_qupath.classes import IGNORE, Color
from darefine_qupath.errors import ExchangeError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.geometry import Box, Size
from darefine_qupath.masks import LabelPainter

__all__ = ["LABELS_TAG", "mask_size", "write_label_tiff"]

LABELS_TAG = "DAREFINE_LABELS"
_TILE = 512
_IGNORE_COLOR = Color(235, 235, 235)


def write_label_tiff(painter: LabelPainter, image_size: tuple[int, int], path: Path | str, *, downsample: int) -> Size:
    """Write the labels of an image as a tiled TIFF with the class colors as its palette.

    Parameters
    ----------
    painter : LabelPainter
        Annotations and classes.
    image_size : tuple of int
        Width and height of the image in level-0 pixels.
    path : Path or str
        The file, ``.tif``; replaced as a whole, or not at all.
    downsample : int
        Level-0 pixels per pixel of the mask.

    Returns
    -------
    Size
        Of the mask: the last column and row may overhang the image.

    Raises
    ------
    ExchangeError
        If the downsample is not positive, or the file cannot be written.
    """
    size = mask_size(image_size, downsample)
    profile = {
        "driver": "GTiff",
        "width": size.width,
        "height": size.height,
        "count": 1,
        "dtype": "uint8",
        "compress": "deflate",
        "tiled": True,
        "blockxsize": _TILE,
        "blockysize": _TILE,
        "photometric": "palette",
        "BIGTIFF": "IF_SAFER",
    }
    try:
        with atomic_write(Path(path), ExchangeError) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(temporary, "w", **profile) as dataset:
                dataset.write_colormap(1, _palette(painter))
                dataset.update_tags(**{LABELS_TAG: _described(painter, image_size, downsample)})
                for window, mask in _tiles(painter, image_size, size, downsample):
                    dataset.write(mask, 1, window=Window(window.x, window.y, window.width, window.height))
    except RasterioError as error:
        raise ExchangeError(f"{path}: the mask cannot be written ({error})") from error
    return size


def mask_size(image_size: tuple[int, int], downsample: int) -> Size:
    """Width and height of the mask of an image; the last column and row may overhang it."""
    if downsample < 1:
        raise ExchangeError(f"A label mask needs a downsample of at least 1, got {downsample}")
    return Size(-(-image_size[0] // downsample), -(-image_size[1] // downsample))


def _described(painter: LabelPainter, image_size: tuple[int, int], downsample: int) -> str:
    """Describe the mask for `read_label_mask`, as JSON."""
    names = list(painter.class_map.names)
    return json.dumps({"names": names, "downsample": downsample, "image_size": list(image_size), "ignore": IGNORE})


def _tiles(
    painter: LabelPainter, image_size: tuple[int, int], size: Size, downsample: int
) -> Iterator[tuple[Box, NDArray[np.uint8]]]:
    """Tiles of a mask, each with its place in it."""
    for y in range(0, size.height, _TILE):
        for x in range(0, size.width, _TILE):
            window = Box(x, y, min(_TILE, size.width - x), min(_TILE, size.height - y))
            box = Box(x * downsample, y * downsample, window.width * downsample, window.height * downsample)
            yield window, painter.paint(box, window.size, image_size=image_size)


def _palette(painter: LabelPainter) -> dict[int, Color]:
    colors = dict(enumerate(painter.class_map.colors))
    return {label: colors.get(label, _IGNORE_COLOR if label == IGNORE else Color(0, 0, 0)) for label in range(256)}
