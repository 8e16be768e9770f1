"""Training a network on tiles, from the first step or from where a run was stopped."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darefine_qupath.checkpoint.environment import environment
from darefine_qupath.checkpoint.model_file import Checkpoint, read_header, save_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.devices import memory_advice
from darefine_qupath.errors import TrainingError, TrainingStoppedError
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.models import ModelConfig, Normalization, SegmentationNetwork, build_model
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.sampling import expected_shares, tile_weights
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training.augment import draw_augmentation
from darefine_qupath.training.config import TrainConfig
from darefine_qupath.training.curves import draw_confusion, draw_curves
from darefine_qupath.training.distributed import ProcessGroup, join_process_group
from darefine_qupath.training.evaluation import ContextMode, evaluate
from darefine_qupath.training.initialize import FrozenLayers, initial_network
from darefine_qupath.training.interrupt import StopFlag, stop_on_signals
from darefine_qupath.training.loader import LoadedBatch, TileData, load_batches, num_workers, plan_run, steps_per_epoch
from darefine_qupath.training.losses import inverse_frequency
from darefine_qupath.training.progress import Reporter, Stopwatch, TrainingProgress
from darefine_qupath.training.runfolder import RunFolder, RunSettings, read_run
from darefine_qupath.training.schedule import learning_rate_factor
from darefine_qupath.training.state import Counters, load_state, read_trained, save_state
from darefine_qupath.training.train_step import StepOutcome, Stepper

__all__ = ["TrainResult", "train"]

_log = logging.getLogger(__name__)
_MAX_LISTED = 12
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
        normalization=normalization or _normalization(model, out if resume else None, init_from),
        provenance={**(provenance or {}), **({"started_from": str(init_from)} if init_from else {})},
        data={"train": _digest(train_data), "validation": _digest(val_data)},
    )
    _check_data(train_data, settings)
    folder = RunFolder(out)
    group = join_process_group(config.device)
    echo_s = 0.0 if group.size == 1 else _ECHO_S
    with stop_on_signals(echo_s=echo_s, is_silent=not group.is_main) as stop, _own_randomness(group):
        _check_batch(config, group)
        with group.report_lost_peers(folder.path):
            with group.fail_together():
                if resume:
                    folder.check(settings)
                elif group.is_main:
                    folder.begin(settings)
            run = _Run(
                settings,
                train_data,
                val_data,
                folder=folder,
                group=group,
                init_from=init_from,
                hard=hard,
                resume=resume,
            )
            run.report, run.stop = progress, stop
            if resume:
                run.restore()
            return run.fit()


class _Run:
    """One process's view of a run."""

    def __init__(
        self,
        settings: RunSettings,
        train_data: TileData,
        val_data: TileData | None,
        *,
        folder: RunFolder,
        group: ProcessGroup,
        init_from: Path | None,
        hard: Mapping[str, float] | None,
        resume: bool,
    ) -> None:
        self.settings, self.config, self.folder, self.group = settings, settings.train, folder, group
        self.train_data = train_data
        self.val_data = val_data if val_data is not None and len(val_data) else None
        self.report: Reporter | None = None
        self.stop = StopFlag()
        self.weights = _weights(train_data.tiles, self.config, hard)
        self.steps = steps_per_epoch(len(train_data), self.config)
        with group.fail_together():
            network, trained = self._network(init_from, resume=resume)
        self.stepper = self._stepper(network, trained)
        self.counters = Counters()
        self.watch = Stopwatch()
        self.saved_at = time.monotonic()
        self.pending: tuple[StepOutcome, tuple[str, ...]] | None = None
        self.environment = environment()
        self.validated: Mapping[str, Any] = {}
        self.learning_rate = 0.0
        self.must_stop = self.must_save = False

    def _network(self, init_from: Path | None, *, resume: bool) -> tuple[SegmentationNetwork, tuple[str, ...]]:
        """Network and the roles of its encoders that came trained; what they came from counts at the start alone."""
        model, state = self.settings.model, self.folder.state
        if resume and state.exists():
            return build_model(model, seed=self.config.seed), read_trained(state)
        if resume:
            _log.warning("%s was stopped before its first state was saved; it starts again", self.folder.path)
        return initial_network(model, self.config, self.settings.classes, init_from)

    def _stepper(self, network: SegmentationNetwork, trained: tuple[str, ...]) -> Stepper:
        config, settings = self.config, self.settings
        self.group.share_norms(network)
        frozen = FrozenLayers(network, config, trained)
        if frozen.live and self.group.is_main:
            self._warn_of_parts(network)
        return Stepper(
            network,
            config,
            group=self.group,
            normalization=settings.normalization,
            frozen=frozen,
            class_weights=_class_weights(self.train_data.tiles, config, self.weights),
            num_steps=config.epochs * self.steps,
        )

    def _warn_of_parts(self, network: SegmentationNetwork) -> None:
        """Say once that batch norm sees less than a batch, which changes what is learnt."""
        shares = 1 if self.group.device.type == "cuda" else self.group.size
        if shares * self.config.grad_accum_steps == 1:
            return
        by = [f"grad_accum_steps = {self.config.grad_accum_steps}"] * (self.config.grad_accum_steps > 1)
        by += [f"{shares} processes without a GPU"] * (shares > 1)
        mend = 'freeze_batch_norm = "yes"' if network.encoders else "a network without batch norm of its own"
        _log.warning(
            "Batch norm learns from %s of the batch at a time (%s), so that the result is not that of the whole batch; "
            "it is with %s",
            f"1/{shares * self.config.grad_accum_steps}", " and ".join(by), mend,
        )  # fmt: skip

    def restore(self) -> None:
        """Go back to the state that was saved last."""
        with self.group.fail_together():
            if self.folder.state.exists():
                self.counters = load_state(self.folder.state, self.stepper)
        step = int(self.group.value_of_main(self.stepper.step))
        with self.group.fail_together():
            if step != self.stepper.step:
                raise TrainingError(
                    f"Process {self.group.rank} of {self.group.size} finds step {self.stepper.step} in "
                    f"{self.folder.state}, the first one step {step}: all processes need one and the same folder"
                )
            if self.group.is_main:
                self.folder.forget_after(step)

    def fit(self) -> TrainResult:
        """Train until the last epoch, or until mIoU stands still."""
        if self.counters.step == self.steps and not self._is_done():
            self._end_epoch()
        start = (self.counters.epoch, self.counters.step)
        planned = plan_run(
            self.train_data.tiles, self.config, self.weights, start, rank=self.group.rank, size=self.group.size
        )
        # A finished or patient run takes nothing from the plan, and the workers never start.
        if not self._is_done():
            pin = self.group.device.type == "cuda"
            workers = num_workers(self.config, self.group.size)
            for loaded in load_batches(self.train_data, planned, workers=workers, pin=pin):
                self._take(loaded)
                if self._is_done():
                    break
        return self._result()

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to agree with, so that a stop or a save need not wait for the next step."""
        return self.group.size == 1

    def _is_done(self) -> bool:
        return self.counters.is_finished

    def _take(self, loaded: LoadedBatch) -> None:
        """Train on a batch; at the end of an epoch, validate and save."""
        draws = [
            draw_augmentation(self.config, epoch=loaded.plan.epoch, position=position)
            for position in loaded.plan.positions
        ]
        factor = learning_rate_factor(self.config, self.stepper.step, self.stepper.num_steps)
        with self._memory_advice():
            outcome = self.stepper.train_on(
                loaded.batch, draws, factor, stop=bool(self.stop), save=self.group.is_main and self._is_clock_due()
            )
            # Looking at the step before this one lets the device work while the next batch is prepared.
            self._look_back()
            self.pending = (outcome, loaded.ids)
            is_last = loaded.plan.step + 1 == self.steps
            is_save_due = not is_last and self._is_save_due()
            if is_last or is_save_due:
                self._look_back()
        if self.must_stop or (self.is_alone and self.stop):
            self._stop_now()
        if is_last:
            self._end_epoch()
        elif is_save_due:
            self._save_state()

    def _memory_advice(self) -> AbstractContextManager[None]:
        at_once = math.ceil(self.config.batch_size / self.group.size / self.config.grad_accum_steps)
        return memory_advice(
            f"with {at_once} tiles of {self.settings.tiles.input_px} px at once: lower --batch-size (or raise "
            f"grad_accum_steps, which cuts a batch into parts), or lower the tile size, input_px"
        )

    def _look_back(self) -> None:
        """Wait for the step under way, count its loss, report; note whether a process was asked to stop."""
        if self.pending is None:
            return
        (outcome, ids), self.pending = self.pending, None
        loss = float(outcome.loss)
        if not math.isfinite(loss):
            raise TrainingError(self._not_a_number(loss, float(outcome.own_loss), ids))
        self.learning_rate = outcome.learning_rate
        done = self.counters.step + 1
        self.counters = replace(self.counters, step=done, loss_sum=self.counters.loss_sum + loss)
        self.watch.step()
        # What every process knows of a step at the same step, and nothing else, decides what all of them do next.
        self.must_stop = self.must_stop or bool(outcome.num_stops > 0)
        self.must_save = self.must_save or bool(outcome.num_saves > 0)
        self._tell()

    def _not_a_number(self, loss: float, own_loss: float, ids: tuple[str, ...]) -> str:
        where = f"epoch {self.counters.epoch + 1}, step {self.counters.step + 1}"
        if math.isfinite(own_loss):
            return f"The loss is {loss} at {where}, from the tiles of another process; see its message"
        more = f" and {len(ids) - _MAX_LISTED} more" if len(ids) > _MAX_LISTED else ""
        advice = ["look at them", "lower encoder_lr and decoder_lr"]
        if not 0 < self.config.grad_clip_norm <= 1:
            advice.append("set grad_clip_norm = 1")
        if self.stepper.dtype != torch.float32:
            advice.append("train with precision = 'fp32'")
        return (
            f"The loss is {loss} at {where}. Tiles of the batch: {', '.join(ids[:_MAX_LISTED])}{more}. What may help: "
            f"{', or '.join(advice)}"
        )

    def _end_epoch(self) -> None:
        """Validate, record, keep the best and the last, save."""
        self._check_weights()
        epoch = self.counters.epoch + 1
        is_last = epoch == self.config.epochs
        matrix = None
        if self.val_data is not None and (is_last or epoch % self.config.validate_every == 0):
            matrix = self._validate(self.val_data)
        record = self._record(epoch, matrix)
        is_best = self._judge(epoch, matrix)
        is_last = is_last or self._is_stale
        if is_last and matrix is not None and self.val_data is not None and self.settings.model.uses_context:
            record["miou_with_blank_contexts"] = self._validate(self.val_data, context="blank").to_json()["miou"]
        self.counters = replace(self.counters, epoch=epoch, step=0, loss_sum=0.0, is_finished=is_last)
        with self.group.fail_together():
            if self.group.is_main:
                self._write(record, matrix, is_best=is_best)
        # A validation takes its time: the first process looks at its clock again.
        is_clock_due = bool(self.group.value_of_main(self._is_clock_due()))
        if is_last or self.config.checkpoint_minutes == 0 or is_clock_due or self._is_save_due():
            self._save_state()
        self.watch.skip()
        self._tell(record)

    def _validate(self, data: TileData, context: ContextMode = "normal") -> ConfusionMatrix:
        self.group.share_buffers(self.stepper.best_network)
        with self._memory_advice():
            return evaluate(
                self.stepper.best_network,
                data,
                normalization=self.settings.normalization,
                device=self.group.device,
                context=context,
                batch_size=max(1, self.config.batch_size // self.group.size // self.config.grad_accum_steps),
                workers=num_workers(self.config, self.group.size),
                dtype=self.stepper.dtype,
                group=self.group,
                # The epoch is judged by the time contexts are blank: what is left of the run then is done.
                before_batch=self._heed_stop if context == "normal" else None,
            )

    def _heed_stop(self) -> None:
        """Break a validation off; several processes would have to agree on it, and finish it instead."""
        if self.is_alone and self.stop:
            self._stop_now()

    def _judge(self, epoch: int, matrix: ConfusionMatrix | None) -> bool:
        """Whether this is the best validation; counts those that are not."""
        if matrix is None or math.isnan(matrix.mean_iou):
            return False
        best = self.counters.best_miou
        if best is None or matrix.mean_iou > best:
            self.counters = replace(self.counters, best_miou=matrix.mean_iou, best_epoch=epoch, num_stale=0)
            return True
        self.counters = replace(self.counters, num_stale=self.counters.num_stale + 1)
        return False

    @property
    def _is_stale(self) -> bool:
        return 0 < self.config.early_stop_patience <= self.counters.num_stale

    def _record(self, epoch: int, matrix: ConfusionMatrix | None) -> dict[str, Any]:
        metrics = {} if matrix is None else matrix.to_json(self.settings.classes.names)
        return {
            "epoch": epoch,
            "step": self.stepper.step,
            "loss": self.counters.loss_sum / max(self.counters.step, 1),
            "learning_rate": self.learning_rate,
            "images_per_second": round(self.watch.images_per_second(self.config.batch_size), 2),
            "seconds": round(time.monotonic() - self.watch.start, 1),
            **metrics,
        }

    def _write(self, record: dict[str, Any], matrix: ConfusionMatrix | None, *, is_best: bool) -> None:
        """Write what an epoch leaves; the state has its own pace, and a resumed run repeats what lies between."""
        folder, classes = self.folder, self.settings.classes
        folder.append(record)
        # Without a judged validation the last epoch is the best there is.
        if is_best or (self.counters.is_finished and self.counters.best_epoch is None):
            save_checkpoint(folder.best, self._checkpoint(record))
            if matrix is not None:
                folder.save_picture(folder.confusion, draw_confusion(matrix, classes))
        if self.counters.is_finished:
            save_checkpoint(folder.last, self._checkpoint(record))
        folder.save_picture(folder.curves, draw_curves(folder.records(), classes))
        _write_tensorboard(folder.path / "tensorboard", record)

    def _checkpoint(self, record: Mapping[str, Any]) -> Checkpoint:
        settings = self.settings
        return Checkpoint(
            state=self.stepper.best_network.state_dict(),
            model=settings.model,
            tiles=settings.tiles,
            classes=settings.classes,
            normalization=settings.normalization,
            provenance={
                **settings.provenance,
                "tiles": dict(settings.data),
                "recipe": self.config.to_json(),
                "epoch": record["epoch"],
                "step": record["step"],
                "metrics": {key: value for key, value in record.items() if key not in _NOT_METRICS},
                "environment": self.environment,
            },
        )

    def _is_save_due(self) -> bool:
        """Whether all processes save now; the clock of one of several says nothing before the others know of it."""
        steps = self.config.checkpoint_steps
        by_clock = self._is_clock_due() if self.is_alone else self.must_save
        return by_clock or (steps > 0 and self.stepper.step % steps == 0)

    def _is_clock_due(self) -> bool:
        """Whether the clock of this process asks for a save."""
        minutes = self.config.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes

    def _check_weights(self) -> None:
        """Refuse to keep weights that are no numbers: the loss shows them one step later, after they are saved."""
        wrong = self.stepper.not_learning()
        if wrong is not None:
            where = f"epoch {self.counters.epoch + 1}, step {self.counters.step}"
            raise TrainingError(
                f"{wrong} after {where}, and nothing was saved; what was saved before stands. Train afresh with lower "
                f"encoder_lr and decoder_lr, grad_clip_norm = 1, or precision = 'fp32'"
            )

    def _save_state(self) -> None:
        self._check_weights()
        with self.group.fail_together():
            if self.group.is_main:
                save_state(self.folder.state, self.stepper, self.counters)
        self.saved_at, self.must_save = time.monotonic(), False

    def _stop_now(self) -> None:
        self._look_back()
        self._save_state()
        signal = self.stop.signal_name or "A stop of another process"
        raise TrainingStoppedError(
            f"{signal} ended training at epoch {self.counters.epoch + 1}, step {self.counters.step} of {self.steps}; "
            f"go on with: darefine train --resume {self.folder.path}"
        )

    def _tell(self, record: Mapping[str, Any] | None = None) -> None:
        if self.report is None or not self.group.is_main:
            return
        counters, at_end = self.counters, record is not None
        loss = counters.loss_sum / max(counters.step, 1) if record is None else record["loss"]
        if record is not None and "iou" in record:
            self.validated = record
        left = self.stepper.num_steps - (counters.epoch * self.steps + counters.step)
        self.report(
            TrainingProgress(
                stage="epoch" if at_end else "step",
                epoch=counters.epoch if at_end else counters.epoch + 1,
                epochs=self.config.epochs,
                step=self.steps if at_end else counters.step,
                steps=self.steps,
                loss=loss,
                learning_rate=self.learning_rate,
                images_per_second=self.watch.images_per_second(self.config.batch_size),
                seconds_left=0.0 if counters.is_finished else self.watch.seconds_left(left),
                miou=self.validated.get("miou"),
                best_miou=counters.best_miou,
                iou=self.validated.get("iou", {}),
            )
        )

    def _result(self) -> TrainResult:
        counters, records = self.counters, self.folder.records()
        chosen = counters.best_epoch or counters.epoch
        metrics = next((record for record in records if record["epoch"] == chosen), {})
        return TrainResult(
            folder=self.folder.path,
            best=self.folder.best,
            last=self.folder.last,
            metrics=metrics,
            epochs=counters.epoch,
            is_early=counters.epoch < self.config.epochs,
            context_miou=_context_miou(records),
            is_main=self.group.is_main,
        )


def _context_miou(records: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    last = records[-1] if records else {}
    blank = last.get("miou_with_blank_contexts")
    return None if blank is None or last.get("miou") is None else (last["miou"], blank)


_NOT_METRICS = ("epoch", "step", "images_per_second", "seconds", "learning_rate")


@contextmanager
def _own_randomness(group: ProcessGroup) -> Iterator[None]:
    """Leave torch's generators as they were, and let cuDNN look for the fastest convolutions of the one tile size."""
    devices = [group.device.index or 0] if group.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def _check_data(data: TileData, settings: RunSettings) -> None:
    if not len(data):
        raise TrainingError("There are no training tiles; annotate regions in QuPath, or look at the split")
    names, tiles = settings.classes.names, data.tiles
    if settings.model.num_classes != len(names):
        raise TrainingError(
            f"The network has {settings.model.num_classes} classes, the class map {len(names)}: {names}"
        )
    missing = [name for name, pixels in zip(names, tiles.class_pixels.tolist(), strict=True) if not pixels]
    if missing and not settings.train.allow_missing_classes:
        raise TrainingError(
            f"No training tile has a pixel of {missing}: annotate some, move an image that has them into the training "
            f"part of the split, take them out of [classes] names, or set allow_missing_classes = true"
        )


def _check_batch(config: TrainConfig, group: ProcessGroup) -> None:
    parts = group.size * config.grad_accum_steps
    if config.batch_size < parts:
        raise TrainingError(
            f"A batch of {config.batch_size} tiles cannot be shared by {group.size} process(es) in "
            f"{config.grad_accum_steps} part(s) each; raise --batch-size to at least {parts}"
        )


def _weights(tiles: TileIndex, config: TrainConfig, hard: Mapping[str, float] | None) -> NDArray[np.float64] | None:
    """How often each tile comes; 0 for tiles without a label, which teach nothing."""
    labelled = tiles.counts[:, :-1].sum(axis=1) > 0
    if config.balance == 0 and not hard and labelled.all():
        return None
    if not labelled.all():
        _log.warning("%d of %d training tiles have no label and are left out", (~labelled).sum(), len(tiles))
    weights = np.zeros(len(tiles))
    weights[labelled] = tile_weights(tiles.subset(labelled), balance=config.balance, hard=hard)
    return weights


def _normalization(model: ModelConfig, begun: Path | None, init_from: Path | None) -> Normalization:
    """How pixels become input where nobody says: as weights were trained that are there already."""
    if begun is not None:
        return read_run(begun).normalization
    return Normalization.of(model) if init_from is None else read_header(init_from).normalization


def _class_weights(tiles: TileIndex, config: TrainConfig, weights: NDArray[np.float64] | None) -> Tensor | None:
    """Weights of the classes in the loss, by the pixels that tiles drawn by `weights` show."""
    if config.class_weights == "none":
        return None
    return inverse_frequency(expected_shares(tiles, np.ones(len(tiles)) if weights is None else weights).tolist())


def _digest(data: TileData | None) -> str:
    """Digest of which tiles there are and of their labels, as far as the index knows them.

    Names and metadata of images do not count: a role that is noted in the project leaves the tiles as they are.
    """
    if data is None:
        return "none"
    tiles = data.tiles
    digest = hashlib.sha256(json.dumps([(image.id, image.size, image.mpp) for image in tiles.images]).encode())
    for column in (tiles.image, tiles.slice_xy, tiles.context_xy, tiles.counts):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]


def _write_tensorboard(folder: Path, record: Mapping[str, Any]) -> None:
    """Repeat the numbers of an epoch for TensorBoard, where it is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
    for name in ("loss", "learning_rate", "images_per_second", "miou", "accuracy"):
        if record.get(name) is not None:
            writer.add_scalar(name, record[name], record["epoch"])
    for name, value in record.get("iou", {}).items():
        if value is not None:
            writer.add_scalar(f"iou/{name}", value, record["epoch"])
    writer.close()
