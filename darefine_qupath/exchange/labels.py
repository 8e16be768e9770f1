"""Label masks: one label per pixel, as PNG or TIFF with the classes as a palette."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import shapely
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.features import shapes
from rasterio.windows import Window
from shapely.geometry import shape

from darefine_qupath.annotations import Annotation, LabelPainter
from darefine_qupath.atomic import replacing
from darefine_qupath.classes import IGNORE, Colour
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.records import Collector, Imported
from darefine_qupath.geometry import Box, Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["read_label_mask", "write_label_png", "write_label_tiff"]

_MAX_PIXELS = 500_000_000
_TAG = "DAREFINE_LABELS"
_TILE = 512
_IGNORE_COLOUR = Colour(235, 235, 235)
_IGNORE_CLASS = "Ignore*"


def read_label_mask(
    path: Path, *, labels: Mapping[int, str] | None = None, image_size: tuple[int, int] | None = None
) -> Imported:
    """Turn a label mask into polygons, one per connected area.

    Parameters
    ----------
    path : Path
        PNG or TIFF of one 8-bit or 16-bit band.
    labels : mapping of int to str, optional
        Class of each label; others are left out. Default what `write_label_tiff` noted in the file; else every label
        but 0 is ``Label <n>``, and 255 ``Ignore*``.
    image_size : tuple of int, optional
        Width and height of the image that the mask covers, in level-0 pixels; default what the file notes, else the
        mask's own size.

    Returns
    -------
    Imported
        In level-0 pixels. Pixel edges are kept: neither simplified nor smoothed.

    Raises
    ------
    ExchangeError
        If the file cannot be read, or is no label mask.
    """
    pixels, palette, notes = _read(path)
    known = _classes(pixels, labels, notes)
    collector = Collector(path)
    for label, name in known.items():
        collector.colour(name, palette.get(label))
    scale_x, scale_y = _scale(pixels, image_size, notes)
    is_known = np.zeros(np.iinfo(pixels.dtype).max + 1, bool)
    is_known[[label for label in known if label < len(is_known)]] = True
    for geometry, value in shapes(pixels, mask=is_known[pixels], connectivity=4):
        polygon = shapely.transform(shape(geometry), lambda points: points * (scale_x, scale_y))
        item = f"an area of label {int(value)}"
        usable = collector.shape(item, polygon)
        if usable is not None:
            collector.add(item, Annotation(geometry=usable, path_class=known[int(value)]))
    return collector.result("label mask")


def _read(path: Path) -> tuple[NDArray[np.uint8 | np.uint16], dict[int, Colour], dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as dataset:
                if dataset.count != 1 or dataset.dtypes[0] not in ("uint8", "uint16"):
                    raise ExchangeError(
                        f"{path}: {dataset.count} bands of {dataset.dtypes[0]} are no label mask; it has one band of "
                        f"8 or 16 bits, a label per pixel"
                    )
                if dataset.width * dataset.height > _MAX_PIXELS:
                    raise ExchangeError(
                        f"{path}: a mask of {dataset.width} x {dataset.height} pixels is too large to be traced (at "
                        f"most {_MAX_PIXELS:,}); reduce it, and give the size of the image"
                    )
                palette = {key: Colour(*value[:3]) for key, value in _colormap(dataset).items()}
                return dataset.read(1), palette, _notes(dataset.tags().get(_TAG))
    except RasterioError as error:
        raise ExchangeError(f"{path}: the mask cannot be read ({error})") from error


def _colormap(dataset: rasterio.DatasetReader) -> dict[int, tuple[int, ...]]:
    try:
        found: dict[int, tuple[int, ...]] = dataset.colormap(1)
    except ValueError:
        return {}
    return found


def _notes(text: str | None) -> dict[str, Any]:
    try:
        notes = json.loads(text or "{}")
    except json.JSONDecodeError:
        return {}
    return notes if isinstance(notes, dict) else {}


def _classes(
    pixels: NDArray[np.uint8 | np.uint16], labels: Mapping[int, str] | None, notes: Mapping[str, Any]
) -> dict[int, str]:
    if labels is not None:
        return dict(labels)
    if isinstance(notes.get("names"), list):
        return {**{label: str(name) for label, name in enumerate(notes["names"])}, IGNORE: _IGNORE_CLASS}
    found = (int(value) for value in np.unique(pixels))
    return {value: _IGNORE_CLASS if value == IGNORE else f"Label {value}" for value in found if value != 0}


def _scale(
    pixels: NDArray[np.uint8 | np.uint16], image_size: tuple[int, int] | None, notes: Mapping[str, Any]
) -> tuple[float, float]:
    """Level-0 pixels per mask pixel."""
    downsample = notes.get("downsample")
    if isinstance(downsample, int) and downsample > 0:
        return float(downsample), float(downsample)
    if image_size is None:
        return 1.0, 1.0
    return image_size[0] / pixels.shape[1], image_size[1] / pixels.shape[0]


def write_label_tiff(painter: LabelPainter, image_size: tuple[int, int], path: Path | str, *, downsample: int) -> Size:
    """Write the labels of an image as a tiled TIFF with the class colours as its palette.

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
    size = _mask_size(image_size, downsample)
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
        with replacing(Path(path), ExchangeError) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(temporary, "w", **profile) as dataset:
                dataset.write_colormap(1, _palette(painter))
                dataset.update_tags(**{_TAG: _described(painter, image_size, downsample)})
                for window, mask in _tiles(painter, image_size, size, downsample):
                    dataset.write(mask, 1, window=Window(window.x, window.y, window.width, window.height))
    except RasterioError as error:
        raise ExchangeError(f"{path}: the mask cannot be written ({error})") from error
    return size


def write_label_png(painter: LabelPainter, image_size: tuple[int, int], path: Path | str, *, downsample: int) -> Size:
    """Write the labels of an image as a palette PNG, which any viewer shows in the class colours.

    Parameters
    ----------
    painter : LabelPainter
        Annotations and classes.
    image_size : tuple of int
        Width and height of the image in level-0 pixels.
    path : Path or str
        The file, ``.png``; replaced as a whole, or not at all.
    downsample : int
        Level-0 pixels per pixel of the mask.

    Returns
    -------
    Size
        Of the mask, which is held in memory as a whole.

    Raises
    ------
    ExchangeError
        If the downsample is not positive, the mask is too large for memory, or the file cannot be written.
    """
    size = _mask_size(image_size, downsample)
    if size.width * size.height > _MAX_PIXELS:
        raise ExchangeError(
            f"{path}: a PNG of {size.width} x {size.height} pixels is too large; take a larger downsample than "
            f"{downsample}, or a TIFF"
        )
    canvas = np.empty((size.height, size.width), np.uint8)
    for window, mask in _tiles(painter, image_size, size, downsample):
        canvas[window.y : window.bottom, window.x : window.right] = mask
    image = Image.fromarray(canvas, "P")
    image.putpalette([band for colour in _palette(painter).values() for band in colour])
    notes = PngInfo()
    notes.add_text(_TAG, _described(painter, image_size, downsample))
    with replacing(Path(path), ExchangeError) as temporary:
        image.save(temporary, "png", pnginfo=notes)
    return size


def _mask_size(image_size: tuple[int, int], downsample: int) -> Size:
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


def _palette(painter: LabelPainter) -> dict[int, Colour]:
    colours = dict(enumerate(painter.class_map.colours))
    return {label: colours.get(label, _IGNORE_COLOUR if label == IGNORE else Colour(0, 0, 0)) for label in range(256)}
