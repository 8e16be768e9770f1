"""Files that darefine itself writes, damaged: for ``scripts/check/fuzz.py``."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from safetensors.torch import save

from darefine_qupath.annotations import Annotation
from darefine_qupath.checkpoint.describe import describe
from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import DarefineError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.models import ModelConfig, build_model
from darefine_qupath.pipeline.settings import read_settings
from darefine_qupath.prediction import ScoreMap, read_score_map
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.prediction.slide_warnings import SlideWarning
from darefine_qupath.project import open_project
from darefine_qupath.review import list_runs
from darefine_qupath.review.run import Run, RunObject
from darefine_qupath.review.run_records import save_run
from darefine_qupath.tiles.dataset import FORMAT, VERSION, DatasetReader, load_index
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig
from darefine_qupath.training.runfolder import RunFolder, RunSettings, read_run
from darefine_qupath.training.state import read_trained
from tests.fuzzing import json_mutant

__all__ = ["NAMES", "own_mutant", "prepare", "try_own"]

TINY = Path(__file__).parents[1] / "projects" / "tiny" / "project.qpproj"
CLASSES = ClassMap(names=("a", "b"), sources={"old a": "a"})
TILES = TileSpec(input_px=64, slice_um=100, context_um=400, stride_um=50)
TOML = b"""[classes]
names = ["Normal", "Tumor"]
[classes.map]
"DCIS" = "Tumor"
[classes.colors]
Tumor = "#c81e28"
[tiles]
input_px = 256
slice_um = 128.0
[train]
epochs = 3
lr = 1e-3
[images]
mpp = 0.25
"""
STATE = {
    "format": "darefine-training-state", "version": 2, "step": 3, "trained": ["slice"], "scaler": {},
    "counters": {"epoch": 1, "step": 0, "loss_sum": 0.5, "best_miou": None, "num_stale": 0, "is_finished": False},
}  # fmt: skip
MANIFEST = {
    "format": FORMAT, "version": VERSION, "spec": TILES.to_json(), "classes": CLASSES.to_json(),
    "storage": {"pixels": "jpeg", "quality": 90}, "num_tiles": 1, "digest": "d",
    "images": [{"id": "1", "name": "x", "size": [9, 9], "mpp": 0.5, "case": None, "metadata": {"a": "b"}}],
}  # fmt: skip
TILE = {"image": "1", "slice": [0, 0, 200, 200], "context": [0, 0, 800, 800], "counts": [1, 2], "ignored": 3}

SAMPLES: dict[str, bytes] = {"darefine.toml": TOML, "dataset.json": json.dumps(MANIFEST).encode()}
NAMES = ("model", "state", "darefine.toml", "scoremap.json", "config.json", "dataset.json", "tiles.jsonl", "run.json")


def prepare(folder: Path) -> None:
    """Make a sound file of each kind in a folder, once."""
    if (folder / "own").exists():
        return
    own = folder / "own"
    own.mkdir()
    config = ModelConfig(network="unet", width=4, num_classes=2)
    header = Checkpoint(state=build_model(config, seed=1).state_dict(), model=config, tiles=TILES, classes=CLASSES,
                        provenance={"project": "p", "mpp": [0.5], "split": {"images": {"1": "train"}}})  # fmt: skip
    SAMPLES["model"] = save(dict(header.state), {"darefine": json.dumps(header.header.to_json())})
    SAMPLES["state"] = save(dict(header.state), {"darefine": json.dumps(STATE)})
    SAMPLES["tiles.jsonl"] = json.dumps(TILE).encode()
    settings = RunSettings(
        model=config, train=TrainConfig(), tiles=TILES, classes=CLASSES, normalization=header.normalization
    )
    SAMPLES["config.json"] = json.dumps(settings.to_json()).encode()
    (own / "dataset.json").write_bytes(SAMPLES["dataset.json"])
    _score_map(own)
    _run_record(own)


def _score_map(own: Path) -> None:
    score_map = ScoreMap(
        folder=own, size=Size(8, 8), box=Box(0, 0, 64, 64), downsample=8.0, mpp=0.25, classes=CLASSES, model_id="m",
        fingerprint="f", class_pixels=(1, 1), num_slices=1,
        warnings=(SlideWarning(kind="mpp", message="coarse", value=2.0),),
    )  # fmt: skip
    blank = np.zeros((8, 8), np.uint8)
    write_score_map(score_map, [MapRows(blank, blank, blank, blank)])
    SAMPLES["scoremap.json"] = (own / "scoremap.json").read_bytes()


def _run_record(own: Path) -> None:
    shutil.copytree(TINY.parent, own / "project", ignore=shutil.ignore_patterns("slides"))
    drawn = Annotation(geometry=shapely.box(1, 2, 30, 40), path_class="Tumor")
    run = Run(
        id="20260101T000000.000000Z-1", batch="b", image="1", image_name="train-1.tif", model="m",
        date="2026-01-01T00:00:00+00:00", state="done", objects=(RunObject(record=drawn, training_class="Tumor"),),
    )  # fmt: skip
    with open_project(own / "project", engine="embedded") as project:
        SAMPLES["run.json"] = save_run(project, run).read_bytes()


def own_mutant(name: str, rng: random.Random, damaged: Callable[[bytes, random.Random], bytes]) -> bytes:
    """Damage a sample, or half the time the JSON in the header of a model file."""
    data = SAMPLES[name]
    if name not in ("model", "state") or rng.random() < 0.3:
        return damaged(data, rng)
    length = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:length])
    if rng.random() < 0.7:
        inner = json_mutant(header["__metadata__"]["darefine"].encode(), rng)
        header["__metadata__"]["darefine"] = inner.decode("utf-8", "replace")
        packed = json.dumps(header).encode()
    else:
        packed = json_mutant(data[8:length], rng)
    return struct.pack("<Q", len(packed)) + packed + data[length:]


def try_own(name: str, data: bytes, folder: Path) -> str:
    """Read a damaged file; what came of it, if that is no fault of ours."""
    own = folder / "own"
    path = own / ("project/darefine/runs/20260101T000000.000000Z-1.json" if name == "run.json" else name)
    if name in ("model", "state"):
        path = own / f"{name}.safetensors"
    before = path.read_bytes() if path.is_file() else None
    path.write_bytes(data)
    try:
        _READERS[name](path)
    except DarefineError as error:
        if path.name not in str(error) and str(own) not in str(error):
            raise AssertionError(f"an error that does not name the file: {error}") from error
        return "refused"
    finally:
        if before is not None:
            path.write_bytes(before)
    return "read"


def _read_model(path: Path) -> None:
    describe(path)
    load_checkpoint(path)


def _read_settings(path: Path) -> None:
    settings = read_settings(path.parent, path)
    for read in (
        lambda: settings.mpp,
        lambda: settings.class_map((), {"Tumor": 1}),
        lambda: settings.tile_spec(TILES),
        settings.tile_filter,
        settings.split_spec,
        lambda: settings.model_config(ModelConfig()),
        lambda: TrainConfig.from_mapping(settings.train),
    ):
        try:
            read()
        except DarefineError:
            continue


def _read_map(path: Path) -> None:
    found = read_score_map(path.parent)
    found.areas_mm2()
    found.shares()
    list(found.bands(4, ("class",)))


def _read_dataset(path: Path) -> None:
    if not (path.parent / "tiles.jsonl").exists():
        (path.parent / "tiles.jsonl").write_bytes(SAMPLES["tiles.jsonl"])
    _ = load_index(path.parent)[0]
    DatasetReader(path.parent)


def _read_runs(path: Path) -> None:
    errors: list[Any] = []
    with open_project(path.parents[2], engine="embedded") as project:
        list_runs(project, on_error=lambda _, error: errors.append(error))
    for error in errors:
        raise error


_READERS: dict[str, Callable[[Path], Any]] = {
    "model": _read_model,
    "state": read_trained,
    "darefine.toml": _read_settings,
    "scoremap.json": _read_map,
    "config.json": lambda path: (read_run(path.parent), RunFolder(path.parent).records()),
    "dataset.json": _read_dataset,
    "tiles.jsonl": _read_dataset,
    "run.json": _read_runs,
}
