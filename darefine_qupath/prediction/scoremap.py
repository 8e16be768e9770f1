"""Read a slide's score map: four tiled, pyramidal TIFFs and a JSON file that says what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import rasterio
from rasterio.windows import Window

from darefine_qupath.classes import IGNORE, ClassMap
from darefine_qupath.errors import LimitError, PredictionError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.geometry import Box, Size, is_possible_mpp
from darefine_qupath.limits import NOTES, naming, parse_json, read_file
from darefine_qupath.prediction.slide_warnings import SlideWarning

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BAND_ROWS", "FORMAT", "LAYERS", "SIDECAR", "TILE_PX", "LayerName", "ScoreMap", "read_score_map"]

FORMAT = "darefine-score-map/1"
LayerName = Literal["class", "confidence", "margin", "runner_up"]
LAYERS: tuple[LayerName, ...] = ("class", "confidence", "margin", "runner_up")
SIDECAR = "scoremap.json"
TILE_PX = 256
BAND_ROWS = 2 * TILE_PX
_LARGEST_DOWNSAMPLE = 1e6


@dataclass(frozen=True, kw_only=True)
class ScoreMap:
    """What a network said about a slide, on disk.

    A map pixel ``(row, column)`` covers the level-0 pixels from ``(column, row) * downsample`` on. The layers are
    uint8 TIFFs: class (255 = not predicted, with a color map), confidence and margin (0 to 255 for 0 to 1; the
    margin is the best score minus the second), and the runner-up class.

    Attributes
    ----------
    folder : Path
        Holds the TIFFs and ``scoremap.json``.
    size : Size
        Map pixels.
    box : Box
        Level-0 pixels it covers; the last row and column may overhang the slide.
    downsample : float
        Level-0 pixels per map pixel.
    mpp : float or None
        Micrometers per level-0 pixel.
    classes : ClassMap
        What the labels mean.
    model_id : str
        Of the model file.
    fingerprint : str
        Of everything that decides the scores: image, model, spec, options.
    class_pixels : tuple of int
        Map pixels per class.
    num_slices : int
        Slices predicted.
    unpredicted_pixels : int
        Map pixels that were asked for (tissue, inside the area) and have no class.
    warnings : tuple of SlideWarning
        What was found before and while predicting.
    settings : mapping
        Options and what they became on that machine (device, precision, batch size), for the record.
    """

    folder: Path
    size: Size
    box: Box
    downsample: float
    mpp: float | None
    classes: ClassMap
    model_id: str
    fingerprint: str
    class_pixels: tuple[int, ...]
    num_slices: int
    unpredicted_pixels: int = 0
    warnings: tuple[SlideWarning, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def path(self, layer: LayerName) -> Path:
        """File of a layer."""
        return self.folder / f"{layer}.tif"

    @property
    def unreadable(self) -> tuple[Box, ...]:
        """Regions that could not be read and were not predicted, in level-0 pixels."""
        return tuple(box for warning in self.warnings if warning.kind == "unreadable" for box in warning.boxes)

    def read(self, layer: LayerName, window: Box | None = None) -> NDArray[np.uint8]:
        """Pixels of a layer.

        Parameters
        ----------
        layer : {"class", "confidence", "margin", "runner_up"}
            Which.
        window : Box, optional
            In map pixels, inside the map; the whole map by default.

        Returns
        -------
        ndarray of uint8, shape (height, width)
            Pixels.
        """
        window = window or Box.of(self.size)
        if not Box.of(self.size).contains(window):
            raise PredictionError(f"Window {window} is not inside the score map of {self.size} pixels")
        try:
            with rasterio.open(self.path(layer)) as source:
                view = Window(window.x, window.y, window.width, window.height)
                pixels: NDArray[np.uint8] = source.read(1, window=view)
        except rasterio.errors.RasterioError as error:
            raise PredictionError(f"{self.path(layer)} is damaged ({error}); predict again with --restart") from error
        return pixels

    def bands(
        self, rows: int = BAND_ROWS, layers: tuple[LayerName, ...] = LAYERS
    ) -> Iterator[tuple[int, Mapping[LayerName, NDArray[np.uint8]]]]:
        """Walk over the map from top to bottom.

        Parameters
        ----------
        rows : int
            Map rows per step; the last step may have fewer.
        layers : tuple of str
            Which layers to read.

        Yields
        ------
        row : int
            First map row of the band.
        pixels : mapping of str to ndarray of uint8, shape (rows, width)
            By layer.
        """
        for row in range(0, self.size.height, rows):
            window = Box(0, row, self.size.width, min(rows, self.size.height - row))
            yield row, {layer: self.read(layer, window) for layer in layers}

    def areas_mm2(self) -> dict[str, float] | None:
        """Area per class name in square millimetres; None where the pixel size is not known."""
        if self.mpp is None:
            return None
        pixel_mm2 = (self.downsample * self.mpp / 1000) ** 2
        return {name: num * pixel_mm2 for name, num in zip(self.classes.names, self.class_pixels, strict=True)}

    def shares(self) -> dict[str, float]:
        """Part of the predicted area per class name, 0 to 1; all 0 where nothing was predicted."""
        total = max(1, sum(self.class_pixels))
        return {name: num / total for name, num in zip(self.classes.names, self.class_pixels, strict=True)}

    @property
    def unpredicted_share(self) -> float:
        """Part of what was asked for that has no class, 0 to 1."""
        return self.unpredicted_pixels / max(1, self.unpredicted_pixels + sum(self.class_pixels))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as ``scoremap.json`` holds them."""
        return {
            "format": FORMAT,
            "layers": {layer: self.path(layer).name for layer in LAYERS},
            "size": list(self.size),
            "box": [self.box.x, self.box.y, self.box.width, self.box.height],
            "downsample": self.downsample,
            "mpp": self.mpp,
            "not_predicted": IGNORE,
            "classes": self.classes.to_json(),
            "class_pixels": list(self.class_pixels),
            "num_slices": self.num_slices,
            "unpredicted_pixels": self.unpredicted_pixels,
            "model": self.model_id,
            "fingerprint": self.fingerprint,
            "warnings": [warning.to_json() for warning in self.warnings],
            "settings": dict(self.settings),
        }


def read_score_map(folder: Path) -> ScoreMap:
    """Open a finished score map.

    Parameters
    ----------
    folder : Path
        Where `predict_slide` wrote it.

    Returns
    -------
    ScoreMap
        The record; pixels are read when asked for.

    Raises
    ------
    PredictionError
        If there is none, or it is unfinished or damaged.
    """
    path = folder / SIDECAR
    damaged = f"{path} is damaged; delete it and predict again"
    try:
        content = read_file(path, NOTES)
    except (FileNotFoundError, NotADirectoryError):
        raise PredictionError(f"No finished score map in {folder}; run darefine predict") from None
    except (OSError, LimitError) as error:
        raise PredictionError(f"{path} cannot be read: {error}") from error
    with naming(damaged, PredictionError):
        data = parse_json(content, NOTES)
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise PredictionError(f"{path} has format {found!r}, expected {FORMAT!r}; predict again")
    with naming(damaged, PredictionError):
        score_map = _from_json(folder, data)
        lengths = msgspec.convert(data.get("bytes", {}), dict[str, int])
    missing = [layer for layer in LAYERS if not score_map.path(layer).is_file()]
    if missing:
        raise PredictionError(f"{folder} lacks the layers {missing}; predict again")
    for layer in LAYERS:
        found = score_map.path(layer).stat().st_size
        if found != lengths.get(layer, found):
            raise PredictionError(
                f"{score_map.path(layer)} is damaged ({found} bytes instead of {lengths[layer]}); predict again"
            )
    return score_map


def _from_json(folder: Path, data: Mapping[str, Any]) -> ScoreMap:
    score_map = msgspec.convert(
        {
            **data,
            "folder": folder,
            "box": Box(*msgspec.convert(data["box"], tuple[int, int, int, int])),
            "classes": ClassMap.from_json(data["classes"]),
            "model_id": data["model"],
            "warnings": [SlideWarning.from_json(warning) for warning in data["warnings"]],
        },
        ScoreMap,
    )
    for pixels, length in zip(score_map.size, score_map.box.size, strict=True):
        # The box is rounded outwards.
        if abs(pixels * score_map.downsample - length) > 1:
            raise ValueError(f"{pixels} map pixels of {score_map.downsample} are not {length} level-0 pixels")
    mpp = score_map.mpp
    if not 0 < score_map.downsample < _LARGEST_DOWNSAMPLE or not (mpp is None or is_possible_mpp(mpp)):
        raise ValueError(f"a downsample of {score_map.downsample} and {mpp} um per pixel cannot be")
    if len(score_map.class_pixels) != score_map.classes.num_classes:
        raise ValueError(f"it counts {len(score_map.class_pixels)} classes of {score_map.classes.num_classes}")
    return score_map


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path, PredictionError) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")
