"""Tell whoever started a verb how far it is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from darefine_qupath.prediction import PredictionProgress
    from darefine_qupath.training import TrainingProgress

__all__ = ["SILENT", "Listener"]

_log = logging.getLogger(__name__)


class Listener:
    """Hears how far a verb of the pipeline is. This one shows nothing; a subclass shows what it likes."""

    def on_items(self, title: str, done: int, total: int, name: str = "") -> None:
        """Hear that some of the items (tiles, images) are done; `title` says what is done with them."""

    def on_slide(self, progress: PredictionProgress) -> None:
        """Hear how far the prediction of a slide is."""

    def on_step(self, progress: TrainingProgress) -> None:
        """Hear of a step of a training run."""

    def on_notice(self, sentence: str) -> None:
        """Hear what is about to happen."""
        _log.info("%s", sentence)


SILENT = Listener()
