"""Train a network on tiles, from the first step or from where a run was stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darefine_qupath.classes import ClassMap
from darefine_qupath.models import ModelConfig, Normalization
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training.config import TrainConfig
from darefine_qupath.training.distributed import ProcessGroup, join_process_group
from darefine_qupath.training.interrupt import stop_on_signals
from darefine_qupath.training.loader import TileData
from darefine_qupath.training.progress import Reporter
from darefine_qupath.training.runfolder import RunFolder, RunSettings
from darefine_qupath.training.start import check_batch, check_data, digest_tiles, starting_normalization
from darefine_qupath.training.state import Counters
from darefine_qupath.training.trainer import Trainer

__all__ = ["TrainResult", "train"]

_ECHO_S = 2.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run ended with.

    Attributes
    ----------
    folder : Path
        The run folder.
    best, last : Path
        Model files: of the best validation, and of the last epoch.
    metrics : mapping
        Of the best validation, as `ConfusionMatrix.to_json` gives them, with ``epoch`` and ``loss``; of the last epoch
        where there was no validation.
    epochs : int
        Epochs that were trained.
    is_early : bool
        Whether mIoU stood still for long enough to stop.
    context_miou : tuple of (float, float) or None
        mIoU after the last epoch with the tiles' own contexts, and with blank ones; None without validation or for a
        network that sees no context.
    is_main : bool
        Whether this is the process, of several, that wrote all this.
    """

    folder: Path
    best: Path
    last: Path
    metrics: Mapping[str, Any]
    epochs: int
    is_early: bool
    context_miou: tuple[float, float] | None = None
    is_main: bool = True


def train(
    train_data: TileData,
    val_data: TileData | None,
    *,
    model: ModelConfig,
    config: TrainConfig,
    out: Path,
    class_map: ClassMap,
    tile_spec: TileSpec,
    normalization: Normalization | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Reporter | None = None,
    resume: bool = False,
    init_from: Path | None = None,
    hard: Mapping[str, float] | None = None,
) -> TrainResult:
    """Train a network and leave a run folder that explains itself.

    Started by ``torchrun``, every process calls this with the same arguments and the first one writes.

    Parameters
    ----------
    train_data : TileData
        Tiles to learn from.
    val_data : TileData or None
        Tiles to choose the best epoch by; without any, the last epoch counts as the best.
    model : ModelConfig
        The network.
    config : TrainConfig
        The recipe.
    out : Path
        The run folder; made if it is not there.
    class_map : ClassMap
        What the labels mean; goes into the model file.
    tile_spec : TileSpec
        Geometry of the tiles; goes into the model file.
    normalization : Normalization, optional
        How pixels become input; without it, as the run or the model it goes on from has it, else as the pretrained
        weights of each encoder want it.
    provenance : mapping, optional
        Where the tiles come from, as JSON values; goes into the model file.
    progress : callable, optional
        Called after every step and every epoch.
    resume : bool
        Go on with the run in `out`; its end is the same, to the bit on a CPU, as if it had not been interrupted.
    init_from : Path, optional
        Model file whose weights the run starts from.
    hard : mapping of str to float, optional
        How much more often than otherwise a tile comes, by its id.

    Returns
    -------
    TrainResult

    Raises
    ------
    TrainingError
        If training cannot start (no tiles, a class without a pixel, a folder with another run) or cannot go on (a loss
        that is not a number, not enough memory).
    TrainingStoppedError
        If SIGINT or SIGTERM ended it; the state is saved.
    """
    settings = RunSettings(
        model=model,
        train=config,
        tiles=tile_spec,
        classes=class_map,
        normalization=normalization or starting_normalization(model, out if resume else None, init_from),
        provenance={**(provenance or {}), **({"started_from": str(init_from)} if init_from else {})},
        data={"train": digest_tiles(train_data), "validation": digest_tiles(val_data)},
    )
    check_data(train_data, settings)
    folder = RunFolder(out)
    group = join_process_group(config.device)
    echo_s = 0.0 if group.size == 1 else _ECHO_S
    with stop_on_signals(echo_s=echo_s, is_silent=not group.is_main) as stop, _own_randomness(group):
        check_batch(config, group)
        with group.report_lost_peers(folder.path):
            with group.fail_together():
                if resume:
                    folder.check(settings)
                elif group.is_main:
                    folder.begin(settings)
            trainer = Trainer(
                settings,
                train_data,
                val_data,
                folder=folder,
                group=group,
                init_from=init_from,
                hard=hard,
                resume=resume,
                report=progress,
                stop=stop,
            )
            return _result(folder, config, trainer.fit(), is_main=group.is_main)


def _result(folder: RunFolder, config: TrainConfig, counters: Counters, *, is_main: bool) -> TrainResult:
    records = folder.records()
    chosen = counters.best_epoch or counters.epoch
    return TrainResult(
        folder=folder.path,
        best=folder.best,
        last=folder.last,
        metrics=next((record for record in records if record["epoch"] == chosen), {}),
        epochs=counters.epoch,
        is_early=counters.epoch < config.epochs,
        context_miou=_context_miou(records),
        is_main=is_main,
    )


def _context_miou(records: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    last = records[-1] if records else {}
    blank = last.get("miou_with_blank_contexts")
    return None if blank is None or last.get("miou") is None else (last["miou"], blank)


@contextmanager
def _own_randomness(group: ProcessGroup) -> Iterator[None]:
    """Leave torch's generators as they were, and let cuDNN look for the fastest convolutions of the one tile size."""
    devices = [group.device.index or 0] if group.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield
