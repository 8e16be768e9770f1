"""Read COCO JSON: polygons, run lengths and boxes by image and category."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import ExchangeError
from darefine_qupath.exchange.collector import Collector
from darefine_qupath.exchange.request import ReadRequest
from darefine_qupath.exchange.run_lengths import RunLengths
from darefine_qupath.exchange.values import band_color, hex_color, scalars

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from darefine_qupath.exchange.class_fields import ClassChoice
    from darefine_qupath.exchange.imported import Imported

__all__ = ["holds_coco", "read_coco"]

_CATEGORY, _SUPER = "category", "supercategory"
_OWN = ("id", "image_id", "category_id", "area", "iscrowd", "score", "segmentation", "bbox")

_ASPECT_TOLERANCE = 0.01


def holds_coco(data: object) -> bool:
    """Whether JSON is a COCO data set, or the list of results that detectors write."""
    if isinstance(data, dict):
        return isinstance(data.get("annotations"), list) and bool({"images", "categories"} & data.keys())
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, dict) and "category_id" in first and bool({"segmentation", "bbox"} & first.keys())


def read_coco(request: ReadRequest, data: object) -> Imported:
    """Read the annotations of one image.

    Parameters
    ----------
    request : ReadRequest
        The file and the image; a file of a single image is taken for it. The class stands in ``category`` (the
        default), ``supercategory``, or an attribute.
    data : object
        Its JSON, of which `holds_coco` is true.

    Returns
    -------
    Imported
        One annotation per annotation of the image.

    Raises
    ------
    ExchangeError
        If the image is not in the file, or has another shape.
    """
    collector, path = request.collector(), request.path
    table: dict[str, Any] = data if isinstance(data, dict) else {"annotations": data}
    images = _dicts(table.get("images"))
    image = _image(path, images, request)
    if image is None:
        _check_one_image(path, table["annotations"])
    else:
        _warn_of_another_name(collector, image, request)
    categories = _by_id(path, _dicts(table.get("categories")), "categories", "name")
    reader = _Reader(collector, categories, _scale(collector, image, request), _size(image) or request.image_size)
    others = 0
    for index, entry in enumerate(table["annotations"]):
        if image is not None and isinstance(entry, dict) and not _is_of(entry, image):
            others += 1
            continue
        item = f"annotation {index}"
        with collector.item(item):
            reader.read(item, entry)
    if others and others == len(table["annotations"]) and len(images) == 1:
        raise ExchangeError(
            f"{path}: the image_id of none of its {others} annotations is the id of its only image "
            f"({str(images[0].get('id'))[:20]!r})"
        )
    if others:
        collector.warnings.append(f"{path}: {others} annotations of other images are left out")
    return collector.result("COCO JSON")


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _key(value: object) -> str | None:
    """Make an id comparable: 1, 1.0 and "1" are the same; None where it is no id."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, (str, int)) else None


def _is_of(entry: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    key = _key(image.get("id"))
    return key is not None and _key(entry.get("image_id")) == key


def _by_id(path: Path, entries: Sequence[Mapping[str, Any]], what: str, name: str) -> dict[str, Mapping[str, Any]]:
    """Entries of a table by their id; an id that means two things is refused."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        key = _key(entry.get("id"))
        if key is None:
            continue
        other = found.setdefault(key, entry)
        if other.get(name) != entry.get(name):
            names = f"{str(other.get(name))[:60]!r} and {str(entry.get(name))[:60]!r}"
            raise ExchangeError(f"{path}: two {what} have the id {key[:20]}: {names}")
    return found


def _check_one_image(path: Path, entries: Sequence[object]) -> None:
    """Refuse annotations of several images where no table says which image is which."""
    ids = sorted({str(_key(entry.get("image_id"))) for entry in entries if isinstance(entry, dict)})
    if len(ids) > 1:
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise ExchangeError(
            f"{path}: annotations of {len(ids)} images (image_id {shown}) without a list of images that says which "
            f"is which; keep those of one image, or add 'images'"
        )


def _warn_of_another_name(collector: Collector, image: Mapping[str, Any], request: ReadRequest) -> None:
    name = image.get("file_name")
    if request.image_name is None or not isinstance(name, str) or _stem(name) == _stem(request.image_name):
        return
    collector.warnings.append(f"{collector.path}: its image is {name[:60]!r}, taken for {request.image_name!r}")


def _image(path: Path, images: Sequence[Mapping[str, Any]], request: ReadRequest) -> Mapping[str, Any] | None:
    """Entry of the image that is asked for; None where the file lists none."""
    _by_id(path, images, "images", "file_name")
    if len(images) <= 1:
        return images[0] if images else None
    found = [
        entry for entry in images if request.image_name and _stem(entry.get("file_name")) == _stem(request.image_name)
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(repr(str(entry.get("file_name"))[:60]) for entry in images[:5])
    raise ExchangeError(
        f"{path}: COCO of {len(images)} images ({names}{', ...' if len(images) > 5 else ''}), of which {len(found)} "
        f"have the name of {request.image_name!r}; keep the entry of this image"
    )


def _stem(name: object) -> str:
    return PurePosixPath(str(name).replace("\\", "/")).name.rsplit(".", 1)[0].casefold()


def _scale(collector: Collector, image: Mapping[str, Any] | None, request: ReadRequest) -> tuple[float, float]:
    """Level-0 pixels per pixel of the image that was annotated."""
    size = _size(image)
    if request.image_size is None or size is None or size == request.image_size:
        return 1.0, 1.0
    x, y = (whole / part for whole, part in zip(request.image_size, size, strict=True))
    one_pixel = max(1 / side for side in size)
    if abs(x / y - 1) > max(_ASPECT_TOLERANCE, one_pixel):
        raise ExchangeError(
            f"{collector.path}: annotations of an image of {size[0]} x {size[1]} pixels, this one has "
            f"{request.image_size[0]} x {request.image_size[1]}; they belong to another image, or to a part of it"
        )
    collector.warnings.append(
        f"{collector.path}: drawn on a picture of {size[0]} x {size[1]} pixels; enlarged {x:.4g} times to the "
        f"image's {request.image_size[0]} x {request.image_size[1]}"
    )
    return x, y


def _size(image: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Width and height of the image that was annotated, where its entry states both."""
    sides = (0, 0) if image is None else (image.get("width"), image.get("height"))
    width, height = (
        int(side) if isinstance(side, (int, float)) and not isinstance(side, bool) and 0 < side < 2**31 else 0
        for side in sides
    )
    return (width, height) if width and height else None


class _Reader:
    """Reads the annotations of an image."""

    def __init__(
        self,
        collector: Collector,
        categories: Mapping[str, Mapping[str, Any]],
        scale: tuple[float, float],
        size: tuple[int, int] | None,
    ) -> None:
        self._collector = collector
        self._categories = categories
        self._scale = scale
        self._run_lengths = RunLengths(size)

    def read(self, item: str, entry: object) -> None:
        """Take one annotation in."""
        if not isinstance(entry, dict):
            raise ExchangeError(f"{item} is no object but a {type(entry).__name__}")
        drawn = self._geometry(entry, item)
        with np.errstate(over="ignore"):
            scaled = shapely.transform(drawn, lambda points: points * self._scale)
        geometry = self._collector.shape(item, scaled)
        if geometry is None:
            return
        category = self._categories.get(_key(entry.get("category_id")) or "", {})
        choice = self._choice(entry, category)
        color = category.get("color")
        self._collector.color(choice.name, band_color(color) or (hex_color(color) if isinstance(color, str) else None))
        self._collector.add(item, Annotation(geometry=geometry, path_class=choice.name), choice)

    def _choice(self, entry: Mapping[str, Any], category: Mapping[str, Any]) -> ClassChoice:
        attributes = entry.get("attributes")
        others = scalars({**(attributes if isinstance(attributes, dict) else {}), **entry}, _OWN)
        if category.get("supercategory"):
            others[_SUPER] = str(category["supercategory"])
        identity = entry.get("category_id")
        name = category.get("name")
        fields: dict[str, str | None] = {_CATEGORY: str(name) if name else None}
        if name is None and identity is not None:
            others["category_id"] = str(identity)
        for field in self._collector.fields.asked:
            fields.setdefault(field, others.get(field))
        return self._collector.choose(fields, {} if name else others)

    def _geometry(self, entry: Mapping[str, Any], item: str) -> BaseGeometry:
        drawn = entry.get("segmentation")
        if isinstance(drawn, dict):
            return self._run_lengths.shape(drawn, item)
        if isinstance(drawn, list) and drawn:
            polygons = [_polygon(part, item) for part in (drawn if isinstance(drawn[0], list) else [drawn])]
            # Parts of an object that a coarser one hides; where they overlap they are one.
            return polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)
        corners = entry.get("bbox")
        if not isinstance(corners, list) or len(corners) != 4:
            raise ExchangeError(f"{item} has neither a segmentation nor a box")
        x, y, width, height = np.array(corners, np.float64).tolist()
        if not math.isfinite(x + y + width + height):
            raise ExchangeError(f"{item} has a box whose corner is not a number")
        return box(x, y, x + width, y + height)


def _polygon(values: object, item: str) -> Polygon:
    corners = np.array(values, np.float64)
    if corners.ndim != 1 or len(corners) % 2 or len(corners) < 6:
        raise ExchangeError(f"{item} has a polygon of {corners.size} numbers; it takes 3 corners or more")
    if not np.isfinite(corners).all():
        raise ExchangeError(f"{item} has a coordinate that is not a number")
    return Polygon(corners.reshape(-1, 2))
