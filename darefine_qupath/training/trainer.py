"""Run the training loop of one process: batches, the end of an epoch, validation, saved states, stops."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from darefine_qupath.devices import memory_advice
from darefine_qupath.errors import TrainingError, TrainingStoppedError
from darefine_qupath.metrics import ConfusionMatrix
from darefine_qupath.models import SegmentationNetwork, build_model
from darefine_qupath.training.augment import draw_augmentation
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.evaluation import ContextMode, evaluate
from darefine_qupath.training.initialize import FrozenLayers, initial_network
from darefine_qupath.training.interrupt import StopFlag
from darefine_qupath.training.loader import LoadedBatch, TileData, load_batches, num_workers, plan_run, steps_per_epoch
from darefine_qupath.training.outputs import RunOutputs
from darefine_qupath.training.progress import Reporter, Stopwatch, TrainingProgress
from darefine_qupath.training.runfolder import RunFolder, RunSettings
from darefine_qupath.training.schedule import learning_rate_factor
from darefine_qupath.training.start import class_weights, sampling_weights, warn_of_partial_norms
from darefine_qupath.training.state import Counters, load_state, read_trained, save_state
from darefine_qupath.training.train_step import StepOutcome, Stepper

__all__ = ["Trainer"]

_log = logging.getLogger(__name__)
_MAX_LISTED = 12


class Trainer:
    """A run in one process: trains on its batches, validates, saves, stops.

    Parameters
    ----------
    settings : RunSettings
        What the run is started with.
    train_data, val_data : TileData
        Tiles to learn from and to choose the best epoch by; None or empty for no validation.
    folder : RunFolder
        Where the run is kept.
    group : ProcessGroup
        This process among all.
    init_from : Path or None
        Model file whose weights it starts from.
    hard : mapping of str to float or None
        How much more often than otherwise a tile comes, by its id.
    resume : bool
        Go on from the state in `folder`.
    report : callable or None
        Called after every step and every epoch, in the first process.
    stop : StopFlag
        Whether this process was asked to stop.
    """

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
        report: Reporter | None,
        stop: StopFlag,
    ) -> None:
        self.settings, self.config, self.folder, self.group = settings, settings.train, folder, group
        self.train_data = train_data
        self.val_data = val_data if val_data is not None and len(val_data) else None
        self.report, self.stop = report, stop
        self.weights = sampling_weights(train_data.tiles, self.config, hard)
        self.steps = steps_per_epoch(len(train_data), self.config)
        with group.fail_together():
            network, trained = self._build_network(init_from, resume=resume)
        self.stepper = self._build_stepper(network, trained)
        self.counters = Counters()
        self.watch = Stopwatch()
        self.saved_at = time.monotonic()
        self.pending: tuple[StepOutcome, tuple[str, ...]] | None = None
        self.outputs = RunOutputs(folder, settings)
        self.validated: Mapping[str, Any] = {}
        self.learning_rate = 0.0
        self.must_stop = self.must_save = False
        if resume:
            self._restore()

    def _build_network(self, init_from: Path | None, *, resume: bool) -> tuple[SegmentationNetwork, tuple[str, ...]]:
        """Build the network; return it and the roles of its encoders that came trained."""
        model, state = self.settings.model, self.folder.state
        if resume and state.exists():
            return build_model(model, seed=self.config.seed), read_trained(state)
        if resume:
            _log.warning("%s was stopped before its first state was saved; it starts again", self.folder.path)
        return initial_network(model, self.config, self.settings.classes, init_from)

    def _build_stepper(self, network: SegmentationNetwork, trained: tuple[str, ...]) -> Stepper:
        config, settings = self.config, self.settings
        self.group.share_norms(network)
        frozen = FrozenLayers(network, config, trained)
        if frozen.live and self.group.is_main:
            warn_of_partial_norms(network, config, self.group)
        return Stepper(
            network,
            config,
            group=self.group,
            normalization=settings.normalization,
            frozen=frozen,
            class_weights=class_weights(self.train_data.tiles, config, self.weights),
            num_steps=config.epochs * self.steps,
        )

    def _restore(self) -> None:
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

    def fit(self) -> Counters:
        """Train until the last epoch, or until mIoU stands still; return how far the run is."""
        if self.counters.step == self.steps and not self._is_finished():
            self._end_epoch()
        start = (self.counters.epoch, self.counters.step)
        planned = plan_run(
            self.train_data.tiles, self.config, self.weights, start, rank=self.group.rank, size=self.group.size
        )
        # A finished run takes nothing from the plan, and the workers never start.
        if not self._is_finished():
            pin = self.group.device.type == "cuda"
            workers = num_workers(self.config, self.group.size)
            for loaded in load_batches(self.train_data, planned, workers=workers, pin=pin):
                self._train_on(loaded)
                if self._is_finished():
                    break
        return self.counters

    def _is_finished(self) -> bool:
        return self.counters.is_finished

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process, so that a stop or a save need not wait for the next step."""
        return self.group.size == 1

    def _train_on(self, loaded: LoadedBatch) -> None:
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
            self._finish_step()
            self.pending = (outcome, loaded.ids)
            is_last = loaded.plan.step + 1 == self.steps
            is_save_due = not is_last and self._is_save_due()
            if is_last or is_save_due:
                self._finish_step()
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

    def _finish_step(self) -> None:
        """Wait for the step under way, count its loss, report, and note whether a process was asked to stop."""
        if self.pending is None:
            return
        (outcome, ids), self.pending = self.pending, None
        loss = float(outcome.loss)
        if not math.isfinite(loss):
            raise TrainingError(self._describe_bad_loss(loss, float(outcome.own_loss), ids))
        self.learning_rate = outcome.learning_rate
        done = self.counters.step + 1
        self.counters = replace(self.counters, step=done, loss_sum=self.counters.loss_sum + loss)
        self.watch.step()
        # What every process knows of a step at the same step, and nothing else, decides what all of them do next.
        self.must_stop = self.must_stop or bool(outcome.num_stops > 0)
        self.must_save = self.must_save or bool(outcome.num_saves > 0)
        self._report()

    def _describe_bad_loss(self, loss: float, own_loss: float, ids: tuple[str, ...]) -> str:
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
        is_best = self._update_best(epoch, matrix)
        is_last = is_last or self._is_stale
        if is_last and matrix is not None and self.val_data is not None and self.settings.model.uses_context:
            record["miou_with_blank_contexts"] = self._validate(self.val_data, context="blank").to_json()["miou"]
        self.counters = replace(self.counters, epoch=epoch, step=0, loss_sum=0.0, is_finished=is_last)
        with self.group.fail_together():
            if self.group.is_main:
                # Without a validation that counts, the last epoch is the best there is.
                self.outputs.write_epoch(
                    record,
                    self.stepper.best_network,
                    matrix,
                    is_best=is_best or (is_last and self.counters.best_epoch is None),
                    is_last=is_last,
                )
        # A validation takes its time: the first process looks at its clock again.
        is_clock_due = bool(self.group.value_of_main(self._is_clock_due()))
        if is_last or self.config.checkpoint_minutes == 0 or is_clock_due or self._is_save_due():
            self._save_state()
        self.watch.skip()
        self._report(record)

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
                before_batch=self._stop_validation if context == "normal" else None,
            )

    def _stop_validation(self) -> None:
        """Stop inside a validation; several processes would have to agree on it, and finish it instead."""
        if self.is_alone and self.stop:
            self._stop_now()

    def _update_best(self, epoch: int, matrix: ConfusionMatrix | None) -> bool:
        """Count a validation; return whether it is the best so far."""
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
        """Refuse to keep weights that are not finite: the loss shows them one step later, after they are saved."""
        wrong = self.stepper.find_bad_weights()
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
        self._finish_step()
        self._save_state()
        signal = self.stop.signal_name or "A stop of another process"
        raise TrainingStoppedError(
            f"{signal} ended training at epoch {self.counters.epoch + 1}, step {self.counters.step} of {self.steps}; "
            f"go on with: darefine train --resume {self.folder.path}"
        )

    def _report(self, record: Mapping[str, Any] | None = None) -> None:
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
