"""Read label masks: one label per pixel, as PNG or TIFF with the classes as a palette."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import shapely
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.features import shapes
from shapely.geometry import shape

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import IGNORE, Color
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.imported import Imported
from darefine_qupath.exchange.label_mask_writer import LABELS_TAG, mask_size
from darefine_qupath.exchange.request import ReadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_label_mask"]

_MAX_PIXELS = 500_000_000
_IGNORE_CLASS = "Ignore*"
_LISTED = 8


def read_label_mask(request: ReadRequest) -> Imported:
    """Turn a label mask into polygons, one per connected area.

    Parameters
    ----------
    request : ReadRequest
        PNG or TIFF of one 8-bit or 16-bit band. Without `labels` the classes are those that `write_label_tiff` noted in
        the file; else every label but 0 is ``Label <n>``, and 255 beside them ``Ignore*`` in a mask of no label beyond
        it. Without `image_size` it covers what it notes, else its own size.

    Returns
    -------
    Imported
        In level-0 pixels. Pixel edges are kept: neither simplified nor smoothed.

    Raises
    ------
    ExchangeError
        If the file cannot be read, is no label mask, has several pages of its size, has none of the labels that are
        asked for or only one that says nothing (255), or does not have the shape of the image.
    """
    if request.class_from:
        raise ExchangeError("it is a label mask, which has no fields; give its classes with --label N=CLASS")
    collector, labels = request.collector(), request.labels
    pixels, palette, notes = _read(request.path)
    scale_x, scale_y = _scale(collector, pixels, request.image_size, notes, stretch=request.stretch)
    known = _classes(collector, pixels, labels, notes)
    known = {label: collector.class_name(name) or name for label, name in known.items()}
    for label, name in known.items():
        collector.color(name, palette.get(label))
    is_known = np.zeros(np.iinfo(pixels.dtype).max + 1, bool)
    is_known[[label for label in known if label < len(is_known)]] = True
    for geometry, value in shapes(pixels, mask=is_known[pixels], connectivity=4):
        polygon = shapely.transform(shape(geometry), lambda points: points * (scale_x, scale_y))
        item = f"an area of label {int(value)}"
        usable = collector.shape(item, polygon)
        if usable is not None:
            collector.add(item, Annotation(geometry=usable, path_class=known[int(value)]))
    return collector.result("label mask")


def _read(path: Path) -> tuple[NDArray[np.uint8 | np.uint16], dict[int, Color], dict[str, Any]]:
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
                _check_pages(path, dataset)
                palette = {key: Color(*value[:3]) for key, value in _colormap(dataset).items()}
                return dataset.read(1), palette, _notes(dataset.tags().get(LABELS_TAG))
    except RasterioError as error:
        raise ExchangeError(f"{path}: the mask cannot be read ({error})") from error


def _check_pages(path: Path, dataset: rasterio.DatasetReader) -> None:
    """Refuse a TIFF of several masks; smaller pages are its pyramid."""
    for name in dataset.subdatasets[1:]:
        with rasterio.open(name) as page:
            if page.width * page.height >= dataset.width * dataset.height:
                raise ExchangeError(
                    f"{path}: {len(dataset.subdatasets)} pages, of which more than one is a whole mask; save each mask "
                    f"as a file of its own"
                )


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
    collector: Collector,
    pixels: NDArray[np.uint8 | np.uint16],
    labels: Mapping[int, str] | None,
    notes: Mapping[str, Any],
) -> dict[int, str]:
    """Class of each label; what is left out or taken for granted is noted."""
    counts = np.bincount(pixels.ravel())
    present = [int(value) for value in np.flatnonzero(counts)]
    if labels is not None:
        if not set(labels) & set(present):
            raise ExchangeError(
                f"{collector.path}: no pixel has the label {_listed(sorted(labels))}; the mask has {_listed(present)}"
            )
        return _chosen(collector, counts, {0: "", **labels}, "--label")
    if isinstance(notes.get("names"), list):
        named = {label: name for label, name in enumerate(notes["names"]) if isinstance(name, str) and name.strip()}
        return _chosen(collector, counts, {**named, IGNORE: _IGNORE_CLASS}, "class")
    found = [value for value in present if value != 0]
    if found == [IGNORE]:
        raise ExchangeError(
            f"{collector.path}: a mask whose only label is {IGNORE} does not say what it shows; give its class with "
            f"--label {IGNORE}=CLASS"
        )
    if not found:
        collector.warnings.append(f"{collector.path}: every pixel is 0, the mask labels nothing")
    is_ignored = IGNORE in found and max(found) == IGNORE
    if is_ignored:
        collector.warnings.append(
            f"{collector.path}: label {IGNORE} ({counts[IGNORE]} px) was taken for {_IGNORE_CLASS}; --label gives it a "
            f"class"
        )
    return {value: _IGNORE_CLASS if value == IGNORE and is_ignored else f"Label {value}" for value in found}


def _chosen(collector: Collector, counts: NDArray[np.intp], labels: Mapping[int, str], what: str) -> dict[int, str]:
    """Labels that have a name; the others that the mask holds are said to be left out."""
    left_out = [value for value in np.flatnonzero(counts).tolist() if value not in labels]
    if left_out:
        pixels = int(counts[left_out].sum())
        collector.warnings.append(
            f"{collector.path}: label {_listed(left_out)} ({pixels} px) has no {what} and is left out"
        )
    return {label: name for label, name in labels.items() if name}


def _listed(values: Sequence[int]) -> str:
    shown = ", ".join(str(value) for value in values[:_LISTED])
    return shown if len(values) <= _LISTED else f"{shown} and {len(values) - _LISTED} more"


def _scale(
    collector: Collector,
    pixels: NDArray[np.uint8 | np.uint16],
    image_size: tuple[int, int] | None,
    notes: Mapping[str, Any],
    *,
    stretch: bool,
) -> tuple[float, float]:
    """Level-0 pixels per mask pixel."""
    height, width = pixels.shape
    downsample, noted = _noted_downsample(notes), _noted_size(notes)
    if image_size is not None and not stretch:
        _check_shape(collector.path, (width, height), image_size, noted)
    whole = image_size or noted
    if downsample is not None and (whole is None or (width, height) == mask_size(whole, downsample)):
        return float(downsample), float(downsample)
    if whole is None:
        return 1.0, 1.0
    if downsample is not None:
        collector.warnings.append(
            f"{collector.path}: notes a downsample of {downsample}, which its {width} x {height} px do not have; it "
            f"was scaled to the image of {whole[0]} x {whole[1]}"
        )
    return whole[0] / width, whole[1] / height


def _noted_downsample(notes: Mapping[str, Any]) -> int | None:
    value = notes.get("downsample")
    return value if type(value) is int and 0 < value < 2**31 else None


def _noted_size(notes: Mapping[str, Any]) -> tuple[int, int] | None:
    match notes.get("image_size"):
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    return None


def _check_shape(path: Path, size: tuple[int, int], image_size: tuple[int, int], noted: tuple[int, int] | None) -> None:
    """Refuse a mask that no single downsample, of whole pixels at the edges, makes of the image."""
    if noted is not None and noted != image_size:
        raise ExchangeError(
            f"{path}: made of an image of {noted[0]} x {noted[1]} px, this one has {image_size[0]} x "
            f"{image_size[1]}; give the right --image, or --stretch to scale it all the same"
        )
    least = max(whole / (part + 1) for whole, part in zip(image_size, size, strict=True))
    most = min(whole / max(part - 1, 0.5) for whole, part in zip(image_size, size, strict=True))
    if least >= most:
        raise ExchangeError(
            f"{path}: a mask of {size[0]} x {size[1]} px has another aspect ratio ({size[0] / size[1]:.3f}) than the "
            f"image of {image_size[0]} x {image_size[1]} ({image_size[0] / image_size[1]:.3f}); it may belong to "
            f"another image or a part of it. Give --stretch to scale it all the same"
        )
