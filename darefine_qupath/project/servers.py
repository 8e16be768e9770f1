"""Read and make server builders: how QuPath opens an image, at which size and pixel size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darefine_qupath.classes import Color
from darefine_qupath.geometry import PixelSize, Size
from darefine_qupath.limits import whole_text
from darefine_qupath.project.lenient_json import JsonObject, json_bytes, scalar_text

__all__ = [
    "BIO_FORMATS",
    "IMAGEJ",
    "OPENSLIDE",
    "Server",
    "image_metadata",
    "is_since",
    "server_builder",
    "server_json",
    "server_of",
    "with_uri",
]

OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
IMAGEJ = "qupath.imagej.images.servers.ImageJServerBuilder"
BIO_FORMATS = "qupath.lib.images.servers.bioformats.BioFormatsServerBuilder"


def release_of(version: str) -> tuple[int, int]:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_since(version: str, major: int, minor: int) -> bool:
    """Whether a QuPath version is at least `major`.`minor`; an unknown version is not."""
    return release_of(version) >= (major, minor)


_WRAPPERS = {
    "rotated": "rotated",
    "cropped": "cropped to a part of the file",
    "affine": "transformed by a matrix",
    "channels": "put together from channels of several images",
    "color": "recoloured channel by channel",
    "color_deconvolved": "split into stains",
    "normalized": "normalised in colour",
    "typeConvert": "converted to another pixel type",
    "sliced": "a part of a stack",
    "sparse": "put together from regions of several images",
    "swapRedBlue": "shown with its colour channels in another order",
    "z_projected": "projected over a stack",
    "z_concatenated": "a stack put together from several images",
}


# Neither changes a level-0 pixel: a rotation by nothing, and levels computed on the fly for a file that has none.
_TRANSPARENT = ("rotated", "pyramidize")


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """What a server builder says of its image.

    Attributes
    ----------
    uri : str or None
        As stored; the first one where there are several.
    provider : str or None
        Java class that opens it.
    args : tuple of str
        Its arguments.
    size : Size or None
        Level-0 pixels, where the builder holds metadata.
    pixel_size : PixelSize or None
        As stored, possible or not; None when not calibrated in micrometres.
    has_metadata : bool
        Whether the builder holds metadata: it is then what QuPath goes by, whatever the file says.
    unsupported : str or None
        Why level-0 pixels of the file are not those of the image.
    """

    uri: str | None = None
    provider: str | None = None
    args: tuple[str, ...] = ()
    size: Size | None = None
    pixel_size: PixelSize | None = None
    has_metadata: bool = False
    unsupported: str | None = None


def server_of(builder: Mapping[str, Any]) -> Server:
    """Read a server builder; what we cannot place safely is named in `Server.unsupported`."""
    inner, reason = _innermost(builder)
    metadata = builder.get("metadata")
    if not isinstance(metadata, Mapping) and reason is None:
        metadata = inner.get("metadata")
    uri, args, provider = inner.get("uri"), inner.get("args"), inner.get("providerClassName")
    arguments = tuple(whole_text(str(value)) for value in args) if isinstance(args, list) else ()
    return Server(
        uri=whole_text(uri) if isinstance(uri, str) else None,
        provider=whole_text(provider) if isinstance(provider, str) else None,
        args=arguments,
        size=_size(metadata),
        pixel_size=_pixel_size(metadata),
        has_metadata=_size(metadata) is not None,
        unsupported=reason or _series(arguments) or _odd_size(metadata),
    )


def _innermost(builder: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Follow wrapped builders to the file; also say why the outermost is not simply that file."""
    reason: str | None = None
    for _ in range(100):
        kind = builder.get("builderType")
        if kind == "uri":
            return builder, reason
        if kind not in _TRANSPARENT or builder.get("rotation", "ROTATE_NONE") != "ROTATE_NONE":
            reason = reason or _refusal(builder)
        below = _below(builder)
        if below is None:
            return builder, reason or _refusal(builder)
        builder = below
    return builder, f"its image server is wrapped more than 100 times ({builder.get('builderType')!r})"


def _below(builder: Mapping[str, Any]) -> Mapping[str, Any] | None:
    several = builder.get("builders") or builder.get("channels")
    below = builder.get("builder") or (several[0] if isinstance(several, list) and several else None)
    return below if isinstance(below, Mapping) else None


def _refusal(builder: Mapping[str, Any]) -> str:
    kind = builder.get("builderType")
    if not isinstance(kind, str):
        return "its image server has no builderType; QuPath itself could not open this project"
    how = _WRAPPERS.get(kind, "of a kind that is not known here")
    if kind == "rotated":
        how += f" ({builder.get('rotation')})"
    return f"its image server ({kind!r}) shows the file {how}; write that image to a file of its own in QuPath"


def _series(args: Sequence[str]) -> str | None:
    joined = " ".join(args)
    series = re.search(r"--series[= ](\d+)", joined)
    if series and int(series[1]) > 0:
        return f"it is image number {int(series[1]) + 1} of a file that holds several; write it to a file of its own"
    named = re.search(r"--name[= ](.+)", joined)
    if named:
        return f"it is image {named[1]!r} of a file that holds several; write it to a file of its own"
    return None


def _size(metadata: object) -> Size | None:
    if not isinstance(metadata, Mapping):
        return None
    width, height = metadata.get("width"), metadata.get("height")
    if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 and max(width, height) < 1 << 31:
        return Size(width, height)
    return None


def _odd_size(metadata: object) -> str | None:
    if not isinstance(metadata, Mapping) or _size(metadata) is not None or not {"width", "height"} & metadata.keys():
        return None
    width, height = (scalar_text(metadata.get(name))[:20] for name in ("width", "height"))
    return f"its size is {width} x {height} pixels in the project file, and no image's; remove it and add it again"


def _pixel_size(metadata: object) -> PixelSize | None:
    calibration = metadata.get("pixelCalibration") if isinstance(metadata, Mapping) else None
    if not isinstance(calibration, Mapping):
        return None
    values = [_micrometers(calibration.get(axis)) for axis in ("pixelWidth", "pixelHeight")]
    known = [value for value in values if value is not None]
    return PixelSize(*known) if len(known) == 2 else None


def _micrometers(quantity: object) -> float | None:
    if not isinstance(quantity, Mapping) or quantity.get("unit") not in ("\u00b5m", "\u03bcm", "um"):
        return None
    value = quantity.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of some hundred digits
        return math.inf


def server_builder(uri: str, *, provider: str, args: Sequence[str] = (), metadata: JsonObject | None) -> JsonObject:
    """Builder of an image file; `metadata` is left out where it is None."""
    builder: JsonObject = {"builderType": "uri", "providerClassName": provider, "uri": uri, "args": list(args)}
    return builder if metadata is None else builder | {"metadata": metadata}


def _downsample(base: Size, level: Size) -> float:
    """QuPath's estimate of what a level was meant to be: a power of 2, a whole number, else the mean ratio."""
    ratios = [base.width / level.width, base.height / level.height]
    power = 2.0 ** math.floor(math.log2(sum(ratios) / 2) + 0.5)
    if all(abs(full / power - part) < 2 for full, part in zip(base, level, strict=True)):
        return power
    for axis, ratio in enumerate(ratios):
        whole = float(math.floor(ratio + 0.5))
        if abs(base[axis] / whole - level[axis]) <= 1:
            ratios[axis] = whole
    return power if power in ratios else sum(ratios) / 2


def image_metadata(
    *,
    name: str,
    levels: Sequence[Size],
    tile: Size,
    mpp: tuple[float, float] | None,
    magnification: float | None,
    has_timepoints: bool = False,
) -> JsonObject:
    """Metadata of an 8-bit RGB image as QuPath writes them.

    Parameters
    ----------
    name : str
        Name of the image.
    levels : sequence of Size
        Pyramid levels, full resolution first.
    tile : Size
        Preferred tile.
    mpp : tuple of float or None
        Micrometres per pixel in x and y; None = not calibrated.
    magnification : float or None
        Of the objective.
    has_timepoints : bool, optional
        Whether to list the one time point, as QuPath 0.6 and later do for a plain image.

    Returns
    -------
    dict
        For `server_builder`.
    """
    width, height = (1.0, 1.0) if mpp is None else mpp
    unit = "px" if mpp is None else "\u00b5m"
    base = levels[0]
    metadata: JsonObject = {
        "name": name,
        "width": base.width,
        "height": base.height,
        "sizeZ": 1,
        "sizeT": 1,
        "channelType": "DEFAULT",
        "isRGB": True,
        "pixelType": "UINT8",
        "levels": [
            {"downsample": _downsample(base, level), "width": level.width, "height": level.height} for level in levels
        ],
        "channels": [
            {"name": "Red", "color": Color(255, 0, 0).argb},
            {"name": "Green", "color": Color(0, 255, 0).argb},
            {"name": "Blue", "color": Color(0, 0, 255).argb},
        ],
        "pixelCalibration": {
            "pixelWidth": {"value": float(width), "unit": unit},
            "pixelHeight": {"value": float(height), "unit": unit},
            "zSpacing": {"value": 1.0, "unit": "z-slice"},
            "timeUnit": "SECONDS",
            "timepoints": [0.0] if has_timepoints else [],
        },
    }
    if magnification is not None:
        metadata["magnification"] = float(magnification)
    return metadata | {"preferredTileWidth": tile.width, "preferredTileHeight": tile.height}


def server_json(builder: JsonObject, *, version: str) -> bytes:
    """Content of ``server.json`` in the form of a QuPath version."""
    release = release_of(version)
    if release >= (0, 6):
        return json_bytes(builder)
    if release >= (0, 5):
        wrapped = {"builder": builder} | ({"metadata": builder["metadata"]} if "metadata" in builder else {})
        return json_bytes(wrapped, pretty=False)
    return json_bytes({key: value for key, value in builder.items() if key != "builderType"}, pretty=False)


def with_uri(builder: JsonObject, uri: str) -> JsonObject:
    """Return a builder of a file with another URI; a wrapped one comes back unchanged."""
    return builder | {"uri": uri} if builder.get("builderType") == "uri" else builder
