"""Train a network on a project, and go on with runs that were stopped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darefine_qupath.errors import ConfigError, DarefineError, TrainingError
from darefine_qupath.limits import naming
from darefine_qupath.models import ModelConfig
from darefine_qupath.pipeline.identity import identity_of
from darefine_qupath.pipeline.listener import SILENT, Listener
from darefine_qupath.pipeline.provenance import find_former_model
from darefine_qupath.pipeline.run_record import (
    HARD_FILE,
    LABELS_FILE,
    REQUEST_FILE,
    SETTINGS_FILE,
    describe_provenance,
    read_json,
    record_hard_tiles,
    record_labels_of_folds,
    record_origin,
    record_request,
)
from darefine_qupath.pipeline.splitting import SamplingSpec, SplitSpec, divide
from darefine_qupath.pipeline.tiles import Tiles, make_tiles
from darefine_qupath.pipeline.train_request import TILES_FOLDER, TrainRequest
from darefine_qupath.pipeline.train_setup import (
    collect_train_fields,
    configure_new_run,
    configure_resumed_run,
    describe_run,
)
from darefine_qupath.project import open_project
from darefine_qupath.tiles.dataset import DatasetReader, dataset_digest, load_index
from darefine_qupath.tiles.roles import Split, TilePart
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig, TrainResult, read_run, train
from darefine_qupath.training.distributed import join_process_group
from darefine_qupath.training.initialize import check_start
from darefine_qupath.training.runfolder import RunSettings
from darefine_qupath.training.tile_dataset import TileDataset

__all__ = ["Folds", "resume_training", "train_on_project"]

_log = logging.getLogger(__name__)


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


def train_on_project(request: TrainRequest, *, listener: Listener = SILENT) -> TrainResult | Folds:
    """Cut the tiles of a project, split them by slide, and train a network.

    Started by ``torchrun``, every process calls this; the first one cuts the tiles, into a folder that all can read.

    Parameters
    ----------
    listener : Listener, optional
        Hears how many tiles are cut, what is about to be trained, and of every step.

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
        return _train_or_cross_validate(_find_former_model(request), listener, resume=False)
    except DarefineError:
        # A run that never began must not take the folder: the same command is made again with the mistake mended, and
        # finds the tiles that were cut.
        for folder in (request.out, *request.out.glob("fold-*")):
            if not any((folder / name).exists() for name in ("state.safetensors", "metrics.jsonl")):
                (folder / "config.json").unlink(missing_ok=True)
        raise


def resume_training(
    folder: Path, *, changes: Mapping[str, Any] | None = None, listener: Listener = SILENT
) -> TrainResult | Folds:
    """Go on with a run that was stopped.

    Parameters
    ----------
    folder : Path
        The run folder.
    changes : mapping, optional
        Fields of `TrainConfig` that go over those it began with. What a model learns from, and how, cannot change.

    Returns
    -------
    TrainResult or Folds
        See `train_on_project`.

    Raises
    ------
    TrainingError
        If the folder holds no run, or one that cannot go on: its tiles are gone or others, its files are damaged.
    """
    file = folder / REQUEST_FILE
    if not file.is_file():
        raise TrainingError(
            f"{folder} is not a run folder (it has no {REQUEST_FILE}); give the folder that darefine train made"
        )
    data = read_json(file)
    with naming(f"{file} is damaged; the run cannot go on", TrainingError):
        request = TrainRequest.from_json(data)
    # Whatever stands in the project's settings now, the run goes on with those that it began with.
    tiles = replace(request.tiles, settings=folder / SETTINGS_FILE)
    request = replace(request, out=folder, tiles=tiles, train={**request.train, **(changes or {})})
    return _train_or_cross_validate(request, listener, resume=_has_begun(folder))


def _has_begun(folder: Path) -> bool:
    """Whether a run folder holds more than what is written before the first step."""
    return any((folder / name).exists() for name in ("config.json", "state.safetensors"))


def _find_former_model(request: TrainRequest) -> TrainRequest:
    """Decide which model the run starts from, so that a later --resume need not."""
    if request.init_from is not None or not request.fine_tune or request.tiles.labels != "reviewed":
        return replace(request, fine_tune=False)
    with open_project(request.tiles.project, engine="embedded") as project:
        former = find_former_model(project)
    if former is not None:
        _log.warning(
            "Fine-tuning starts from %s, whose predictions were reviewed; --from none starts from scratch", former
        )
    return replace(request, init_from=former, fine_tune=False)


def _train_or_cross_validate(request: TrainRequest, listener: Listener, *, resume: bool) -> TrainResult | Folds:
    settings = request.tiles.read_settings()
    spec = settings.split_spec(**request.split)
    if not spec.folds or spec.fold:
        return _train_once(request, listener, resume=resume)[0]
    if request.save_roles:
        raise ConfigError("In a cross-validation every case validates once, so images have no roles to save")
    if join_process_group(TrainConfig.from_mapping(collect_train_fields(settings, request)).device).is_main:
        record_request(request, settings)
    results = []
    cut: Tiles | None = None
    for fold in range(1, spec.folds + 1):
        # All folds share the tiles; each has a run folder of its own.
        out = request.out / f"fold-{fold}"
        part = replace(request, out=out, dataset=request.tiles_at, split={**request.split, "fold": fold})
        listener.on_notice(f"Fold {fold} of {spec.folds}")
        result, cut = _train_once(part, listener, resume=_has_begun(out), cut=cut, is_fold=True)
        results.append(result)
    return Folds(folder=request.out, results=tuple(results))


def _train_once(
    request: TrainRequest,
    listener: Listener,
    *,
    resume: bool,
    cut: Tiles | None = None,
    is_fold: bool = False,
) -> tuple[TrainResult, Tiles]:
    """Train once, with tiles that are `cut` already where several folds share them; give them too."""
    settings = request.tiles.read_settings()
    split_spec, sampling = settings.split_spec(**request.split), settings.sampling_spec(**request.sampling)
    begun = read_run(request.out) if resume else None
    model_wanted, config, spec = (
        configure_new_run(settings, request) if begun is None else configure_resumed_run(begun, request)
    )
    group = join_process_group(config.device)
    with group.report_lost_peers(request.out):
        with group.fail_together():
            if begun is None:
                check_start(model_wanted, config, request.init_from)
            if group.is_main:
                if begun is None:
                    record_request(request, settings)
                tiles = cut or _load_or_cut_tiles(request, split_spec, spec, begun, is_cut=resume, listener=listener)
                if is_fold:
                    tiles = record_labels_of_folds(request.out.parent / LABELS_FILE, tiles, begun)
        with group.fail_together():
            if not group.is_main:
                # What the first process has cut is there by now.
                tiles = cut or _load_or_cut_tiles(request, split_spec, spec, begun, is_cut=True, listener=SILENT)
            model, split, parts = _divide(tiles, model_wanted, split_spec, sampling, seed=config.seed)
            if group.is_main:
                if begun is None:
                    record_origin(request, tiles, split, parts[0])
                record_hard_tiles(request, sampling, TileDataset(parts[0].tiles, tiles.reader), group)
                for sentence in describe_run(settings, request, model, config, group, parts):
                    listener.on_notice(sentence)
        with group.fail_together():
            provenance = describe_provenance(request, tiles, split, parts[0]) if begun is None else begun.provenance
            hard = read_json(request.out / HARD_FILE) if sampling.hard_model is not None else None
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
            progress=listener.on_step,
            resume=resume,
            init_from=request.init_from,
            hard=hard,
        )
    return result, tiles


def _divide(
    tiles: Tiles, wanted: ModelConfig, split_spec: SplitSpec, sampling: SamplingSpec, *, seed: int
) -> tuple[ModelConfig, Split, tuple[TilePart, TilePart]]:
    """Network for the classes of the tiles, their split, and the tiles to learn from and to validate by."""
    model = ModelConfig.from_json({**wanted.to_json(), "num_classes": tiles.index.classes.num_classes})
    split = divide(tiles.index, split_spec, seed=seed)
    training, validation = split.part(tiles.index, "train"), split.part(tiles.index, "validation")
    return model, split, (replace(training, tiles=sampling.cap(training.tiles, seed=seed)), validation)


def _load_or_cut_tiles(
    request: TrainRequest,
    split: SplitSpec,
    default_spec: TileSpec | None,
    begun: RunSettings | None,
    *,
    is_cut: bool,
    listener: Listener,
) -> Tiles:
    folder = request.tiles_at
    if is_cut and folder is not None:
        # The run goes on with the tiles it began with, whatever has been drawn in QuPath since.
        if begun is not None and dataset_digest(folder) != begun.provenance.get("data"):
            raise TrainingError(f"The tiles in {folder} are not those that {request.out} began with; start a new run")
        return Tiles(index=load_index(folder), reader=DatasetReader(folder), training_set=None)
    tiles = make_tiles(
        request.tiles,
        folder,
        test_images=split.test_images,
        default_spec=default_spec,
        # Tiles that several runs share are not replaced under them.
        overwrite=request.dataset in (None, request.out.parent / TILES_FOLDER),
        listener=listener,
    )
    with open_project(request.tiles.project, engine="embedded") as project:
        return replace(tiles, identity=identity_of(project, {image.id for image in tiles.index.images}))
