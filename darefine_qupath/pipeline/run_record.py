"""Record in a run folder what a training run was asked for and what it learns from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from darefine_qupath.errors import TrainingError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import NOTES, naming, parse_json, read_file
from darefine_qupath.pipeline.hard_examples import hard_weights
from darefine_qupath.pipeline.identity import IDENTITY
from darefine_qupath.pipeline.provenance import summarize_objects
from darefine_qupath.pipeline.settings import RECORDED_NAME, Settings
from darefine_qupath.pipeline.splitting import SamplingSpec, save_roles
from darefine_qupath.pipeline.tiles import Tiles
from darefine_qupath.pipeline.train_request import TrainRequest
from darefine_qupath.prediction import stain_statistics
from darefine_qupath.tiles.dataset import dataset_digest
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.roles import Role, Split, TilePart
from darefine_qupath.tiles.slide_reader import TileReader
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.runfolder import RunSettings
from darefine_qupath.training.tile_dataset import TileDataset

__all__ = [
    "HARD_FILE",
    "LABELS_FILE",
    "REQUEST_FILE",
    "SETTINGS_FILE",
    "describe_provenance",
    "read_json",
    "record_hard_tiles",
    "record_labels_of_folds",
    "record_origin",
    "record_request",
]

_log = logging.getLogger(__name__)

REQUEST_FILE = "request.json"
SETTINGS_FILE = RECORDED_NAME
SPLIT_FILE = "split.json"
LABELS_FILE = "labels.json"
HARD_FILE = "hard.json"
_STAIN_TILES = 64


def record_request(request: TrainRequest, settings: Settings) -> None:
    """Record in the run folder all that a later --resume needs, the settings of the project too."""
    request.out.mkdir(parents=True, exist_ok=True)
    text = "# The project had no darefine.toml.\n" if settings.path is None else settings.path.read_text("utf-8")
    with atomic_write(request.out / SETTINGS_FILE, TrainingError) as temporary:
        temporary.write_text(text, encoding="utf-8")
    _write_json(request.out / REQUEST_FILE, request.to_json())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with atomic_write(path, TrainingError) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run folder."""
    with naming(f"{path} is damaged; the run cannot go on", TrainingError):
        data = parse_json(read_file(path, NOTES), NOTES)
        if not isinstance(data, dict):
            raise TypeError("it holds no JSON object")
    return data


def record_labels_of_folds(file: Path, tiles: Tiles, begun: RunSettings | None) -> Tiles:
    """Record which objects gave the labels, for later folds: the project may have changed by then."""
    if tiles.training_set is None:
        noted = read_json(file)
        held_back, identity = tuple(noted["held_back"]), noted.get(IDENTITY, {})
        return replace(tiles, held_back=held_back, objects=noted["objects"], identity=identity)
    if begun is None:
        _write_json(file, {"objects": tiles.objects, "held_back": tiles.held_back, IDENTITY: tiles.identity})
    return tiles


def record_origin(request: TrainRequest, tiles: Tiles, split: Split, training: TilePart) -> None:
    """Record in the run folder, and in the project if asked, what the run learns from."""
    roles: dict[str, Role] = {**split.images, **dict.fromkeys(tiles.held_back, "test")}
    _write_json(request.out / SPLIT_FILE, {**split.to_json(), "images": roles})
    trained = {training.tiles.images[number].id for number in np.unique(training.tiles.image).tolist()}
    objects = {image: found for image, found in tiles.objects.items() if image in trained}
    _write_json(request.out / LABELS_FILE, {"labels": request.tiles.labels, "objects": objects})
    if not request.save_roles:
        return
    if split.is_spatial:
        _log.warning("The split runs through a slide, so its images have no roles to save in the project")
    else:
        _log.info("The roles of %d images are saved in the project", save_roles(request.tiles.project, roles))


def record_hard_tiles(request: TrainRequest, sampling: SamplingSpec, data: TileDataset, group: ProcessGroup) -> None:
    """Weigh the training tiles by a former model's mistakes, unless that was done before."""
    model, file = sampling.hard_model, request.out / HARD_FILE
    if model is not None and not file.exists():
        _write_json(file, hard_weights(model, data, boost=sampling.hard_boost, device=group.device))


def describe_provenance(request: TrainRequest, tiles: Tiles, split: Split, training: TilePart) -> dict[str, Any]:
    """Where a model comes from: project, slides, labels, split and stain, for its file."""
    found = stain_statistics(_sample_slices(training.tiles, tiles.reader))
    folder = request.tiles_at
    images = [training.tiles.images[number] for number in np.unique(training.tiles.image).tolist()]
    roles = read_json(request.out / SPLIT_FILE)["images"]
    return {
        "project": str(request.tiles.project),
        IDENTITY: dict(tiles.identity),
        "labels": request.tiles.labels,
        # Which objects these are stands in the run folder.
        "objects": summarize_objects(read_json(request.out / LABELS_FILE)["objects"]),
        "data": None if folder is None else dataset_digest(folder),
        "split": {"images": roles, "spatial": split.is_spatial},
        "images": {image.id: image.name for image in tiles.index.images},
        # Tiles in micrometres fit any slide; tiles in pixels fit slides of the same pixel size.
        "mpp": [] if tiles.index.spec.is_physical else sorted({image.mpp for image in images if image.mpp}),
        **({} if found is None else {"stain": found.to_json()}),
    }


def _sample_slices(tiles: TileIndex, reader: TileReader) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Slices from all over the training tiles."""
    step = max(1, len(tiles) // _STAIN_TILES)
    return (reader.read(tiles[position]).slice for position in range(0, len(tiles), step))
