"""Train and measure every cell of an experiment: one network, one encoder, one seed, with equal budgets for all.

A cell is measured once, at its end, on tiles that no part of training has seen, and is then a file in ``OUT/cells``. An
experiment that was stopped goes on where it was, inside a cell too; several processes share the cells of one folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from darefine_qupath.checkpoint.environment import environment
from darefine_qupath.checkpoint.model_file import load_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.demo import CLASSES, MPP, draw_slide
from darefine_qupath.devices import choose_device
from darefine_qupath.errors import ConfigError
from darefine_qupath.experiments.networks import CONTEXTS, NETWORKS
from darefine_qupath.experiments.tables import write_json
from darefine_qupath.filesystem import open_lock, try_lock
from darefine_qupath.models import ModelConfig, num_parameters
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.pipeline.tiles import TileRequest, make_tiles
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.dataset import DatasetReader, load_index
from darefine_qupath.tiles.roles import Split, explicit_roles
from darefine_qupath.tiles.sources import TileSource
from darefine_qupath.tiles.spatial_split import spatial_split
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig, evaluate, train
from darefine_qupath.training.tile_dataset import TileDataset

__all__ = ["ExperimentRequest", "run_experiment"]

_LOCK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ExperimentRequest:
    """What to train, on what, for how long; without a project, slides are generated.

    Attributes
    ----------
    out : Path
        Folder of the experiment; all its cells have equal settings.
    networks, encoders : sequence of str
        Names of `NETWORKS`, and slice encoders: each pair is a row.
    seeds : sequence of int
        Each seed is a cell of every row.
    context_encoder : str or None
        As the slice encoder by default.
    steps, batch_size : int
        Optimizer steps of every cell, and tiles of each.
    width : int
        Decoder channels.
    input_px : int
        Side of slice and context as the network sees them, on generated slides.
    preset : str
        Recipe that `train` changes.
    train : mapping
        Any other setting of training.
    num_slides, num_held_out : int
        Generated slides to learn from and to measure on.
    side_px : int
        Side of a generated slide.
    project, settings : Path or None
        Project whose tiles are used, and another settings file than its own.
    images, held_out : sequence of str
        Images that are used at all, and those to measure on; without any, a quarter of each, parted by area.
    """

    out: Path
    networks: Sequence[str] = tuple(NETWORKS)
    encoders: Sequence[str] = ("efficientnet-lite0",)
    seeds: Sequence[int] = (0, 1, 2)
    context_encoder: str | None = None
    steps: int = 200
    batch_size: int = 8
    width: int = 64
    input_px: int = 96
    preset: Literal["paper", "modern"] = "modern"
    train: Mapping[str, Any] = field(default_factory=dict)
    num_slides: int = 4
    num_held_out: int = 2
    side_px: int = 4096
    project: Path | None = None
    settings: Path | None = None
    images: Sequence[str] = ()
    held_out: Sequence[str] = ()

    def shared(self) -> dict[str, Any]:
        """Return what all cells of a folder have in common, as JSON values."""
        shared = {
            "context_encoder": self.context_encoder,
            "steps": self.steps,
            "batch": self.batch_size,
            "width": self.width,
            "preset": self.preset,
            "set": dict(self.train),
        }
        if self.project is None:
            slides = {"slides": self.num_slides, "held_out_slides": self.num_held_out, "side": self.side_px}
            return {**shared, "size": self.input_px, "data": "generated slides", **slides}
        where = {"project": self.project.resolve().name, "images": sorted(self.images)}
        return {**shared, "data": "project", **where, "held_out": sorted(self.held_out)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network, one slice encoder, one seed."""

    network: str
    encoder: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.network}-{self.encoder}-seed{self.seed}"


def run_experiment(
    request: ExperimentRequest,
    *,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Train and measure every cell that is not finished and that no other process works on.

    Parameters
    ----------
    request : ExperimentRequest
        What to do.
    listener : Listener, optional
        Hears of every slide drawn, every cell begun and every step.

    Returns
    -------
    dict
        The settings that all cells share, for `darefine_qupath.experiments.tables.write_tables`.

    Raises
    ------
    ConfigError
        If the folder holds cells of other settings, or a setting makes no sense.
    TrainingStoppedError
        If it was stopped; the same call goes on.
    """
    settings = request.shared()
    _keep_settings(request.out, settings)
    with _held(request.out / "locks" / "tiles", wait=True):
        data = (
            _generated_tiles(request, listener) if request.project is None else _project_tiles(request, request.project)
        )
    cells = [
        Cell(network=network, encoder=encoder, seed=seed)
        for seed, encoder, network in product(request.seeds, request.encoders, request.networks)
        # U-Net has no encoder to choose: one row is enough.
        if network != "unet" or encoder == request.encoders[0]
    ]
    for number, cell in enumerate(cells, 1):
        file = request.out / "cells" / f"{cell.name}.json"
        with _held(request.out / "locks" / cell.name, wait=False) as is_ours:
            if is_ours and not file.exists():
                listener.on_notice(f"[{number}/{len(cells)}] {cell.name}")
                result = _run_cell(cell, request, *data, listener)
                file.parent.mkdir(exist_ok=True)
                write_json(file, result)
                shutil.rmtree(request.out / "runs" / cell.name)
    return settings


def _keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings in a new folder; refuse a folder whose cells were made with others."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "settings.json"
    if not file.exists():
        write_json(file, settings)
        return
    held = json.loads(file.read_text("utf-8"))
    changed = [f"{key} {held.get(key)!r} -> {value!r}" for key, value in settings.items() if held.get(key) != value]
    if changed:
        raise ConfigError(f"{out} holds cells of other settings ({'; '.join(changed)}); give another folder")


@contextmanager
def _held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock between processes, which the system gives back when one is killed; say whether it was free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(path)
    try:
        while not (is_held := try_lock(descriptor)) and wait:
            time.sleep(_LOCK_SECONDS)
        yield is_held
    finally:
        os.close(descriptor)


def _generated_tiles(request: ExperimentRequest, listener: Listener) -> tuple[TileDataset, TileDataset]:
    """Tiles to learn from and tiles to measure on, of different slides."""
    spec = TileSpec(input_px=request.input_px, slice_um=128, context_um=640, stride_um=128)
    classes = ClassMap(
        names=tuple(known.name for known in CLASSES),
        colors=tuple(known.color for known in CLASSES),
        unlabelled="Normal",
    )

    def part(name: str, first_seed: int, count: int) -> TileDataset:
        folder = request.out / "tiles" / name
        if not (folder / "dataset.json").exists():
            sources = [slide(f"{name}-{seed}", seed) for seed in range(first_seed, first_seed + count)]
            build_dataset(sources, spec, classes, folder)
        return TileDataset(load_index(folder), DatasetReader(folder))

    def slide(name: str, seed: int) -> TileSource:
        path = request.out / "slides" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        listener.on_notice(f"Drawing {path.name}")
        drawn = draw_slide(path, seed=seed, size=(request.side_px, request.side_px))
        return TileSource(id=name, name=name, path=drawn.path, mpp=MPP, annotations=drawn.annotations)

    return part("train", 1, request.num_slides), part("held-out", 1001, request.num_held_out)


def _project_tiles(request: ExperimentRequest, project: Path) -> tuple[TileDataset, TileDataset]:
    """Tiles of a project's annotated images to learn from, and tiles of other images or other places."""
    folder = request.out / "tiles" / "project"
    if not (folder / "dataset.json").exists():
        make_tiles(TileRequest(project=project, settings=request.settings, images=tuple(request.images)), folder)
    index, reader = load_index(folder), DatasetReader(folder)
    if request.held_out:
        fixed = explicit_roles(index.images, {"validation": request.held_out})
        split = Split(images={image.id: fixed.get(image.id, "train") for image in index.images})
    else:
        split = spatial_split(index, validation=0.25, seed=0)
    learned, measured = split.part(index, "train"), split.part(index, "validation")
    return TileDataset(learned.tiles, reader), TileDataset(measured.tiles, reader)


def _run_cell(
    cell: Cell,
    request: ExperimentRequest,
    learned: TileDataset,
    measured: TileDataset,
    listener: Listener,
) -> dict[str, Any]:
    """Train one network and measure it, with its contexts, with empty ones and with those of other tiles."""
    network, classes = NETWORKS[cell.network], learned.tiles.classes
    model = ModelConfig(
        slice_encoder=cell.encoder,
        context_encoder=request.context_encoder or cell.encoder,
        width=request.width,
        num_classes=classes.num_classes,
        **network.model,
    )
    recipe = {
        "preset": request.preset,
        "epochs": 1,
        "samples_per_epoch": request.steps * request.batch_size,
        "batch_size": request.batch_size,
        "workers": 0,
        "checkpoint_minutes": 1.0,
        **request.train,
        **network.train,
        "seed": cell.seed,
    }
    config = TrainConfig.from_mapping(recipe)
    run = request.out / "runs" / cell.name
    wall, process = time.perf_counter(), time.process_time()
    trained = train(
        learned,
        None,
        model=model,
        config=config,
        out=run,
        class_map=classes,
        tile_spec=learned.tiles.spec,
        progress=listener.on_step,
        resume=(run / "config.json").exists(),
    )
    seconds = {"wall": time.perf_counter() - wall, "process": time.process_time() - process}
    checkpoint = load_checkpoint(trained.last)
    built, device = checkpoint.build(), choose_device(config.device)
    scores = {
        mode: evaluate(built, measured, normalization=checkpoint.normalization, device=device, context=mode).to_json(
            classes.names
        )
        for mode in (CONTEXTS if model.uses_context else CONTEXTS[:1])
    }
    return {
        "network": cell.network,
        "encoder": cell.encoder,
        "seed": cell.seed,
        "model": model.to_json(),
        "recipe": config.to_json(),
        "parameters": num_parameters(built),
        "tiles": {"learned": len(learned), "measured": len(measured), "spec": learned.tiles.spec.to_json()},
        "scores": scores,
        "loss": trained.metrics["loss"],
        # Of the last process alone, where a cell was stopped and went on.
        "training_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hardware": _hardware(device),
        "environment": environment(),
    }


def _hardware(device: torch.device) -> str:
    """Say where a cell was trained."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
