"""Show how far a command is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from darefine_qupath.cli.lines import note, visible
from darefine_qupath.cli.output import number
from darefine_qupath.pipeline.listener import Listener

if TYPE_CHECKING:
    from darefine_qupath.prediction import PredictionProgress
    from darefine_qupath.training import TrainingProgress

__all__ = ["ProgressListener", "show_progress"]

_stderr = Console(stderr=True, highlight=False)
_QUIET_SECONDS = 15.0

Report = Callable[[str, int, int, str], None]
"""``report(title, done, total, text)``: how far something is."""


class ProgressListener(Listener):
    """Turns what a verb tells into lines for the person at the terminal."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_items(self, title: str, done: int, total: int, name: str = "") -> None:
        """Show how many items are done."""
        self._report(title, done, total, name)

    def on_slide(self, progress: PredictionProgress) -> None:
        """Show how far a slide is, and all of them where there are several."""
        left = progress.seconds_left
        rest = "" if left is None else f", {left / 60:.0f} min left"
        name = progress.slide
        if progress.num_slides > 1:
            name += f" (slide {min(progress.slides_done + 1, progress.num_slides)} of {progress.num_slides})"
            if progress.all_seconds_left is not None:
                rest += f", {progress.all_seconds_left / 60:.0f} min for all"
        self._report("Predicting", progress.done, progress.total, f"{name} {progress.rate:.1f} tiles/s{rest}")

    def on_step(self, progress: TrainingProgress) -> None:
        """Show epoch, loss and scores."""
        scores = "" if progress.miou is None else f" mIoU {progress.miou:.3f}"
        iou = " ".join(f"{name} {number(value, 2)}" for name, value in progress.iou.items())
        self._report(
            "Training",
            (progress.epoch - 1) * progress.steps + progress.step,
            progress.epochs * progress.steps,
            f"epoch {progress.epoch}/{progress.epochs} loss {progress.loss:.3f}{scores} {iou} "
            f"{progress.images_per_second:.1f} tiles/s, {_clock(progress.seconds_left)} left",
        )

    def on_notice(self, sentence: str) -> None:
        """Say what is about to happen."""
        note(sentence)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def show_progress(title: str) -> Iterator[ProgressListener]:
    """Show what a listener hears; `title` stands there until it hears of something."""
    if not _stderr.is_terminal:
        yield ProgressListener(_lines_now_and_then())
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=_stderr, transient=True) as bar:
        task = bar.add_task(title, total=1, text="")

        def report(what: str, done: int, total: int, text: str) -> None:
            if bar.tasks[0].description != what:
                # The speed of one thing says nothing about the next.
                bar.reset(task, description=what)
            bar.update(task, completed=done, total=max(1, total), text=visible(text))

        yield ProgressListener(report)


def _lines_now_and_then() -> Report:
    last = time.monotonic() - _QUIET_SECONDS / 2

    def report(title: str, done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _QUIET_SECONDS:
            last = now
            note(f"{title}: {done}/{total} {text}".rstrip())

    return report
