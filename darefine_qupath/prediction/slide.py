"""Predict a slide: plan, check, read ahead, compute, blend, note what is done, and write its score map."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint
from darefine_qupath.classes import IGNORE
from darefine_qupath.devices import choose_device, choose_precision
from darefine_qupath.errors import PredictionError
from darefine_qupath.geometry import Box
from darefine_qupath.models import box_within
from darefine_qupath.prediction.area import PredictionArea
from darefine_qupath.prediction.blend import MapRows, RollingBand, WindowedScores
from darefine_qupath.prediction.engine import (
    BatchScores,
    EncodedContext,
    Engine,
    EngineSettings,
    choose_batch_size,
)
from darefine_qupath.prediction.fingerprint import compute_fingerprint
from darefine_qupath.prediction.journal import JournalState, PredictionJournal
from darefine_qupath.prediction.options import PredictionProgress, PredictOptions
from darefine_qupath.prediction.plan import PlanRow, plan_slide
from darefine_qupath.prediction.prefetch import BatchPixels, SlideHandles, cut_batches, read_ahead, read_batch
from darefine_qupath.prediction.scoremap import ScoreMap, read_score_map
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.prediction.slide_checks import check_slide
from darefine_qupath.prediction.slide_warnings import (
    SlideWarning,
    damage_warnings,
    merge_damage_warnings,
    warn_of_unpredicted,
)
from darefine_qupath.slides import Slide, open_slide, tissue_mask

__all__ = ["predict_slide"]

_log = logging.getLogger(__name__)

_MAX_WORKERS = 8


def predict_slide(
    slide: Slide | Path | str,
    checkpoint: Checkpoint | Path | str,
    *,
    out: Path,
    mpp: float | None = None,
    options: PredictOptions | None = None,
    progress: Callable[[PredictionProgress], None] | None = None,
) -> ScoreMap:
    """Predict a slide.

    A finished map of the same image, model and options is returned at once; an unfinished one is resumed, and ends
    with the same bytes as if it had never stopped. Memory grows with the slide's width, not with its height.

    Parameters
    ----------
    slide : Slide, Path or str
        What to predict; a file is opened as `options` say.
    checkpoint : Checkpoint, Path or str
        The model.
    out : Path
        Folder for this image's maps; nobody else's.
    mpp : float, optional
        Micrometers per level-0 pixel; the file's by default.
    options : PredictOptions, optional
        How.
    progress : callable, optional
        Called with a `PredictionProgress` after every batch.

    Returns
    -------
    ScoreMap
        On disk in `out`; its `warnings` tell what is unusual, and what could not be read.

    Raises
    ------
    PredictionError
        If prediction cannot start or go on, or `options.strict` is set and there is a warning.
    MissingMppError
        If the model's tiles are in micrometers and the pixel size is not known.
    SlideError
        If the slide cannot be opened.
    """
    options = options or PredictOptions()
    if isinstance(checkpoint, Path | str):
        checkpoint = load_checkpoint(checkpoint)
    if isinstance(slide, Path | str):
        with open_slide(slide, crop_bounds=options.crop_bounds, reader=options.reader) as opened:
            return predict_slide(opened, checkpoint, out=out, mpp=mpp, options=options, progress=progress)
    mpp = slide.mpp if mpp is None else mpp
    fingerprint = compute_fingerprint(slide, checkpoint, mpp=mpp, options=options)
    finished = _finished(out, fingerprint) if options.resume else None
    if finished is not None:
        _raise_if_strict(slide, finished.warnings, options)
        _log.info("%s is finished already", slide.path)
        return finished
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictionError(f"Cannot make the folder {out}: {error}") from error
    return _SlidePrediction(slide, checkpoint, out, mpp, options, fingerprint).predict(progress)


def _finished(out: Path, fingerprint: str) -> ScoreMap | None:
    try:
        found = read_score_map(out)
    except PredictionError:
        return None
    return found if found.fingerprint == fingerprint else None


@dataclass(frozen=True)
class _PendingScores:
    """Scores of a batch, perhaps still being computed."""

    scores: BatchScores
    exactly: Callable[[], BatchScores]
    """Computes them again in float32."""
    boxes: tuple[Box, ...]
    places: tuple[tuple[int, int], ...]
    """Map pixels (row, column) where they begin."""


class _SlidePrediction:
    """One prediction of one slide."""

    def __init__(
        self,
        slide: Slide,
        checkpoint: Checkpoint,
        out: Path,
        mpp: float | None,
        options: PredictOptions,
        fingerprint: str,
    ) -> None:
        self.slide, self.checkpoint, self.out, self.mpp, self.options, self.fingerprint = (
            slide, checkpoint, out, mpp, options, fingerprint,
        )  # fmt: skip
        tissue = tissue_mask(slide, mpp=mpp) if options.tissue else None
        self.region = PredictionArea(tissue=tissue, within=options.within)
        spec = checkpoint.tiles.at(mpp)
        keep = self.region.touches if tissue is not None or options.within is not None else None
        self.plan = plan_slide(slide.size, spec, options, keep=keep)
        self.journal = PredictionJournal(out / "partial")

    def predict(self, progress: Callable[[PredictionProgress], None] | None) -> ScoreMap:
        with self.journal.locked():
            state = self._load_interrupted() if self.options.resume else None
            if state is None or not self._can_resume(state):
                state = self._start()
            _raise_if_strict(self.slide, state.warnings, self.options)
            if state.rows_done < len(self.plan.rows):
                state = self._predict_rows(state, progress)
            score_map = self._record(state)
            _raise_if_strict(self.slide, score_map.warnings, self.options)
            write_score_map(score_map, self._bands(state.rows_done))
            self.journal.clear()
        return score_map

    def _load_interrupted(self) -> JournalState | None:
        bottoms = [row.bottom for row in self.plan.rows]
        return self.journal.load(self.fingerprint, bottoms=bottoms, width=self.plan.grid.size.width)

    def _start(self) -> JournalState:
        found = check_slide(
            self.slide, self.plan, tiles=self.checkpoint.tiles, mpp=self.mpp, provenance=self.checkpoint.provenance
        )
        for warning in found:
            _log.warning("%s: %s", self.slide.path, warning.message)
        state = JournalState(
            fingerprint=self.fingerprint,
            settings=self._settings(),
            class_pixels=(0,) * self.checkpoint.classes.num_classes,
            warnings=found,
        )
        self.journal.start(state)
        return state

    def _settings(self) -> EngineSettings:
        device = choose_device(self.options.device)
        precision = choose_precision(self.options.precision, device)
        return EngineSettings(
            device=str(device),
            precision=precision,
            batch_size=self.options.batch_size or choose_batch_size(device, self.checkpoint.tiles.input_px),
            tta=self.options.tta,
            compile=self.options.compile,
            output_stride=self.options.output_stride,
        )

    def _can_resume(self, state: JournalState) -> bool:
        """Whether this machine, and the user, would compute as the run did that was interrupted."""
        now = self._settings()
        same = replace(now, batch_size=state.settings.batch_size) == state.settings
        asked = (self.options.batch_size or state.settings.batch_size) >= state.settings.batch_size
        if not (same and asked):
            _log.info("%s was started with %s, this run would use %s: starting over", self.out, state.settings, now)
        return same and asked

    def _predict_rows(self, state: JournalState, progress: Callable[[PredictionProgress], None] | None) -> JournalState:
        build = self.checkpoint.build
        engine = Engine(build(), self.checkpoint.normalization, state.settings, build=build)
        band = RollingBand(self.checkpoint.classes.num_classes, self.plan.grid.size.width)
        if state.rows_done:
            band.top = self.plan.rows[state.rows_done - 1].bottom
            band.unfinished = self.journal.unfinished(state.rows_done - 1)
        report = _Reporter(self.slide.path.name, state.slices_done, self.plan.num_slices, progress)
        workers = self.options.workers or min(_MAX_WORKERS, os.cpu_count() or 1)
        handles = SlideHandles(self.slide)
        try:
            with ThreadPoolExecutor(workers, thread_name_prefix="darefine-read") as pool:
                read = partial(read_batch, handles, self.plan.spec)
                for row in self.plan.rows[state.rows_done :]:
                    work = cut_batches(row.groups, engine.batch_size, contexts=engine.uses_context)
                    pixels = read_ahead(work, read, pool, ahead=workers + 2)
                    state = self._predict_row(row, state, engine, band, pixels, report)
        finally:
            handles.close()
        return state

    def _predict_row(
        self,
        row: PlanRow,
        state: JournalState,
        engine: Engine,
        band: RollingBand,
        work: Iterator[BatchPixels],
        report: _Reporter,
    ) -> JournalState:
        band.reserve(row.reach)
        unreadable: list[Box] = []
        white: list[Box] = []
        contexts: dict[int, EncodedContext] = {}
        waiting: _PendingScores | None = None
        for pixels in work:
            scored = self._predict_batch(pixels, row, engine, contexts)
            # The device computes this batch while the one before is blended.
            self._blend(waiting, band)
            waiting = scored
            unreadable.extend(box for box, read in zip(pixels.batch.slices, pixels.slices, strict=True) if read is None)
            white.extend(pixels.damaged)
            report.add(len(pixels.slices))
        damage = tuple(damage_warnings(unreadable, white))
        _raise_if_strict(self.slide, damage, self.options)
        self._blend(waiting, band)
        top = band.top
        layers = band.finish(row.bottom)
        outside = self.region.outside(self.plan.grid, top, row.bottom)
        missing = layers.label == IGNORE
        if outside is not None:
            layers.hide(outside)
            missing &= ~outside
        counts = np.bincount(layers.label.ravel(), minlength=256)[: len(state.class_pixels)]
        state = replace(
            state,
            settings=replace(state.settings, batch_size=engine.batch_size),
            rows_done=state.rows_done + 1,
            slices_done=state.slices_done + row.num_slices,
            class_pixels=tuple(int(a + b) for a, b in zip(state.class_pixels, counts, strict=True)),
            unpredicted_pixels=state.unpredicted_pixels + int(missing.sum()),
            warnings=(*state.warnings, *damage),
        )
        self.journal.commit(state, layers, band.unfinished)
        return state

    def _predict_batch(
        self,
        pixels: BatchPixels,
        row: PlanRow,
        engine: Engine,
        contexts: dict[int, EncodedContext],
    ) -> _PendingScores | None:
        batch = pixels.batch
        if not engine.uses_context:
            contexts = dict.fromkeys(batch.group_numbers, engine.no_context)
        elif batch.new_contexts:
            encoded = engine.encode(pixels.contexts)
            contexts.update(zip((number for number, _ in batch.new_contexts), encoded, strict=True))
        for number in [number for number in contexts if number < min(batch.group_numbers)]:
            del contexts[number]
        readable = [
            (box, number, read)
            for box, number, read in zip(batch.slices, batch.group_numbers, pixels.slices, strict=True)
            if read is not None
        ]
        if not readable:
            return None
        boxes, numbers, images = zip(*readable, strict=True)
        places = [(self.plan.grid.place(box.y), self.plan.grid.place(box.x)) for box in boxes]
        used = list(dict.fromkeys(numbers))
        within = [box_within(box, row.groups[number].context) for box, number in zip(boxes, numbers, strict=True)]
        work = (
            images,
            [contexts[number] for number in used],
            [used.index(number) for number in numbers],
            np.asarray(within, np.float32),
            [(down[1], right[1]) for down, right in places],
        )
        return _PendingScores(
            engine.score(*work),
            partial(engine.score_exactly, *work),
            boxes,
            tuple((down[0], right[0]) for down, right in places),
        )

    def _blend(self, scored: _PendingScores | None, band: RollingBand) -> None:
        if scored is None:
            return
        for (row, column), (scores, weight) in zip(scored.places, self._finite(scored).fetch(), strict=True):
            band.add(WindowedScores(row, column, scores, weight))

    def _finite(self, scored: _PendingScores) -> BatchScores:
        """Scores of a batch, again in float32 where they are not finite, which would spread to all that overlap."""
        scores = scored.scores
        wrong = scores.first_not_finite()
        if wrong is not None:
            at = scored.boxes[wrong]
            _log.warning("%s: scores at %s are not finite; computing their batch again in float32", self.slide.path, at)
            scores = scored.exactly()
            wrong = scores.first_not_finite()
        if wrong is not None:
            raise PredictionError(
                f"The model {self.checkpoint.model_id} gives scores that are not finite (NaN or infinite) for "
                f"{self.slide.path} at {scored.boxes[wrong]}, in float32 too; train it again, or take another model"
            )
        return scores

    def _bands(self, rows: int) -> Iterator[MapRows]:
        yield from self.journal.bands(rows)
        bottom = self.plan.rows[rows - 1].bottom if rows else 0
        width, height = self.plan.grid.size
        for top in range(bottom, height, 512):
            yield MapRows.blank(min(512, height - top), width)

    def _record(self, state: JournalState) -> ScoreMap:
        found = ScoreMap(
            folder=self.out,
            size=self.plan.grid.size,
            box=self.plan.grid.box,
            downsample=self.plan.grid.downsample,
            mpp=self.mpp,
            classes=self.checkpoint.classes,
            model_id=self.checkpoint.model_id,
            fingerprint=self.fingerprint,
            class_pixels=state.class_pixels,
            num_slices=self.plan.num_slices,
            unpredicted_pixels=state.unpredicted_pixels,
            warnings=merge_damage_warnings(state.warnings),
            settings={
                **asdict(state.settings),
                "options": self.options.score_settings(),
                "tiles": asdict(self.plan.spec),
            },
        )
        return replace(found, warnings=tuple(warn_of_unpredicted(found.warnings, found.unpredicted_share)))


def _raise_if_strict(slide: Slide, warnings: tuple[SlideWarning, ...], options: PredictOptions) -> None:
    """Make the first warning an error if that was asked for."""
    if options.strict and warnings:
        raise PredictionError(f"{slide.path}: {warnings[0].message}; leave out --strict to predict it anyway")


class _Reporter:
    """Counts slices and tells who asked."""

    def __init__(
        self, slide: str, done: int, total: int, progress: Callable[[PredictionProgress], None] | None
    ) -> None:
        self._slide, self._before, self._total, self._progress = slide, done, total, progress
        self._fresh = 0
        self._began = time.monotonic()

    def add(self, num: int) -> None:
        self._fresh += num
        if self._progress is not None:
            seconds = time.monotonic() - self._began
            self._progress(
                PredictionProgress(self._slide, self._before + self._fresh, self._total, seconds, self._fresh)
            )
